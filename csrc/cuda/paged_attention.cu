// Decode attention over a paged cache on a GPU (split-KV): kernels/paged_attention.py. The write into it: cache_write.cu.
//
// One block is one (sequence, key/value head, part of kSplit tokens); the query heads of the group are packed: a key or value
// is loaded once, 16 bytes a lane, and meets all of them. A row of a head is read by kLanes lanes; the groups of lanes take
// kUnroll tokens at a time each, all their loads in flight, and keep their own running softmax, merged through
// shuffles and shared memory. Parts lie at multiples of kSplit whatever the batch; a second kernel merges them in order.
#include "common.cuh"

namespace fastppo {
namespace {

constexpr int kSplit = 256;  // kernels/_paged_attention_launch.py: SPLIT
constexpr int kThreads = 128;
constexpr int kUnroll = 4;

struct PagedArgs {
  const void *q, *k, *v;
  int64_t q_token, q_head;
  const int32_t *tables, *lens;
  void* out;
  float* workspace;  // [B, H, parts, D + 2]: sums, maximum, total
  int64_t B, M;
  int H, KV, D, block, parts;
  float scale, softcap;
  int window;
};

__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }
__device__ __forceinline__ void from_float(float x, __half* out) { *out = __float2half(x); }

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float* out) {
  const T* each = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int e = 0; e < 16 / static_cast<int>(sizeof(T)); ++e) out[e] = to_float(each[e]);
}

// 1 - 2 / (e^2x + 1) cancels near zero, where the series is used.
__device__ __forceinline__ float tanh_exact(float x) {
  float a = fabsf(x), y = x * x;
  float p = -5.70498872745e-3f;
  p = p * y + 2.06390887954e-2f;
  p = p * y - 5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y - 3.33332819422e-1f;
  float small = p * y * x + x, big = 1.0f - 2.0f / (__expf(2.0f * fminf(a, 40.0f)) + 1.0f);
  return a < 0.625f ? small : x < 0.0f ? -big : big;
}

// kLanes lanes share a row; lane l holds vectors l, l + kLanes, .. (kChunks of them). G query heads of one group.
template <typename T, int kLanes, int kChunks, int G>
struct State {
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kDims = kVec * kChunks;
  float acc[G][kDims];
  float top[G], sum[G];
};

template <typename T, int kLanes, int kChunks, int G>
__device__ __forceinline__ void merge(State<T, kLanes, kChunks, G>& s, int g, float top, float sum, const float* acc) {
  float now = fmaxf(s.top[g], top);
  float keep = s.top[g] == kNegInf ? 0.0f : __expf(s.top[g] - now), add = top == kNegInf ? 0.0f : __expf(top - now);
  s.top[g] = now, s.sum[g] = s.sum[g] * keep + sum * add;
#pragma unroll
  for (int d = 0; d < State<T, kLanes, kChunks, G>::kDims; ++d) s.acc[g][d] = s.acc[g][d] * keep + acc[d] * add;
}

// kUnroll tokens from `first`, those past `end` masked: scores, running softmax, values.
template <typename T, int kLanes, int kChunks, int G>
__device__ __forceinline__ void attend(State<T, kLanes, kChunks, G>& s, const PagedArgs& a, const float (&q)[G][16 / sizeof(T) * kChunks],
                                       const int32_t* table, int first, int stride, int end, int kv, int lane) {
  constexpr int kVec = 16 / sizeof(T);
  uint4 raw[kUnroll][kChunks];
  int64_t at[kUnroll];
  float score[kUnroll][G];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int token = min(first + u * stride, end - 1);
    at[u] = ((int64_t(table[token / a.block]) * a.block + token % a.block) * a.KV + kv) * a.D;
  }
  auto fetch = [&](const void* cache) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        int d = (c * kLanes + lane) * kVec;
        raw[u][c] = d < a.D ? *reinterpret_cast<const uint4*>(static_cast<const T*>(cache) + at[u] + d) : make_uint4(0, 0, 0, 0);
      }
  };
  fetch(a.k);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int g = 0; g < G; ++g) score[u][g] = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float k[kVec];
      unpack<T>(raw[u][c], k);
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int e = 0; e < kVec; ++e) score[u][g] += q[g][c * kVec + e] * k[e];
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int by = kLanes / 2; by > 0; by /= 2) score[u][g] += __shfl_xor_sync(kAllLanes, score[u][g], by);
      float x = score[u][g] * a.scale;
      if (a.softcap > 0.0f) x = a.softcap * tanh_exact(x / a.softcap);
      score[u][g] = first + u * stride < end ? x : kNegInf;
    }
  }
  fetch(a.v);
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float now = s.top[g];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) now = fmaxf(now, score[u][g]);
    float keep = s.top[g] == kNegInf ? 0.0f : __expf(s.top[g] - now);
    s.top[g] = now, s.sum[g] *= keep;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      score[u][g] = score[u][g] == kNegInf ? 0.0f : __expf(score[u][g] - now);
      s.sum[g] += score[u][g];
    }
#pragma unroll
    for (int d = 0; d < kVec * kChunks; ++d) s.acc[g][d] *= keep;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float v[kVec];
      unpack<T>(raw[u][c], v);
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int e = 0; e < kVec; ++e) s.acc[g][c * kVec + e] += score[u][g] * v[e];
    }
}

// grid: B * KV * group chunks * parts, 1-D (y and z stop at 65,535).
template <typename T, int kLanes, int kChunks, int G>
__global__ void __launch_bounds__(kThreads) paged_attention_kernel(PagedArgs a) {
  constexpr int kVec = 16 / sizeof(T), kDims = kVec * kChunks, kGroups = kThreads / kLanes;
  __shared__ float shared[kThreads / kWarp][G][kWarp][kDims > 8 ? 9 : kDims + 1];
  __shared__ float shared_top[kThreads / kWarp][G], shared_sum[kThreads / kWarp][G];
  static_assert(kDims <= 8, "a lane keeps at most eight dimensions");
  const int group = a.H / a.KV, heads = (group + G - 1) / G;
  int64_t index = blockIdx.x;
  const int part = static_cast<int>(index % a.parts);
  index /= a.parts;
  const int h0 = static_cast<int>(index % heads) * G;
  index /= heads;
  const int kv = static_cast<int>(index % a.KV);
  const int64_t b = index / a.KV;
  const int len = a.lens[b], begin = max(part * kSplit, a.window ? max(0, len - a.window) : 0);
  const int end = min(len, (part + 1) * kSplit);
  const int lane = threadIdx.x % kLanes, mine = threadIdx.x / kLanes;
  float q[G][kDims];
  State<T, kLanes, kChunks, G> s;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    s.top[g] = kNegInf, s.sum[g] = 0.0f;
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      int dim = (d / kVec * kLanes + lane) * kVec + d % kVec, h = kv * group + min(h0 + g, group - 1);
      s.acc[g][d] = 0.0f;
      q[g][d] = dim < a.D ? to_float(static_cast<const T*>(a.q)[b * a.q_token + h * a.q_head + dim]) : 0.0f;
    }
  }
  const int32_t* table = a.tables + b * a.M;
  if (begin < end)
    for (int t = begin; t < end; t += kGroups * kUnroll) attend<T, kLanes, kChunks, G>(s, a, q, table, t + mine, kGroups, end, kv, lane);
  // Lanes of a warp that hold the same dimensions first, then the warps.
#pragma unroll
  for (int by = kLanes; by < kWarp; by *= 2)
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float acc[kDims];
#pragma unroll
      for (int d = 0; d < kDims; ++d) acc[d] = __shfl_xor_sync(kAllLanes, s.acc[g][d], by);
      float top = __shfl_xor_sync(kAllLanes, s.top[g], by), sum = __shfl_xor_sync(kAllLanes, s.sum[g], by);
      merge(s, g, top, sum, acc);
    }
  const int warp = threadIdx.x / kWarp, at = threadIdx.x % kWarp;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (at == 0) shared_top[warp][g] = s.top[g], shared_sum[warp][g] = s.sum[g];
#pragma unroll
    for (int d = 0; d < kDims; ++d) shared[warp][g][at][d] = s.acc[g][d];
  }
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    for (int w = 1; w < kThreads / kWarp; ++w) merge(s, g, shared_top[w][g], shared_sum[w][g], shared[w][g][lane]);
    if (h0 + g >= group) continue;
    const int64_t row = b * a.H + kv * group + h0 + g;
    float* partial = a.workspace + (row * a.parts + part) * (a.D + 2);
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      int dim = (d / kVec * kLanes + lane) * kVec + d % kVec;
      if (dim >= a.D) continue;
      if (a.parts > 1) partial[dim] = s.acc[g][d];
      else from_float(s.sum[g] > 0.0f ? s.acc[g][d] / s.sum[g] : 0.0f, static_cast<T*>(a.out) + row * a.D + dim);
    }
    if (lane == 0 && a.parts > 1) partial[a.D] = s.top[g], partial[a.D + 1] = s.sum[g];
  }
}

// One block per (sequence, head): the parts in order.
template <typename T>
__global__ void paged_merge_kernel(PagedArgs a) {
  const int64_t row = blockIdx.x;
  const float* parts = a.workspace + row * a.parts * (a.D + 2);
  const int used = (a.lens[row / a.H] + kSplit - 1) / kSplit;
  for (int d = threadIdx.x; d < a.D; d += blockDim.x) {
    float top = kNegInf, sum = 0.0f, acc = 0.0f;
    for (int p = 0; p < used; ++p) {
      const float* part = parts + p * (a.D + 2);
      if (!(part[a.D + 1] > 0.0f)) continue;
      float now = fmaxf(top, part[a.D]), keep = top == kNegInf ? 0.0f : __expf(top - now), add = __expf(part[a.D] - now);
      acc = acc * keep + part[d] * add, sum = sum * keep + part[a.D + 1] * add, top = now;
    }
    from_float(sum > 0.0f ? acc / sum : 0.0f, static_cast<T*>(a.out) + row * a.D + d);
  }
}

template <typename T, int kLanes, int kChunks, int G>
const char* launch(const PagedArgs& a, cudaStream_t stream) {
  const int heads = (a.H / a.KV + G - 1) / G;
  const int64_t blocks = a.B * a.KV * heads * a.parts;
  if (blocks > 0x7fffffff) return "too many blocks for one launch; cut the batch";
  FASTPPO_LAUNCH(static_cast<unsigned>(blocks), kThreads, 0, stream, (paged_attention_kernel<T, kLanes, kChunks, G>), a);
  if (a.parts > 1) FASTPPO_LAUNCH(static_cast<unsigned>(a.B * a.H), 128, 0, stream, (paged_merge_kernel<T>), a);
  return launch_error();
}

template <typename T, int kLanes, int kChunks>
const char* launch_group(const PagedArgs& a, cudaStream_t stream) {
  const int group = a.H / a.KV;
  if (group == 1) return launch<T, kLanes, kChunks, 1>(a, stream);
  return launch<T, kLanes, kChunks, 4>(a, stream);  // wider groups take several blocks, which share the L2 cache
}

template <typename T>
const char* launch_lanes(const PagedArgs& a, cudaStream_t stream) {
  const int vectors = a.D * static_cast<int>(sizeof(T)) / 16;
  if (vectors <= 8) return launch_group<T, 8, 1>(a, stream);
  if (vectors <= 16) return launch_group<T, 16, 1>(a, stream);
  if (vectors <= 32) return launch_group<T, 32, 1>(a, stream);
  if constexpr (sizeof(T) == 4) return launch_group<T, 32, 2>(a, stream);
  return "the head size is above 256";
}

}  // namespace

const char* paged_attention_cuda(uintptr_t q, int64_t q_token, int64_t q_head, uintptr_t k, uintptr_t v, int dtype,
                                 uintptr_t tables, int64_t M, uintptr_t lens, uintptr_t out, uintptr_t workspace, int64_t B,
                                 int64_t H, int64_t KV, int64_t D, int64_t block, float scale, int64_t window, float softcap,
                                 uintptr_t stream) {
  if (B == 0) return nullptr;
  if ((k | v) % 16 != 0) return "the caches must begin at a multiple of 16 bytes";
  PagedArgs a{};
  a.q = reinterpret_cast<const void*>(q), a.k = reinterpret_cast<const void*>(k), a.v = reinterpret_cast<const void*>(v);
  a.q_token = q_token, a.q_head = q_head;
  a.tables = reinterpret_cast<const int32_t*>(tables), a.lens = reinterpret_cast<const int32_t*>(lens);
  a.out = reinterpret_cast<void*>(out), a.workspace = reinterpret_cast<float*>(workspace);
  a.B = B, a.M = M, a.H = static_cast<int>(H), a.KV = static_cast<int>(KV), a.D = static_cast<int>(D);
  a.block = static_cast<int>(block), a.parts = static_cast<int>((M * block + kSplit - 1) / kSplit);
  a.scale = scale, a.softcap = softcap, a.window = static_cast<int>(window);
  cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  if (dtype == 0) return launch_lanes<float>(a, s);
  if (dtype == 1) return launch_lanes<__nv_bfloat16>(a, s);
  return launch_lanes<__half>(a, s);
}

}  // namespace fastppo
