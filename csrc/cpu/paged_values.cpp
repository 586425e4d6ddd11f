// The values of paged attention: acc[row] = acc[row] * alpha[row] + sum over tokens of p[row][t] v[t], in float. Sixteen tokens at
// a time, so that all heads of a token are read together; sums stay in registers over them.
#include "paged_tokens.h"

namespace fastppo {
namespace {

// Tokens [t, end), W vectors of 16 dimensions (kHalf: 8) from d. alpha: with the chunk's first tokens, else nullptr.
template <typename T, int R, int W, bool kHalf, bool kFetch>
FASTPPO_INLINE void value_block(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int t, int end, int kv, int d) {
  vec16 sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = load16(acc + r * f.padded + d + 16 * w) * (alpha ? alpha[r] : 1.0f);
  for (; t < end; ++t) {
    const T* v = f.row(t, kv) + d;
    if (kFetch) prefetch(f.row(t + kAhead, kv) + d, kHalf ? 8 : 16 * W);
    vec16 b[W];
    if (kHalf) {
      b[0] = wide8(v);
    } else if (W == 1) {
      b[0] = load(v);
    } else {
      for (int w = 0; w + 1 < W; w += 2) load_pair(v + 16 * w, &b[w], &b[w + 1]);
    }
    for (int w = 0; w < W; ++w)
      for (int r = 0; r < R; ++r) sum[r][w] += b[w] * p[r * kChunk + t];
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store16(acc + r * f.padded + d + 16 * w, sum[r][w]);
}

template <typename T, bool kWide, int R, bool kFetch>
FASTPPO_INLINE void value_rows(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int t, int end, int kv) {
  constexpr int W = kWide ? (R == 4 ? 4 : 8) : 4 / R;
  int d = 0;
  for (; d + 16 * W <= f.D; d += 16 * W) value_block<T, R, W, false, kFetch>(f, p, alpha, acc, t, end, kv, d);
  for (; d + 32 <= f.D && W > 2; d += 32) value_block<T, R, 2, false, kFetch>(f, p, alpha, acc, t, end, kv, d);
  for (; d + 16 <= f.D; d += 16) value_block<T, R, 1, false, kFetch>(f, p, alpha, acc, t, end, kv, d);
  if (d < f.D) value_block<T, R, 1, true, kFetch>(f, p, alpha, acc, t, end, kv, d);
}

// The first rows of a head fetch what comes later.
template <typename T, bool kWide, int R>
FASTPPO_INLINE int value_head(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int t, int end, int kv, int r, int rows) {
  for (; r + R <= rows; r += R) {
    const float* old = t == f.begin ? alpha + r : nullptr;
    if (r == 0) value_rows<T, kWide, R, true>(f, p, old, acc, t, end, kv);
    if (r > 0) value_rows<T, kWide, R, false>(f, p + r * kChunk, old, acc + r * f.padded, t, end, kv);
  }
  return r;
}

// kWide: 32 registers of sixteen floats.
template <typename T, bool kWide>
FASTPPO_INLINE void values_of(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows) {
  constexpr int kStep = 16;
  for (int t = f.begin; t < f.n; t += kStep)
    for (int kv = 0; kv < f.KV; ++kv) {
      const int end = t + kStep < f.n ? t + kStep : f.n;
      const int64_t row = int64_t(kv) * rows;
      const float *a = p + row * kChunk, *old = alpha + row;
      float* to = acc + row * f.padded;
      int r = kWide ? value_head<T, kWide, 4>(f, a, old, to, t, end, kv, 0, rows) : 0;
      r = value_head<T, kWide, 2>(f, a, old, to, t, end, kv, r, rows);
      value_head<T, kWide, 1>(f, a, old, to, t, end, kv, r, rows);
    }
}

}  // namespace

// target_clones does not take templates: a group of functions per cache dtype.
#define FASTPPO_VALUES(T)                                                                                                \
  FASTPPO_AVX512 static void values_wide(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows) { \
    values_of<T, true>(f, p, alpha, acc, rows);                                                                          \
  }                                                                                                                      \
  FASTPPO_CLONES static void values_narrow(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows) { \
    values_of<T, false>(f, p, alpha, acc, rows);                                                                         \
  }                                                                                                                      \
  void values(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows) {                            \
    return has_avx512() ? values_wide(f, p, alpha, acc, rows) : values_narrow(f, p, alpha, acc, rows);                   \
  }
FASTPPO_VALUES(float)
FASTPPO_VALUES(bf16_t)
FASTPPO_VALUES(fp16_t)
#undef FASTPPO_VALUES

}  // namespace fastppo
