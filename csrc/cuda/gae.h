// What gae.cu takes: addresses on the GPU. Absent tensors are null.
#pragma once
#include <cstdint>

namespace fastppo {

enum GAEMasked { kGAEZero, kGAEStop, kGAECarry };  // order of MASKED in kernels/gae.py
constexpr int kGAEFullKL = 4;                      // KINDS["full"] in kernels/kl_reward.py

struct GAEArgs {
  const float *rewards, *logprobs, *ref, *values;  // rewards, or logprobs and ref
  const uint8_t* mask;                             // null: every token counts
  const float* scores;                             // null with rewards
  const int32_t* cu_seqlens;                       // null: rows of T
  float *advantages, *returns, *kl_sums;
  float* work;    // [3, B] the rows' moments
  int* ticket;    // 0 before and after a launch; launches that share it must be on one stream
  float* moments;  // [3]
  int64_t B, T;
  float gamma, lam, kl_coef;
  int kind, masked;
  bool aligned;  // set by the launcher
};

// nullptr, or CUDA's error text.
const char* gae_cuda(GAEArgs args, void* stream);

}  // namespace fastppo
