// Sampling on a GPU: kernels/sampling.py has the formula and the order of the random numbers. One block is one row.
//
// Pass 1 reads the row from DRAM, a tile of 1024 columns per warp with 16-byte loads, 4 to 8 in flight per lane, and leaves
// each tile's maximum and sums in shared memory. What follows needs no barrier-heavy work on the row: thresholds by a radix
// select whose passes skip every tile and element below a bound from the tiles' maxima, then the masses of the tiles that
// are left, then one tile for the token; these find the row in L2. Masses are 40-bit fixed point, so the atomics that add
// them give the same sum in any order.
#include "common.cuh"
#include "philox.h"

namespace fastppo {
namespace {

constexpr int kTile = 1024;  // kernels/sampling.py: TILE
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEach = kTile / kWarp;  // columns of a lane
constexpr int kBins = 2048;
constexpr float kMassOne = 1099511627776.0f;  // 2^40
constexpr float kNegInf = -__builtin_huge_valf();
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

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

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
  unsigned long long* mass;                       // [kBins]
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

// The digit of `bits` at `shift` at which the mass from above reaches `target`; adds what is above it to *s.above.
__device__ __forceinline__ void pick_digit(Shared s, unsigned long long target) {
  if (threadIdx.x < kWarp) {
    constexpr int kMine = kBins / kWarp;
    const int lane = threadIdx.x, first = kBins - 1 - lane * kMine;  // lane 0 has the highest digits
    unsigned long long mine = 0, base = *s.above;
    for (int i = 0; i < kMine; ++i) mine += s.mass[first - i];
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
        if (s.mass[first - i] == 0) continue;
        above += last, chosen = first - i, last = s.mass[chosen];
      }
      *s.digit = static_cast<uint32_t>(chosen), *s.above = above;
    }
  }
  __syncthreads();
}

// The largest key whose tokens, with all above, weigh at least share of those >= floor (by_mass) or number at least k.
template <typename Y>
__device__ __forceinline__ uint32_t radix_threshold(const SamplingArgs& a, const Y* y, int tiles, float top, uint32_t floor, bool by_mass, Shared s) {
  const int lane = threadIdx.x % kWarp;
  unsigned long long target = static_cast<unsigned long long>(a.top_k);
  uint32_t prefix = 0;
  if (threadIdx.x == 0) *s.above = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.mass[i] = 0;
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
        atomicAdd(&s.mass[key >> shift & ((1u << bits) - 1)], static_cast<unsigned long long>(e));
      }
    }
    __syncthreads();
    if (by_mass && pass == 0) {
      unsigned long long total = 0;
      for (int i = 0; i < kBins; ++i) total += s.mass[i];
      target = static_cast<unsigned long long>(static_cast<float>(total) * a.top_p);
    }
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

template <typename Y>
__device__ __forceinline__ int draw(const SamplingArgs& a, const Y* y, int tiles, float top, Shared s, float* sampled) {
  const int lane = threadIdx.x % kWarp;
  uint32_t floor = 0;
  const bool cut_k = a.top_k > 0 && a.top_k < a.V;
  if (cut_k) floor = bound_from_maxima(s.max_y, tiles, a.top_k, s.bound);
#pragma unroll 1
  for (int by_mass = !cut_k; by_mass < (a.top_p < 1.0f ? 2 : 1); ++by_mass)
    floor = max(floor, radix_threshold(a, y, tiles, top, floor, by_mass, s));
  const float least = fmaxf(fmaxf(top + a.log_min_p, -3.4e38f), floor ? value_of(floor) : kNegInf);
  const bool reuse = a.same_rate && !a.adjusted && floor == 0 && a.log_min_p == kNegInf;
  for (int tile = threadIdx.x / kWarp; tile < tiles; tile += kWarps) {
    float w = 0.0f;
    if (reuse) {
      w = s.sum_x[tile] * __expf((s.max_x[tile] - top) * a.rate);
    } else if (s.max_y[tile] >= least) {
      float v[kEach];
      load_tile(y, a.V, tile, lane, a.wide_y, v);
#pragma unroll
      for (int j = 0; j < kEach; ++j) w += v[j] >= least ? __expf((v[j] - top) * a.rate) : 0.0f;
      w = warp_sum(w);
    }
    if (lane == 0) s.weight[tile] = w;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return 0;
  Uniforms u = philox_uniforms(a.seeds[blockIdx.x], a.positions[blockIdx.x]);
  float total, e[kEach];
  const int tile = pick_tile(s.weight, tiles, u.tile, &total);
  load_tile(y, a.V, tile, lane, a.wide_y, e);
#pragma unroll
  for (int j = 0; j < kEach; ++j) e[j] = e[j] >= least ? __expf((e[j] - top) * a.rate) : 0.0f;
  const int token = tile * kTile + pick_column<Y>(e, u.token, lane);
  *sampled = (to_float(y[token]) - top) * a.rate - logf(total);
  return token;
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

template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads, 1) sampling_kernel(SamplingArgs a) {
  FASTPPO_DYNAMIC_SHARED(unsigned long long, memory);
  __shared__ int bad;
  __shared__ uint32_t bound, digit;
  __shared__ unsigned long long above;
  const int tiles = static_cast<int>((a.V + kTile - 1) / kTile);
  float* f = reinterpret_cast<float*>(memory + kBins);
  Shared s{f, f + tiles, f + 2 * tiles, f + 3 * tiles, f + 4 * tiles, memory, &bad, &bound, &above, &digit};
  const int64_t b = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride;  // int64: past 2^31 elements
  const Y* y = static_cast<const Y*>(a.y) + b * a.y_stride;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  row_statistics(a, x, static_cast<const float*>(a.adjusted ? a.y : nullptr) + (a.adjusted ? b * a.y_stride : 0), tiles, s);
  const float top = max_over(s.max_x, tiles), top_y = max_over(s.max_y, tiles);
  const int code = bad ? kBadNumber : top_y == kNegInf ? kNothingLeft : 0;
  if (code) {
    if (threadIdx.x == 0) a.tokens[b] = code, a.sampled[b] = a.logprob[b] = a.entropy[b] = __int_as_float(0x7fc00000);
    return;
  }
  float sampled = 0.0f;
  int token = 0;
  if (!a.greedy) {
    token = draw(a, y, tiles, top_y, s, &sampled);
  } else if (threadIdx.x < kWarp) {
    token = argmax(a, y, tiles, top_y, s.max_y);
  }
  if (threadIdx.x >= kWarp) return;
  float sum = 0.0f, dot = 0.0f;
  for (int t = threadIdx.x; t < tiles; t += kWarp) {
    if (s.max_x[t] == kNegInf) continue;
    float shift = s.max_x[t] - top, scale = __expf(shift * a.raw_rate);
    sum += scale * s.sum_x[t];
    dot += scale > 0.0f ? scale * (s.dot_x[t] + shift * s.sum_x[t]) : 0.0f;
  }
  sum = warp_sum(sum), dot = warp_sum(dot);
  if (threadIdx.x == 0) {
    a.tokens[b] = token, a.sampled[b] = sampled;
    a.logprob[b] = (to_float(x[token]) - top) * a.raw_rate - logf(sum);
    a.entropy[b] = logf(sum) - a.raw_rate * dot / sum;
  }
}

template <typename T, typename Y>
const char* launch(const SamplingArgs& args, int64_t B, void* stream) {
  const int64_t tiles = (args.V + kTile - 1) / kTile;
  const int shared = static_cast<int>(kBins * 8 + tiles * 5 * 4);
  if (shared > 200 * 1024) return "the vocabulary is too large for this kernel (above 9 million)";
  if (shared > 48 * 1024)
    cudaFuncSetAttribute(sampling_kernel<T, Y>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  FASTPPO_LAUNCH(static_cast<unsigned>(B), kThreads, shared, static_cast<cudaStream_t>(stream), (sampling_kernel<T, Y>), args);
  return launch_error();
}

template <typename T>
const char* launch_rows(SamplingArgs a, int64_t B, void* stream) {
  constexpr int kVec = 16 / sizeof(T);
  a.wide_x = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && (B == 1 || a.x_stride % kVec == 0);
  a.wide_y = a.adjusted ? reinterpret_cast<uintptr_t>(a.y) % 16 == 0 && (B == 1 || a.y_stride % 4 == 0) : a.wide_x;
  return a.adjusted ? launch<T, float>(a, B, stream) : launch<T, T>(a, B, stream);
}

}  // namespace

const char* sampling_cuda(uintptr_t x, int dtype, int64_t x_stride, uintptr_t y, int64_t y_stride, int64_t B, int64_t V,
                          uintptr_t seeds, uintptr_t positions, float temperature, int64_t top_k, float top_p,
                          float log_min_p, float logprob_temperature, uintptr_t tokens, uintptr_t numbers_3B, uintptr_t stream) {
  SamplingArgs a{};
  a.x = reinterpret_cast<const void*>(x), a.y = reinterpret_cast<const void*>(y ? y : x);
  a.V = V, a.x_stride = x_stride, a.y_stride = y ? y_stride : x_stride;
  a.seeds = reinterpret_cast<const int64_t*>(seeds), a.positions = reinterpret_cast<const int64_t*>(positions);
  a.tokens = reinterpret_cast<int64_t*>(tokens);
  a.sampled = reinterpret_cast<float*>(numbers_3B), a.logprob = a.sampled + B, a.entropy = a.sampled + 2 * B;
  a.greedy = temperature == 0.0f || top_k == 1, a.adjusted = y != 0;
  a.rate = a.greedy ? 1.0f : 1.0f / temperature, a.raw_rate = 1.0f / logprob_temperature;
  a.same_rate = temperature == logprob_temperature;
  a.top_k = top_k, a.top_p = top_p, a.log_min_p = log_min_p;
  void* s = reinterpret_cast<void*>(stream);
  if (B == 0) return nullptr;
  if (dtype == 0) return launch_rows<float>(a, B, s);
  if (dtype == 1) return launch_rows<__nv_bfloat16>(a, B, s);
  return launch_rows<__half>(a, B, s);
}

}  // namespace fastppo
