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

// The same for sixteen differences of log-probs (for kFull: the KL itself).
FASTPPO_INLINE vec16 kl16(int kind, vec16 d) {
  if (kind == kAbs) return as_float(as_int(d) & 0x7fffffff);
  if (kind == kMSE) return 0.5f * d * d;
  if (kind == kK3) return (exp16(-d) - 1.0f) + d;
  return d;
}

// Index of the last True, -1 where there is none.
FASTPPO_INLINE int64_t last_true(const uint8_t* mask, int64_t n) {
  if (!mask) return n - 1;
  int64_t t = n;
  for (; t >= 16; t -= 16) {  // most of a short response's row may be padding
    uint64_t words[2];
    std::memcpy(words, mask + t - 16, 16);
    if (words[0] | words[1]) break;
  }
  while (t > 0 && !mask[t - 1]) --t;
  return t - 1;
}

}  // namespace fastppo
