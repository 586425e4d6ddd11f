// Sixteen-lane float vectors on GCC/Clang vector extensions, run-time ISA dispatch, and a parallel loop.
//
// vec16 is one AVX-512 register, two AVX2 registers or four SSE registers, as the clone that uses it is compiled.
// FASTPPO_CLONES on a function makes one body per ISA and picks at load time, so no file needs -march flags.
// Everything a clone calls must be FASTPPO_INLINE: a call that is not inlined runs the baseline's code.
// OpenMP stays outside clones (GCC outlines the parallel body for the baseline): write a cloned row function and
// call it from parallel_for.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>

#include <omp.h>

#include "team.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) && !defined(__clang__))
#define FASTPPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTPPO_CLONES
#endif
// For bodies that pay only with AVX-512: FASTPPO_AVX512 on the function, has_avx512() before the call.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPPO_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define FASTPPO_AVX512
#endif
#define FASTPPO_INLINE static inline __attribute__((always_inline))

namespace fastppo {

typedef float vec16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t bvec16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t sbvec16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t hvec16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef double dvec8 __attribute__((vector_size(64), aligned(8), may_alias));

inline bool has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512cd");
  return has;
#else
  return false;
#endif
}

FASTPPO_INLINE vec16 splat(float x) { return vec16{} + x; }
FASTPPO_INLINE vec16 load16(const float* p) { return *reinterpret_cast<const vec16*>(p); }
FASTPPO_INLINE void store16(float* p, vec16 x) { *reinterpret_cast<vec16*>(p) = x; }
FASTPPO_INLINE vec16 max16(vec16 a, vec16 b) { return a > b ? a : b; }

FASTPPO_INLINE vec16 as_float(ivec16 x) { return reinterpret_cast<vec16&>(x); }
FASTPPO_INLINE ivec16 as_int(vec16 x) { return reinterpret_cast<ivec16&>(x); }

// All bits of a lane set where its byte isn't 0.
FASTPPO_INLINE ivec16 true16(const uint8_t* p) {
  return __builtin_convertvector(static_cast<sbvec16>(*reinterpret_cast<const bvec16*>(p) != 0), ivec16);
}

// bf16 is the upper half of a float.
FASTPPO_INLINE vec16 load16_bf16(const uint16_t* p) {
  hvec16 h = *reinterpret_cast<const hvec16*>(p);
  ivec16 i = __builtin_convertvector(h, ivec16) << 16;
  return reinterpret_cast<vec16&>(i);
}

// e^x for x <= 88, relative error below 2e-7; x below -87.3 (and -inf) gives 0.
FASTPPO_INLINE vec16 exp16(vec16 x) {
  const vec16 low = splat(-87.33654f);
  ivec16 alive = x > low;
  vec16 y = x > low ? x : low;
  y = y < splat(88.0f) ? y : splat(88.0f);
  vec16 shifted = y * 1.44269504f + 12582912.0f;  // round to nearest by the float's own rounding at 1.5 * 2^23
  vec16 n = shifted - 12582912.0f;
  vec16 r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec16 scale = (__builtin_convertvector(n, ivec16) + 127) << 23;
  p = p * reinterpret_cast<vec16&>(scale);
  ivec16 bits = reinterpret_cast<ivec16&>(p) & alive;
  return reinterpret_cast<vec16&>(bits);
}

// Threads that a parallel_for would use here.
inline int num_threads() {
  if (const Team* team = Team::current()) return team->size();
  return omp_in_parallel() ? 1 : omp_get_max_threads();
}

// fn(begin, end) over [0, n) on torch's OpenMP threads; serial where n * work_per_item is too small to share.
template <typename F>
inline void parallel_for(int64_t n, int64_t work_per_item, const F& fn) {
  constexpr int64_t kSerialWork = 1 << 15, kSerialTeamWork = 1 << 12;
  int threads = num_threads();
  if (Team* team = Team::current(); team && n > 1 && n * work_per_item >= kSerialTeamWork) {
    auto run = [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); };
    return team->loop(run, &fn, n);
  }
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1 || Team::current() || n * work_per_item < kSerialWork) {
    if (n > 0) fn(int64_t{0}, n);
    return;
  }
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    int64_t t = omp_get_thread_num(), k = omp_get_num_threads();
    int64_t begin = n * t / k, end = n * (t + 1) / k;
    if (begin < end) failure.keep([&] { fn(begin, end); });
  }
  failure.raise();
}

// fn(item) for every item in [0, n), each taken by the next free thread; serial as parallel_for.
template <typename F>
inline void parallel_items(int64_t n, int64_t work_per_item, const F& fn) {
  std::atomic<int64_t> next{0};
  const int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads(), workers = threads < n ? threads : n;
  if (workers <= 0) return;
  parallel_for(workers, n * work_per_item / workers, [&](int64_t begin, int64_t end) {
    (void)begin, (void)end;  // a serial call has one range and takes everything as well
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) fn(i);
  });
}

}  // namespace fastppo
