// A row of logits as sampling.cu sees it: tiles of 1024 columns, each warp's own, and their maxima and sums in shared memory.
#pragma once
#include "common.cuh"

namespace fastppo {
namespace {

constexpr int kTile = 1024;  // kernels/sampling.py: TILE
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEach = kTile / kWarp;  // columns of a lane
constexpr int kBins = 2048;  // of a pass of the radix select
constexpr int kMine = kBins / kWarp;
constexpr int kSlots = kBins + kWarp;  // bins in memory: one more after each lane's, so that lanes read different banks
constexpr float kMassOne = 1099511627776.0f;  // 2^40
constexpr int kBadNumber = -1, kNothingLeft = -2;

struct SamplingArgs {
  const void* x;
  const void* y;  // float; x itself where there is neither penalty nor ban
  int64_t V, x_stride, y_stride;
  const int64_t *seeds, *positions;
  int64_t* tokens;
  float *sampled, *logprob, *entropy;
  float rate, raw_rate, top_p, log_min_p;
  int64_t top_k;
  bool greedy, adjusted, wide_x, wide_y, same_rate;
};

// Column of a lane's j-th element within its tile.
template <typename T>
__device__ __forceinline__ int column_of(int lane, int j) {
  constexpr int kVec = 16 / sizeof(T);
  return (j / kVec * kWarp + lane) * kVec + j % kVec;
}

// A lane's 32 columns of a tile, -inf past V.
template <typename T>
__device__ __forceinline__ void load_tile(const T* row, int64_t V, int tile, int lane, bool wide, float (&out)[kEach]) {
  constexpr int kVec = 16 / sizeof(T);
  constexpr int kLoads = kEach / kVec;
  const int64_t start = int64_t(tile) * kTile;
  if (wide && start + kTile <= V) {
    uint4 raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw[i] = *reinterpret_cast<const uint4*>(row + start + (i * kWarp + lane) * kVec);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const T* each = reinterpret_cast<const T*>(&raw[i]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) out[i * kVec + e] = to_float(each[e]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    int64_t column = start + column_of<T>(lane, j);
    out[j] = column < V ? to_float(row[column]) : kNegInf;
  }
}

// Unsigned integer that orders like the float.
__device__ __forceinline__ uint32_t key_of(float x) {
  uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ float running_sum(float x, int lane) {
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    float before = __shfl_up_sync(kAllLanes, x, by);
    if (lane >= by) x += before;
  }
  return x;
}

struct Shared {
  float *max_x, *sum_x, *dot_x, *max_y, *weight;  // [tiles]
  unsigned long long* mass;                       // [kSlots], bin i at slot_of(i)
  int* bad;
  uint32_t* bound;
  unsigned long long* above;
  uint32_t* digit;
};

template <typename T>
__device__ __forceinline__ void row_statistics(const SamplingArgs& a, const T* x, const float* y, int tiles, Shared s) {
  const int lane = threadIdx.x % kWarp;
  for (int tile = threadIdx.x / kWarp; tile < tiles; tile += kWarps) {
    float v[kEach], top = kNegInf, sum = 0.0f, dot = 0.0f;
    load_tile(x, a.V, tile, lane, a.wide_x, v);
    int bad = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      bad |= !(v[j] < __builtin_huge_valf());  // NaN or +inf
      top = fmaxf(top, v[j]);
    }
    top = warp_max(top);
    float base = fmaxf(top, -3e38f);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      float z = v[j] - base, e = __expf(z * a.raw_rate);
      sum += e;
      dot += e > 0.0f ? e * z : 0.0f;
    }
    sum = warp_sum(sum), dot = warp_sum(dot);
    bad = __any_sync(kAllLanes, bad);
    float top_y = top;
    if (a.adjusted) {
      load_tile(y, a.V, tile, lane, a.wide_y, v);
      top_y = kNegInf;
#pragma unroll
      for (int j = 0; j < kEach; ++j) top_y = fmaxf(top_y, v[j]);
      top_y = warp_max(top_y);
    }
    if (lane == 0) {
      s.max_x[tile] = top, s.sum_x[tile] = sum, s.dot_x[tile] = dot, s.max_y[tile] = top_y;
      if (bad) atomicOr(s.bad, 1);
    }
  }
  __syncthreads();
}

// Each warp folds the tiles by itself and in the same order: no barrier.
__device__ __forceinline__ float max_over(const float* x, int tiles) {
  float top = kNegInf;
  for (int t = threadIdx.x % kWarp; t < tiles; t += kWarp) top = fmaxf(top, x[t]);
  return warp_max(top);
}

// Mass of the row relative to its maximum `top`, likewise.
__device__ __forceinline__ float total_of(const Shared& s, int tiles, float top, float rate) {
  float total = 0.0f;
  for (int t = threadIdx.x % kWarp; t < tiles; t += kWarp) total += s.sum_x[t] * __expf((s.max_x[t] - top) * rate);
  return warp_sum(total);
}

}  // namespace
}  // namespace fastppo
