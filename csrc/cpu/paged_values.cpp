// The values of paged attention: acc[row] = acc[row] * alpha[row] + sum over tokens of p[row][t] v[t], in float. Eight tokens at
// a time, so that all heads of a token are read together; sums stay in registers over them.
#include "paged_tokens.h"

namespace fastppo {
namespace {

// Tokens [t, end), W vectors of 16 dimensions (kHalf: 8) from d. alpha: with the chunk's first tokens, else nullptr.
template <typename T, int R, int W, bool kHalf>
FASTPPO_INLINE void value_block(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int t, int end, int kv, int d) {
  vec16 sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = load16(acc + r * f.padded + d + 16 * w) * (alpha ? alpha[r] : 1.0f);
  for (; t < end; ++t) {
    const T* v = f.row(t, kv) + d;
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

template <typename T, int R>
FASTPPO_INLINE void value_rows(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int t, int end, int kv) {
  constexpr int W = R == 1 ? 8 : 4;
  int d = 0;
  for (; d + 16 * W <= f.D; d += 16 * W) value_block<T, R, W, false>(f, p, alpha, acc, t, end, kv, d);
  for (; d + 32 <= f.D; d += 32) value_block<T, R, 2, false>(f, p, alpha, acc, t, end, kv, d);
  for (; d + 16 <= f.D; d += 16) value_block<T, R, 1, false>(f, p, alpha, acc, t, end, kv, d);
  if (d < f.D) value_block<T, R, 1, true>(f, p, alpha, acc, t, end, kv, d);
}

template <typename T>
FASTPPO_INLINE void values_of(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows) {
  constexpr int kStep = 8;
  for (int t = f.begin; t < f.n; t += kStep)
    for (int kv = 0; kv < f.KV; ++kv) {
      f.prefetch(t, kStep, kv);
      int end = t + kStep < f.n ? t + kStep : f.n, r = 0;
      const int64_t row = int64_t(kv) * rows;
      for (; r + 4 <= rows; r += 4)
        value_rows<T, 4>(f, p + (row + r) * kChunk, t == f.begin ? alpha + row + r : nullptr, acc + (row + r) * f.padded, t, end, kv);
      for (; r < rows; ++r)
        value_rows<T, 1>(f, p + (row + r) * kChunk, t == f.begin ? alpha + row + r : nullptr, acc + (row + r) * f.padded, t, end, kv);
    }
}

}  // namespace

// target_clones does not take templates: one function per cache dtype.
#define FASTPPO_VALUES(T)                                                                                              \
  FASTPPO_CLONES void values(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows) {           \
    values_of(f, p, alpha, acc, rows);                                                                                 \
  }
FASTPPO_VALUES(float)
FASTPPO_VALUES(bf16_t)
FASTPPO_VALUES(fp16_t)
#undef FASTPPO_VALUES

}  // namespace fastppo
