// Attention over a paged cache on a CPU: kernels/paged_attention.py has the formula.
//
// A work item is one tile of queries of one sequence over one part (kSplit tokens) of its context, or over all of them where
// the tile has several queries. Inside, chunks of kChunk tokens: scores of all rows (query, head), online softmax, values.
// Every boundary is a multiple of a constant, counted from the sequence's start, and every sum has one order, so a row's
// bits depend on its own sequence alone, and decode and prefill agree bit for bit.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../ops.h"
#include "half.h"
#include "paged_attention.h"
#include "simd.h"

namespace fastppo {
namespace {

constexpr int kSplit = 256;  // kernels/paged_attention.py: SPLIT
constexpr int kChunk = 64;   // divides kSplit
constexpr int kMaxHead = 256;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec4 __attribute__((vector_size(16), aligned(4), may_alias));

// Eight elements and eight zeros: the last step of a head size that is no multiple of 16, which must not read beyond it.
#if defined(__clang__) || __GNUC__ >= 12
typedef uint16_t hvec8 __attribute__((vector_size(16), aligned(2), may_alias));
FASTPPO_INLINE vec16 wide8(const float* p) {
  vec8 low = *reinterpret_cast<const vec8*>(p);
  return __builtin_shufflevector(low, vec8{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
template <typename T>
FASTPPO_INLINE vec16 wide8(const T* p) {
  hvec8 low = *reinterpret_cast<const hvec8*>(p);
  hvec16 all = __builtin_shufflevector(low, hvec8{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return load(reinterpret_cast<const T*>(&all));
}
#else
template <typename T>
FASTPPO_INLINE vec16 wide8(const T* p) {
  T padded[16] = {};
  std::memcpy(padded, p, 8 * sizeof(T));
  return load(padded);
}
#endif

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

FASTPPO_INLINE vec4 shuffle4(vec4 a, vec4 b, ivec4 at) {
#if defined(__clang__)
  return vec4{at[0] < 4 ? a[at[0]] : b[at[0] - 4], at[1] < 4 ? a[at[1]] : b[at[1] - 4],
              at[2] < 4 ? a[at[2]] : b[at[2] - 4], at[3] < 4 ? a[at[3]] : b[at[3] - 4]};
#else
  return __builtin_shuffle(a, b, at);
#endif
}

// The sums of four vectors, as one vector.
FASTPPO_INLINE vec4 sum4(vec16 a, vec16 b, vec16 c, vec16 d) {
  vec4 x = fold(a), y = fold(b), z = fold(c), w = fold(d);
  vec4 xy = shuffle4(x, y, ivec4{0, 4, 1, 5}) + shuffle4(x, y, ivec4{2, 6, 3, 7});
  vec4 zw = shuffle4(z, w, ivec4{0, 4, 1, 5}) + shuffle4(z, w, ivec4{2, 6, 3, 7});
  return shuffle4(xy, zw, ivec4{0, 1, 4, 5}) + shuffle4(xy, zw, ivec4{2, 3, 6, 7});
}

FASTPPO_INLINE float sum_of(vec16 v) {
  vec4 f = fold(v);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

FASTPPO_INLINE float max_of(vec16 v) {
  vec4 q[4];
  std::memcpy(q, &v, sizeof v);
  vec4 a = q[0] > q[1] ? q[0] : q[1], b = q[2] > q[3] ? q[2] : q[3], m = a > b ? a : b;
  float x = m[0] > m[1] ? m[0] : m[1], y = m[2] > m[3] ? m[2] : m[3];
  return x > y ? x : y;
}

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

// The keys or values of a chunk. Tokens are read in order, all heads of a token together, as they lie in memory.
template <typename T>
struct Tokens {
  const T* cache;
  const int64_t* at;  // [n] element offset of each token
  int begin, n;
  const T* next;  // what will be read after this chunk: its tokens are prefetched while the last of this one compute
  const int64_t* next_at;
  int next_n;
  int KV, D, padded;  // padded: D rounded up to 16

  // The hardware's prefetcher stops at the end of a 4 KiB page, so rows some tokens ahead are asked for by hand.
  inline __attribute__((always_inline)) void prefetch(int t, int count, int kv) const {
    constexpr int kAhead = 8;
    for (int i = t + kAhead; i < t + kAhead + count; ++i) {
      const T* row = i < n ? cache + at[i] : i - n < next_n ? next + next_at[i - n] : nullptr;
      if (!row) return;
      const char* bytes = reinterpret_cast<const char*>(row + kv * D);
      for (int byte = 0; byte < D * static_cast<int>(sizeof(T)); byte += 64) __builtin_prefetch(bytes + byte, 0, 3);
    }
  }
};

// 32 elements as two vectors. bfloat16 comes apart with a shift and a mask where widening costs four shuffles: even and odd
// elements, so rows of q and acc that meet bfloat16 keep each full block of 32 in that order (see interleaved).
template <typename T>
FASTPPO_INLINE void load_pair(const T* p, vec16* a, vec16* b) {
  *a = load(p), *b = load(p + 16);
}
FASTPPO_INLINE void load_pair(const bf16_t* p, vec16* a, vec16* b) {
  ivec16 both = *reinterpret_cast<const ivec16*>(p);
  *a = as_float(both << 16), *b = as_float(both & static_cast<int32_t>(0xffff0000));
}
template <typename T>
constexpr bool interleaved = false;
template <>
constexpr bool interleaved<bf16_t> = true;

// s[r][t] = q[r] . k[t] for R rows and N tokens of one head. Tokens past n repeat the last.
template <typename T, int R, int N>
FASTPPO_INLINE void score_block(const Tokens<T>& f, const float* q, int t, int kv, float* s) {
  const int pairs = f.D / 32 * 2, full = f.D / 16;
  const T* k[N];
  for (int i = 0; i < N; ++i) k[i] = f.cache + f.at[t + i < f.n ? t + i : f.n - 1] + kv * f.D;
  vec16 sum[R * N];
  for (int i = 0; i < R * N; ++i) sum[i] = vec16{};
  for (int d = 0; d < pairs; d += 2) {
    vec16 b0[N], b1[N];
    for (int i = 0; i < N; ++i) load_pair(k[i] + 16 * d, &b0[i], &b1[i]);
    for (int r = 0; r < R; ++r) {
      vec16 a0 = load16(q + r * f.padded + 16 * d), a1 = load16(q + r * f.padded + 16 * d + 16);
      for (int i = 0; i < N; ++i) sum[r * N + i] += a0 * b0[i];
      for (int i = 0; i < N; ++i) sum[r * N + i] += a1 * b1[i];
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
  for (int i = 0; i < R * N; i += 4)
    *reinterpret_cast<vec4*>(s + i / N * kChunk + t + i % N) = sum4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
}

// Scores of all rows; row = kv * rows + r, each `padded` floats of q and kChunk of s.
template <typename T>
FASTPPO_INLINE void scores_of(const Tokens<T>& f, const float* q, int rows, float* s) {
  const int step = rows == 1 ? 8 : 4;
  for (int t = f.begin & ~7; t < f.n; t += step)
    for (int kv = 0; kv < f.KV; ++kv) {
      f.prefetch(t, step, kv);
      const float* a = q + int64_t(kv) * rows * f.padded;
      float* out = s + int64_t(kv) * rows * kChunk;
      int r = 0;
      if (rows == 1) score_block<T, 1, 8>(f, a, t, kv, out), ++r;
      for (; r + 4 <= rows; r += 4) score_block<T, 4, 4>(f, a + r * f.padded, t, kv, out + r * kChunk);
      for (; r + 2 <= rows; r += 2) score_block<T, 2, 4>(f, a + r * f.padded, t, kv, out + r * kChunk);
      for (; r < rows; ++r) score_block<T, 1, 4>(f, a + r * f.padded, t, kv, out + r * kChunk);
    }
}

// acc[r] = acc[r] * alpha[r] + sum_t p[r][t] v[t] over tokens [t, end), W vectors of 16 dimensions (kHalf: 8) from d.
template <typename T, int R, int W, bool kHalf>
FASTPPO_INLINE void value_block(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int t, int end, int kv, int d) {
  vec16 sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = load16(acc + r * f.padded + d + 16 * w) * (alpha ? alpha[r] : 1.0f);
  for (; t < end; ++t) {
    const T* v = f.cache + f.at[t] + kv * f.D + d;
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

// target_clones does not take templates: one pair of functions per cache dtype.
#define FASTPPO_PHASES(T)                                                                                      \
  FASTPPO_CLONES void scores(const Tokens<T>& f, const float* q, int rows, float* s) { scores_of(f, q, rows, s); } \
  FASTPPO_CLONES void values(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows) {       \
    values_of(f, p, alpha, acc, rows);                                                                         \
  }
FASTPPO_PHASES(float)
FASTPPO_PHASES(bf16_t)
FASTPPO_PHASES(fp16_t)
#undef FASTPPO_PHASES

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

// n elements between a float row and an array of any dtype.
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

struct SoftmaxArgs {
  float scale, softcap;
  int lo, hi;  // visible tokens of the chunk
};

// Turns s into e^(s - max), zero outside [lo, hi); updates the running maximum and sum. Returns the factor of what came before.
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
  float before = *max, now = std::max(before, max_of(top));
  vec16 total = {};
  for (int t = 0; t < kChunk; t += 16) {
    vec16 e = {};
    if (t >= first && t < end) e = exp16(load16(s + t) - now);
    store16(s + t, e);
    total += e;
  }
  float alpha = before == kNegInf ? 0.0f : exp16(splat(before - now))[0];
  *max = now;
  *sum = *sum * alpha + sum_of(total);
  return alpha;
}

// acc = acc * old + part * new
FASTPPO_CLONES void merge_row(float* acc, const float* part, int padded, float* max, float* sum, float part_max, float part_sum) {
  float now = std::max(*max, part_max);
  float keep = *max == kNegInf ? 0.0f : exp16(splat(*max - now))[0], add = exp16(splat(part_max - now))[0];
  for (int d = 0; d < padded; d += 16) store16(acc + d, load16(acc + d) * keep + load16(part + d) * add);
  *sum = *sum * keep + part_sum * add;
  *max = now;
}

struct Job {
  const void* q;
  int64_t q_token, q_head;
  int q_dtype;
  const void *k, *v;
  int cache_dtype;
  const int32_t* tables;
  int64_t M;
  const int32_t *lens, *starts;
  void* out;
  int64_t B, H, KV, D, block;
  float scale, softcap;
  int64_t window;
  int padded;
};

struct Item {
  int64_t b, query;   // first query, in [0, N)
  int position, count;  // position of that query, and queries in the tile
  int part, part_end;   // parts of the context, in units of kSplit
  int64_t partial;      // where in the workspace the part goes; -1: the item writes its result
};

struct Rows {  // running softmax of some rows
  float *acc, *max, *sum;
  void clear(int64_t rows, int padded) const {
    std::fill(acc, acc + rows * padded, 0.0f), std::fill(max, max + rows, kNegInf), std::fill(sum, sum + rows, 0.0f);
  }
};

struct Scratch {
  std::vector<float> q, s, alpha, part, whole;
  static Rows rows_in(std::vector<float>& buffer, int64_t rows, int padded) {
    buffer.resize(rows * (padded + 2));
    return {buffer.data(), buffer.data() + rows * padded, buffer.data() + rows * (padded + 1)};
  }
};

template <typename T>
class Worker {
 public:
  Worker(const Job& job, Scratch& scratch) : j(job), s(scratch), group(j.H / j.KV) {}

  void run(const Item& item, float* workspace) {
    const int64_t rows = item.count * j.H;
    load_queries(item);
    Rows part = Scratch::rows_in(s.part, rows, j.padded);
    if (item.partial >= 0) {
      float* p = workspace + item.partial * j.H * (j.padded + 2);
      part = {p, p + j.H * j.padded, p + j.H * (j.padded + 1)};
    }
    if (item.part_end - item.part <= 1) {
      part.clear(rows, j.padded);
      if (item.part < item.part_end) attend(item, item.part, part);
      if (item.partial < 0) write(item, part);
      return;
    }
    Rows whole = Scratch::rows_in(s.whole, rows, j.padded);
    whole.clear(rows, j.padded);
    for (int i = item.part; i < item.part_end; ++i) {
      part.clear(rows, j.padded);
      attend(item, i, part);
      merge(whole, part, rows);
    }
    write(item, whole);
  }

  void merge(Rows whole, Rows part, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      if (part.sum[r] > 0)
        merge_row(whole.acc + r * j.padded, part.acc + r * j.padded, j.padded, whole.max + r, whole.sum + r, part.max[r], part.sum[r]);
  }

  // Merges the parts of one decode query, which lie one after the other in the workspace.
  void merge_parts(const Item& first, int parts, float* workspace) {
    Rows whole = Scratch::rows_in(s.whole, j.H, j.padded);
    whole.clear(j.H, j.padded);
    for (int i = 0; i < parts; ++i) {
      float* p = workspace + (first.partial + i) * j.H * (j.padded + 2);
      merge(whole, {p, p + j.H * j.padded, p + j.H * (j.padded + 1)}, j.H);
    }
    write(first, whole);
  }

 private:
  // Rows of a key/value head lie together: row = (kv * count + query) * group + head in group.
  int64_t row_of(const Item& item, int64_t i, int64_t h) const {
    return (h / group * item.count + i) * group + h % group;
  }

  void load_queries(const Item& item) {
    s.q.assign(item.count * j.H * j.padded, 0.0f);
    float row[kMaxHead];
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t h = 0; h < j.H; ++h) {
        float* to = s.q.data() + row_of(item, i, h) * j.padded;
        widen(j.q, j.q_dtype, (item.query + i) * j.q_token + h * j.q_head, j.D, interleaved<T> ? row : to);
        for (int64_t d = 0; interleaved<T> && d < j.D; ++d) to[place(d)] = row[d];
      }
  }

  void write(const Item& item, Rows done) const {
    float row[kMaxHead];
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t h = 0; h < j.H; ++h) {
        int64_t r = row_of(item, i, h);
        float inverse = done.sum[r] > 0 ? 1.0f / done.sum[r] : 0.0f;
        const float* acc = done.acc + r * j.padded;
        for (int64_t d = 0; interleaved<T> && d < j.D; ++d) row[d] = acc[place(d)];
        narrow(interleaved<T> ? row : acc, inverse, j.D, j.q_dtype, j.out, ((item.query + i) * j.H + h) * j.D);
      }
  }

  // Where dimension d lies in an interleaved row.
  int64_t place(int64_t d) const { return d < j.D / 32 * 32 ? d / 32 * 32 + d % 2 * 16 + d % 32 / 2 : d; }

  int64_t first_visible(int64_t position) const { return j.window ? std::max<int64_t>(0, position - j.window + 1) : 0; }

  // Element offsets of the tokens of the chunk at c; returns how many there are. Tokens before `begin` are never
  // looked at (a page before the window may be gone): they repeat the first that is.
  int offsets(int64_t b, int64_t c, int64_t begin, int64_t end, int64_t* at) const {
    const int32_t* table = j.tables + b * j.M;
    int n = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kChunk, end - c)));
    for (int t = 0; t < n; ++t) {
      int64_t token = std::max(begin, c + t);
      at[t] = (int64_t(table[token / j.block]) * j.block + token % j.block) * j.KV * j.D;
    }
    return n;
  }

  void attend(const Item& item, int part, Rows state) {
    const int rows = static_cast<int>(item.count * group);
    s.s.resize(j.KV * rows * kChunk), s.alpha.resize(j.KV * rows);
    const int64_t end = std::min<int64_t>(int64_t(part + 1) * kSplit, item.position + item.count);
    const int64_t begin = std::max<int64_t>(int64_t(part) * kSplit, first_visible(item.position));
    const T *k = static_cast<const T*>(j.k), *v = static_cast<const T*>(j.v);
    const int KV = static_cast<int>(j.KV), D = static_cast<int>(j.D);
    int64_t at[2][kChunk];
    int side = 0;
    int64_t c = begin / kChunk * kChunk;
    int n = offsets(item.b, c, begin, end, at[0]);
    for (; c < end; c += kChunk, side ^= 1) {
      int skip = static_cast<int>(std::max(begin, c) - c), next_n = offsets(item.b, c + kChunk, begin, end, at[side ^ 1]);
      scores(Tokens<T>{k, at[side], skip, n, v + 0, at[side], n, KV, D, j.padded}, s.q.data(), rows, s.s.data());
      for (int kv = 0; kv < KV; ++kv)
        for (int r = 0; r < rows; ++r) softmax(item, c, n, kv * rows + r, r, state);
      values(Tokens<T>{v, at[side], skip, n, k, at[side ^ 1], next_n, KV, D, j.padded}, s.s.data(), s.alpha.data(), state.acc, rows);
      n = next_n;
    }
  }

  void softmax(const Item& item, int64_t c, int n, int row, int r, Rows state) {
    int64_t position = item.position + r / group;
    SoftmaxArgs args{j.scale, j.softcap, static_cast<int>(std::max<int64_t>(0, first_visible(position) - c)),
                     static_cast<int>(std::min<int64_t>(n, position + 1 - c))};
    float* p = s.s.data() + int64_t(row) * kChunk;
    s.alpha[row] = 1.0f;
    if (args.lo < args.hi) {
      s.alpha[row] = softmax_row(p, args, state.max + row, state.sum + row);
    } else {
      std::fill(p, p + kChunk, 0.0f);
    }
  }

  const Job& j;
  Scratch& s;
  const int64_t group;
};

// Cuts the batch into items; `merges` are the decode queries with several parts.
void plan(const Job& j, std::vector<Item>& items, std::vector<Item>& merges, int64_t* partials, int64_t* work) {
  const int tile = static_cast<int>(std::max<int64_t>(1, 8192 / (j.H * j.padded)));
  *partials = *work = 0;
  for (int64_t b = 0; b < j.B; ++b) {
    int64_t first = j.starts ? j.starts[b] : b, count = j.starts ? j.starts[b + 1] - first : 1;
    for (int64_t i = 0; i < count; i += tile) {
      int n = static_cast<int>(std::min<int64_t>(tile, count - i));
      int position = static_cast<int>(j.lens[b] - count + i);
      int64_t seen = j.window ? std::max<int64_t>(0, position - j.window + 1) : 0;
      int part = static_cast<int>(seen / kSplit), end = (position + n + kSplit - 1) / kSplit;
      *work += int64_t(n) * (position + n - seen) * j.H * j.D;
      bool split = count == 1 && end - part > 1;
      if (!split) {
        items.push_back({b, first + i, position, n, part, std::max(part, end), -1});
        continue;
      }
      merges.push_back({b, first + i, position, 1, part, end, *partials});
      for (int p = part; p < end; ++p) items.push_back({b, first + i, position, 1, p, p + 1, (*partials)++});
    }
  }
}

template <typename T>
void run(const Job& j) {
  static thread_local std::vector<Item> items, merges;
  static thread_local std::vector<float> workspace;
  items.clear(), merges.clear();
  int64_t partials, work;
  plan(j, items, merges, &partials, &work);
  workspace.resize(std::max<int64_t>(workspace.size(), partials * j.H * (j.padded + 2)));
  const std::vector<Item>&todo = items, &split = merges;
  float* space = workspace.data();
  const int64_t n = static_cast<int64_t>(todo.size());
  std::atomic<int64_t> next{0};
  // Items differ in length, so threads take the next one; what an item computes does not depend on who takes it.
  int64_t workers = std::min<int64_t>(n, num_threads());
  parallel_for(workers, work / std::max<int64_t>(workers, 1), [&](int64_t, int64_t) {
    thread_local Scratch scratch;
    Worker<T> worker(j, scratch);
    for (int64_t i; (i = next.fetch_add(1)) < n;) worker.run(todo[i], space);
  });
  parallel_for(static_cast<int64_t>(split.size()), j.H * j.padded * 4, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Worker<T> worker(j, scratch);
    for (int64_t i = begin; i < end; ++i) worker.merge_parts(split[i], split[i].part_end - split[i].part, space);
  });
}

}  // namespace

void paged_attention(uintptr_t q, int64_t q_token, int64_t q_head, int q_dtype, uintptr_t k, uintptr_t v, int cache_dtype,
                     uintptr_t tables, int64_t M, uintptr_t lens, uintptr_t starts, uintptr_t out, int64_t B, int64_t H,
                     int64_t KV, int64_t D, int64_t block, double scale, int64_t window, double softcap) {
  Job job{reinterpret_cast<const void*>(q), q_token, q_head, q_dtype,
          reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), cache_dtype,
          reinterpret_cast<const int32_t*>(tables), M,
          reinterpret_cast<const int32_t*>(lens), reinterpret_cast<const int32_t*>(starts),
          reinterpret_cast<void*>(out), B, H, KV, D, block,
          static_cast<float>(scale), static_cast<float>(softcap), window, static_cast<int>((D + 15) / 16 * 16)};
  pybind11::gil_scoped_release release;
  if (cache_dtype == 0) run<float>(job);
  if (cache_dtype == 1) run<bf16_t>(job);
  if (cache_dtype == 2) run<fp16_t>(job);
}

void cache_write(uintptr_t k, uintptr_t v, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, int dtype,
                 uintptr_t k_cache, uintptr_t v_cache, int cache_dtype, uintptr_t slots, int64_t N, int64_t KV, int64_t D) {
  const int64_t* slot = reinterpret_cast<const int64_t*>(slots);
  const int64_t in = dtype == 0 ? 4 : 2, out = cache_dtype == 0 ? 4 : 2;
  auto one = [&](uintptr_t source, int64_t token, int64_t head, uintptr_t cache, int64_t n) {
    for (int64_t h = 0; h < KV; ++h) {
      const char* from = reinterpret_cast<const char*>(source) + (n * token + h * head) * in;
      char* to = reinterpret_cast<char*>(cache) + (slot[n] * KV + h) * D * out;
      if (dtype == cache_dtype) {
        std::memcpy(to, from, D * in);
      } else {
        float row[kMaxHead];
        widen(from, dtype, 0, D, row), narrow(row, 1.0f, D, cache_dtype, to, 0);
      }
    }
  };
  pybind11::gil_scoped_release release;
  parallel_for(N, KV * D, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (slot[n] < 0) continue;
      one(k, k_token, k_head, k_cache, n);
      one(v, v_token, v_head, v_cache, n);
    }
  });
}

void bind_paged_attention(pybind11::module_& m) {
  m.def("paged_attention", &paged_attention, "kernels/paged_attention.py");
  m.def("cache_write", &cache_write, "kernels/paged_attention.py");
}

}  // namespace fastppo
