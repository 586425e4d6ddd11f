// Sums of a row in a fixed order: sixteen float lanes, or eight double ones where a variance will be taken.
#pragma once
#include "simd.h"

namespace fastppo {

FASTPPO_INLINE double row_sum(const float* row, int64_t n) {
  vec16 lanes = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) lanes += load16(row + i);
  double sum = 0;
  for (int k = 0; k < 16; ++k) sum += lanes[k];
  for (; i < n; ++i) sum += row[i];
  return sum;
}

// Adds the row's sum to sums[0] and its sum of squares to sums[1].
FASTPPO_INLINE void row_moments(const float* row, int64_t n, double* sums) {
  typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
  dvec8 sum = {}, squares = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const dvec8 x = __builtin_convertvector(*reinterpret_cast<const vec8*>(row + i), dvec8);
    sum += x;
    squares += x * x;
  }
  for (int k = 0; k < 8; ++k) {
    sums[0] += sum[k];
    sums[1] += squares[k];
  }
  for (; i < n; ++i) {
    sums[0] += row[i];
    sums[1] += static_cast<double>(row[i]) * row[i];
  }
}

// exp16 of simd.h for one lane, for loops that the vectoriser turns into each clone's own instructions.
FASTPPO_INLINE float exp_scalar(float x) {
  const float y = x < 88.0f ? (x > -87.33654f ? x : -87.33654f) : 88.0f;
  const float shifted = y * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x > -87.33654f ? p * scale : 0.0f;
}

}  // namespace fastppo
