#include "paged_rows.h"

#include <algorithm>
#include <limits>

#include "lanes.h"
#include "paged_tokens.h"

namespace fastppo {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// |x| < 0.625: odd polynomial (Cephes tanhf); else 1 - 2 / (e^2x + 1).
FASTPPO_INLINE vec16 tanh16(vec16 x) {
  vec16 a = x < 0.0f ? -x : x;
  vec16 big = 1.0f - 2.0f / (exp16(a + a) + 1.0f);
  vec16 y = x * x;
  vec16 p = splat(-5.70498872745e-3f);
  p = p * y + 2.06390887954e-2f;
  p = p * y - 5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y - 3.33332819422e-1f;
  p = p * y * a + a;
  vec16 t = a < 0.625f ? p : big;
  return x < 0.0f ? -t : t;
}

// The first n < 16 elements, the others zero.
template <typename T>
FASTPPO_INLINE vec16 load_part(const T* p, int64_t n) {
  T part[16] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <typename T>
FASTPPO_INLINE void store_part(T* p, vec16 x, int64_t n) {
  T part[16];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

template <typename T>
FASTPPO_INLINE void widen_of(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

template <typename T>
FASTPPO_INLINE void narrow_of(const float* from, float factor, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(to + i, load16(from + i) * factor);
  if (i < n) store_part(to + i, load_part(from + i, n - i) * factor, n - i);
}

}  // namespace

FASTPPO_CLONES void widen(const void* base, int dtype, int64_t at, int64_t n, float* to) {
  if (dtype == kFloat32) widen_of(static_cast<const float*>(base) + at, n, to);
  if (dtype == kBFloat16) widen_of(static_cast<const bf16_t*>(base) + at, n, to);
  if (dtype == kFloat16) widen_of(static_cast<const fp16_t*>(base) + at, n, to);
}

FASTPPO_CLONES void narrow(const float* from, float factor, int64_t n, int dtype, void* base, int64_t at) {
  if (dtype == kFloat32) narrow_of(from, factor, n, static_cast<float*>(base) + at);
  if (dtype == kBFloat16) narrow_of(from, factor, n, static_cast<bf16_t*>(base) + at);
  if (dtype == kFloat16) narrow_of(from, factor, n, static_cast<fp16_t*>(base) + at);
}

FASTPPO_CLONES void interleave(const float* __restrict__ from, int64_t D, float* __restrict__ to) {
  int64_t d = 0;
  for (; d + 32 <= D; d += 32)
    for (int i = 0; i < 16; ++i) to[d + i] = from[d + 2 * i], to[d + 16 + i] = from[d + 2 * i + 1];
  std::memcpy(to + d, from + d, (D - d) * sizeof(float));
}

FASTPPO_CLONES void uninterleave(const float* __restrict__ from, int64_t D, float* __restrict__ to) {
  int64_t d = 0;
  for (; d + 32 <= D; d += 32)
    for (int i = 0; i < 16; ++i) to[d + 2 * i] = from[d + i], to[d + 2 * i + 1] = from[d + 16 + i];
  std::memcpy(to + d, from + d, (D - d) * sizeof(float));
}

FASTPPO_CLONES float softmax_row(float* s, const SoftmaxArgs& a, float* max, float* sum) {
  const int first = a.lo & ~15, end = (a.hi + 15) & ~15;
  const vec16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, none = splat(kNegInf);
  vec16 top = none;
  for (int t = first; t < end; t += 16) {
    vec16 x = load16(s + t) * a.scale;
    if (a.softcap > 0) x = tanh16(x / a.softcap) * a.softcap;
    if (t < a.lo || t + 16 > a.hi) {
      vec16 at = lane + static_cast<float>(t);
      x = at < static_cast<float>(a.hi) ? x : none;
      x = at >= static_cast<float>(a.lo) ? x : none;
    }
    store16(s + t, x);
    top = max16(x, top);
  }
  float before = *max, now = std::max(before, most16(top));
  vec16 total = {};
  for (int t = 0; t < kChunk; t += 16) {
    vec16 e = {};
    if (t >= first && t < end) e = exp16(load16(s + t) - now);
    store16(s + t, e);
    total += e;
  }
  float alpha = before == kNegInf ? 0.0f : exp16(splat(before - now))[0];
  *max = now;
  *sum = *sum * alpha + sum16(total);
  return alpha;
}

FASTPPO_CLONES void merge_row(float* acc, const float* part, int padded, float* max, float* sum, float part_max, float part_sum) {
  float now = std::max(*max, part_max);
  float keep = *max == kNegInf ? 0.0f : exp16(splat(*max - now))[0], add = exp16(splat(part_max - now))[0];
  for (int d = 0; d < padded; d += 16) store16(acc + d, load16(acc + d) * keep + load16(part + d) * add);
  *sum = *sum * keep + part_sum * add;
  *max = now;
}

}  // namespace fastppo
