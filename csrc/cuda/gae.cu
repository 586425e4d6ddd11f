// KL shaping, GAE, returns and whitening moments in one launch; formula in kernels/gae.py.
//
// One block of 128 threads per row, eight tokens per thread, tiles of 1024 tokens from the row's end. A step backwards in
// time is a map of what comes from the right; threads compose their tokens' maps, warps scan the threads' maps, and every
// thread then walks its own tokens with what came in. The block that finishes last adds the rows' moments in row order.
#include "common.cuh"
#include "gae.h"

namespace fastppo {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp, kEach = 8, kTile = kThreads * kEach;

// advantage = a * advantage + b * next_value + s; next_value = seen ? first : as it came
struct Map {
  float a, b, s, first;
  int seen;
};
__device__ __forceinline__ Map identity() { return {1.0f, 0.0f, 0.0f, 0.0f, 0}; }

// `left` is earlier in time: it takes what `right` gives.
__device__ __forceinline__ Map after(const Map& left, const Map& right) {
  return {left.a * right.a, fmaf(left.a, right.b, right.seen ? 0.0f : left.b),
          fmaf(left.a, right.s, fmaf(left.b, right.first, left.s)), left.seen ? left.first : right.first,
          left.seen | right.seen};
}

__device__ __forceinline__ Map from_right(const Map& m, int lanes) {
  return {__shfl_down_sync(kAllLanes, m.a, lanes), __shfl_down_sync(kAllLanes, m.b, lanes),
          __shfl_down_sync(kAllLanes, m.s, lanes), __shfl_down_sync(kAllLanes, m.first, lanes),
          __shfl_down_sync(kAllLanes, m.seen, lanes)};
}

// Count, mean and squared distances from the mean (Chan et al. 1979).
struct Moments {
  float n, mean, m2;
};
__device__ __forceinline__ Moments merge(const Moments& x, const Moments& y) {
  const float n = x.n + y.n, share = n > 0.0f ? y.n / n : 0.0f, away = y.mean - x.mean;
  return {n, fmaf(away, share, x.mean), fmaf(away * away, x.n * share, x.m2 + y.m2)};
}

__device__ __forceinline__ Moments block_moments(Moments m, Moments* shared) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    m = merge(m, {__shfl_down_sync(kAllLanes, m.n, lanes), __shfl_down_sync(kAllLanes, m.mean, lanes),
                  __shfl_down_sync(kAllLanes, m.m2, lanes)});
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = m;
  __syncthreads();
  m = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) m = merge(m, shared[w]);
  return m;
}

__device__ __forceinline__ float kl_of(int kind, float d) {
  if (kind == 1) return fabsf(d);
  if (kind == 2) return 0.5f * d * d;
  if (kind == 3) return (__expf(-d) - 1.0f) + d;
  return d;
}

// Eight consecutive values; wide: two 16-byte loads of an aligned tile that lies inside the row.
__device__ __forceinline__ void load8(const float* row, int t, int n, bool wide, float (&x)[kEach]) {
  if (wide) {
    const float4 low = *reinterpret_cast<const float4*>(row + t), high = *reinterpret_cast<const float4*>(row + t + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
#pragma unroll
    for (int k = 0; k < kEach; ++k) x[k] = t + k < n ? row[t + k] : 0.0f;
  }
}

__device__ __forceinline__ void store8(float* row, int t, int n, bool wide, const float (&x)[kEach]) {
  if (wide) {
    *reinterpret_cast<float4*>(row + t) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(row + t + 4) = make_float4(x[4], x[5], x[6], x[7]);
  } else {
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (t + k < n) row[t + k] = x[k];
  }
}

// Bits of the eight tokens that lie in the row, and of those that count.
__device__ __forceinline__ unsigned mask8(const uint8_t* row, int t, int n, bool wide) {
  unsigned bits = 0;
  if (wide) {
    const uint2 word = *reinterpret_cast<const uint2*>(row + t);
#pragma unroll
    for (int k = 0; k < kEach; ++k) bits |= ((k < 4 ? word.x : word.y) >> (8 * (k % 4)) & 1u) << k;
  } else {
#pragma unroll
    for (int k = 0; k < kEach; ++k) bits |= (t + k < n && row[t + k] ? 1u : 0u) << k;
  }
  return bits;
}

__device__ __forceinline__ Map token_map(const GAEArgs& g, bool inside, bool on, float reward, float value, Map right) {
  const float step = g.gamma * g.lam;
  if (on || (inside && g.masked == kGAEZero)) return after({step, g.gamma, reward - value, value, 1}, right);
  if (inside && g.masked == kGAEStop) return after({0.0f, 0.0f, 0.0f, 0.0f, 1}, right);
  return right;
}

struct Shared {
  Map maps[2][kWarps];
  int counts[2][kWarps];
  Moments moments[kWarps];
  float kl[kWarps];
  int is_last;
};

__device__ void add_rows(const GAEArgs& g, Shared& shared) {
  Moments m = {0.0f, 0.0f, 0.0f};
  const volatile float* partials = g.work;  // volatile: written by other blocks
  for (int64_t b = threadIdx.x; b < g.B; b += kThreads)
    m = merge(m, {partials[b], partials[g.B + b], partials[2 * g.B + b]});
  m = block_moments(m, shared.moments);
  if (threadIdx.x == 0) {
    g.moments[0] = m.n, g.moments[1] = m.mean, g.moments[2] = m.m2;
    *g.ticket = 0;  // ready for the next launch on this stream
  }
}

// Tokens of one tile: masked values and rewards (without the score), and their KL added to kl_sum.
template <bool SHAPED>
__device__ __forceinline__ void load_tile(const GAEArgs& g, int64_t at, int t, int n, bool wide, unsigned on,
                                          float (&reward)[kEach], float (&value)[kEach], float& kl_sum) {
  load8(g.values + at, t, n, wide, value);
  if (SHAPED) {
    float logprob[kEach] = {};
    load8(g.ref + at, t, n, wide, reward);
    if (g.kind != kGAEFullKL) load8(g.logprobs + at, t, n, wide, logprob);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float d = g.kind == kGAEFullKL ? reward[k] : logprob[k] - reward[k];
      const float kl = on >> k & 1u ? kl_of(g.kind, d) : 0.0f;
      kl_sum += kl;
      reward[k] = -g.kl_coef * kl;
    }
  } else {
    load8(g.rewards + at, t, n, wide, reward);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    reward[k] = on >> k & 1u ? reward[k] : 0.0f;
    value[k] = on >> k & 1u ? value[k] : 0.0f;
  }
}

// Whether a token that counts stands to the right of this thread's, in this tile. One barrier, that of the tile's counts.
__device__ __forceinline__ bool any_right(unsigned on, int parity, Shared& shared, bool& any) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned lanes = __ballot_sync(kAllLanes, on != 0);
  if (lane == 0) shared.counts[parity][warp] = lanes != 0;
  __syncthreads();
  bool right = lane < kWarp - 1 && (lanes >> (lane + 1)) != 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    right |= w > warp && shared.counts[parity][w];
    any |= shared.counts[parity][w] != 0;
  }
  return right;
}

// The map of all tokens to the right of this thread's in the tile; `all` is the whole tile's.
__device__ __forceinline__ Map scan_tile(Map mine, int parity, Shared& shared, Map& all) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Map other = from_right(mine, lanes);
    if (lane + lanes < kWarp) mine = after(mine, other);
  }
  if (lane == 0) shared.maps[parity][warp] = mine;
  const Map neighbour = from_right(mine, 1);
  __syncthreads();
  Map right = identity();
  all = identity();
#pragma unroll
  for (int w = kWarps - 1; w >= 0; --w) {
    if (w > warp) right = after(shared.maps[parity][w], right);
    all = after(shared.maps[parity][w], all);
  }
  return lane < kWarp - 1 ? after(neighbour, right) : right;
}

template <bool SHAPED>
__global__ void __launch_bounds__(kThreads, 4) gae_kernel(GAEArgs g) {
  __shared__ Shared shared;
  const int64_t b = blockIdx.x, at = g.cu_seqlens ? g.cu_seqlens[b] : b * g.T;
  const int n = static_cast<int>(g.cu_seqlens ? g.cu_seqlens[b + 1] - at : g.T);
  const float score = SHAPED ? g.scores[b] : 0.0f;
  float advantage_in = 0.0f, value_in = 0.0f, kl_sum = 0.0f;
  bool scored = !SHAPED;
  Moments moments = {0.0f, 0.0f, 0.0f};
  int parity = 0;
  for (int low = n > 0 ? (n - 1) / kTile * kTile : -1; low >= 0; low -= kTile, parity ^= 1) {
    const int t = low + static_cast<int>(threadIdx.x) * kEach;
    const bool wide = g.aligned && at % 8 == 0 && t + kEach <= n;
    const unsigned in_row = t >= n ? 0u : n - t >= kEach ? 0xffu : (1u << (n - t)) - 1u;
    const unsigned on = g.mask ? mask8(g.mask + at, t, n, wide) : in_row;
    float reward[kEach], value[kEach];
    load_tile<SHAPED>(g, at, t, n, wide, on, reward, value, kl_sum);
    if (SHAPED && !scored && !any_right(on, parity, shared, scored) && on) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) reward[k] += on >> k == 1u ? score : 0.0f;
    }
    Map mine = identity(), all;
#pragma unroll
    for (int k = kEach - 1; k >= 0; --k) mine = token_map(g, in_row >> k & 1u, on >> k & 1u, reward[k], value[k], mine);
    const Map right = scan_tile(mine, parity, shared, all);
    Map state = {0.0f, 0.0f, fmaf(right.a, advantage_in, fmaf(right.b, value_in, right.s)),
                 right.seen ? right.first : value_in, 1};  // s is the advantage, first the next value
    advantage_in = fmaf(all.a, advantage_in, fmaf(all.b, value_in, all.s));
    value_in = all.seen ? all.first : value_in;
    float sum = 0.0f;
#pragma unroll
    for (int k = kEach - 1; k >= 0; --k) {
      state = token_map(g, in_row >> k & 1u, on >> k & 1u, reward[k], value[k], state);
      reward[k] = on >> k & 1u ? state.s : 0.0f;
      value[k] += reward[k];
      sum += reward[k];
    }
    store8(g.advantages + at, t, n, wide, reward);
    store8(g.returns + at, t, n, wide, value);
    const float counted = static_cast<float>(__popc(on));
    Moments part = {counted, counted > 0.0f ? sum / counted : 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (on >> k & 1u) part.m2 = fmaf(reward[k] - part.mean, reward[k] - part.mean, part.m2);
    moments = merge(moments, part);
  }

  moments = block_moments(moments, shared.moments);
  if (SHAPED) {
    kl_sum = warp_sum(kl_sum);
    if (threadIdx.x % kWarp == 0) shared.kl[threadIdx.x / kWarp] = kl_sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (SHAPED) g.kl_sums[b] = (shared.kl[0] + shared.kl[1]) + (shared.kl[2] + shared.kl[3]);
    g.work[b] = moments.n, g.work[g.B + b] = moments.mean, g.work[2 * g.B + b] = moments.m2;
    __threadfence();
    shared.is_last = atomicAdd(g.ticket, 1) == g.B - 1;
  }
  __syncthreads();
  if (shared.is_last) add_rows(g, shared);
}

}  // namespace

const char* gae_cuda(GAEArgs g, void* stream) {
  const uint64_t bits = reinterpret_cast<uint64_t>(g.rewards) | reinterpret_cast<uint64_t>(g.logprobs) |
                        reinterpret_cast<uint64_t>(g.ref) | reinterpret_cast<uint64_t>(g.values) |
                        reinterpret_cast<uint64_t>(g.advantages) | reinterpret_cast<uint64_t>(g.returns) |
                        reinterpret_cast<uint64_t>(g.mask);
  g.aligned = bits % 16 == 0;
  const dim3 grid(static_cast<unsigned>(g.B));
  if (g.scores) {
    FASTPPO_LAUNCH(grid, kThreads, 0, static_cast<cudaStream_t>(stream), (gae_kernel<true>), g);
  } else {
    FASTPPO_LAUNCH(grid, kThreads, 0, static_cast<cudaStream_t>(stream), (gae_kernel<false>), g);
  }
  return launch_error();
}

}  // namespace fastppo
