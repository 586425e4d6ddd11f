// What the files of paged attention share: the tokens of a chunk in a cache and vectors of any head size.
#pragma once
#include "half.h"
#include "simd.h"

namespace fastppo {

constexpr int kSplit = 256;  // kernels/_paged_attention_launch.py: SPLIT
constexpr int kChunk = 64;   // divides kSplit
constexpr int kMaxHead = 256;

// The keys or values of a chunk: tokens [begin, n), all heads of a token together, as they lie in memory.
template <typename T>
struct Tokens {
  const T* cache;
  const int64_t* at;  // [n] byte offset of each token; those before `begin` repeat the first that is read
  int begin, n;
  const T* next;  // what will be read after this chunk: its tokens are fetched while the last of this one compute
  const int64_t* next_at;
  int next_n;
  int KV, D, padded;  // padded: D rounded up to 16

  static const T* row_in(const T* base, int64_t offset) { return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + offset); }
  const T* row(int t, int kv) const { return row_in(cache, at[t]) + kv * D; }
  int64_t token_bytes() const { return int64_t(KV) * D * sizeof(T); }

  // The hardware's prefetcher stops at the end of a 4 KiB page, so rows some tokens ahead are asked for by hand. Not further: one
  // chunk ahead, into L2, made the whole a tenth slower.
  inline __attribute__((always_inline)) void prefetch(int t, int count, int kv) const {
    constexpr int kAhead = 8;
    for (int i = t + kAhead; i < t + kAhead + count; ++i) {
      const T* row = i < n ? row_in(cache, at[i]) : i - n < next_n ? row_in(next, next_at[i - n]) : nullptr;
      if (!row) return;
      const char* bytes = reinterpret_cast<const char*>(row + kv * D);
      for (int byte = 0; byte < D * static_cast<int>(sizeof(T)); byte += 64) __builtin_prefetch(bytes + byte, 0, 3);
    }
  }
};

// s[row][t] = q[row] . k[t]: row = kv * rows + r, each `padded` floats of q and kChunk of s. Scores of tokens that are not in
// [begin, n) may be anything.
#define FASTPPO_PAGED_PHASES(T)                                                \
  void scores(const Tokens<T>& f, const float* q, int rows, float* s);         \
  /* acc[row] = acc[row] * alpha[row] + sum over [begin, n) of p[row][t] v[t] */ \
  void values(const Tokens<T>& f, const float* p, const float* alpha, float* acc, int rows);
FASTPPO_PAGED_PHASES(float)
FASTPPO_PAGED_PHASES(bf16_t)
FASTPPO_PAGED_PHASES(fp16_t)
#undef FASTPPO_PAGED_PHASES

// bfloat16 comes apart with a shift and a mask where widening costs four shuffles: even and odd elements, so rows of q and acc
// that meet bfloat16 keep each full block of 32 in that order (paged_rows.h: interleave).
template <typename T>
constexpr bool interleaved = false;
template <>
constexpr bool interleaved<bf16_t> = true;

// 32 elements as two vectors.
template <typename T>
FASTPPO_INLINE void load_pair(const T* p, vec16* a, vec16* b) {
  *a = load(p), *b = load(p + 16);
}
FASTPPO_INLINE void load_pair(const bf16_t* p, vec16* a, vec16* b) {
  ivec16 both = *reinterpret_cast<const ivec16*>(p);
  *a = as_float(both << 16), *b = as_float(both & static_cast<int32_t>(0xffff0000));
}

// Eight elements and eight zeros: the last step of a head size that is no multiple of 16, which must not read beyond it.
#if defined(__clang__) || __GNUC__ >= 12
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
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

}  // namespace fastppo
