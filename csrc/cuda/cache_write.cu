// Keys and values of new tokens into their slots of a paged cache: kernels/paged_attention.py. One block is one token.
#include "common.cuh"

namespace fastppo {
namespace {

// 16 bytes a thread.
template <typename T>
__global__ void cache_write_kernel(const T* k, const T* v, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,
                                   T* k_cache, T* v_cache, const int64_t* slots, int KV, int D, bool wide) {
  constexpr int kVec = 16 / sizeof(T);
  const int64_t n = blockIdx.x, slot = slots[n];
  if (slot < 0) return;
  const int step = wide ? kVec : 1;
  for (int i = threadIdx.x * step; i < KV * D; i += blockDim.x * step) {
    const int h = i / D, d = i % D;
    const T *from_k = k + n * k_token + h * k_head + d, *from_v = v + n * v_token + h * v_head + d;
    T *to_k = k_cache + slot * KV * D + i, *to_v = v_cache + slot * KV * D + i;
    if (wide) {
      *reinterpret_cast<uint4*>(to_k) = *reinterpret_cast<const uint4*>(from_k);
      *reinterpret_cast<uint4*>(to_v) = *reinterpret_cast<const uint4*>(from_v);
    } else {
      *to_k = *from_k, *to_v = *from_v;
    }
  }
}

template <typename T>
const char* launch_write(uintptr_t k, uintptr_t v, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, uintptr_t k_cache,
                         uintptr_t v_cache, uintptr_t slots, int64_t N, int KV, int D, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool wide = ((k | v | k_cache | v_cache) % 16 == 0) && (k_token | k_head | v_token | v_head | D) % kVec == 0;
  FASTPPO_LAUNCH(static_cast<unsigned>(N), 128, 0, stream, (cache_write_kernel<T>), reinterpret_cast<const T*>(k),
                 reinterpret_cast<const T*>(v), k_token, k_head, v_token, v_head, reinterpret_cast<T*>(k_cache),
                 reinterpret_cast<T*>(v_cache), reinterpret_cast<const int64_t*>(slots), KV, D, wide);
  return launch_error();
}

}  // namespace

const char* cache_write_cuda(uintptr_t k, uintptr_t v, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,
                             int dtype, uintptr_t k_cache, uintptr_t v_cache, uintptr_t slots, int64_t N, int64_t KV, int64_t D,
                             uintptr_t stream) {
  if (N == 0) return nullptr;
  cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  auto run = dtype == 0 ? launch_write<float> : launch_write<__half>;  // 16-bit values are copied, not looked at
  return run(k, v, k_token, k_head, v_token, v_head, k_cache, v_cache, slots, N, static_cast<int>(KV), static_cast<int>(D), s);
}

}  // namespace fastppo
