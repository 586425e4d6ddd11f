// Products of floats with few values of k, for train_body.cpp: with vectors, where AMX's three parts of a float would cost more.
//   C [M, N] (+)= A [M, K] B [K, N] + bias.   B is laid out once, [K][N up to 16], then every thread takes rows of C, 6 x 64
// numbers at a time in registers. Sums run over k in order, whatever M: a row does not depend on the others in any bit.
#include <algorithm>
#include <vector>

#include "lanes.h"
#include "train.h"

namespace fastppo {
namespace {

struct Small {
  const float *a, *b, *bias;
  float* c;
  int64_t M, N, K, a_row, a_column, b_row, b_column, c_row;
  bool add;
  float* laid;  // [K][wide]
  int64_t wide;
};

FASTPPO_CLONES void lay(const Small& f, int64_t begin, int64_t end) {
  constexpr int64_t kSide = 16;
  for (int64_t k0 = begin; k0 < end; k0 += kSide) {
    for (int64_t j0 = 0; j0 < f.wide; j0 += kSide) {
      for (int64_t k = k0; k < std::min(end, k0 + kSide); ++k) {
        float* to = f.laid + k * f.wide + j0;
        const float* from = f.b + k * f.b_row + j0 * f.b_column;
        const int64_t some = std::min(kSide, f.N - j0);
        for (int64_t j = 0; j < some; ++j) to[j] = from[j * f.b_column];
        for (int64_t j = some; j < kSide; ++j) to[j] = 0.0f;
      }
    }
  }
}

FASTPPO_INLINE vec16 some_of(const float* p, int64_t n) {
  if (n >= 16) return load16(p);
  float lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load16(lanes);
}

FASTPPO_INLINE void put_some(float* p, vec16 x, int64_t n) {
  if (n >= 16) return store16(p, x);
  float lanes[16];
  store16(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

template <int R, int W>
FASTPPO_INLINE void block(const Small& f, int64_t row, int64_t column) {
  const float *a = f.a + row * f.a_row, *b = f.laid + column;
  vec16 sums[R][W] = {};
  for (int64_t k = 0; k < f.K; ++k) {
    vec16 bw[W];
    for (int w = 0; w < W; ++w) bw[w] = load16(b + k * f.wide + w * 16);
    for (int r = 0; r < R; ++r) {
      const float x = a[r * f.a_row + k * f.a_column];
      for (int w = 0; w < W; ++w) sums[r][w] += x * bw[w];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) {
      const int64_t j = column + w * 16, n = f.N - j;
      float* to = f.c + (row + r) * f.c_row + j;
      vec16 x = sums[r][w];
      if (f.bias) x += some_of(f.bias + j, n);
      put_some(to, f.add ? x + some_of(to, n) : x, n);
    }
  }
}

template <int R>
FASTPPO_INLINE void strip(const Small& f, int64_t row) {
  int64_t j = 0;
  for (; j + 64 <= f.wide; j += 64) block<R, 4>(f, row, j);
  for (; j + 32 <= f.wide; j += 32) block<R, 2>(f, row, j);
  for (; j < f.wide; j += 16) block<R, 1>(f, row, j);
}

FASTPPO_CLONES void rows(const Small& f, int64_t begin, int64_t end) {
  int64_t r = begin;
  for (; r + 6 <= end; r += 6) strip<6>(f, r);
  for (; r < end; ++r) strip<1>(f, r);
}

}  // namespace

void small_product(const std::array<uintptr_t, 4>& addresses, const std::array<int64_t, 6>& sizes, int flags) {
  static thread_local std::vector<float> memory;
  const auto [M, N, K, a_stride, b_stride, out_stride] = sizes;
  const auto at = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  const bool along_a = flags & 1, along_b = flags & 2;
  const int64_t wide = (N + 15) / 16 * 16;
  memory.resize(std::max<size_t>(memory.size(), wide * K));
  const Small f{at(0), at(1), at(3), at(2), M, N, K, along_a ? a_stride : 1, along_a ? 1 : a_stride, along_b ? 1 : b_stride,
                along_b ? b_stride : 1, out_stride, (flags & 32) != 0, memory.data(), wide};
  parallel_for(K, wide, [&](int64_t begin, int64_t end) { lay(f, begin, end); });
  parallel_for((M + 5) / 6, 6 * wide * K, [&](int64_t begin, int64_t end) { rows(f, begin * 6, std::min(M, end * 6)); });
}

}  // namespace fastppo
