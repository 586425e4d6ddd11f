// Log-prob and entropy of given tokens from logits, and their gradient, one pass each. Formulas: kernels/logprob.py.
#include "logprob_row.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "../ops.h"
#include "half.h"

namespace fastppo {
namespace {

constexpr int64_t kBlock = 2048;  // 8 KB of float: the second pass over a block reads the first-level cache
constexpr float kInf = std::numeric_limits<float>::infinity();

// 2^y for -126 <= y <= 120, relative error below 2e-7; the magic number rounds y to an integer in its low bits.
FASTPPO_INLINE vec16 exp2_inside(vec16 y) {
  vec16 magic = y + 12582912.0f;
  vec16 r = y - (magic - 12582912.0f);
  vec16 p = splat(1.53453e-4f);
  p = p * r + 1.33999e-3f;
  p = p * r + 9.61848907e-3f;
  p = p * r + 5.55032864e-2f;
  p = p * r + 2.40226462e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return as_float(as_int(p) + (as_int(magic) << 23));
}

// A comparison with NaN is false, so a NaN passes through and reaches the sums.
FASTPPO_INLINE vec16 clamp_low(vec16 y) { return y < splat(-126.0f) ? splat(-126.0f) : y; }

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

template <typename T, bool kBias>
FASTPPO_INLINE vec16 raw(const T* x, const float* bias, int64_t j) {
  vec16 v = load(x + j);
  if (kBias) v = v + load16(bias + j);
  return v;
}

template <typename T, bool kBias>
FASTPPO_INLINE vec16 raw_part(const T* x, const float* bias, int64_t j, int64_t n) {
  vec16 v = load_part(x + j, n);
  if (kBias) {
    vec16 b = load_part(bias + j, n);
    for (int i = 0; i < 16; ++i) v[i] += i < n ? b[i] : 0.0f;
  }
  return v;
}

// y - max2, clamped.
template <bool kCap>
FASTPPO_INLINE vec16 relative(vec16 v, const LogitMap& map, float max2) {
  if (kCap) v = tanh16(v * map.to_tanh);
  return clamp_low(v * map.to_log2 - max2);
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

template <typename T, bool kBias>
FASTPPO_INLINE float block_max(const T* x, const float* bias, int64_t n) {
  vec16 m0 = splat(-kInf), m1 = m0, m2 = m0, m3 = m0;
  int64_t j = 0;
  for (; j + 64 <= n; j += 64) {
    m0 = max16(raw<T, kBias>(x, bias, j), m0);
    m1 = max16(raw<T, kBias>(x, bias, j + 16), m1);
    m2 = max16(raw<T, kBias>(x, bias, j + 32), m2);
    m3 = max16(raw<T, kBias>(x, bias, j + 48), m3);
  }
  for (; j + 16 <= n; j += 16) m0 = max16(raw<T, kBias>(x, bias, j), m0);
  if (j < n) m0 = max16(raw_part<T, kBias>(x, bias, j, n - j), m0);
  return reduce_max(max16(max16(m0, m1), max16(m2, m3)));
}

FASTPPO_INLINE void accumulate(vec16 y, vec16& sum, vec16& dot) {
  vec16 e = exp2_inside(y);
  sum = sum + e;
  dot = dot + e * y;
}

template <typename T, bool kBias, bool kCap>
FASTPPO_INLINE void block_sums(const T* x, int64_t n, const LogitMap& map, const float* bias, float max2, double& sum,
                               double& dot) {
  vec16 s0 = {}, s1 = {}, s2 = {}, s3 = {}, d0 = {}, d1 = {}, d2 = {}, d3 = {};
  int64_t j = 0;
  for (; j + 64 <= n; j += 64) {
    // The next block comes from memory while this one is computed; past the end a prefetch is harmless.
    for (int64_t line = 0; line < 64; line += 64 / sizeof(T)) __builtin_prefetch(x + j + kBlock + line);
    accumulate(relative<kCap>(raw<T, kBias>(x, bias, j), map, max2), s0, d0);
    accumulate(relative<kCap>(raw<T, kBias>(x, bias, j + 16), map, max2), s1, d1);
    accumulate(relative<kCap>(raw<T, kBias>(x, bias, j + 32), map, max2), s2, d2);
    accumulate(relative<kCap>(raw<T, kBias>(x, bias, j + 48), map, max2), s3, d3);
  }
  for (; j + 16 <= n; j += 16) accumulate(relative<kCap>(raw<T, kBias>(x, bias, j), map, max2), s0, d0);
  if (j < n) {
    vec16 y = relative<kCap>(raw_part<T, kBias>(x, bias, j, n - j), map, max2), s = {}, d = {};
    accumulate(y, s, d);
    // Lanes past the end are dropped here: a soft cap would make their -infinity a finite logit.
    for (int i = 0; i < n - j; ++i) s0[i] += s[i], d0[i] += d[i];
  }
  sum = reduce_add((s0 + s1) + (s2 + s3));
  dot = reduce_add((d0 + d1) + (d2 + d3));
}

template <typename T, bool kBias, bool kCap>
FASTPPO_INLINE void stats(const void* x, int64_t n, const LogitMap& map, RowState& state) {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    int64_t length = n - begin < kBlock ? n - begin : kBlock;
    const T* block = static_cast<const T*>(x) + begin;
    const float* bias = kBias ? map.bias + begin : nullptr;
    vec16 top = splat(block_max<T, kBias>(block, bias, length));
    if (kCap) top = tanh16(top * map.to_tanh);
    float top2 = lane0(top) * map.to_log2;
    float max2 = top2 > state.max2 ? top2 : static_cast<float>(state.max2);
    float shift = max2 == -kInf ? 0.0f : max2;  // -inf - -inf would be NaN
    double sum, dot;
    block_sums<T, kBias, kCap>(block, length, map, bias, shift, sum, dot);
    // What the state held moves to the new maximum; before the first finite logit it holds nothing but perhaps a NaN.
    double move = state.max2 - shift, kept = state.max2 == -kInf ? 0.0 : std::exp2(move);
    state.dot = kept == 0.0 ? 0.0 * state.dot + dot : kept * (state.dot + move * state.sum) + dot;
    state.sum = kept * state.sum + sum;
    state.max2 = max2;
  }
}

template <bool kCap>
FASTPPO_INLINE vec16 gradient(vec16 v, const LogitMap& map, const RowCoefficients& k) {
  vec16 slope = splat(map.grad);
  if (kCap) {
    v = tanh16(v * map.to_tanh);
    slope = slope * (1.0f - v * v);
  }
  vec16 y = v * map.to_log2 - k.max2;
  ivec16 dead = y < splat(-126.0f);
  y = clamp_low(y);
  vec16 d = exp2_inside(y) * (y * k.b + k.a) * slope;
  return as_float(as_int(-d) & ~dead);  // exactly 0 where p is 0
}

template <typename T, bool kBias, bool kCap>
FASTPPO_INLINE void grad(const void* x_, void* dx_, int64_t n, const LogitMap& map, const RowCoefficients& k) {
  const T* x = static_cast<const T*>(x_);
  T* dx = static_cast<T*>(dx_);
  bool here = k.token >= 0 && k.token < n;
  vec16 target = {};
  if (here) {  // before an in-place write takes it away
    vec16 v = raw_part<T, kBias>(x, map.bias, k.token, 1);
    target = gradient<kCap>(v, map, k);
    vec16 t = kCap ? tanh16(v * map.to_tanh) : vec16{};
    target = target + k.g * map.grad * (1.0f - t * t);
  }
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    vec16 v0 = raw<T, kBias>(x, map.bias, j), v1 = raw<T, kBias>(x, map.bias, j + 16);
    store(dx + j, gradient<kCap>(v0, map, k));
    store(dx + j + 16, gradient<kCap>(v1, map, k));
  }
  for (; j < n; j += 16) {
    int64_t length = n - j < 16 ? n - j : 16;
    store_part(dx + j, gradient<kCap>(raw_part<T, kBias>(x, map.bias, j, length), map, k), length);
  }
  if (here) store_part(dx + k.token, target, 1);
}

// One body per dtype and ISA; the map's parts choose the inner loop.
#define ROW_BODIES(T)                                                                                            \
  FASTPPO_CLONES void stats_##T(const void* x, int64_t n, const LogitMap& map, RowState& state) {                \
    if (map.cap > 0 && map.bias) return stats<T, true, true>(x, n, map, state);                                  \
    if (map.cap > 0) return stats<T, false, true>(x, n, map, state);                                             \
    if (map.bias) return stats<T, true, false>(x, n, map, state);                                                \
    stats<T, false, false>(x, n, map, state);                                                                    \
  }                                                                                                              \
  FASTPPO_CLONES void grad_##T(const void* x, void* dx, int64_t n, const LogitMap& map, const RowCoefficients& k) { \
    if (map.cap > 0 && map.bias) return grad<T, true, true>(x, dx, n, map, k);                                   \
    if (map.cap > 0) return grad<T, false, true>(x, dx, n, map, k);                                              \
    if (map.bias) return grad<T, true, false>(x, dx, n, map, k);                                                 \
    grad<T, false, false>(x, dx, n, map, k);                                                                     \
  }
ROW_BODIES(float)
ROW_BODIES(bf16_t)
ROW_BODIES(fp16_t)
#undef ROW_BODIES

}  // namespace

void row_stats(const void* x, int dtype, int64_t n, const LogitMap& map, RowState& state) {
  if (dtype == kFloat32) return stats_float(x, n, map, state);
  if (dtype == kBFloat16) return stats_bf16_t(x, n, map, state);
  stats_fp16_t(x, n, map, state);
}

void row_grad(const void* x, void* dx, int dtype, int64_t n, const LogitMap& map, const RowCoefficients& k) {
  if (dtype == kFloat32) return grad_float(x, dx, n, map, k);
  if (dtype == kBFloat16) return grad_bf16_t(x, dx, n, map, k);
  grad_fp16_t(x, dx, n, map, k);
}

double row_log2(const void* x, int dtype, int64_t column, const LogitMap& map) {
  double v = load_one(x, dtype, column);
  if (map.bias) v = static_cast<float>(v) + map.bias[column];
  if (map.cap > 0) v = std::tanh(v * map.to_tanh);
  return v * map.to_log2;
}

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

void bind_logprob(pybind11::module_& m) {
  m.def("logprob_forward", &forward);
  m.def("logprob_backward", &backward);
}

}  // namespace fastppo
