// Sampling on a GPU: kernels/sampling.py has the formula and the order of the random numbers. One block is one row.
//
// Pass 1 reads the row from DRAM, a tile of 1024 columns per warp with 16-byte loads, 4 to 8 in flight per lane, and leaves
// each tile's maximum and sums in shared memory. What follows needs no barrier-heavy work on the row: thresholds by a radix
// select whose passes skip every tile and element below a bound from the tiles' maxima, then the masses of the tiles that
// are left, then one tile for the token; these find the row in L2. Masses are 40-bit fixed point, so the atomics that add
// them give the same sum in any order.
#include "philox.h"
#include "sampling_pick.cuh"
#include "sampling_threshold.cuh"

namespace fastppo {
namespace {

template <typename Y>
__device__ __forceinline__ int draw(const SamplingArgs& a, const Y* y, int tiles, float top, Shared s, float* sampled) {
  const int lane = threadIdx.x % kWarp;
  uint32_t floor = 0;
  const bool cut_k = a.top_k > 0 && a.top_k < a.V;
  if (cut_k) floor = bound_from_maxima(s.max_y, tiles, a.top_k, s.bound);
  const bool same = a.same_rate && !a.adjusted;  // the sums of pass 1 are those of the distribution sampled from
  const float total_x = same && !cut_k && a.top_p < 1.0f ? total_of(s, tiles, top, a.rate) : 0.0f;
#pragma unroll 1
  for (int by_mass = !cut_k; by_mass < (a.top_p < 1.0f ? 2 : 1); ++by_mass)
    floor = max(floor, radix_threshold(a, y, tiles, top, floor, by_mass, total_x, s));
  const float least = fmaxf(fmaxf(top + a.log_min_p, -3.4e38f), floor ? value_of(floor) : kNegInf);
  const bool reuse = same && floor == 0 && a.log_min_p == kNegInf;
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

template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads, 1) sampling_kernel(SamplingArgs a) {
  FASTPPO_DYNAMIC_SHARED(unsigned long long, memory);
  __shared__ int bad;
  __shared__ uint32_t bound, digit;
  __shared__ unsigned long long above;
  const int tiles = static_cast<int>((a.V + kTile - 1) / kTile);
  float* f = reinterpret_cast<float*>(memory + kSlots);
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
  const int shared = static_cast<int>(kSlots * 8 + tiles * 5 * 4);
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
