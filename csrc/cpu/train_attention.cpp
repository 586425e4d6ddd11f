// Causal attention over packed sequences for training on a CPU: one task per (sequence, key/value head), whose keys and
// values stay in the cache. Rotary embedding is applied on the way in and taken back from the gradients on the way out.
//   S = scale rot(q) rot(k)^T,  P = softmax(S over j <= i, i - j < window),  out = P v,  lse = log sum exp S
//   dV = P^T dO,  dS = P (dO v^T - rowsum(dO O)),  dQ = scale dS k,  dK = scale dS^T q     (rot, then rot^T)
// 4 T^2 D FLOPs (half of it masked) forward and 10 backward per head and sequence; S is never kept. T: float or bf16 in
// memory; all sums are float. fastppo/engine/kernels.py has the signatures.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../ops.h"
#include "half.h"
#include "lanes.h"
#include "train.h"

namespace fastppo {
namespace {

constexpr int64_t kQueries = 32;  // query rows at a time
constexpr int64_t kStrip = 8;     // rows of a product at a time: of those queries, or of keys

struct Attention {
  const void *q, *k, *v, *out, *dout;  // T, rows of tokens; heads side by side
  void *dq, *dk, *dv, *to;             // to: the forward's output
  float* lse;                          // [N, H]
  const float *cos, *sin;              // [N, D] or null
  const int32_t* starts;               // [B + 1]
  int64_t H, K, D, q_stride, kv_stride, o_stride, window;  // window 0: none
  float scale;
};

FASTPPO_INLINE float get(const float* p) { return *p; }
FASTPPO_INLINE float get(const bf16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
FASTPPO_INLINE void set(float* p, float x) { *p = x; }
FASTPPO_INLINE void set(bf16_t* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One row of D numbers, rotated by its token's angle where there is one, times `scale`, into to[0, D).
template <typename T>
FASTPPO_INLINE void load_row(const Attention& f, const T* from, int64_t token, bool rotate, float scale, float* to) {
  const int64_t D = f.D, half = D / 2;
  if (!rotate || !f.cos) {
    for (int64_t d = 0; d < D; ++d) to[d] = get(from + d) * scale;
    return;
  }
  const float *c = f.cos + token * D, *s = f.sin + token * D;
  for (int64_t d = 0; d < half; ++d) {
    const float a = get(from + d), b = get(from + half + d);
    to[d] = (a * c[d] - b * s[d]) * scale;
    to[half + d] = (b * c[half + d] + a * s[half + d]) * scale;
  }
}

// The transposed rotation of a gradient, times `scale`.
template <typename T>
FASTPPO_INLINE void store_row(const Attention& f, const float* from, int64_t token, bool rotate, float scale, T* to) {
  const int64_t D = f.D, half = D / 2;
  if (!rotate || !f.cos) {
    for (int64_t d = 0; d < D; ++d) set(to + d, from[d] * scale);
    return;
  }
  const float *c = f.cos + token * D, *s = f.sin + token * D;
  for (int64_t d = 0; d < half; ++d) {
    const float a = from[d], b = from[half + d];
    set(to + d, (a * c[d] + b * s[half + d]) * scale);
    set(to + half + d, (b * c[half + d] - a * s[d]) * scale);
  }
}

// C [R, 16 W] (+)= A [R, depth] B [depth, 16 W]; A's element (r, k) at a[r * a_row + k * a_col].
template <int R, int W>
FASTPPO_INLINE void block(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t depth, float* c,
                          int64_t ldc, bool add) {
  vec16 acc[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) acc[r][w] = add ? load16(c + r * ldc + w * 16) : vec16{};
  for (int64_t k = 0; k < depth; ++k) {
    vec16 bw[W];
    for (int w = 0; w < W; ++w) bw[w] = load16(b + k * ldb + w * 16);
    for (int r = 0; r < R; ++r) {
      const float x = a[r * a_row + k * a_col];
      for (int w = 0; w < W; ++w) acc[r][w] += x * bw[w];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store16(c + r * ldc + w * 16, acc[r][w]);
}

template <int R>
FASTPPO_INLINE void strip(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t depth, float* c,
                          int64_t ldc, int64_t columns, bool add) {
  int64_t j = 0;
  for (; j + 64 <= columns; j += 64) block<R, 4>(a, a_row, a_col, b + j, ldb, depth, c + j, ldc, add);
  for (; j + 32 <= columns; j += 32) block<R, 2>(a, a_row, a_col, b + j, ldb, depth, c + j, ldc, add);
  for (; j < columns; j += 16) block<R, 1>(a, a_row, a_col, b + j, ldb, depth, c + j, ldc, add);
}

// columns: a multiple of 16
FASTPPO_INLINE void product(int64_t rows, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t depth,
                            float* c, int64_t ldc, int64_t columns, bool add) {
  int64_t r = 0;
  if (columns <= 32)  // few columns: more rows, so that enough sums are on their way at a time
    for (; r + 8 <= rows; r += 8) strip<8>(a + r * a_row, a_row, a_col, b, ldb, depth, c + r * ldc, ldc, columns, add);
  for (; r + 4 <= rows; r += 4) strip<4>(a + r * a_row, a_row, a_col, b, ldb, depth, c + r * ldc, ldc, columns, add);
  for (; r < rows; ++r) strip<1>(a + r * a_row, a_row, a_col, b, ldb, depth, c + r * ldc, ldc, columns, add);
}

// s[0, n) of query i against keys first, first + 1, ...: exp(s - m), 0 where i may not see the key. Returns m + log of the sum.
// given: -m instead of the row's own maximum (backward: m = lse, so that the row becomes P).
FASTPPO_INLINE float softmax_row(float* s, int64_t n, int64_t first, int64_t i, int64_t window, bool given, float m, float* sum_out) {
  const int64_t begin = std::max<int64_t>(0, window ? i - window + 1 - first : 0), end = std::min(n, i + 1 - first);
  for (int64_t j = 0; j < begin; ++j) s[j] = -INFINITY;
  for (int64_t j = end; j < n; ++j) s[j] = -INFINITY;
  if (!given) {
    vec16 top = splat(-INFINITY);
    for (int64_t j = 0; j < n; j += 16) top = max16(load16(s + j), top);
    m = most16(top);
  }
  vec16 sum{};
  for (int64_t j = 0; j < n; j += 16) {
    const vec16 e = exp16(load16(s + j) - m);
    store16(s + j, e);
    sum += e;
  }
  *sum_out = given ? 1.0f : sum16(sum);
  return given ? m : m + std::log(*sum_out);
}

// ds = p (dp - delta)
FASTPPO_INLINE void dsoftmax_row(const float* p, float* dp, int64_t n, float delta) {
  for (int64_t j = 0; j < n; j += 16) store16(dp + j, load16(p + j) * (load16(dp + j) - delta));
}

struct Scratch {
  std::vector<float> kt, k, v, vt, q, s, o, dp, dq, dk, dv;
};

FASTPPO_INLINE int64_t up16(int64_t n) { return (n + 15) / 16 * 16; }

// to [D, ld] = the transpose of from [T, ldf]
FASTPPO_INLINE void transpose(const float* from, int64_t T, int64_t D, int64_t ldf, float* to, int64_t ld) {
  for (int64_t d = 0; d < D; ++d)
    for (int64_t t = 0; t < T; ++t) to[d * ld + t] = from[t * ldf + d];
}

template <typename T>
FASTPPO_INLINE void load_keys(const Attention& f, int64_t start, int64_t n, int64_t head, Scratch& w, bool backward) {
  const int64_t D = f.D, Dp = up16(D), Tp = up16(n);
  w.k.assign(n * Dp, 0.0f), w.v.assign(n * Dp, 0.0f), w.kt.assign(D * Tp, 0.0f);
  for (int64_t t = 0; t < n; ++t) {
    const int64_t at = (start + t) * f.kv_stride + head * D;
    load_row(f, static_cast<const T*>(f.k) + at, start + t, true, 1.0f, &w.k[t * Dp]);
    load_row(f, static_cast<const T*>(f.v) + at, start + t, false, 1.0f, &w.v[t * Dp]);
  }
  transpose(w.k.data(), n, D, Dp, w.kt.data(), Tp);
  if (!backward) return;
  w.vt.assign(D * Tp, 0.0f), w.dk.assign(n * Dp, 0.0f), w.dv.assign(n * Dp, 0.0f);
  transpose(w.v.data(), n, D, Dp, w.vt.data(), Tp);
}

// Keys that a block of queries from i0 on may see: from `first`, a multiple of 16, on.
FASTPPO_INLINE int64_t first_key(const Attention& f, int64_t i0) {
  return f.window ? std::max<int64_t>(0, i0 - f.window + 1) / 16 * 16 : 0;
}

template <typename T>
FASTPPO_INLINE void forward_task(const Attention& f, int64_t b, int64_t kv, Scratch& w) {
  const int64_t start = f.starts[b], n = f.starts[b + 1] - start, D = f.D, Dp = up16(D), Tp = up16(n), group = f.H / f.K;
  load_keys<T>(f, start, n, kv, w, false);
  w.q.assign(kQueries * Dp, 0.0f), w.s.resize(kQueries * Tp), w.o.resize(kQueries * Dp);
  for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
    for (int64_t i0 = 0; i0 < n; i0 += kQueries) {
      const int64_t rows = std::min(kQueries, n - i0);
      const int64_t first = first_key(f, i0);
      for (int64_t r = 0; r < rows; ++r)
        load_row(f, static_cast<const T*>(f.q) + (start + i0 + r) * f.q_stride + head * D, start + i0 + r, true, f.scale, &w.q[r * Dp]);
      float sums[kQueries] = {};
      for (int64_t s = 0; s < rows; s += kStrip) {
        const int64_t strip = std::min(kStrip, rows - s), keys = i0 + s + strip - first;  // that its last query sees
        product(strip, &w.q[s * Dp], Dp, 1, w.kt.data() + first, Tp, D, &w.s[s * Tp], Tp, up16(keys), false);
        for (int64_t r = s; r < s + strip; ++r)
          f.lse[(start + i0 + r) * f.H + head] = softmax_row(&w.s[r * Tp], up16(keys), first, i0 + r, f.window, false, 0, sums + r);
        product(strip, &w.s[s * Tp], Tp, 1, &w.v[first * Dp], Dp, keys, &w.o[s * Dp], Dp, Dp, false);
      }
      for (int64_t r = 0; r < rows; ++r)
        store_row(f, &w.o[r * Dp], 0, false, 1.0f / sums[r], static_cast<T*>(f.to) + (start + i0 + r) * f.o_stride + head * D);
    }
  }
}

template <typename T>
FASTPPO_INLINE void backward_block(const Attention& f, int64_t start, int64_t n, int64_t head, int64_t i0, Scratch& w) {
  const int64_t D = f.D, Dp = up16(D), Tp = up16(n), rows = std::min(kQueries, n - i0);
  const int64_t first = first_key(f, i0), seen = i0 + rows - first;  // keys that the block's last query sees
  float deltas[kQueries];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = start + i0 + r, at = token * f.o_stride + head * D;
    load_row(f, static_cast<const T*>(f.q) + token * f.q_stride + head * D, token, true, f.scale, &w.q[r * Dp]);
    load_row(f, static_cast<const T*>(f.dout) + at, token, false, 1.0f, &w.o[r * Dp]);
    float delta = 0;
    for (int64_t d = 0; d < D; ++d) delta += w.o[r * Dp + d] * get(static_cast<const T*>(f.out) + at + d);
    deltas[r] = delta;
  }
  for (int64_t s = 0; s < rows; s += kStrip) {
    const int64_t strip = std::min(kStrip, rows - s), keys = i0 + s + strip - first;
    product(strip, &w.q[s * Dp], Dp, 1, w.kt.data() + first, Tp, D, &w.s[s * Tp], Tp, up16(keys), false);
    product(strip, &w.o[s * Dp], Dp, 1, w.vt.data() + first, Tp, D, &w.dp[s * Tp], Tp, up16(keys), false);
    for (int64_t r = s; r < s + strip; ++r) {
      float unused;
      softmax_row(&w.s[r * Tp], up16(keys), first, i0 + r, f.window, true, f.lse[(start + i0 + r) * f.H + head], &unused);
      dsoftmax_row(&w.s[r * Tp], &w.dp[r * Tp], up16(keys), deltas[r]);
    }
    product(strip, &w.dp[s * Tp], Tp, 1, &w.k[first * Dp], Dp, keys, &w.dq[s * Dp], Dp, Dp, false);
  }
  for (int64_t j = 0; j < seen; j += kStrip) {
    // queries before the strip of key j see none of these keys; S was not even computed there
    const int64_t from = std::max<int64_t>(0, first + j - i0) / kStrip * kStrip, depth = rows - from, strip = std::min(kStrip, seen - j);
    product(strip, &w.s[from * Tp + j], 1, Tp, &w.o[from * Dp], Dp, depth, &w.dv[(first + j) * Dp], Dp, Dp, true);
    product(strip, &w.dp[from * Tp + j], 1, Tp, &w.q[from * Dp], Dp, depth, &w.dk[(first + j) * Dp], Dp, Dp, true);  // q carries the scale
  }
  for (int64_t r = 0; r < rows; ++r)
    store_row(f, &w.dq[r * Dp], start + i0 + r, true, f.scale, static_cast<T*>(f.dq) + (start + i0 + r) * f.q_stride + head * D);
}

template <typename T>
FASTPPO_INLINE void backward_task(const Attention& f, int64_t b, int64_t kv, Scratch& w) {
  const int64_t start = f.starts[b], n = f.starts[b + 1] - start, D = f.D, Dp = up16(D), Tp = up16(n), group = f.H / f.K;
  load_keys<T>(f, start, n, kv, w, true);
  w.q.assign(kQueries * Dp, 0.0f), w.o.assign(kQueries * Dp, 0.0f), w.dq.resize(kQueries * Dp);
  w.s.resize(kQueries * Tp), w.dp.resize(kQueries * Tp);
  for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
    for (int64_t i0 = 0; i0 < n; i0 += kQueries) backward_block<T>(f, start, n, head, i0, w);
  for (int64_t t = 0; t < n; ++t) {
    const int64_t at = (start + t) * f.kv_stride + kv * D;
    store_row(f, &w.dk[t * Dp], start + t, true, 1.0f, static_cast<T*>(f.dk) + at);
    store_row(f, &w.dv[t * Dp], start + t, false, 1.0f, static_cast<T*>(f.dv) + at);
  }
}

FASTPPO_CLONES void forward_float(const Attention& f, int64_t b, int64_t kv, Scratch& w) { forward_task<float>(f, b, kv, w); }
FASTPPO_CLONES void forward_bf16(const Attention& f, int64_t b, int64_t kv, Scratch& w) { forward_task<bf16_t>(f, b, kv, w); }
FASTPPO_CLONES void backward_float(const Attention& f, int64_t b, int64_t kv, Scratch& w) { backward_task<float>(f, b, kv, w); }
FASTPPO_CLONES void backward_bf16(const Attention& f, int64_t b, int64_t kv, Scratch& w) { backward_task<bf16_t>(f, b, kv, w); }

}  // namespace

void train_attention(const std::array<uintptr_t, 12>& a, const std::array<int64_t, 8>& sizes, double scale, bool bf16) {
  auto p = [&](int i) { return reinterpret_cast<void*>(a[i]); };
  auto floats = [&](int i) { return reinterpret_cast<float*>(a[i]); };
  const auto [B, H, K, D, q_stride, kv_stride, o_stride, window] = sizes;
  const Attention f = {p(0), p(1), p(2), p(3), p(8), p(9), p(10), p(11), p(3), floats(4), floats(5), floats(6),
                       static_cast<const int32_t*>(p(7)), H, K, D, q_stride, kv_stride, o_stride, window, float(scale)};
  auto task = a[8] ? (bf16 ? backward_bf16 : backward_float) : (bf16 ? forward_bf16 : forward_float);
  const int64_t tokens = B ? f.starts[B] / B + 1 : 0, heads = K;
  parallel_for(B * K, tokens * tokens * D * (H / K), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t i = begin; i < end; ++i) task(f, i / heads, i % heads, scratch);
  });
}

void bind_train_attention(pybind11::module_& m) {
  m.def("train_attention", &train_attention, "fastppo/engine/kernels.py", pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastppo
