// 16 bytes of float, bfloat16 or half as floats and back, and 2^y: PTX, with plain C++ beside it for tests/cuda_host.
#pragma once
#include "common.cuh"

namespace fastppo {
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

__device__ __forceinline__ float bits_to_float(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}
__device__ __forceinline__ uint32_t float_to_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}

// 2^y; the hardware's relative error is 2^-22.
__device__ __forceinline__ float exp2_fast(float y) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
#else
  return exp2f(y);
#endif
}

__device__ __forceinline__ float half_to_float(uint32_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(h)));
  return x;
#else
  uint32_t magnitude = (h & 0x7fff) << 13;
  float x = bits_to_float(magnitude) * 5.192296858534828e33f;  // 2^112: half's exponent bias to float's
  uint32_t b = float_to_bits(x) | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
  return bits_to_float(b | (h & 0x8000) << 16);
#endif
}

__device__ __forceinline__ uint32_t float_to_half(float x) {
#ifdef __CUDA_ARCH__
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  uint32_t b = float_to_bits(x), a = b & 0x7fffffff, sign = (b >> 16) & 0x8000;
  if (a >= 0x47800000) return sign | (a > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (a < 0x38800000) return sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000);
  return sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13);
#endif
}

__device__ __forceinline__ uint32_t float_to_bf16(float x) {
  uint32_t b = float_to_bits(x);
  if ((b & 0x7fffffff) > 0x7f800000) return (b | 0x400000) >> 16;
  return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}

// How many elements 16 bytes hold, and how they are packed.
template <typename T>
struct Packed;
template <>
struct Packed<float> {
  static constexpr int kCount = 4;
  static __device__ __forceinline__ float one(const float* p) { return *p; }
  static __device__ __forceinline__ void put(float* p, float x) { *p = x; }
  static __device__ __forceinline__ void unpack(const uint4& v, float* x) {
    x[0] = bits_to_float(v.x), x[1] = bits_to_float(v.y), x[2] = bits_to_float(v.z), x[3] = bits_to_float(v.w);
  }
  static __device__ __forceinline__ uint4 pack(const float* x) {
    return make_uint4(float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3]));
  }
};
template <>
struct Packed<bf16> {
  static constexpr int kCount = 8;
  static __device__ __forceinline__ float one(const bf16* p) { return bits_to_float(uint32_t(p->bits) << 16); }
  static __device__ __forceinline__ void put(bf16* p, float x) { p->bits = static_cast<uint16_t>(float_to_bf16(x)); }
  static __device__ __forceinline__ void pair(uint32_t v, float* x) {
    x[0] = bits_to_float(v << 16), x[1] = bits_to_float(v & 0xffff0000u);
  }
  static __device__ __forceinline__ void unpack(const uint4& v, float* x) {
    pair(v.x, x), pair(v.y, x + 2), pair(v.z, x + 4), pair(v.w, x + 6);
  }
  static __device__ __forceinline__ uint32_t join(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
#else
    return float_to_bf16(low) | float_to_bf16(high) << 16;
#endif
  }
  static __device__ __forceinline__ uint4 pack(const float* x) {
    return make_uint4(join(x[0], x[1]), join(x[2], x[3]), join(x[4], x[5]), join(x[6], x[7]));
  }
};
template <>
struct Packed<fp16> {
  static constexpr int kCount = 8;
  static __device__ __forceinline__ float one(const fp16* p) { return half_to_float(p->bits); }
  static __device__ __forceinline__ void put(fp16* p, float x) { p->bits = static_cast<uint16_t>(float_to_half(x)); }
  static __device__ __forceinline__ void pair(uint32_t v, float* x) {
    x[0] = half_to_float(v & 0xffff), x[1] = half_to_float(v >> 16);
  }
  static __device__ __forceinline__ void unpack(const uint4& v, float* x) {
    pair(v.x, x), pair(v.y, x + 2), pair(v.z, x + 4), pair(v.w, x + 6);
  }
  static __device__ __forceinline__ uint32_t join(float low, float high) {
    return float_to_half(low) | float_to_half(high) << 16;
  }
  static __device__ __forceinline__ uint4 pack(const float* x) {
    return make_uint4(join(x[0], x[1]), join(x[2], x[3]), join(x[4], x[5]), join(x[6], x[7]));
  }
};

}  // namespace
}  // namespace fastppo
