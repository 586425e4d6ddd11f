// One chunk of linear_ppo_loss: each row of logits is read twice while it is in the cache, once for its statistics and
// once to become its gradient; between the two stands ppo_loss for that token. Formulas: kernels/linear_ppo_loss.py.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "../ops.h"
#include "half.h"
#include "logprob_row.h"
#include "ppo_loss.h"

namespace fastppo {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// tile: {address, rows, columns, row stride, dtype code}. head: {temperature, logit scale, soft cap or 0}.
// in: tokens, values, old log-probs, old values, advantages, returns, mask or 0. o: PPOLossOptions in its order.
// out: logprob, entropy, dlogprob, dentropy, dvalues, statistics [kPPOStats] double. Returns the loss.
// Rows with dlogprob = dentropy = 0 keep their logits.
double chunk(const std::array<int64_t, 5>& tile, const std::array<double, 3>& head, uintptr_t bias,
             const std::array<uintptr_t, 7>& in, const std::array<double, 9>& o, const std::array<uintptr_t, 6>& out,
             bool want_grad) {
  const int64_t rows = tile[1], columns = tile[2];
  const int dtype = static_cast<int>(tile[4]);
  const LogitMap map(head[0], head[1], head[2], pointer<const float>(bias));
  const int64_t* tokens = pointer<const int64_t>(in[0]);
  float *logprob = pointer<float>(out[0]), *entropy = pointer<float>(out[1]);
  float *g = pointer<float>(out[2]), *h = pointer<float>(out[3]);
  const PPOLossTokens ppo = {logprob,
                             pointer<float>(in[1]),
                             entropy,
                             pointer<float>(in[2]),
                             pointer<float>(in[3]),
                             pointer<float>(in[4]),
                             pointer<float>(in[5]),
                             pointer<uint8_t>(in[6]),
                             g,
                             pointer<float>(out[4]),
                             h};
  const PPOLossOptions options = {float(o[0]), float(o[1]), float(o[2]), float(o[3]), float(o[4]),
                                  float(o[5]), float(o[6]), float(o[7]), float(o[8])};
  std::vector<double> sums(rows * kPPOStats, 0.0);  // per row, added in order: the same for any number of threads
  parallel_for(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      void* x = pointer<void>(tile[0] + i * tile[3] * element_size(dtype));
      RowState state;
      row_stats(x, dtype, columns, map, state);
      RowResult r = row_result(state, row_log2(x, dtype, tokens[i], map));
      logprob[i] = r.logprob, entropy[i] = r.entropy;
      ppo_loss_chunk(ppo, i, i + 1, options, &sums[i * kPPOStats]);
      if (want_grad && (g[i] != 0 || h[i] != 0))
        row_grad(x, x, dtype, columns, map, row_coefficients(state.max2, state.sum, r.entropy, g[i], h[i], tokens[i]));
    }
  });
  double* total = pointer<double>(out[5]);
  for (int i = 0; i < kPPOStats; ++i) total[i] = 0;
  for (int64_t i = 0; i < rows; ++i) ppo_loss_add(total, &sums[i * kPPOStats]);
  return ppo_loss_finish(total, options);
}

}  // namespace

void bind_linear_ppo_loss(pybind11::module_& m) {
  m.def("linear_ppo_loss_chunk", &chunk);
}

}  // namespace fastppo
