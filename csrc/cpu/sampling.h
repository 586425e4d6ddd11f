// The sampler for C++ callers: kernels/sampling.py has the meaning of every argument. Needs the GIL, which it lets go.
#pragma once
#include <cstdint>

namespace fastppo {

void sampling(uintptr_t logits, int dtype, int64_t B, int64_t V, int64_t stride, uintptr_t seeds, uintptr_t positions,
              uintptr_t history, uintptr_t history_mask, int64_t L, uintptr_t banned, int64_t banned_stride,
              double temperature, int64_t top_k, double top_p, double min_p, double penalty, double logprob_temperature,
              uintptr_t tokens, uintptr_t sampled, uintptr_t logprob, uintptr_t entropy);

}  // namespace fastppo
