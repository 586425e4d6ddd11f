// The PPO loss of a run of tokens: loss terms, statistics and gradients. Used by ppo_loss and by linear_ppo_loss.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "simd.h"

namespace fastppo {

// Order of PPOStats in kernels/ppo_loss.py. While summing, the two m2 entries hold plain sums of squares.
enum PPOStat {
  kCount, kPolicyLoss, kValueLoss, kEntropy, kPolicyClipped, kValueClipped, kDualClipped, kApproxKL, kPolicyKL, kRatio,
  kAdvantage, kReturn, kReturnM2, kOldValue, kOldValueM2, kValue, kValueError, kRatioMax, kPPOStats
};

struct PPOLossOptions {
  float ratio_low, ratio_high;  // 1 - cliprange, 1 + cliprange
  float cliprange_value;
  float vf_coef;
  float dual_clip;  // 0: off
  float entropy_coef;
  float whiten_mean, whiten_rstd;  // 0, 1: off
  float scale;                     // 1 / normalizer; gradients carry it
};

// All [N] float32; entropy, mask and the gradients may be null (mask: every token counts).
struct PPOLossTokens {
  const float *logprobs, *values, *entropy;
  const float *old_logprobs, *old_values, *advantages, *returns;
  const uint8_t* mask;
  float *grad_logprobs, *grad_values, *grad_entropy;
};

// Tokens [begin, end): writes their gradients and adds their statistics to sums[kPPOStats] (start from zeros).
// For the same statistics to the last bit whatever the thread count, call it on fixed chunks and add in order.
void ppo_loss_chunk(const PPOLossTokens& tokens, int64_t begin, int64_t end, const PPOLossOptions& options, double* sums);

// Adds one chunk's sums to the total; the maximum is a maximum.
FASTPPO_INLINE void ppo_loss_add(double* total, const double* sums) {
  for (int i = 0; i < kRatioMax; ++i) total[i] += sums[i];
  if (sums[kRatioMax] > total[kRatioMax]) total[kRatioMax] = sums[kRatioMax];
}

// Sums of squares to sums of squared distances from the mean; returns the loss.
inline double ppo_loss_finish(double* total, const PPOLossOptions& options) {
  const double n = total[kCount] > 0 ? total[kCount] : 1;
  for (int i : {kReturnM2, kOldValueM2}) {
    const double m2 = total[i] - total[i - 1] * total[i - 1] / n;
    total[i] = m2 > 0 ? m2 : 0;
  }
  const double sum = total[kPolicyLoss] + options.vf_coef * total[kValueLoss] - options.entropy_coef * total[kEntropy];
  return sum * options.scale;
}

}  // namespace fastppo
