// Sums of AMX tiles to where they belong: rows of floats or bf16, plus a bias, plus what is there.
#pragma once
#include "amx_pack.h"

#ifdef FASTPPO_AMX

namespace fastppo {

constexpr int64_t kStrip = 32, kPanel = 32;  // rows and columns that are multiplied at a time

typedef float Sums[4][256];  // of a strip and a panel: upper left, upper right, lower left, lower right

struct Result {
  void* data;  // [rows, columns]
  int64_t stride, rows, columns;
  bool is_bf16, add;
  const void* bias;  // [columns] or nullptr
  bool bias_is_bf16;
};

// Where the result of a strip and a panel goes.
struct Corner {
  char* at;
  int64_t row_bytes, rows;
  __mmask16 left, right;  // columns that are there
};

FASTPPO_AMX inline Corner corner(const Result& f, int64_t row, int64_t column) {
  const int64_t size = f.is_bf16 ? 2 : 4, columns = f.columns - column;
  return {static_cast<char*>(f.data) + (row * f.stride + column) * size, f.stride * size, std::min(kStrip, f.rows - row),
          static_cast<__mmask16>(first_bits(std::min<int64_t>(columns, kSide))),
          static_cast<__mmask16>(first_bits(std::min<int64_t>(columns - kSide, kSide)))};
}

FASTPPO_AMX inline void fetch(const Result& f, const Corner& to) {
  for (int64_t r = 0; r < to.rows; ++r) {
    _mm_prefetch(to.at + r * to.row_bytes, _MM_HINT_T0);
    if (!f.is_bf16) _mm_prefetch(to.at + r * to.row_bytes + 64, _MM_HINT_T0);
  }
}

FASTPPO_AMX inline __m512 load_some(const void* from, bool is_bf16, __mmask16 mask) {
  if (!is_bf16) return _mm512_maskz_loadu_ps(mask, from);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, widen(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

FASTPPO_AMX inline void store_some(void* to, bool is_bf16, __mmask16 mask, __m512 x) {
  if (!is_bf16) return _mm512_mask_storeu_ps(to, mask, x);
  const __m512i bits = _mm512_castps_si512(x), even = _mm512_and_si512(shift_down(bits), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  const __m512i out = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(to, mask, _mm512_maskz_cvtepi32_epi16(0xffff, shift_down(out)));
}

template <bool is_bf16>
FASTPPO_AMX inline void write_sums_as(const Result& f, int64_t column, const Corner& to, const Sums& sums) {
  constexpr int64_t kSize = is_bf16 ? 2 : 4;
  const char* bias = static_cast<const char*>(f.bias) + column * (f.bias_is_bf16 ? 2 : 4);
  const __m512 zero = _mm512_setzero_ps();
  const __m512 bias_left = f.bias ? load_some(bias, f.bias_is_bf16, to.left) : zero;
  const __m512 bias_right = f.bias ? load_some(bias + kSide * (f.bias_is_bf16 ? 2 : 4), f.bias_is_bf16, to.right) : zero;
  char* at = to.at;
  for (int64_t r = 0; r < to.rows; ++r, at += to.row_bytes) {
    const float* from = sums[r / kSide * 2] + r % kSide * kSide;
    __m512 left = _mm512_add_ps(_mm512_load_ps(from), bias_left);
    __m512 right = _mm512_add_ps(_mm512_load_ps(from + 256), bias_right);
    if (f.add) {
      left = _mm512_add_ps(left, load_some(at, is_bf16, to.left));
      right = _mm512_add_ps(right, load_some(at + kSide * kSize, is_bf16, to.right));
    }
    store_some(at, is_bf16, to.left, left);
    store_some(at + kSide * kSize, is_bf16, to.right, right);
  }
}

FASTPPO_AMX inline void write_sums(const Result& f, int64_t column, const Corner& to, const Sums& sums) {
  f.is_bf16 ? write_sums_as<true>(f, column, to, sums) : write_sums_as<false>(f, column, to, sums);
}

}  // namespace fastppo

#endif
