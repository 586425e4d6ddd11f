// What every .cu file shares. The same sources also compile with a C++ compiler for tests/cuda_host (FASTPPO_CUDA_HOST),
// which runs blocks, warps and shuffles on the CPU; so launches and dynamic shared memory go through macros.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// kernel may be a template: put its name in parentheses when it holds a comma.
#ifdef FASTPPO_CUDA_HOST
#define FASTPPO_LAUNCH(grid, block, shared_bytes, stream, kernel, ...) \
  cuda_host::launch(dim3(grid), dim3(block), shared_bytes, [&] { kernel(__VA_ARGS__); })
#define FASTPPO_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_host::dynamic_shared())
#else
#define FASTPPO_LAUNCH(grid, block, shared_bytes, stream, kernel, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define FASTPPO_DYNAMIC_SHARED(type, name)                    \
  extern __shared__ __align__(16) unsigned char shared_raw[]; \
  type* name = reinterpret_cast<type*>(shared_raw)
#endif

namespace fastppo {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kNegInf = -__builtin_huge_valf();

// Text of the last launch's error, nullptr when there was none: what each launcher returns to the bindings.
inline const char* launch_error() {
  cudaError_t code = cudaGetLastError();
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

}  // namespace fastppo
