// Philox4x32-10 (Salmon et al., SC 2011), the same bits as kernels/_philox.py, for C++ and CUDA.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTPPO_BOTH __host__ __device__ __forceinline__
#else
#define FASTPPO_BOTH static inline
#endif

namespace fastppo {

struct Uniforms {
  float tile, token;
};

// Two uniforms in [0, 1) for (seed, position): 24 bits each, exact in float.
FASTPPO_BOTH Uniforms philox_uniforms(int64_t seed, int64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {static_cast<float>(c0 >> 8) * 0x1p-24f, static_cast<float>(c1 >> 8) * 0x1p-24f};
}

}  // namespace fastppo
