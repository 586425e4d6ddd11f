// A token from the tiles' weights by inverse CDF, or the lowest that holds the maximum: part of sampling.cu.
#pragma once
#include "sampling_row.cuh"

namespace fastppo {
namespace {

// Warp 0: the first tile whose running weight exceeds u * total (the last with weight if rounding leaves none).
__device__ __forceinline__ int pick_tile(const float* weight, int tiles, float u, float* total) {
  const int lane = threadIdx.x;
  float carry = 0.0f;
  for (int t = 0; t < tiles; t += kWarp) {
    float w = t + lane < tiles ? weight[t + lane] : 0.0f;
    carry += __shfl_sync(kAllLanes, running_sum(w, lane), kWarp - 1);
  }
  *total = carry;
  float target = u * carry;
  int last = 0;
  carry = 0.0f;
  for (int t = 0; t < tiles; t += kWarp) {
    float w = t + lane < tiles ? weight[t + lane] : 0.0f, sum = running_sum(w, lane);
    unsigned found = __ballot_sync(kAllLanes, carry + sum > target && w > 0.0f), any = __ballot_sync(kAllLanes, w > 0.0f);
    if (found) return t + __ffs(static_cast<int>(found)) - 1;
    if (any) last = t + 31 - __clz(static_cast<int>(any));
    carry += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  return last;
}

// Warp 0: the token inside a tile, columns in order.
template <typename Y>
__device__ __forceinline__ int pick_column(const float (&e)[kEach], float u, int lane) {
  constexpr int kVec = 16 / sizeof(Y);
  float part[kEach / kVec], carry = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach / kVec; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += e[i * kVec + j];
    part[i] = running_sum(sum, lane);
    carry += __shfl_sync(kAllLanes, part[i], kWarp - 1);
  }
  const float target = u * carry;
  int column = kTile, last = -1;
  carry = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach / kVec; ++i) {
    float before = __shfl_up_sync(kAllLanes, part[i], 1);
    float sum = carry + (lane ? before : 0.0f);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      sum += e[i * kVec + j];
      int here = column_of<Y>(lane, i * kVec + j);
      if (e[i * kVec + j] > 0.0f) {
        last = max(last, here);
        if (sum > target) column = min(column, here);
      }
    }
    carry += __shfl_sync(kAllLanes, part[i], kWarp - 1);
  }
  column = __reduce_min_sync(kAllLanes, column);
  last = __reduce_max_sync(kAllLanes, last);
  return column < kTile ? column : last;
}

// Warp 0: the lowest column that holds the maximum.
template <typename Y>
__device__ __forceinline__ int argmax(const SamplingArgs& a, const Y* y, int tiles, float top, const float* max_y) {
  const int lane = threadIdx.x;
  int tile = tiles - 1, column = kTile - 1;
  for (int t = lane; t < tiles; t += kWarp) tile = max_y[t] == top ? min(tile, t) : tile;
  tile = __reduce_min_sync(kAllLanes, tile);
  for (int c = lane; c < kTile; c += kWarp) {
    int64_t at = int64_t(tile) * kTile + c;
    if (at < a.V && to_float(y[at]) == top) column = min(column, c);
  }
  return tile * kTile + __reduce_min_sync(kAllLanes, column);
}

}  // namespace
}  // namespace fastppo
