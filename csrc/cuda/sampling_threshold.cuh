// The smallest logit that top-k or top-p keeps, by a radix select over order-preserving keys: part of sampling.cu.
#pragma once
#include "sampling_row.cuh"

namespace fastppo {
namespace {

__device__ __forceinline__ int slot_of(int bin) { return bin + bin / kMine; }

// All bins. Every warp adds them by itself: no barrier.
__device__ __forceinline__ unsigned long long mass_of_all(const unsigned long long* mass) {
  unsigned long long total = 0;
  for (int i = threadIdx.x % kWarp; i < kBins; i += kWarp) total += mass[slot_of(i)];
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) total += __shfl_xor_sync(kAllLanes, total, by);
  return total;
}

// The digit of `bits` at `shift` at which the mass from above reaches `target`; adds what is above it to *s.above.
__device__ __forceinline__ void pick_digit(Shared s, unsigned long long target) {
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x, first = kBins - 1 - lane * kMine;  // lane 0 has the highest digits
    unsigned long long mine = 0, base = *s.above;
    for (int i = 0; i < kMine; ++i) mine += s.mass[slot_of(first - i)];
    unsigned long long upto = mine;
    for (int by = 1; by < kWarp; by *= 2) {
      unsigned long long before = __shfl_up_sync(kAllLanes, upto, by);
      if (lane >= by) upto += before;
    }
    const bool reaches = mine > 0 && base + upto >= target;
    const unsigned hits = __ballot_sync(kAllLanes, reaches), any = __ballot_sync(kAllLanes, mine > 0);
    const int owner = hits ? __ffs(static_cast<int>(hits)) - 1 : 31 - __clz(static_cast<int>(any));  // rounding: the lowest
    if (lane == owner) {
      unsigned long long above = base + upto - mine, last = 0;
      int chosen = first;
      for (int i = 0; i < kMine && above + last < target + (last == 0); ++i) {
        if (s.mass[slot_of(first - i)] == 0) continue;
        above += last, chosen = first - i, last = s.mass[slot_of(chosen)];
      }
      *s.digit = static_cast<uint32_t>(chosen), *s.above = above;
    }
  }
  __syncthreads();
}

// Tokens below it together weigh less than half of what top-p drops of `total`, were they all the vocabulary: they need no look.
__device__ __forceinline__ uint32_t bound_from_mass(const SamplingArgs& a, float top, float total) {
  return key_of(top + __logf(0.5f * (1.0f - a.top_p) * total / static_cast<float>(a.V)) / a.rate);
}

// The largest key whose tokens, with all above, weigh at least top_p of those >= floor (by_mass) or number at least k.
// total: the mass of those >= floor where it is known, else 0.
template <typename Y>
__device__ __forceinline__ uint32_t radix_threshold(const SamplingArgs& a, const Y* y, int tiles, float top, uint32_t floor,
                                                    bool by_mass, float total, Shared s) {
  const int lane = threadIdx.x % kWarp;
  const bool known = by_mass && total > 0.0f;
  unsigned long long target = static_cast<unsigned long long>(a.top_k);
  if (known) target = static_cast<unsigned long long>(total * a.top_p * kMassOne);
  if (known) floor = max(floor, bound_from_mass(a, top, total));
  uint32_t prefix = 0;
  if (threadIdx.x == 0) *s.above = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < kSlots; i += kThreads) s.mass[i] = 0;
    __syncthreads();
    for (int tile = threadIdx.x / kWarp; tile < tiles; tile += kWarps) {
      if (key_of(s.max_y[tile]) < floor) continue;
      float v[kEach];
      load_tile(y, a.V, tile, lane, a.wide_y, v);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        uint32_t key = key_of(v[j]);
        if (key < floor || v[j] == kNegInf || (pass > 0 && (key >> (shift + bits)) != prefix)) continue;
        float e = by_mass ? __expf((v[j] - top) * a.rate) * kMassOne : 1.0f;
        atomicAdd(&s.mass[slot_of(key >> shift & ((1u << bits) - 1))], static_cast<unsigned long long>(e));
      }
    }
    __syncthreads();
    if (by_mass && !known && pass == 0)
      target = static_cast<unsigned long long>(static_cast<float>(mass_of_all(s.mass)) * a.top_p);
    pick_digit(s, target);
    prefix = prefix << bits | *s.digit;
    __syncthreads();
  }
  return prefix;
}

// At least k elements reach the k-th largest of the tiles' maxima: a lower bound of the k-th largest element.
__device__ __forceinline__ uint32_t bound_from_maxima(const float* max_y, int tiles, int64_t k, uint32_t* bound) {
  if (threadIdx.x == 0) *bound = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < tiles && k <= tiles; t += kThreads) {
    int reach = 0;
    for (int o = 0; o < tiles; ++o) reach += max_y[o] >= max_y[t];
    if (reach >= k) atomicMax(bound, key_of(max_y[t]));
  }
  __syncthreads();
  return *bound;
}

}  // namespace
}  // namespace fastppo
