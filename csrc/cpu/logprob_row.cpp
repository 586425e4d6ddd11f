// One row of logits: statistics and gradient, sixteen columns a vector. Formulas: kernels/logprob.py.
#include "logprob_row.h"

#include "half.h"

namespace fastppo {
namespace {

constexpr int64_t kBlock = 2048;  // 8 KB of float: the second pass over a block reads the first-level cache
constexpr float kInf = std::numeric_limits<float>::infinity();

// 2^y for -126 <= y <= 120, relative error below 3e-7; the magic number rounds y to an integer in its low bits.
FASTPPO_INLINE vec16 exp2_inside(vec16 y) {
  vec16 magic = y + 12582912.0f;
  vec16 r = y - (magic - 12582912.0f);
  vec16 p = splat(0.001326472731307149f);
  p = p * r + 0.009671512991189957f;
  p = p * r + 0.05550733581185341f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  p = p * r + 1.0f;
  return as_float(as_int(p) + (as_int(magic) << 23));
}

// max16(a, NaN) is NaN, so a NaN passes through and reaches the sums.
FASTPPO_INLINE vec16 clamp_low(vec16 y) { return max16(splat(-126.0f), y); }

// tanh by 1 - 2 / (e^2u + 1), by its series where that would cancel.
FASTPPO_INLINE vec16 tanh16(vec16 u) {
  vec16 a = u < splat(10.0f) ? u : splat(10.0f);
  a = a < splat(-10.0f) ? splat(-10.0f) : a;
  vec16 far = 1.0f - 2.0f / (exp2_inside(a * 2.88539008f) + 1.0f);
  vec16 q = a * a, s = splat(2.18694885e-2f);
  s = s * q - 5.39682540e-2f;
  s = s * q + 1.33333333e-1f;
  s = s * q - 3.33333333e-1f;
  vec16 near = a + a * q * s;
  return q < splat(0.09f) ? near : far;
}

enum Kind { kPlain, kBias, kCap };  // kCap: soft cap, with a bias or without
constexpr int64_t kStep = 64;       // columns per iteration: four independent chains of vec16

// body(x, bias, n) for every kStep columns. The last, partial step runs on a copy padded with -infinity, so that the
// body, which is compiled for every dtype, kind and ISA, exists once.
template <typename T, typename Body>
FASTPPO_INLINE void each_step(const T* x, const float* bias, int64_t n, const Body& body) {
  alignas(64) T tail_x[kStep];
  alignas(64) float tail_bias[kStep];
  for (int64_t j = 0; j < n; j += kStep) {
    const int64_t length = n - j < kStep ? n - j : kStep;
    const T* from = x + j;
    const float* from_bias = bias ? bias + j : nullptr;
    if (length < kStep) {
      for (int64_t i = 0; i < kStep; i += 16) store(tail_x + i, splat(-kInf)), store(tail_bias + i, vec16{});
      std::memcpy(tail_x, from, length * sizeof(T));
      if (bias) std::memcpy(tail_bias, from_bias, length * sizeof(float));
      from = tail_x, from_bias = bias ? tail_bias : nullptr;
    }
    body(from, from_bias, j, length);
  }
}
#define STEP [&](const T* x, const float* bias, int64_t at, int64_t length) __attribute__((always_inline))

template <typename T, int kKind>
FASTPPO_INLINE vec16 raw(const T* x, const float* bias, int64_t j) {
  vec16 v = load(x + j);
  if (kKind == kBias || (kKind == kCap && bias)) v = v + load(bias + j);
  return v;
}

FASTPPO_INLINE float reduce_max(vec16 v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

FASTPPO_INLINE double reduce_add(vec16 v) {
  double s = 0;
  for (int i = 0; i < 16; ++i) s += v[i];
  return s;
}

template <typename T, int kKind>
FASTPPO_INLINE float first_max(const T* block, const float* bias, int64_t n) {
  vec16 m = splat(-kInf);
  each_step(block, bias, n < kStep ? n : kStep, STEP {
    (void)at, (void)length;
    for (int k = 0; k < 4; ++k) m = max16(raw<T, kKind>(x, bias, 16 * k), m);
  });
  return reduce_max(m);
}

struct BlockSums {
  double sum, dot;
  float top;  // largest y - shift
};

template <typename T, int kKind>
FASTPPO_INLINE BlockSums block_sums(const T* block, int64_t n, const LogitMap& map, const float* block_bias, float shift) {
  vec16 s[4] = {}, d[4] = {}, top[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  each_step(block, block_bias, n, STEP {
    // The next block comes from memory while this one is computed; past the end a prefetch is harmless.
    for (int64_t line = 0; line < kStep; line += 64 / sizeof(T)) __builtin_prefetch(block + at + kBlock + line);
    for (int k = 0; k < 4; ++k) {
      vec16 v = raw<T, kKind>(x, bias, 16 * k);
      if (kKind == kCap) v = tanh16(v * map.to_tanh);
      vec16 y = v * map.to_log2 - shift;
      if (kKind == kCap)  // which made padding's -infinity finite
        for (int64_t i = length - 16 * k; i < 16; ++i) y[i < 0 ? 0 : i] = -kInf;
      top[k] = max16(y, top[k]);
      y = clamp_low(y);
      vec16 e = exp2_inside(y);
      s[k] = s[k] + e;
      d[k] = d[k] + e * y;
    }
  });
  return {reduce_add((s[0] + s[1]) + (s[2] + s[3])), reduce_add((d[0] + d[1]) + (d[2] + d[3])),
          reduce_max(max16(max16(top[0], top[1]), max16(top[2], top[3])))};
}

// A block is summed relative to the largest logit before it, and once more in the rare case that it holds one far above.
template <typename T, int kKind>
FASTPPO_INLINE void stats(const void* x, int64_t n, const LogitMap& map, RowState& state) {
  constexpr float kFar = 4.0f;  // 2^4: sums relative to less than the maximum lose that many units of rounding
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    int64_t length = n - begin < kBlock ? n - begin : kBlock;
    const T* block = static_cast<const T*>(x) + begin;
    const float* bias = kKind != kPlain && map.bias ? map.bias + begin : nullptr;
    float shift = static_cast<float>(state.max2);
    if (shift == -kInf) {
      float top = first_max<T, kKind>(block, bias, length);
      shift = (kKind == kCap ? std::tanh(top * map.to_tanh) : top) * map.to_log2;
    }
    BlockSums b;
    for (;;) {
      if (!(shift > -kInf)) shift = 0;  // -inf - -inf would be NaN
      b = block_sums<T, kKind>(block, length, map, bias, shift);
      float top = shift + b.top;
      if (!(b.top > kFar) || !(top > shift)) break;
      shift = top;
      if (top == kInf) {  // stays NaN
        b.sum = b.dot = std::numeric_limits<double>::quiet_NaN();
        break;
      }
    }
    // What the state held moves to the new maximum; before the first finite logit it holds nothing but perhaps a NaN.
    double move = state.max2 - shift, kept = state.max2 == -kInf ? 0.0 : std::exp2(move);
    state.dot = kept == 0.0 ? 0.0 * state.dot + b.dot : kept * (state.dot + move * state.sum) + b.dot;
    state.sum = kept * state.sum + b.sum;
    if (state.max2 > -kInf || b.top > -kInf) state.max2 = shift;
  }
}

template <typename T, int kKind>
FASTPPO_INLINE void grad(const void* x_, void* dx_, int64_t n, const LogitMap& map, const RowCoefficients& k) {
  T* dx = static_cast<T*>(dx_);
  each_step(static_cast<const T*>(x_), map.bias, n, STEP {
    alignas(64) T tail[kStep];
    T* out = length < kStep ? tail : dx + at;
    for (int j = 0; j < kStep; j += 16) {
      vec16 v = raw<T, kKind>(x, bias, j), slope = splat(map.grad);
      if (kKind == kCap) {
        v = tanh16(v * map.to_tanh);
        slope = slope * (1.0f - v * v);
      }
      vec16 y = v * map.to_log2 - k.max2;
      ivec16 dead = y < splat(-126.0f);
      y = clamp_low(y);
      vec16 d = exp2_inside(y) * (y * k.b + k.a) * slope;
      store(out + j, as_float(as_int(-d) & ~dead));  // exactly 0 where p is 0
    }
    if (length < kStep) std::memcpy(dx + at, tail, length * sizeof(T));
  });
}

// One body per dtype and ISA; the map chooses the inner loop.
#define ROW_BODIES(T)                                                                                               \
  FASTPPO_CLONES void stats_##T(const void* x, int64_t n, const LogitMap& map, RowState& state) {                   \
    if (map.cap > 0) return stats<T, kCap>(x, n, map, state);                                                       \
    if (map.bias) return stats<T, kBias>(x, n, map, state);                                                         \
    stats<T, kPlain>(x, n, map, state);                                                                             \
  }                                                                                                                 \
  FASTPPO_CLONES void grad_##T(const void* x, void* dx, int64_t n, const LogitMap& map, const RowCoefficients& k) { \
    if (map.cap > 0) return grad<T, kCap>(x, dx, n, map, k);                                                        \
    if (map.bias) return grad<T, kBias>(x, dx, n, map, k);                                                          \
    grad<T, kPlain>(x, dx, n, map, k);                                                                              \
  }
ROW_BODIES(float)
ROW_BODIES(bf16_t)
ROW_BODIES(fp16_t)
#undef ROW_BODIES

// The vectors' own tanh: with another one the token's logit would not be among those that were summed.
FASTPPO_CLONES float tanh_one(float u) { return lane0(tanh16(splat(u))); }
#undef STEP

// The token's own column, in double: g reaches only this one.
float token_gradient(const void* x, int dtype, const LogitMap& map, const RowCoefficients& k) {
  double v = load_one(x, dtype, k.token), slope = map.grad;
  if (map.bias) v = static_cast<float>(v) + map.bias[k.token];
  if (map.cap > 0) {
    v = tanh_one(static_cast<float>(v) * map.to_tanh);
    slope *= 1 - v * v;
  }
  double y = v * map.to_log2 - k.max2;
  double part = y < -126 ? 0 : std::exp2(y) * (k.a + k.b * y);
  return static_cast<float>(slope * (k.g - part));
}

}  // namespace

void row_stats(const void* x, int dtype, int64_t n, const LogitMap& map, RowState& state) {
  if (dtype == kFloat32) return stats_float(x, n, map, state);
  if (dtype == kBFloat16) return stats_bf16_t(x, n, map, state);
  stats_fp16_t(x, n, map, state);
}

void row_grad(const void* x, void* dx, int dtype, int64_t n, const LogitMap& map, const RowCoefficients& k) {
  const bool here = k.token >= 0 && k.token < n;
  const float own = here ? token_gradient(x, dtype, map, k) : 0;  // before an in-place write takes the logit away
  if (dtype == kFloat32)
    grad_float(x, dx, n, map, k);
  else if (dtype == kBFloat16)
    grad_bf16_t(x, dx, n, map, k);
  else
    grad_fp16_t(x, dx, n, map, k);
  if (here) store_one(dx, dtype, k.token, own);
}

double row_log2(const void* x, int dtype, int64_t column, const LogitMap& map) {
  double v = load_one(x, dtype, column);
  if (map.bias) v = static_cast<float>(v) + map.bias[column];
  if (map.cap > 0) v = tanh_one(static_cast<float>(v) * map.to_tanh);
  return v * map.to_log2;
}

}  // namespace fastppo
