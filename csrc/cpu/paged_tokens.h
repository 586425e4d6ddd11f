// What the files of paged attention share: the tokens of a chunk in a cache and vectors of any head size.
#pragma once
#include "half.h"
#include "simd.h"

namespace fastppo {

constexpr int kSplit = 256;  // kernels/_paged_attention_launch.py: SPLIT
constexpr int kChunk = 64;   // divides kSplit
constexpr int kMaxHead = 256;

// Tokens between one that is read and one that is asked for, into L2: from memory a line takes 200 ns, and L1 waits for 16 of
// them at most, L2 for 48. The processor's own prefetching stops at the end of a 4 KiB page, which is two tokens or one.
constexpr int kAhead = 16;

// The keys or values of a chunk: tokens [begin, n), all heads of a token together, as they lie in memory.
template <typename T>
struct Tokens {
  const char* const* at;  // [n + kAhead] where each token lies, and then what is read after the chunk; tokens before `begin`
  int begin, n;           // repeat the first that is read
  int KV, D, padded;  // padded: D rounded up to 16

  const T* row(int t, int kv) const { return reinterpret_cast<const T*>(at[t]) + kv * D; }
};

// Asks for the lines of `count` elements.
template <typename T>
inline __attribute__((always_inline)) void prefetch(const T* p, int count) {
  for (int i = 0; i < count; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

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
