// Log-prob and entropy of given tokens from logits, and the gradient: one block per row, one pass over it each way.
// Formulas: kernels/logprob.py; everything to base 2, as in csrc/cpu/logprob_row.h.
//
// 16-byte loads, kDepth of them in flight per thread; the few elements before the first and after the last aligned
// vector go one to a thread.
#include "common.cuh"
#include "launchers.h"
#include "packed.cuh"

namespace fastppo {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDepth = 4;      // vectors in flight per thread, forward
constexpr int kGradDepth = 2;  // backward: a store follows each load
constexpr float kLn2 = 0.69314718f;
constexpr float kLowest = -126.0f;

// sum over what a thread has seen of 2^(y - top) and of (y - top) 2^(y - top).
struct State {
  float top, sum, dot;
};

// (y - top) clamped so that e * y is 0, not NaN, for -inf; a comparison with NaN is false, so NaN passes.
__device__ __forceinline__ float above_lowest(float y) { return y < kLowest ? kLowest : y; }

// Before the first finite logit the state holds no mass, but perhaps a NaN: 0 * NaN keeps it.
__device__ __forceinline__ float rescale(State& s, float top) {
  float shift = top == -INFINITY ? 0.0f : top;
  float move = s.top == -INFINITY ? 0.0f : s.top - shift;
  float kept = s.top == -INFINITY ? 0.0f : exp2_fast(move);
  s.dot = kept * (s.dot + above_lowest(move) * s.sum);
  s.sum = kept * s.sum;
  s.top = top;
  return shift;
}

template <int kCount>
__device__ __forceinline__ void add(State& s, const float* x, float to_log2) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, x[i]);
  float shift = rescale(s, fmaxf(s.top, top * to_log2));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float y = above_lowest(fmaf(x[i], to_log2, -shift)), e = exp2_fast(y);
    s.sum += e;
    s.dot = fmaf(e, y, s.dot);
  }
}

__device__ __forceinline__ void merge(State& s, State other) {
  float top = fmaxf(s.top, other.top);
  rescale(s, top);
  rescale(other, top);
  s.sum += other.sum;
  s.dot += other.dot;
}

__device__ __forceinline__ void merge_lanes(State& s) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    State other;
    other.top = __shfl_xor_sync(kAllLanes, s.top, lane);
    other.sum = __shfl_xor_sync(kAllLanes, s.sum, lane);
    other.dot = __shfl_xor_sync(kAllLanes, s.dot, lane);
    merge(s, other);
  }
}

// Row i of a strided tensor, in elements. int64: row * V overflows int32 past 2^31 elements.
__device__ __forceinline__ int64_t offset(const LogprobRows& rows, int64_t i) {
  return (i / rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride;
}

// Elements before the first 16-byte boundary.
template <typename T>
__device__ __forceinline__ int64_t before_aligned(const T* p, int64_t n) {
  int64_t lead = ((16 - (reinterpret_cast<uintptr_t>(p) & 15)) & 15) / sizeof(T);
  return lead < n ? lead : n;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) logprob_forward_kernel(const T* logits, LogprobRows rows, int64_t vocab,
                                                                  float to_log2, const int64_t* tokens, float* logprob,
                                                                  float* entropy, float* stats) {
  constexpr int kCount = Packed<T>::kCount;
  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x;
  const T* x = logits + offset(rows, row);
  const int64_t lead = before_aligned(x, vocab), vectors = (vocab - lead) / kCount;
  const uint4* body = reinterpret_cast<const uint4*>(x + lead);
  State s = {-INFINITY, 0.0f, 0.0f};
  float values[kCount];
  int64_t v = thread;
  for (; v + (kDepth - 1) * kThreads < vectors; v += kDepth * kThreads) {
    uint4 loaded[kDepth];
#pragma unroll
    for (int k = 0; k < kDepth; ++k) loaded[k] = body[v + k * kThreads];
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Packed<T>::unpack(loaded[k], values);
      add<kCount>(s, values, to_log2);
    }
  }
  for (; v < vectors; v += kThreads) {
    Packed<T>::unpack(body[v], values);
    add<kCount>(s, values, to_log2);
  }
  const int64_t tail = lead + vectors * kCount + thread;
  if (thread < lead) values[0] = Packed<T>::one(x + thread), add<1>(s, values, to_log2);
  if (tail < vocab) values[0] = Packed<T>::one(x + tail), add<1>(s, values, to_log2);

  __shared__ State warps[kWarps];
  merge_lanes(s);
  if (thread % kWarp == 0) warps[thread / kWarp] = s;
  __syncthreads();
  if (thread >= kWarp) return;
  State whole = {-INFINITY, 0.0f, 0.0f};
  if (thread < kWarps) whole = warps[thread];
  merge_lanes(whole);
  if (thread != 0) return;
  const int64_t token = tokens[row];
  const bool valid = token >= 0 && token < vocab && whole.top != -INFINITY;
  const float log_sum = log2f(whole.sum);
  const float h = kLn2 * (log_sum - whole.dot / whole.sum);
  float value = valid ? kLn2 * (fmaf(Packed<T>::one(x + token), to_log2, -whole.top) - log_sum) : NAN;
  value = value > 0.0f ? 0.0f : value;
  logprob[row] = h != h ? NAN : value;
  entropy[row] = whole.top == -INFINITY ? NAN : (h < 0.0f ? 0.0f : h);
  stats[2 * row] = whole.top;
  stats[2 * row + 1] = whole.sum;
}

// What one row's gradient is made of: dx = slope * 2^(y - top) (a + b (y - top)), plus target at the token's column.
struct Coefficients {
  float to_log2, top, a, b, slope, target;
};

__device__ __forceinline__ float gradient(float x, const Coefficients& k) {
  float y = fmaf(x, k.to_log2, -k.top), below = y;
  y = above_lowest(y);
  float d = k.slope * exp2_fast(y) * fmaf(k.b, y, k.a);
  return below < kLowest ? 0.0f : d;  // exactly 0 where p is 0
}

template <typename T>
__device__ __forceinline__ void gradient_one(const T* x, T* dx, int64_t j, int64_t token, bool dead,
                                             const Coefficients& k) {
  float d = gradient(Packed<T>::one(x + j), k);
  Packed<T>::put(dx + j, dead ? 0.0f : j == token ? d + k.target : d);
}

template <typename T>
__device__ __forceinline__ uint4 gradient_vector(const uint4& loaded, int64_t first, int64_t token,
                                                 const Coefficients& k) {
  constexpr int kCount = Packed<T>::kCount;
  float values[kCount];
  Packed<T>::unpack(loaded, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float d = gradient(values[i], k);
    values[i] = first + i == token ? d + k.target : d;
  }
  return Packed<T>::pack(values);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    logprob_backward_kernel(const T* logits, T* grads, LogprobRows rows, LogprobRows grad_rows, int64_t vocab,
                            float to_log2, float inverse_temperature, const int64_t* tokens, const float* stats,
                            const float* entropy, const float* upstream, const float* upstream_entropy) {
  constexpr int kCount = Packed<T>::kCount;
  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x;
  const T* x = logits + offset(rows, row);
  T* dx = grads + offset(grad_rows, row);
  const float g = upstream[row], h = upstream_entropy[row], sum = stats[2 * row + 1];
  const bool dead = g == 0.0f && h == 0.0f;
  const int64_t token = tokens[row];
  Coefficients k;
  k.to_log2 = to_log2, k.top = stats[2 * row], k.slope = -inverse_temperature, k.target = g * inverse_temperature;
  k.a = h == 0.0f ? g / sum : (g + h * (entropy[row] - kLn2 * log2f(sum))) / sum;
  k.b = h * kLn2 / sum;

  int64_t lead = before_aligned(dx, vocab);
  // Rows that are aligned differently go one element at a time.
  if (before_aligned(x, vocab) != lead) lead = vocab;
  const int64_t vectors = (vocab - lead) / kCount;
  const uint4* body = reinterpret_cast<const uint4*>(x + lead);
  uint4* out = reinterpret_cast<uint4*>(dx + lead);
  const uint4 zero = make_uint4(0, 0, 0, 0);
  int64_t v = thread;
  for (; v + (kGradDepth - 1) * kThreads < vectors && !dead; v += kGradDepth * kThreads) {
    uint4 loaded[kGradDepth];
#pragma unroll
    for (int i = 0; i < kGradDepth; ++i) loaded[i] = body[v + i * kThreads];
#pragma unroll
    for (int i = 0; i < kGradDepth; ++i)
      out[v + i * kThreads] = gradient_vector<T>(loaded[i], lead + (v + i * kThreads) * kCount, token, k);
  }
  for (; v < vectors; v += kThreads) out[v] = dead ? zero : gradient_vector<T>(body[v], lead + v * kCount, token, k);
  for (int64_t j = thread; j < lead; j += kThreads) gradient_one(x, dx, j, token, dead, k);
  for (int64_t j = lead + vectors * kCount + thread; j < vocab; j += kThreads) gradient_one(x, dx, j, token, dead, k);
}

constexpr float kLog2E = 1.44269504f;

template <typename T>
void forward(const LogprobForward& a, cudaStream_t stream) {
  FASTPPO_LAUNCH(
      static_cast<unsigned>(a.rows.count), kThreads, 0, stream, logprob_forward_kernel<T>,
      static_cast<const T*>(a.logits), a.rows, a.vocab, kLog2E / a.temperature, a.tokens, a.logprob, a.entropy, a.stats);
}

template <typename T>
void backward(const LogprobBackward& a, cudaStream_t stream) {
  FASTPPO_LAUNCH(
      static_cast<unsigned>(a.rows.count), kThreads, 0, stream, logprob_backward_kernel<T>,
      static_cast<const T*>(a.logits), static_cast<T*>(a.grads), a.rows, a.grad_rows, a.vocab, kLog2E / a.temperature,
      1.0f / a.temperature, a.tokens, a.stats, a.entropy, a.upstream, a.upstream_entropy);
}

}  // namespace
}  // namespace fastppo

using namespace fastppo;

extern "C" const char* fastppo_logprob_forward(const LogprobForward* a, void* stream) {
  if (a->rows.count == 0) return nullptr;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  a->dtype == 0 ? forward<float>(*a, s) : a->dtype == 1 ? forward<bf16>(*a, s) : forward<fp16>(*a, s);
  return fastppo::launch_error();
}

extern "C" const char* fastppo_logprob_backward(const LogprobBackward* a, void* stream) {
  if (a->rows.count == 0) return nullptr;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  a->dtype == 0 ? backward<float>(*a, s) : a->dtype == 1 ? backward<bf16>(*a, s) : backward<fp16>(*a, s);
  return fastppo::launch_error();
}
