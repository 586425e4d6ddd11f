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

// The sums of sixteen vectors; lane i is the sum of x[i].
FASTPPO_INLINE vec16 sum_each16(const vec16* x) {
#define ADD(a, b, low, high) (FASTPPO_SHUFFLE(ivec16, a, b, low) + FASTPPO_SHUFFLE(ivec16, a, b, high))
#define LIST(...) __VA_ARGS__
  vec16 half[8], quarter[4], eighth[2];
  // Pair p joins the vectors whose sums end in lanes that differ in bit 2, then in bit 3, 0 and 1.
  for (int p = 0; p < 8; ++p) {
    const int i = p % 2 * 8 + p / 4 + p / 2 % 2 * 2;
    half[p] = ADD(x[i], x[i + 4], LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                  LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
  }
  for (int p = 0; p < 4; ++p)
    quarter[p] = ADD(half[2 * p], half[2 * p + 1], LIST(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                     LIST(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  // quarter[2 * (i & 1) + (i >> 1 & 1)] holds x[i], x[i + 4], x[i + 8], x[i + 12], four lanes each
  for (int p = 0; p < 2; ++p)
    eighth[p] = ADD(quarter[2 * p], quarter[2 * p + 1], LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                    LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  return ADD(eighth[0], eighth[1], LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
#undef LIST
#undef ADD
}

// sum[r * N + i] = lanes of q[r] * k[t + i], not yet added up. Tokens past n repeat the last.
template <typename T, int R, int N>
FASTPPO_INLINE void products(const Tokens<T>& f, const float* q, int t, int kv, vec16* sum) {
  const int pairs = f.D / 32 * 2, full = f.D / 16;
  const T* k[N];
  for (int i = 0; i < N; ++i) k[i] = f.row(t + i < f.n ? t + i : f.n - 1, kv);
  for (int i = 0; i < R * N; ++i) sum[i] = vec16{};
  for (int d = 0; d < pairs; d += 2) {
    vec16 a0[R], a1[R];
    for (int r = 0; r < R; ++r) a0[r] = load16(q + r * f.padded + 16 * d), a1[r] = load16(q + r * f.padded + 16 * d + 16);
    for (int i = 0; i < N; ++i) {
      vec16 b0, b1;
      load_pair(k[i] + 16 * d, &b0, &b1);
      for (int r = 0; r < R; ++r) sum[r * N + i] += a0[r] * b0;
      for (int r = 0; r < R; ++r) sum[r * N + i] += a1[r] * b1;
    }
  }
  for (int d = pairs; d < full; ++d) {
    vec16 a[R];
    for (int r = 0; r < R; ++r) a[r] = load16(q + r * f.padded + 16 * d);
    for (int i = 0; i < N; ++i) {
      vec16 b = load(k[i] + 16 * d);
      for (int r = 0; r < R; ++r) sum[r * N + i] += a[r] * b;
    }
  }
  if (f.D % 16) {
    for (int i = 0; i < N; ++i) {
      vec16 b = wide8(k[i] + 16 * full);
      for (int r = 0; r < R; ++r) sum[r * N + i] += load16(q + r * f.padded + 16 * full) * b;
    }
  }
}

template <typename T, int R, int N>
FASTPPO_INLINE void score_block(const Tokens<T>& f, const float* q, int t, int kv, float* s) {
  vec16 sum[R * N];
  products<T, R, N>(f, q, t, kv, sum);
  if (R * N == 16) {
    vec16 all = sum_each16(sum);
    for (int r = 0; r < R; ++r) std::memcpy(s + r * kChunk + t, reinterpret_cast<const float*>(&all) + r * N, N * sizeof(float));
  } else {
    for (int i = 0; i < R * N; i += 4)
      *reinterpret_cast<vec4*>(s + i / N * kChunk + t + i % N) = sum4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
  }
}

// R rows and kStep tokens in blocks of N.
template <typename T, int R, int N, int kStep>
FASTPPO_INLINE void score_rows(const Tokens<T>& f, const float* q, int t, int kv, float* s) {
  for (int i = 0; i < kStep && t + i < f.n; i += N) score_block<T, R, N>(f, q, t + i, kv, s);
}

// kWide: 32 registers, hence sixteen sums at a time.
template <typename T, bool kWide>
FASTPPO_INLINE void scores_of(const Tokens<T>& f, const float* q, int rows, float* s) {
  constexpr int kStep = kWide ? 16 : 8;
  for (int t = f.begin & ~(kStep - 1); t < f.n; t += kStep)
    for (int kv = 0; kv < f.KV; ++kv) {
      f.prefetch(t, kStep, kv);
      const float* a = q + int64_t(kv) * rows * f.padded;
      float* out = s + int64_t(kv) * rows * kChunk;
      int r = 0;
      for (; r + 4 <= rows; r += 4) score_rows<T, 4, 4, kStep>(f, a + r * f.padded, t, kv, out + r * kChunk);
      for (; r + 2 <= rows; r += 2) score_rows<T, 2, kWide ? 8 : 4, kStep>(f, a + r * f.padded, t, kv, out + r * kChunk);
      for (; r < rows; ++r) score_rows<T, 1, kStep, kStep>(f, a + r * f.padded, t, kv, out + r * kChunk);
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
