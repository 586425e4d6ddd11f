// Per-token KL of one row, by kind; used by kl_reward and by the fused GAE.
#pragma once
#include "sums.h"

namespace fastppo {

// The order of KINDS in kernels/kl_reward.py.
enum KLKind { kKL, kAbs, kMSE, kK3, kFull };

// out[t] = KL of token t, 0 where mask is False; for kFull `ref` holds the KL itself. mask may be null.
FASTPPO_INLINE void kl_row(int kind, const float* logprobs, const float* ref, const uint8_t* mask, float* out, int64_t n) {
  if (kind == kFull) {
    for (int64_t t = 0; t < n; ++t) out[t] = ref[t];
  } else {
    for (int64_t t = 0; t < n; ++t) out[t] = logprobs[t] - ref[t];
  }
  if (mask)
    for (int64_t t = 0; t < n; ++t) {
      const float kl = out[t];  // loaded by every lane: the vectoriser refuses a load that only some do
      out[t] = mask[t] ? kl : 0.0f;
    }
  if (kind == kAbs) {
    for (int64_t t = 0; t < n; ++t) out[t] = out[t] < 0 ? -out[t] : out[t];
  } else if (kind == kMSE) {
    for (int64_t t = 0; t < n; ++t) out[t] = 0.5f * out[t] * out[t];
  } else if (kind == kK3) {
    for (int64_t t = 0; t < n; ++t) out[t] = (exp_scalar(-out[t]) - 1.0f) + out[t];
  }
}

// Index of the last True, -1 where there is none.
FASTPPO_INLINE int64_t last_true(const uint8_t* mask, int64_t n) {
  if (!mask) return n - 1;
  int64_t t = n - 1;
  while (t >= 0 && !mask[t]) --t;
  return t;
}

}  // namespace fastppo
