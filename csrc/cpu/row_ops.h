// Elementwise operations, means and norms on rows of floats, for decode_program.cpp.
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace fastppo {
namespace {

// fastppo/generation/row_program.py has the same lists
enum Unary { kNeg, kCos, kSin, kRsqrt, kRelu, kSilu, kGelu, kGeluTanh, kTanh, kSigmoid, kExp, kSqrt, kReciprocal, kAbs };
enum Arithmetic { kAdd, kSub, kMul, kDiv, kPow };

FASTPPO_INLINE vec16 tanh16(vec16 x) {
  // (e^2x - 1) / (e^2x + 1) loses digits near 0, where the series has them
  vec16 magnitude = max16(x, -x);
  vec16 e = exp16(magnitude * 2.0f);
  vec16 far = 1.0f - 2.0f / (e + 1.0f);
  far = x < splat(0.0f) ? -far : far;
  vec16 s = x * x;
  vec16 near = x + x * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)));
  return magnitude < splat(0.2f) ? near : far;
}

// Abramowitz & Stegun 7.1.26: absolute error below 1.5e-7
FASTPPO_INLINE vec16 erf16(vec16 x) {
  vec16 z = max16(x, -x);
  vec16 t = 1.0f / (1.0f + 0.3275911f * z);
  vec16 p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  vec16 y = 1.0f - p * exp16(-z * z);
  return x < splat(0.0f) ? -y : y;
}

FASTPPO_INLINE vec16 sqrt16(vec16 x) {
  vec16 y;
  for (int i = 0; i < 16; ++i) y[i] = std::sqrt(x[i]);
  return y;
}

FASTPPO_INLINE vec16 unary16(int mode, vec16 x) {
  switch (mode) {
    case kNeg: return -x;
    case kRsqrt: return 1.0f / sqrt16(x);
    case kRelu: return max16(x, splat(0.0f));
    case kSilu: return x / (1.0f + exp16(-x));
    case kGelu: return 0.5f * x * (1.0f + erf16(x * 0.70710678f));
    case kGeluTanh: return x / (1.0f + exp16(-1.59576912f * (x + 0.044715f * x * x * x)));  // (1 + tanh z) / 2 = sigmoid(2 z)
    case kTanh: return tanh16(x);
    case kSigmoid: return 1.0f / (1.0f + exp16(-x));
    case kExp: return exp16(x);
    case kSqrt: return sqrt16(x);
    case kReciprocal: return 1.0f / x;
    default: return max16(x, -x);  // kAbs
  }
}

FASTPPO_INLINE vec16 arithmetic16(int mode, vec16 a, vec16 b) {
  switch (mode) {
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    default: return a / b;
  }
}

// A lambda in a clone must be inlined too: a call would pass vectors by another ISA's convention.
#define INLINE_LAMBDA __attribute__((always_inline))

// out[0 .. n) = f(lane) for whole vectors, then for a padded last one
template <typename F>
FASTPPO_INLINE void map16(float* out, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, f(i, 16));
  if (i < n) {
    vec16 last = f(i, static_cast<int>(n - i));
    std::memcpy(out + i, &last, (n - i) * sizeof(float));
  }
}

FASTPPO_INLINE vec16 load_some(const float* p, int lanes) {
  if (lanes == 16) return load16(p);
  vec16 x{};
  std::memcpy(&x, p, lanes * sizeof(float));
  return x;
}

FASTPPO_CLONES void unary(int mode, const float* x, float* out, int64_t n) {
  if (mode == kCos || mode == kSin) {
    for (int64_t i = 0; i < n; ++i) out[i] = mode == kCos ? std::cos(x[i]) : std::sin(x[i]);
    return;
  }
#define CASE(M) \
  case M: map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA { return unary16(M, load_some(x + i, lanes)); }); break;
  switch (mode) {
    CASE(kNeg) CASE(kRsqrt) CASE(kRelu) CASE(kSilu) CASE(kGelu) CASE(kGeluTanh) CASE(kTanh)
    CASE(kSigmoid) CASE(kExp) CASE(kSqrt) CASE(kReciprocal) default: CASE(kAbs)
  }
#undef CASE
}

FASTPPO_CLONES void binary(int mode, const float* a, const float* b, float* out, int64_t n, bool swapped) {
  map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA {
    vec16 x = load_some(a + i, lanes), y = load_some(b + i, lanes);
    return swapped ? arithmetic16(mode, y, x) : arithmetic16(mode, x, y);
  });
}

FASTPPO_CLONES void scalar(int mode, const float* a, float b, float* out, int64_t n, bool swapped) {
  if (mode == kPow) {
    if (b == 2.0f) return map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA { vec16 x = load_some(a + i, lanes); return x * x; });
    if (b == 3.0f) return map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA { vec16 x = load_some(a + i, lanes); return x * x * x; });
    for (int64_t i = 0; i < n; ++i) out[i] = std::pow(a[i], b);
    return;
  }
  map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA {
    vec16 x = load_some(a + i, lanes), y = splat(b);
    return swapped ? arithmetic16(mode, y, x) : arithmetic16(mode, x, y);
  });
}

FASTPPO_INLINE float sum_of(vec16 x) {
  float s = 0.0f;
  for (int i = 0; i < 16; ++i) s += x[i];
  return s;
}

FASTPPO_CLONES void mean(const float* x, float* out, int64_t groups, int64_t n, float scale) {
  for (int64_t r = 0; r < groups; ++r, x += n) {
    vec16 sum{};
    for (int64_t i = 0; i < n; i += 16) sum += load_some(x + i, static_cast<int>(std::min<int64_t>(16, n - i)));
    out[r] = sum_of(sum) * scale;
  }
}

FASTPPO_CLONES void layer_norm(const float* x, float* out, int64_t groups, int64_t n, float eps, const float* weight,
                               const float* bias) {
  for (int64_t r = 0; r < groups; ++r, x += n, out += n) {
    vec16 sum{}, squares{};
    for (int64_t i = 0; i < n; i += 16) sum += load_some(x + i, static_cast<int>(std::min<int64_t>(16, n - i)));
    const float center = sum_of(sum) / n;
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] - center;
    for (int64_t i = 0; i < n; i += 16) {
      vec16 d = load_some(out + i, static_cast<int>(std::min<int64_t>(16, n - i)));
      squares += d * d;
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / n + eps);
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
  }
}

FASTPPO_CLONES void rms_norm(const float* x, float* out, int64_t groups, int64_t n, float eps, const float* weight) {
  for (int64_t r = 0; r < groups; ++r, x += n, out += n) {
    vec16 squares{};
    for (int64_t i = 0; i < n; i += 16) {
      vec16 v = load_some(x + i, static_cast<int>(std::min<int64_t>(16, n - i)));
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / n + eps);
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
  }
}

}  // namespace
}  // namespace fastppo
