// Across the sixteen lanes of a vec16: sum and maximum by halves, in an order that does not depend on the ISA.
#pragma once
#include "simd.h"

namespace fastppo {

typedef float lanes8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float lanes4 __attribute__((vector_size(16), aligned(4), may_alias));

struct Quarters {
  lanes4 q[4];
};

FASTPPO_INLINE Quarters quarters(vec16 x) {
  Quarters out;
#if defined(__clang__) || __GNUC__ >= 12
  lanes8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  out.q[0] = __builtin_shufflevector(a, a, 0, 1, 2, 3), out.q[1] = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  out.q[2] = __builtin_shufflevector(b, b, 0, 1, 2, 3), out.q[3] = __builtin_shufflevector(b, b, 4, 5, 6, 7);
#else
  std::memcpy(out.q, &x, sizeof x);
#endif
  return out;
}

FASTPPO_INLINE float sum16(vec16 x) {
  const Quarters f = quarters(x);
  const lanes4 s = (f.q[0] + f.q[2]) + (f.q[1] + f.q[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

FASTPPO_INLINE float most16(vec16 x) {
  const Quarters f = quarters(x);
  const lanes4 a = f.q[0] > f.q[2] ? f.q[0] : f.q[2], b = f.q[1] > f.q[3] ? f.q[1] : f.q[3], s = a > b ? a : b;
  const float c = s[0] > s[2] ? s[0] : s[2], d = s[1] > s[3] ? s[1] : s[3];
  return c > d ? c : d;
}

}  // namespace fastppo
