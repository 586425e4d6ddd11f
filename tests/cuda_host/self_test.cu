// Kernels that check the executor itself: barriers, shuffles, shared memory, atomics, deadlock.
#include <pybind11/pybind11.h>

#include "common.cuh"

namespace fastppo {

// Sum of each row by shuffles and shared memory; one block a row.
__global__ void row_sum(const float* x, float* out, int n) {
  __shared__ float parts[kWarp];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    sum = threadIdx.x < blockDim.x / kWarp ? parts[threadIdx.x] : 0.0f;
    sum = warp_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// Reverses n values through dynamic shared memory.
__global__ void reverse(float* x, int n) {
  FASTPPO_DYNAMIC_SHARED(float, held);
  held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = held[n - 1 - threadIdx.x];
}

// Lane numbers through every shuffle, 8 to a group.
__global__ void shuffles(int* out) {
  int lane = threadIdx.x;
  out[lane] = __shfl_sync(kAllLanes, lane, 3, 8);
  out[32 + lane] = __shfl_xor_sync(kAllLanes, lane, 5);
  out[64 + lane] = __shfl_down_sync(kAllLanes, lane, 2, 8);
  out[96 + lane] = __shfl_up_sync(kAllLanes, lane, 2, 8);
  out[128 + lane] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
}

__global__ void broken(int* out) {
  if (threadIdx.x < 16) __syncwarp();
  __syncthreads();
  out[0] = 1;
}

}  // namespace fastppo

PYBIND11_MODULE(_cuda_host_self_test, m) {
  using namespace fastppo;
  m.def("row_sum", [](uintptr_t x, uintptr_t out, int rows, int n, int threads) {
    FASTPPO_LAUNCH(rows, threads, 0, nullptr, row_sum, (const float*)x, (float*)out, n);
  });
  m.def("reverse", [](uintptr_t x, int n) { FASTPPO_LAUNCH(1, n, n * 4, nullptr, reverse, (float*)x, n); });
  m.def("shuffles", [](uintptr_t out) { FASTPPO_LAUNCH(1, 32, 0, nullptr, shuffles, (int*)out); });
  m.def("broken", [](uintptr_t out) { FASTPPO_LAUNCH(1, 32, 0, nullptr, broken, (int*)out); });
}
