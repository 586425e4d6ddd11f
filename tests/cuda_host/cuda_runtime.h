// A stand-in for CUDA's runtime that runs kernels on the CPU: one fiber per thread of a block, one block at a time.
//
// Covers: grids and blocks of any shape, __shared__ (static and dynamic), __syncthreads, __syncwarp, warp shuffles,
// votes and reductions over full or partial warps, atomics, vector types, fast math by the exact functions, bf16/fp16.
// Does not cover: races (fibers switch only at barriers, so a missing barrier may pass: compute-sanitizer's racecheck
// is for that), memory consistency between blocks (the last-block counters of gae.cu run one block after the other),
// addresses outside an allocation (memcheck's) and unaligned vector loads, tensor cores, TMA, cp.async, clusters, limits on
// registers and shared memory, streams, launch errors, and timing. Inline PTX (ex2, cvt in logprob.cu) does not run: its plain C++ stand-in does,
// so the hardware's approximate functions (ex2.approx, __expf, __logf: 2 ulp or so) are replaced by exact ones. A barrier that
// not every thread reaches aborts with a message.
//
// By file: gae.cu and paged_attention.cu run whole; logprob.cu without its PTX; sampling.cu whole, its atomics in one fixed order.
// The Triton kernels do not pass here: the interpreter runs them (tests/test_triton_interpreter.py), without their compiler.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __constant__ static
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define CUDA_HOST_VECTOR(type, name)                                                        \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                  \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  static inline name##2 make_##name##2(type a, type b) { return {a, b}; }                   \
  static inline name##4 make_##name##4(type a, type b, type c, type d) { return {a, b, c, d}; }
CUDA_HOST_VECTOR(float, float)
CUDA_HOST_VECTOR(int, int)
CUDA_HOST_VECTOR(unsigned, uint)
CUDA_HOST_VECTOR(unsigned short, ushort)
CUDA_HOST_VECTOR(double, double)
CUDA_HOST_VECTOR(long long, longlong)
#undef CUDA_HOST_VECTOR

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
static inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <typename F>
static inline cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) { return cudaSuccess; }
static inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
static inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? 4 : 232448;
  return cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

enum class Wait { none, block, warp, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait waits = Wait::none;
  unsigned mask = 0;  // lanes that a warp barrier waits for
  uint3 index;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> slots;  // one per thread: what it hands to its warp
  ucontext_t scheduler;
  int current = 0;
  int arrivals = 0;  // for __syncthreads_or and friends
  std::function<void()> body;
  std::vector<uint64_t> dynamic;
};

extern thread_local Block* block;
void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body);
void wait(Wait what, unsigned mask);
inline void* dynamic_shared() { return block->dynamic.data(); }
inline int lane() { return block->current % warpSize; }

// Every lane of `mask` leaves a value, then `pick` chooses whose to take (a lane number).
template <typename T, typename Pick>
T exchange(unsigned mask, T value, Pick pick) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  int warp_start = block->current / warpSize * warpSize;
  std::memcpy(&block->slots[block->current], &value, sizeof(T));
  wait(Wait::warp, mask);
  T out = value;
  int from = pick(lane());
  int threads = static_cast<int>(block->fibers.size());
  if (from >= 0 && from < warpSize && warp_start + from < threads)
    std::memcpy(&out, &block->slots[warp_start + from], sizeof(T));
  wait(Wait::warp, mask);
  return out;
}

template <typename T, typename Fold>
T fold(unsigned mask, T value, Fold f) {
  int warp_start = block->current / warpSize * warpSize;
  std::memcpy(&block->slots[block->current], &value, sizeof(T));
  wait(Wait::warp, mask);
  T out{};
  bool first = true;
  for (int i = 0; i < warpSize && warp_start + i < static_cast<int>(block->fibers.size()); ++i) {
    if (!(mask >> i & 1)) continue;
    T each;
    std::memcpy(&each, &block->slots[warp_start + i], sizeof(T));
    out = first ? each : f(out, each);
    first = false;
  }
  wait(Wait::warp, mask);
  return out;
}

}  // namespace cuda_host

static inline void __syncthreads() { cuda_host::wait(cuda_host::Wait::block, 0); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::wait(cuda_host::Wait::warp, mask); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  return cuda_host::exchange(mask, x, [=](int lane) { return lane / width * width + (from % width + width) % width; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32) {
  return cuda_host::exchange(mask, x, [=](int lane) { return (lane ^ with) / width == lane / width ? lane ^ with : lane; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
  return cuda_host::exchange(mask, x, [=](int lane) { return lane % width + (int)by < width ? lane + (int)by : lane; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
  return cuda_host::exchange(mask, x, [=](int lane) { return lane % width >= (int)by ? lane - (int)by : lane; });
}
static inline unsigned __ballot_sync(unsigned mask, int yes) {
  unsigned bit = yes ? 1u << cuda_host::lane() : 0u;
  return cuda_host::fold(mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
static inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
static inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, !yes) == 0; }
static inline unsigned __activemask() { return 0xffffffffu; }
#define CUDA_HOST_REDUCE(name, expression)                            \
  template <typename T>                                               \
  T __reduce_##name##_sync(unsigned mask, T x) {                      \
    return cuda_host::fold(mask, x, [](T a, T b) { return expression; }); \
  }
CUDA_HOST_REDUCE(add, a + b)
CUDA_HOST_REDUCE(max, a > b ? a : b)
CUDA_HOST_REDUCE(min, a < b ? a : b)
CUDA_HOST_REDUCE(or, a | b)
CUDA_HOST_REDUCE(and, a & b)
#undef CUDA_HOST_REDUCE
static inline int __syncthreads_or(int yes) {
  cuda_host::Block* b = cuda_host::block;
  __syncthreads();
  b->arrivals = 0;
  __syncthreads();
  if (yes) b->arrivals = 1;
  __syncthreads();
  int out = b->arrivals;
  __syncthreads();
  return out;
}
static inline int __syncthreads_and(int yes) { return !__syncthreads_or(!yes); }

template <typename T>
T atomicAdd(T* p, T x) { T old = *p; *p = old + x; return old; }
template <typename T>
T atomicMax(T* p, T x) { T old = *p; *p = old > x ? old : x; return old; }
template <typename T>
T atomicMin(T* p, T x) { T old = *p; *p = old < x ? old : x; return old; }
template <typename T>
T atomicOr(T* p, T x) { T old = *p; *p = old | x; return old; }
template <typename T>
T atomicExch(T* p, T x) { T old = *p; *p = x; return old; }
template <typename T>
T atomicCAS(T* p, T expected, T x) { T old = *p; if (old == expected) *p = x; return old; }

template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
void __stcs(T* p, T x) { *p = x; }
// Macros: glibc declares functions of these names.
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
static inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
static inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
template <typename T>
static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
static inline T max(T a, T b) { return a < b ? b : a; }
