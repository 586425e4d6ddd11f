// Vector passes over one tile of a row of logits, for sampling.cpp: maximum, statistics, weights, histogram bins.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#include "half.h"

namespace fastppo {
namespace {

constexpr int kTile = 1024;  // kernels/sampling.py: TILE
constexpr int kBins = 2048;
constexpr float kBinsPerNat = 64.0f;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// A row as tiles: `tail` is the last tile, padded with -inf to a multiple of 64 columns.
struct Row {
  const float* base;
  const float* tail;
  int64_t V, tiles;
  const float* tile(int64_t t) const { return t + 1 == tiles ? tail : base + t * kTile; }
  int padded(int64_t t) const { return t + 1 == tiles ? static_cast<int>((V - t * kTile + 63) & ~int64_t{63}) : kTile; }
  float at(int64_t i) const { return tile(i / kTile)[i % kTile]; }
};

struct TileStats {
  float max, sum, dot;  // dot = sum e * (x - max), e = exp((x - max) * rate)
  bool nan;
};

FASTPPO_INLINE ivec16 magnitude(vec16 x) { return as_int(x) & 0x7fffffff; }
FASTPPO_INLINE ivec16 most_int(ivec16 a, ivec16 b) { return a > b ? a : b; }

FASTPPO_INLINE float max_of(vec16 v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

FASTPPO_INLINE float sum_of(vec16 v) {
  float s8[8], s = 0;
  for (int i = 0; i < 8; ++i) s8[i] = v[i] + v[i + 8];
  for (int i = 0; i < 4; ++i) s += s8[i] + s8[i + 4];
  return s;
}

// n is a multiple of 64. NaNs are looked for among integers: GCC 12 compares a vector with itself lane by lane.
FASTPPO_CLONES void tile_max(const float* p, int n, float* lanes, float* max, bool* nan) {
  vec16 m0 = splat(kNegInf), m1 = m0, m2 = m0, m3 = m0;
  ivec16 most = {}, more = {};
  for (int i = 0; i < n; i += 64) {
    const vec16 a = load16(p + i), b = load16(p + i + 16), c = load16(p + i + 32), d = load16(p + i + 48);
    m0 = max16(a, m0), m1 = max16(b, m1), m2 = max16(c, m2), m3 = max16(d, m3);
    most = most_int(most_int(magnitude(a), magnitude(b)), most);
    more = most_int(most_int(magnitude(c), magnitude(d)), more);
  }
  const vec16 m = max16(max16(m0, m1), max16(m2, m3));
  if (lanes) store16(lanes, m);
  *max = max_of(m);
  most = most_int(most, more);
  int top = 0;
  for (int i = 0; i < 16; ++i) top = most[i] > top ? most[i] : top;
  *nan = top > 0x7f800000;
}

FASTPPO_CLONES void tile_stats(const float* p, int n, float max, float rate, TileStats* out) {
  vec16 s0 = {}, s1 = {}, d0 = {}, d1 = {};
  vec16 m = splat(max > kLowest ? max : kLowest), low = splat(kLowest / 2);
  for (int i = 0; i < n; i += 32) {
    vec16 a = load16(p + i) - m, b = load16(p + i + 16) - m;
    vec16 ea = exp16(a * rate), eb = exp16(b * rate);
    s0 += ea, s1 += eb;
    d0 += ea * max16(a, low), d1 += eb * max16(b, low);  // 0 * -inf would be NaN
  }
  out->sum = sum_of(s0 + s1), out->dot = sum_of(d0 + d1);
}

// Sum of exp((y - max) * rate) over y >= threshold; with e != nullptr also each term.
FASTPPO_CLONES void tile_weight(const float* p, int n, float max, float rate, float threshold, float* e, float* sum) {
  vec16 s0 = {}, s1 = {}, none = {}, low = splat(threshold);
  for (int i = 0; i < n; i += 32) {
    vec16 a = load16(p + i), b = load16(p + i + 16);
    vec16 ea = exp16((a - max) * rate), eb = exp16((b - max) * rate);
    ea = a >= low ? ea : none, eb = b >= low ? eb : none;
    s0 += ea, s1 += eb;
    if (e) store16(e + i, ea), store16(e + i + 16, eb);
  }
  *sum = sum_of(s0 + s1);
}

// e and the histogram bin of every column: bin = (max - y) * rate * kBinsPerNat, kBins for what is below the threshold.
FASTPPO_CLONES void tile_bins(const float* p, int n, float max, float rate, float threshold, float* e, int* bin) {
  vec16 low = splat(threshold), last = splat(kBins - 1), out = splat(kBins);
  for (int i = 0; i < n; i += 16) {
    vec16 a = load16(p + i);
    vec16 z = (a - max) * rate;
    vec16 b = z * -kBinsPerNat;
    b = b < last ? b : last;
    b = a >= low ? b : out;
    store16(e + i, exp16(z));
    *reinterpret_cast<ivec16*>(bin + i) = __builtin_convertvector(b, ivec16);
  }
}

template <typename T>
FASTPPO_INLINE void widen(const T* h, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, load(h + i));
  T rest[16] = {};
  float wide[16];
  std::memcpy(rest, h + i, (n - i) * sizeof(T));
  store16(wide, load(rest));
  std::memcpy(out + i, wide, (n - i) * 4);
}

FASTPPO_CLONES void widen_tile(const void* source, int dtype, int64_t n, float* out) {
  if (dtype == kBFloat16)
    widen(static_cast<const bf16_t*>(source), n, out);
  else
    widen(static_cast<const fp16_t*>(source), n, out);
}

void pad_tail(float* tail, int64_t used) {
  for (int64_t i = used; i < ((used + 63) & ~int64_t{63}); ++i) tail[i] = kNegInf;
}

}  // namespace
}  // namespace fastppo
