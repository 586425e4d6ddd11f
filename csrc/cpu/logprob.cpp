// Log-prob and entropy of given tokens from logits, and their gradient, row by row. Formulas: kernels/logprob.py.
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../ops.h"
#include "half.h"
#include "logprob_row.h"

namespace fastppo {
namespace {

// Rows of a strided tensor whose leading dimensions collapse to two.
struct Rows {
  int64_t count, inner, outer_stride, inner_stride;  // strides in elements
  int64_t offset(int64_t i) const { return (i / inner) * outer_stride + (i % inner) * inner_stride; }
};
using RowTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

Rows rows_of(const RowTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

void forward(uintptr_t logits, int dtype, const RowTuple& layout, int64_t vocab, double temperature, uintptr_t tokens_,
             const std::array<uintptr_t, 3>& out) {
  const Rows rows = rows_of(layout);
  const LogitMap map(temperature);
  const int64_t* tokens = reinterpret_cast<const int64_t*>(tokens_);
  float* logprob = reinterpret_cast<float*>(out[0]);
  float* entropy = reinterpret_cast<float*>(out[1]);
  float* saved = reinterpret_cast<float*>(out[2]);  // [rows, 2]: maximum and sum
  parallel_for(rows.count, vocab, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* x = reinterpret_cast<const void*>(logits + rows.offset(i) * element_size(dtype));
      RowState state;
      row_stats(x, dtype, vocab, map, state);
      RowResult r = row_result(state, row_log2(x, dtype, tokens[i], map));
      logprob[i] = r.logprob;
      entropy[i] = r.entropy;
      saved[2 * i] = static_cast<float>(state.max2);
      saved[2 * i + 1] = static_cast<float>(state.sum);
    }
  });
}

void backward(uintptr_t logits, uintptr_t grads, int dtype, const RowTuple& in_layout, const RowTuple& out_layout,
              int64_t vocab, double temperature, uintptr_t tokens_, const std::array<uintptr_t, 4>& in) {
  const Rows rows = rows_of(in_layout), out_rows = rows_of(out_layout);
  const LogitMap map(temperature);
  const int64_t* tokens = reinterpret_cast<const int64_t*>(tokens_);
  const float* saved = reinterpret_cast<const float*>(in[0]);
  const float* entropy = reinterpret_cast<const float*>(in[1]);
  const float* g = reinterpret_cast<const float*>(in[2]);
  const float* h = reinterpret_cast<const float*>(in[3]);
  parallel_for(rows.count, vocab, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* x = reinterpret_cast<const void*>(logits + rows.offset(i) * element_size(dtype));
      void* dx = reinterpret_cast<void*>(grads + out_rows.offset(i) * element_size(dtype));
      if (g[i] == 0 && h[i] == 0) {
        std::memset(dx, 0, vocab * element_size(dtype));
        continue;
      }
      row_grad(x, dx, dtype, vocab, map, row_coefficients(saved[2 * i], saved[2 * i + 1], entropy[i], g[i], h[i], tokens[i]));
    }
  });
}

}  // namespace

// Ask for 2 MB pages under a fresh buffer: touching 100 MB in 4 KB pages costs 25,000 page faults.
void advise_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is harmless
#endif
}

void bind_logprob(pybind11::module_& m) {
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("logprob_forward", &forward);
  m.def("logprob_backward", &backward);
}

}  // namespace fastppo
