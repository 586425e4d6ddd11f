// Statistics and gradient of one tile of logits [rows, columns] that torch's matrix product has just written. The
// product is torch's, the tile never leaves the caches. Formulas: kernels/linear_logprob.py.
#include <pybind11/stl.h>

#include <array>

#include "../ops.h"
#include "half.h"
#include "logprob_row.h"

namespace fastppo {
namespace {

struct Tile {
  uintptr_t data;
  int64_t rows, columns, row_stride;  // elements
  int64_t first_column;               // of the vocabulary
  int dtype;

  // {address, rows, columns, row stride, first column, dtype code}
  explicit Tile(const std::array<int64_t, 6>& t)
      : data(t[0]), rows(t[1]), columns(t[2]), row_stride(t[3]), first_column(t[4]), dtype(static_cast<int>(t[5])) {}
  void* row(int64_t i) const { return reinterpret_cast<void*>(data + i * row_stride * element_size(dtype)); }
};

// {temperature, logit scale, soft cap or 0}; bias is the whole vocabulary's, float32, or 0.
LogitMap map_of(const std::array<double, 3>& head, uintptr_t bias, int64_t first_column) {
  const float* bias_V = reinterpret_cast<const float*>(bias);
  return LogitMap(head[0], head[1], head[2], bias_V ? bias_V + first_column : nullptr);
}

// state: [rows, 4] double: maximum, sum, dot, the token's own logit, all base 2.
void tile_stats(const std::array<int64_t, 6>& tile_, const std::array<double, 3>& head, uintptr_t bias, uintptr_t tokens_,
                uintptr_t state_) {
  const Tile tile(tile_);
  const LogitMap map = map_of(head, bias, tile.first_column);
  const int64_t* tokens = reinterpret_cast<const int64_t*>(tokens_);
  double* state_N4 = reinterpret_cast<double*>(state_);
  parallel_for(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* s = state_N4 + 4 * i;
      RowState state;
      if (tile.first_column > 0) state.max2 = s[0], state.sum = s[1], state.dot = s[2];
      row_stats(tile.row(i), tile.dtype, tile.columns, map, state);
      s[0] = state.max2, s[1] = state.sum, s[2] = state.dot;
      int64_t column = tokens[i] - tile.first_column;
      if (column >= 0 && column < tile.columns) s[3] = row_log2(tile.row(i), tile.dtype, column, map);
    }
  });
}

// out: logprob, entropy [rows] and statistics [rows, 2] (maximum and sum), float32.
void finish(int64_t rows, uintptr_t state_, const std::array<uintptr_t, 3>& out) {
  const double* s = reinterpret_cast<const double*>(state_);
  float* logprob = reinterpret_cast<float*>(out[0]);
  float* entropy = reinterpret_cast<float*>(out[1]);
  float* stats = reinterpret_cast<float*>(out[2]);
  for (int64_t i = 0; i < rows; ++i, s += 4) {
    RowState state;
    state.max2 = s[0], state.sum = s[1], state.dot = s[2];
    RowResult r = row_result(state, s[3]);
    logprob[i] = r.logprob, entropy[i] = r.entropy;
    stats[2 * i] = static_cast<float>(s[0]), stats[2 * i + 1] = static_cast<float>(s[1]);
  }
}

// Logits become their gradients in place. in: statistics [rows, 2], entropy, g, h [rows].
void tile_grad(const std::array<int64_t, 6>& tile_, const std::array<double, 3>& head, uintptr_t bias, uintptr_t tokens_,
               const std::array<uintptr_t, 4>& in) {
  const Tile tile(tile_);
  const LogitMap map = map_of(head, bias, tile.first_column);
  const int64_t* tokens = reinterpret_cast<const int64_t*>(tokens_);
  const float* stats = reinterpret_cast<const float*>(in[0]);
  const float* entropy = reinterpret_cast<const float*>(in[1]);
  const float* g = reinterpret_cast<const float*>(in[2]);
  const float* h = reinterpret_cast<const float*>(in[3]);
  parallel_for(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowCoefficients k = row_coefficients(stats[2 * i], stats[2 * i + 1], entropy[i], g[i], h[i],
                                           tokens[i] - tile.first_column);
      row_grad(tile.row(i), tile.row(i), tile.dtype, tile.columns, map, k);
    }
  });
}

}  // namespace

void bind_linear_logprob(pybind11::module_& m) {
  m.def("linear_logprob_tile_stats", &tile_stats);
  m.def("linear_logprob_finish", &finish);
  m.def("linear_logprob_tile_grad", &tile_grad);
}

}  // namespace fastppo
