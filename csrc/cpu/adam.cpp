// Adam for many tensors in one loop over blocks. 16 bytes read and 12 written per parameter, a dozen FLOPs: bound by memory.
// fastppo/adam.py has the formula.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../ops.h"
#include "simd.h"

namespace fastppo {
namespace {

constexpr int64_t kBlock = 8192;

struct Block {
  float* p;
  const float* g;
  float *m, *v;
  int64_t n;
  float step_size, root;  // lr / (1 - b1^t), sqrt(1 - b2^t)
};

struct Options {
  float one_less_b1, b2, one_less_b2, eps;
};

// arguments and not a struct: only then does GCC know that p, m and v lie apart, and vectorises
FASTPPO_CLONES void adam_block(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
                               float step_size, float root, Options o) {
  for (int64_t i = 0; i < n; ++i) {
    const float mean = m[i] + o.one_less_b1 * (g[i] - m[i]), square = o.b2 * v[i] + o.one_less_b2 * g[i] * g[i];
    m[i] = mean, v[i] = square;
    p[i] -= step_size * mean / (__builtin_sqrtf(square) / root + o.eps);
  }
}

// addresses: of each tensor's p, g, m, v; sizes; t of each; lr, b1, b2, eps
void adam(const std::vector<std::array<uintptr_t, 4>>& addresses, const std::vector<int64_t>& sizes, const std::vector<int64_t>& steps,
          const std::array<double, 4>& options) {
  const auto [lr, b1, b2, eps] = options;
  const Options o = {float(1 - b1), float(b2), float(1 - b2), float(eps)};
  std::vector<Block> blocks;
  for (size_t t = 0; t < sizes.size(); ++t) {
    const auto at = [&](int i) { return reinterpret_cast<float*>(addresses[t][i]); };
    const float step_size = lr / (1 - std::pow(b1, steps[t])), root = std::sqrt(1 - std::pow(b2, steps[t]));
    for (int64_t i = 0; i < sizes[t]; i += kBlock)
      blocks.push_back({at(0) + i, at(1) + i, at(2) + i, at(3) + i, std::min(kBlock, sizes[t] - i), step_size, root});
  }
  parallel_for(int64_t(blocks.size()), kBlock * 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block& x = blocks[i];
      adam_block(x.p, x.g, x.m, x.v, x.n, x.step_size, x.root, o);
    }
  });
}

}  // namespace

void bind_adam(pybind11::module_& m) {
  m.def("adam", &adam, "fastppo/adam.py", pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastppo
