// The two entry points of paged_attention.cpp, for C++ callers. Each releases the GIL: call with it held.
#pragma once
#include <cstdint>

namespace fastppo {

void paged_attention(uintptr_t q, int64_t q_token, int64_t q_head, int q_dtype, uintptr_t k, uintptr_t v, int cache_dtype,
                     uintptr_t tables, int64_t M, uintptr_t lens, uintptr_t starts, uintptr_t out, int64_t B, int64_t H,
                     int64_t KV, int64_t D, int64_t block, double scale, int64_t window, double softcap);

void cache_write(uintptr_t k, uintptr_t v, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, int dtype,
                 uintptr_t k_cache, uintptr_t v_cache, int cache_dtype, uintptr_t slots, int64_t N, int64_t KV, int64_t D);

}  // namespace fastppo
