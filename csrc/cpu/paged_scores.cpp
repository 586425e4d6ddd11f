// Scores of paged attention: dot products of the queries of a group with the keys of a chunk, in float. A block of rows and
// tokens keeps one vector of partial sums per pair; with AVX-512 sixteen of them are added up together, in 30 shuffles where
// four at a time take 56 (3 to 5 % of a float decode with groups of four). Both ways add lanes by halves (8, 4, 2, 1 apart), so the bits are the same.
#include "paged_tokens.h"

namespace fastppo {
namespace {

typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec4 __attribute__((vector_size(16), aligned(4), may_alias));

// Lane i + lane i + 8, then i + lane i + 4. GCC 11 and older have no __builtin_shufflevector.
FASTPPO_INLINE vec4 fold(vec16 v) {
#if defined(__clang__) || __GNUC__ >= 12
  vec8 s = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
#else
  vec4 q[4];
  std::memcpy(q, &v, sizeof v);
  return (q[0] + q[2]) + (q[1] + q[3]);
#endif
}

#if defined(__clang__)
#define FASTPPO_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTPPO_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

// The sums of four vectors, as one vector.
FASTPPO_INLINE vec4 sum4(vec16 a, vec16 b, vec16 c, vec16 d) {
  vec4 x = fold(a), y = fold(b), z = fold(c), w = fold(d);
  vec4 xy = FASTPPO_SHUFFLE(ivec4, x, y, 0, 4, 1, 5) + FASTPPO_SHUFFLE(ivec4, x, y, 2, 6, 3, 7);
  vec4 zw = FASTPPO_SHUFFLE(ivec4, z, w, 0, 4, 1, 5) + FASTPPO_SHUFFLE(ivec4, z, w, 2, 6, 3, 7);
  return FASTPPO_SHUFFLE(ivec4, xy, zw, 0, 1, 4, 5) + FASTPPO_SHUFFLE(ivec4, xy, zw, 2, 3, 6, 7);
}

struct Sixteen {
  float x[16];
};

// The sums of sixteen vectors; lane i is the sum of x[i]. Each step joins two vectors: half of either as it lies (a blend,
// which any port of vectors can do) and the other halves crosswise (a shuffle, which one port alone can).
FASTPPO_INLINE vec16 sum_each16(const vec16* x) {
#define ADD(a, b, blend, cross) (FASTPPO_SHUFFLE(ivec16, a, b, blend) + FASTPPO_SHUFFLE(ivec16, a, b, cross))
#define LIST(...) __VA_ARGS__
  vec16 half[8], quarter[4], eighth[2];
  // Pair p joins the vectors whose sums end in lanes that differ in bit 3, then in bit 2, 1 and 0.
  for (int p = 0; p < 8; ++p) {
    const int i = p % 2 * 4 + p / 4 + p / 2 % 2 * 2;
    half[p] = ADD(x[i], x[i + 8], LIST(0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31),
                  LIST(8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23));
  }
  for (int p = 0; p < 4; ++p)
    quarter[p] = ADD(half[2 * p], half[2 * p + 1], LIST(0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31),
                     LIST(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27));
  // quarter[2 * (i & 1) + (i >> 1 & 1)] holds x[i], x[i + 4], x[i + 8], x[i + 12], four lanes each
  for (int p = 0; p < 2; ++p)
    eighth[p] = ADD(quarter[2 * p], quarter[2 * p + 1], LIST(0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31),
                    LIST(2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29));
  return ADD(eighth[0], eighth[1], LIST(0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31),
             LIST(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30));
#undef LIST
#undef ADD
}

FASTPPO_INLINE Sixteen sum_each(const vec16* x, bool wide) {
  Sixteen out;
  if (wide) store16(out.x, sum_each16(x));
  for (int i = 0; i < 16 && !wide; i += 4) *reinterpret_cast<vec4*>(out.x + i) = sum4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  return out;
}

// sum[r * S + i] = lanes of q[r] * k[t + i], not yet added up. Tokens past n repeat the last.
template <typename T, int R, int N, int S, bool kFetch>
FASTPPO_INLINE void products(const Tokens<T>& f, const float* q, int t, int kv, vec16* sum) {
  const int pairs = f.D / 32 * 2, full = f.D / 16;
  const T *k[N], *ahead[N];
  for (int i = 0; i < N; ++i) {
    const int token = t + i < f.n ? t + i : f.n - 1;
    k[i] = f.row(token, kv), ahead[i] = f.row(token + kAhead, kv);
  }
  for (int i = 0; i < R * N; ++i) sum[i / N * S + i % N] = vec16{};
  for (int d = 0; d < pairs; d += 2) {
    vec16 a0[R], a1[R];
    for (int r = 0; r < R; ++r) a0[r] = load16(q + r * f.padded + 16 * d), a1[r] = load16(q + r * f.padded + 16 * d + 16);
    for (int i = 0; i < N; ++i) {
      vec16 b0, b1;
      load_pair(k[i] + 16 * d, &b0, &b1);
      if (kFetch) prefetch(ahead[i] + 16 * d, 32);
      for (int r = 0; r < R; ++r) sum[r * S + i] += a0[r] * b0;
      for (int r = 0; r < R; ++r) sum[r * S + i] += a1[r] * b1;
    }
  }
  for (int d = pairs; d < full; ++d) {
    vec16 a[R];
    for (int r = 0; r < R; ++r) a[r] = load16(q + r * f.padded + 16 * d);
    for (int i = 0; i < N; ++i) {
      vec16 b = load(k[i] + 16 * d);
      if (kFetch) prefetch(ahead[i] + 16 * d, 16);
      for (int r = 0; r < R; ++r) sum[r * S + i] += a[r] * b;
    }
  }
  if (f.D % 16) {
    for (int i = 0; i < N; ++i) {
      vec16 b = wide8(k[i] + 16 * full);
      if (kFetch) prefetch(ahead[i] + 16 * full, 8);
      for (int r = 0; r < R; ++r) sum[r * S + i] += load16(q + r * f.padded + 16 * full) * b;
    }
  }
}

constexpr int kStep = 16;  // tokens: all heads of these are read before the next ones are

// R rows and kStep tokens, sixteen sums at a time, of which N tokens' are made together.
template <typename T, bool kWide, int R, bool kFetch>
FASTPPO_INLINE void score_rows(const Tokens<T>& f, const float* q, int t, int kv, float* s) {
  constexpr int kTokens = 16 / R, N = !kWide ? 2 : kTokens < 8 ? kTokens : 8;
  for (int end = t + kStep < f.n ? t + kStep : f.n; t < end; t += kTokens) {
    vec16 sum[16];
    for (int i = 0; i < kTokens; i += N) products<T, R, N, kTokens, kFetch>(f, q, t + i, kv, sum + i);
    const Sixteen all = sum_each(sum, kWide);
    for (int r = 0; r < R; ++r) std::memcpy(s + r * kChunk + t, all.x + r * kTokens, kTokens * sizeof(float));
  }
}

// The first rows of a head fetch what comes later.
template <typename T, bool kWide, int R>
FASTPPO_INLINE int score_head(const Tokens<T>& f, const float* q, int t, int kv, float* s, int r, int rows) {
  for (; r + R <= rows; r += R) {
    if (r == 0) score_rows<T, kWide, R, true>(f, q, t, kv, s);
    if (r > 0) score_rows<T, kWide, R, false>(f, q + r * f.padded, t, kv, s + r * kChunk);
  }
  return r;
}

// kWide: 32 registers of sixteen floats, hence four rows and four tokens together.
template <typename T, bool kWide>
FASTPPO_INLINE void scores_of(const Tokens<T>& f, const float* q, int rows, float* s) {
  for (int t = f.begin & ~(kStep - 1); t < f.n; t += kStep)
    for (int kv = 0; kv < f.KV; ++kv) {
      const float* a = q + int64_t(kv) * rows * f.padded;
      float* out = s + int64_t(kv) * rows * kChunk;
      int r = kWide ? score_head<T, kWide, 4>(f, a, t, kv, out, 0, rows) : 0;
      r = score_head<T, kWide, 2>(f, a, t, kv, out, r, rows);
      score_head<T, kWide, 1>(f, a, t, kv, out, r, rows);
    }
}

}  // namespace

// target_clones does not take templates: a group of functions per cache dtype.
#define FASTPPO_SCORES(T)                                                                                                \
  FASTPPO_AVX512 static void scores_wide(const Tokens<T>& f, const float* q, int rows, float* s) { scores_of<T, true>(f, q, rows, s); }    \
  FASTPPO_CLONES static void scores_narrow(const Tokens<T>& f, const float* q, int rows, float* s) { scores_of<T, false>(f, q, rows, s); } \
  void scores(const Tokens<T>& f, const float* q, int rows, float* s) {                                                  \
    return has_avx512() ? scores_wide(f, q, rows, s) : scores_narrow(f, q, rows, s);                                     \
  }
FASTPPO_SCORES(float)
FASTPPO_SCORES(bf16_t)
FASTPPO_SCORES(fp16_t)
#undef FASTPPO_SCORES

}  // namespace fastppo
