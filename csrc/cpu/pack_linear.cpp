// A weight matrix into panels, once per rollout: packed_linear.h has their layout. Every weight is read and written once.
//
// 32 x 32 weights at a time, in the order in which they lie: along a row of panels where n is contiguous (GPT-2's Conv1D), down a
// panel where k is (nn.Linear). Panels are written past the caches, or each line would be read first.
#include <algorithm>
#include <cstring>

#include "amx_pack.h"
#include "huge_pages.h"
#include "packed_linear.h"
#include "simd.h"

namespace fastppo {
namespace {

// Where weight (n, k) lies.
struct Source {
  const void* weight;
  bool is_bf16;
  int64_t n_stride, k_stride, N, K;
};

FASTPPO_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FASTPPO_INLINE float from_bf16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The block at (n, k) to `to`, element by element; what is not there is 0.
void plain_block(const Source& f, int64_t n, int64_t k, void* to, bool to_is_bf16) {
  float block[kPanel][kPanel] = {};  // [k][n]
  for (int64_t j = 0; j < std::min<int64_t>(kPanel, f.N - n); ++j) {
    for (int64_t d = 0; d < std::min<int64_t>(kPanel, f.K - k); ++d) {
      const int64_t at = (n + j) * f.n_stride + (k + d) * f.k_stride;
      block[d][j] = f.is_bf16 ? from_bf16(static_cast<const uint16_t*>(f.weight)[at]) : static_cast<const float*>(f.weight)[at];
    }
  }
  if (!to_is_bf16) {
    std::memcpy(to, block, sizeof(block));
    return;
  }
  uint16_t* pairs = static_cast<uint16_t*>(to);
  for (int d = 0; d < kPanel; ++d) {
    for (int j = 0; j < kPanel; ++j) pairs[(d / 2 * kPanel + j) * 2 + d % 2] = to_bf16(block[d][j]);
  }
}

#ifdef FASTPPO_AMX

// Rounded to bf16 (ties to even, NaN stays NaN) in the upper halves; what is below is not cleared.
FASTPPO_AMX inline __m512i rounded(__m512i bits) {
  const __m512i even = _mm512_and_si512(shift_down(bits), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  const __mmask16 nan = _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(bits), _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
}

// A block of floats with n or k contiguous; `to` is a line of cache.
FASTPPO_AMX void quick_block(const Source& f, int64_t n, int64_t k, void* to, bool to_is_bf16) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const bool along_n = f.n_stride == 1;
  for (int half = 0; half < 4; ++half) {  // 16 columns x 16 of k
    const int64_t column = half % 2 * 16, row = half / 2 * 16;
    const float* from = static_cast<const float*>(f.weight) + (n + column) * f.n_stride + (k + row) * f.k_stride;
    __m512i x[16];  // [k], 16 columns each
    if (along_n) {
      load_block(from, f.k_stride, f.K - k - row, f.N - n - column, x);
    } else {
      load_block(from, f.n_stride, f.N - n - column, f.K - k - row, x);
      transpose(x);
    }
    for (int d = 0; d < 16; d += to_is_bf16 ? 2 : 1) {
      char* line = static_cast<char*>(to) + ((row + d) * kPanel + column * (to_is_bf16 ? 2 : 1)) * (to_is_bf16 ? 2 : 4);
      const __m512i pair = to_is_bf16 ? _mm512_or_si512(shift_down(rounded(x[d])), _mm512_and_si512(rounded(x[d + 1]), upper)) : x[d];
      _mm512_stream_si512(reinterpret_cast<__m512i*>(line), pair);
    }
  }
}

#endif

}  // namespace

void pack_linear(uintptr_t weight, bool from_is_bf16, int64_t n_stride, int64_t k_stride, int64_t N, int64_t K, uintptr_t packed,
                 bool to_is_bf16) {
  const Source f{reinterpret_cast<const void*>(weight), from_is_bf16, n_stride, k_stride, N, K};
  const int64_t panels = (N + kPanel - 1) / kPanel, blocks = (K + kPanel - 1) / kPanel, bytes = kPanel * kPanel * (to_is_bf16 ? 2 : 4);
  ask_for_huge_pages(packed, panels * blocks * bytes);
#ifdef FASTPPO_AMX
  const bool quick = amx_works() && !from_is_bf16 && (n_stride == 1 || k_stride == 1) && packed % 64 == 0;
#endif
  parallel_for(panels, blocks * kPanel * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < (end - begin) * blocks; ++i) {
      const int64_t p = begin + (n_stride == 1 ? i % (end - begin) : i / blocks), b = n_stride == 1 ? i / (end - begin) : i % blocks;
      void* to = reinterpret_cast<char*>(packed) + (p * blocks + b) * bytes;
#ifdef FASTPPO_AMX
      if (quick) {
        quick_block(f, p * kPanel, b * kPanel, to, to_is_bf16);
        continue;
      }
#endif
      plain_block(f, p * kPanel, b * kPanel, to, to_is_bf16);
    }
#ifdef FASTPPO_AMX
    if (quick) _mm_sfence();
#endif
  });
}

}  // namespace fastppo
