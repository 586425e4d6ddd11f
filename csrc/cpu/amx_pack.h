// Factors of a product, rearranged into AMX tiles of bf16: 16 lines of 32 numbers, one line of cache each.
//
// The left factor's tiles are 16 rows x 32 values of k, the right factor's 16 pairs of k x 16 columns: in either a 32-bit
// word holds two values of k. A bf16 factor pairs k with k + 1. A float is the sum of three bf16 numbers (24 = 8 + 8 + 8
// bits), one tile each, and pairs k with k + 16: both are then loaded as they lie. Either side's tile of words is the
// other's transposed, so a factor whose k runs the other way is one 16 x 16 transposition more.
#pragma once
#include "amx.h"

#ifdef FASTPPO_AMX

#include <algorithm>

namespace fastppo {

constexpr int kTile = 512;      // bf16 numbers in a tile
constexpr int64_t kChunk = 32;  // values of k in a tile
constexpr int kSide = 16;       // rows or columns in a tile

// One factor: [lines, K], a line being a row of the left factor or a column of the right one.
struct Factor {
  const void* data;
  int64_t stride;  // in elements, of the direction that is not contiguous
  bool along_k;    // k is the contiguous direction
  bool is_bf16;
  bool left;
  int64_t lines, K;
  int parts() const { return is_bf16 ? 1 : 3; }
  int64_t at(int64_t line, int64_t k) const { return along_k ? line * stride + k : k * stride + line; }
};

FASTPPO_AMX inline __m512i shift_down(__m512i x) { return _mm512_maskz_srli_epi32(0xffff, x, 16); }

// Words of the pairs (a, b) into the same line of three tiles. A part is the upper half of a float's bits: what is left
// has 8 bits less, and the third part nothing left.
FASTPPO_AMX inline void split_line(__m512 a, __m512 b, uint16_t* to, int64_t part_stride) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  constexpr int kBelowOrUpper = 0xf8;  // x | (y & z)
  for (int part = 0; part < 3; ++part) {
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    _mm512_store_si512(to + part * part_stride, _mm512_ternarylogic_epi32(shift_down(x), y, upper, kBelowOrUpper));
    if (part == 2) return;
    a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(x, upper)));
    b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(y, upper)));
  }
}

FASTPPO_AMX inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_maskz_unpacklo_epi32(0xffff, x[i], x[i + 1]);
    y[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_maskz_unpacklo_epi64(0xff, y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(0xff, y[i + j], y[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      y[i + 8 * j] = _mm512_maskz_shuffle_i32x4(0xffff, x[i + 8 * j], x[i + 8 * j + 4], 0x88);
      y[i + 8 * j + 4] = _mm512_maskz_shuffle_i32x4(0xffff, x[i + 8 * j], x[i + 8 * j + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_maskz_shuffle_i32x4(0xffff, y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_maskz_shuffle_i32x4(0xffff, y[i], y[i + 8], 0xdd);
  }
}

inline uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// 16 x 16 floats of which `lines` x `columns` are there; the rest is 0.
FASTPPO_AMX inline void load_block(const float* from, int64_t stride, int64_t lines, int64_t columns, __m512i (&to)[16]) {
  const __mmask16 mask = static_cast<__mmask16>(first_bits(std::min<int64_t>(columns, 16)));
  for (int i = 0; i < 16; ++i) {
    to[i] = i < lines ? _mm512_maskz_loadu_epi32(mask, from + i * stride) : _mm512_setzero_si512();
  }
}

FASTPPO_AMX inline void pack_floats(const Factor& f, int64_t line, int64_t k, uint16_t* to, int64_t part_stride) {
  const float* from = static_cast<const float*>(f.data) + f.at(line, k);
  const int64_t lines = f.lines - line, some = f.K - k, second = f.along_k ? 16 : 16 * f.stride;
  const bool whole = lines >= kSide && some >= kChunk;
  if (whole && f.along_k == f.left) {
    for (int i = 0; i < 16; ++i, from += f.stride, to += 32) {
      split_line(_mm512_loadu_ps(from), _mm512_loadu_ps(from + second), to, part_stride);
    }
    return;
  }
  __m512i a[16], b[16];
  if (f.along_k) {
    load_block(from, f.stride, lines, some, a);
    load_block(from + second, f.stride, lines, some - 16, b);
  } else {
    load_block(from, f.stride, some, lines, a);
    load_block(from + second, f.stride, some - 16, lines, b);
  }
  if (f.along_k != f.left) transpose(a), transpose(b);
  for (int i = 0; i < 16; ++i) split_line(_mm512_castsi512_ps(a[i]), _mm512_castsi512_ps(b[i]), to + i * 32, part_stride);
}

FASTPPO_AMX inline __m512i widen(__m256i halves) { return _mm512_maskz_cvtepu16_epi32(0xffff, halves); }

// Words of 16 pairs of k x 16 lines, where lines are contiguous.
FASTPPO_AMX inline void load_pairs(const uint16_t* from, int64_t stride, int64_t lines, int64_t some, __m512i (&words)[16]) {
  const __mmask16 mask = static_cast<__mmask16>(first_bits(std::min<int64_t>(lines, 16)));
  for (int i = 0; i < 16; ++i, from += 2 * stride) {
    const __m256i low = 2 * i < some ? _mm256_maskz_loadu_epi16(mask, from) : _mm256_setzero_si256();
    const __m256i high = 2 * i + 1 < some ? _mm256_maskz_loadu_epi16(mask, from + stride) : _mm256_setzero_si256();
    words[i] = _mm512_or_si512(widen(low), _mm512_maskz_slli_epi32(0xffff, widen(high), 16));
  }
}

FASTPPO_AMX inline void pack_halves(const Factor& f, int64_t line, int64_t k, uint16_t* to) {
  const uint16_t* from = static_cast<const uint16_t*>(f.data) + f.at(line, k);
  const int64_t lines = f.lines - line, some = f.K - k;
  const bool whole = lines >= kSide && some >= kChunk;
  __m512i words[16];
  if (whole && f.along_k) {
    for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(from + i * f.stride);
  } else if (whole) {
    load_pairs(from, f.stride, 16, 32, words);
  } else if (f.along_k) {
    const __mmask32 mask = first_bits(some);
    for (int i = 0; i < 16; ++i) {
      words[i] = i < lines ? _mm512_maskz_loadu_epi16(mask, from + i * f.stride) : _mm512_setzero_si512();
    }
  } else {
    load_pairs(from, f.stride, lines, some, words);
  }
  if (f.along_k != f.left) transpose(words);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, words[i]);
}

// Fetches what pack_tile(f, line, k) will read.
FASTPPO_AMX inline void fetch_tile(const Factor& f, int64_t line, int64_t k) {
  const int64_t size = f.is_bf16 ? 2 : 4;
  const char* from = static_cast<const char*>(f.data) + f.at(line, k) * size;
  const int rows = f.along_k ? 16 : 32;
  for (int i = 0; i < rows; ++i) {
    _mm_prefetch(from + i * f.stride * size, _MM_HINT_T0);
    if (f.along_k && !f.is_bf16) _mm_prefetch(from + i * f.stride * size + 64, _MM_HINT_T0);
  }
}

// Half `half` (16 lines) of a chunk of 32 lines, [part][2][16][32]; lines and k that are not there are 0.
FASTPPO_AMX inline void pack_tile(const Factor& f, int64_t line, int64_t k, int half, uint16_t* to) {
  if (f.is_bf16) {
    pack_halves(f, line + half * kSide, k, to + half * kTile);
  } else {
    pack_floats(f, line + half * kSide, k, to + half * kTile, 2 * kTile);
  }
}

}  // namespace fastppo

#endif
