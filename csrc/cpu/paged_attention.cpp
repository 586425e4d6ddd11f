// Attention over a paged cache on a CPU: kernels/paged_attention.py has the formula.
//
// A work item is one tile of queries of one sequence over one part (kSplit tokens) of its context, or over all of them where
// the tile has several queries. Inside, chunks of kChunk tokens: scores of all rows (query, head) that share a key/value head,
// online softmax, values. Every boundary is a multiple of a constant, counted from the sequence's start, and every sum has one
// order, so a row's bits depend on its own sequence alone, and decode and prefill agree bit for bit.
// While one phase computes, it prefetches the rows of the next (values of the head, then keys of the next head): rows of
// one head are KV * D elements apart, which the hardware's prefetcher does not follow.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../ops.h"
#include "paged_attention.h"
#include "simd.h"

namespace fastppo {
namespace {

constexpr int kSplit = 256;  // kernels/paged_attention.py: SPLIT
constexpr int kChunk = 64;   // divides kSplit
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec4 __attribute__((vector_size(16), aligned(4), may_alias));

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

FASTPPO_INLINE vec16 widen_half(ivec16 h) {
  ivec16 bits = (h & 0x7fff) << 13;
  vec16 value = reinterpret_cast<vec16&>(bits) * 0x1p112f;  // rebias the exponent; also right for subnormals
  ivec16 out = reinterpret_cast<ivec16&>(value);
  ivec16 special = (h & 0x7c00) == 0x7c00;  // inf and NaN
  out = (special & (bits | 0x7f800000)) | (~special & out);
  out |= (h & 0x8000) << 16;
  return reinterpret_cast<vec16&>(out);
}

FASTPPO_INLINE vec16 wide16(const float* p) { return load16(p); }
FASTPPO_INLINE vec16 wide16(const bf16* p) { return load16_bf16(&p->bits); }
FASTPPO_INLINE vec16 wide16(const half* p) {
  return widen_half(__builtin_convertvector(*reinterpret_cast<const hvec16*>(p), ivec16));
}

// Eight elements and eight zeros: the last step of a head size that is no multiple of 16, which must not read beyond it.
template <typename T>
FASTPPO_INLINE vec16 wide8(const T* p) {
  T padded[16] = {};
  std::memcpy(padded, p, 8 * sizeof(T));
  return wide16(padded);
}

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

FASTPPO_INLINE float sum_of(vec16 v) { return sum4(v, v, v, v)[0]; }

FASTPPO_INLINE float max_of(vec16 v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
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

template <typename T>
FASTPPO_INLINE void prefetch_row(const T* p, int D) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int i = 0; i < D * static_cast<int>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// What one phase needs: rows of queries or probabilities, the tokens of a chunk (element offsets), one key/value head.
template <typename T>
struct Phase {
  const T* cache;       // at the head
  const T* next;        // the next phase's cache at its head, or nullptr
  const int64_t* at;    // [n] element offset of each token
  const int64_t* next_at;
  int n, next_n, D, padded;  // padded: D rounded up to 16
};

// s[r][t] = q[r] . k[t] for R rows, 16 / R tokens at a time. Tokens past n repeat the last.
template <typename T, int R>
FASTPPO_INLINE void score_rows(const Phase<T>& f, const float* const* q, float* s, bool prefetch) {
  constexpr int N = 16 / R;
  const int full = f.D / 16;
  for (int t = 0; t < f.n; t += N) {
    const T* k[N];
    for (int i = 0; i < N; ++i) k[i] = f.cache + f.at[std::min(t + i, f.n - 1)];
    vec16 sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = vec16{};
    for (int d = 0; d < full; ++d) {
      vec16 a[R];
      for (int r = 0; r < R; ++r) a[r] = load16(q[r] + 16 * d);
      for (int i = 0; i < N; ++i) {
        vec16 b = wide16(k[i] + 16 * d);
        for (int r = 0; r < R; ++r) sum[r * N + i] += a[r] * b;
      }
    }
    if (f.D % 16) {
      for (int i = 0; i < N; ++i) {
        vec16 b = wide8(k[i] + 16 * full);
        for (int r = 0; r < R; ++r) sum[r * N + i] += load16(q[r] + 16 * full) * b;
      }
    }
    if (prefetch && f.next)
      for (int i = t; i < std::min(t + N, f.next_n); ++i) prefetch_row(f.next + f.next_at[i], f.D);
    for (int i = 0; i < 16; i += 4) {
      vec4 four = sum4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
      float* out = s + i / N * kChunk + t + i % N;
      if (N >= 4) {
        *reinterpret_cast<vec4*>(out) = four;
      } else {  // N == 2 or 1: two or four rows in the vector
        for (int e = 0; e < 4; ++e) s[(i + e) / N * kChunk + t + (i + e) % N] = four[e];
      }
    }
  }
}

// acc[r] = acc[r] * alpha[r] + sum_t p[r][t] v[t] for W vectors of 16 dimensions from dimension d; half: 8 dimensions.
template <typename T, int R, int W, bool kHalf>
FASTPPO_INLINE void value_block(const Phase<T>& f, const float* p, const float* alpha, float* const* acc, int d,
                                int begin, bool prefetch) {
  vec16 sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = load16(acc[r] + d + 16 * w) * alpha[r];
  for (int t = begin; t < f.n; ++t) {
    const T* v = f.cache + f.at[t] + d;
    if (prefetch && t < f.next_n) prefetch_row(f.next + f.next_at[t], f.D);
    for (int w = 0; w < W; ++w) {
      vec16 b = kHalf ? wide8(v) : wide16(v + 16 * w);
      for (int r = 0; r < R; ++r) sum[r][w] += b * p[r * kChunk + t];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store16(acc[r] + d + 16 * w, sum[r][w]);
}

template <typename T, int R>
FASTPPO_INLINE void value_rows(const Phase<T>& f, const float* p, const float* alpha, float* const* acc, int begin,
                               bool prefetch) {
  constexpr int W = R == 1 ? 8 : 4;
  int d = 0;
  prefetch = prefetch && f.next;
  for (; d + 16 * W <= f.D; d += 16 * W, prefetch = false) value_block<T, R, W, false>(f, p, alpha, acc, d, begin, prefetch);
  for (; d + 32 <= f.D; d += 32, prefetch = false) value_block<T, R, 2, false>(f, p, alpha, acc, d, begin, prefetch);
  for (; d + 16 <= f.D; d += 16, prefetch = false) value_block<T, R, 1, false>(f, p, alpha, acc, d, begin, prefetch);
  if (d < f.D) value_block<T, R, 1, true>(f, p, alpha, acc, d, begin, prefetch);
}

template <typename T>
FASTPPO_INLINE void scores_of(const Phase<T>& f, const float* const* q, int rows, float* s) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) score_rows<T, 4>(f, q + r, s + r * kChunk, r == 0);
  for (; r + 2 <= rows; r += 2) score_rows<T, 2>(f, q + r, s + r * kChunk, r == 0);
  for (; r < rows; ++r) score_rows<T, 1>(f, q + r, s + r * kChunk, r == 0);
}

template <typename T>
FASTPPO_INLINE void values_of(const Phase<T>& f, const float* p, const float* alpha, float* const* acc, int rows, int begin) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) value_rows<T, 4>(f, p + r * kChunk, alpha + r, acc + r, begin, r == 0);
  for (; r + 2 <= rows; r += 2) value_rows<T, 2>(f, p + r * kChunk, alpha + r, acc + r, begin, r == 0);
  for (; r < rows; ++r) value_rows<T, 1>(f, p + r * kChunk, alpha + r, acc + r, begin, r == 0);
}

// target_clones does not take templates: one pair of functions per cache dtype.
#define FASTPPO_PHASES(T)                                                                                                  \
  FASTPPO_CLONES void scores(const Phase<T>& f, const float* const* q, int rows, float* s) { scores_of(f, q, rows, s); }   \
  FASTPPO_CLONES void values(const Phase<T>& f, const float* p, const float* alpha, float* const* acc, int rows, int begin) { \
    values_of(f, p, alpha, acc, rows, begin);                                                                              \
  }
FASTPPO_PHASES(float)
FASTPPO_PHASES(bf16)
FASTPPO_PHASES(half)
#undef FASTPPO_PHASES

struct SoftmaxArgs {
  float scale, softcap;
  int lo, hi;  // visible tokens of the chunk
};

// Turns s into e^(s - max), zero outside [lo, hi); updates the running maximum and sum. Returns the factor of what came before.
FASTPPO_CLONES float softmax_row(float* s, const SoftmaxArgs& a, float* max, float* sum) {
  const int first = a.lo & ~15, end = (a.hi + 15) & ~15;
  vec16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, none = splat(kNegInf), top = none;
  for (int t = first; t < end; t += 16) {
    vec16 x = load16(s + t) * a.scale;
    if (a.softcap > 0) x = tanh16(x / a.softcap) * a.softcap;
    vec16 at = lane + static_cast<float>(t);
    x = at < static_cast<float>(a.hi) ? x : none;
    x = at >= static_cast<float>(a.lo) ? x : none;
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

inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Round to nearest even, by hand: subnormals, overflow to infinity, NaN.
inline uint16_t to_half(float x) {
  uint32_t u, sign;
  std::memcpy(&u, &x, 4);
  sign = u >> 16 & 0x8000, u &= 0x7fffffff;
  if (u > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (u >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (u < 0x38800000) {  // subnormal in half: the float adder does the rounding
    float y, magic = 0.5f;
    std::memcpy(&y, &u, 4);
    y += magic;
    std::memcpy(&u, &y, 4);
    return static_cast<uint16_t>(sign | (u - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13));
}

inline float from_bits(const void* p, int dtype, int64_t i) {
  if (dtype == 0) return static_cast<const float*>(p)[i];
  uint32_t h = static_cast<const uint16_t*>(p)[i], u = h << 16;
  if (dtype == 2) {
    u = (h & 0x7fff) << 13;
    float y;
    std::memcpy(&y, &u, 4);
    y *= 0x1p112f;
    std::memcpy(&u, &y, 4);
    if ((h & 0x7c00) == 0x7c00) u = (h & 0x7fff) << 13 | 0x7f800000;
    u |= (h & 0x8000) << 16;
  }
  float y;
  std::memcpy(&y, &u, 4);
  return y;
}

inline void to_bits(void* p, int dtype, int64_t i, float x) {
  if (dtype == 0) static_cast<float*>(p)[i] = x;
  if (dtype == 1) static_cast<uint16_t*>(p)[i] = to_bf16(x);
  if (dtype == 2) static_cast<uint16_t*>(p)[i] = to_half(x);
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
  std::vector<const float*> q_rows;
  std::vector<float*> acc_rows;
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
    const int64_t rows = item.count * j.H;
    s.q.assign(rows * j.padded, 0.0f), s.q_rows.resize(rows), s.acc_rows.resize(rows);
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t h = 0; h < j.H; ++h) {
        float* to = s.q.data() + row_of(item, i, h) * j.padded;
        int64_t from = (item.query + i) * j.q_token + h * j.q_head;
        if (j.q_dtype == 0) std::memcpy(to, static_cast<const float*>(j.q) + from, j.D * 4);
        for (int64_t d = 0; j.q_dtype && d < j.D; ++d) to[d] = from_bits(j.q, j.q_dtype, from + d);
      }
    for (int64_t r = 0; r < rows; ++r) s.q_rows[r] = s.q.data() + r * j.padded;
  }

  void write(const Item& item, Rows done) const {
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t h = 0; h < j.H; ++h) {
        int64_t r = row_of(item, i, h), to = ((item.query + i) * j.H + h) * j.D;
        float inverse = done.sum[r] > 0 ? 1.0f / done.sum[r] : 0.0f;
        const float* acc = done.acc + r * j.padded;
        for (int64_t d = 0; d < j.D; ++d) to_bits(j.out, j.q_dtype, to + d, acc[d] * inverse);
      }
  }

  int64_t first_visible(int64_t position) const { return j.window ? std::max<int64_t>(0, position - j.window + 1) : 0; }

  void offsets(int64_t b, int64_t begin, int n, int64_t* at) const {
    const int32_t* table = j.tables + b * j.M;
    for (int t = 0; t < n; ++t) {
      int64_t token = begin + t;
      at[t] = (int64_t(table[token / j.block]) * j.block + token % j.block) * j.KV * j.D;
    }
  }

  void attend(const Item& item, int part, Rows state) {
    const int rows = static_cast<int>(item.count * group);
    for (int64_t r = 0; r < item.count * j.H; ++r) s.acc_rows[r] = state.acc + r * j.padded;
    s.s.resize(rows * kChunk), s.alpha.resize(rows);
    int64_t end = std::min<int64_t>(int64_t(part + 1) * kSplit, item.position + item.count);
    int64_t begin = std::max<int64_t>(int64_t(part) * kSplit, first_visible(item.position));
    int64_t at[2][kChunk];
    auto length = [&](int64_t c) { return static_cast<int>(std::min<int64_t>(kChunk, end - c)); };
    int64_t c = begin / kChunk * kChunk;
    int side = 0;
    if (c < end) offsets(item.b, std::max(c, begin), length(c) - int(std::max(c, begin) - c), at[0] + (std::max(c, begin) - c));
    for (; c < end; c += kChunk, side ^= 1) {
      int n = length(c), skip = static_cast<int>(std::max(begin, c) - c), next_n = 0;
      if (c + kChunk < end) offsets(item.b, c + kChunk, next_n = length(c + kChunk), at[side ^ 1]);
      for (int i = 0; i < skip; ++i) at[side][i] = at[side][skip];  // never looked at: a page before the window may be gone
      for (int64_t kv = 0; kv < j.KV; ++kv) {
        bool last = kv + 1 == j.KV;
        const T* k = static_cast<const T*>(j.k) + kv * j.D;
        const T* v = static_cast<const T*>(j.v) + kv * j.D;
        Phase<T> keys{k, v, at[side], at[side], n, n, int(j.D), j.padded};
        const T* next = last ? static_cast<const T*>(j.k) : k + j.D;
        Phase<T> vals{v, last && !next_n ? nullptr : next, at[side], at[side ^ last], n, last ? next_n : n, int(j.D), j.padded};
        scores(keys, &s.q_rows[kv * rows], rows, s.s.data());
        for (int r = 0; r < rows; ++r) softmax(item, c, n, kv, r, state);
        values(vals, s.s.data(), s.alpha.data(), &s.acc_rows[kv * rows], rows, skip);
      }
    }
  }

  void softmax(const Item& item, int64_t c, int n, int64_t kv, int r, Rows state) {
    int64_t position = item.position + r / group;
    SoftmaxArgs args{j.scale, j.softcap, static_cast<int>(std::max<int64_t>(0, first_visible(position) - c)),
                     static_cast<int>(std::min<int64_t>(n, position + 1 - c))};
    float* row = s.s.data() + r * kChunk;
    int64_t at = kv * item.count * group + r;
    s.alpha[r] = 1.0f;
    if (args.lo < args.hi) {
      s.alpha[r] = softmax_row(row, args, state.max + at, state.sum + at);
    } else {
      std::fill(row, row + kChunk, 0.0f);
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
  int64_t workers = std::min<int64_t>(n, omp_in_parallel() ? 1 : omp_get_max_threads());
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
  if (cache_dtype == 1) run<bf16>(job);
  if (cache_dtype == 2) run<half>(job);
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
        for (int64_t d = 0; d < D; ++d) to_bits(to, cache_dtype, d, from_bits(from, dtype, d));
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
