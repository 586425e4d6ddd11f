// Sixteen elements of float, bfloat16 or IEEE half to and from vec16; the dtype codes that Python passes.
#pragma once
#include <limits>

#include "simd.h"

namespace fastppo {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16_t {
  uint16_t bits;
};
struct fp16_t {
  uint16_t bits;
};

FASTPPO_INLINE int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }


FASTPPO_INLINE vec16 load(const float* p) { return load16(p); }
FASTPPO_INLINE vec16 load(const bf16_t* p) { return load16_bf16(reinterpret_cast<const uint16_t*>(p)); }

// The multiplication by 2^112 moves half's exponent bias to float's and makes its subnormals normal.
FASTPPO_INLINE vec16 load(const fp16_t* p) {
  ivec16 h = __builtin_convertvector(*reinterpret_cast<const hvec16*>(p), ivec16);
  vec16 x = as_float((h & 0x7fff) << 13) * 5.192296858534828e33f;
  ivec16 magnitude = as_int(x) | (((h & 0x7c00) == 0x7c00) & 0x7f800000);  // infinity and NaN keep their exponent
  return as_float(magnitude | ((h & 0x8000) << 16));
}

FASTPPO_INLINE void store(float* p, vec16 x) { store16(p, x); }

// Round to nearest, ties to even; a NaN stays a NaN.
FASTPPO_INLINE void store(bf16_t* p, vec16 x) {
  ivec16 b = as_int(x);
  ivec16 rounded = b + 0x7fff + ((b >> 16) & 1);
  ivec16 nan = (b & 0x7fffffff) > 0x7f800000;
  ivec16 out = nan ? (b | 0x400000) : rounded;
  *reinterpret_cast<hvec16*>(p) = __builtin_convertvector((out >> 16) & 0xffff, hvec16);
}

FASTPPO_INLINE void store(fp16_t* p, vec16 x) {
  ivec16 b = as_int(x);
  ivec16 a = b & 0x7fffffff;
  ivec16 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  ivec16 small = as_int(as_float(a) + 0.5f) - 0x3f000000;  // the addition rounds at half's smallest subnormal
  ivec16 special = a > 0x7f800000 ? ivec16{} + 0x7e00 : ivec16{} + 0x7c00;
  ivec16 out = a < 0x38800000 ? small : normal;
  out = a >= 0x47800000 ? special : out;
  *reinterpret_cast<hvec16*>(p) = __builtin_convertvector(out | ((b >> 16) & 0x8000), hvec16);
}

FASTPPO_INLINE float lane0(vec16 x) { return x[0]; }

inline float load_one(const void* p, int dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  uint16_t lanes[16] = {static_cast<const uint16_t*>(p)[i]};
  return lane0(dtype == kBFloat16 ? load(reinterpret_cast<const bf16_t*>(lanes)) : load(reinterpret_cast<const fp16_t*>(lanes)));
}

inline void store_one(void* p, int dtype, int64_t i, float x) {
  if (dtype == kFloat32) {
    static_cast<float*>(p)[i] = x;
    return;
  }
  uint16_t lanes[16];
  if (dtype == kBFloat16)
    store(reinterpret_cast<bf16_t*>(lanes), splat(x));
  else
    store(reinterpret_cast<fp16_t*>(lanes), splat(x));
  static_cast<uint16_t*>(p)[i] = lanes[0];
}

}  // namespace fastppo
