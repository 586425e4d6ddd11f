// New keys and values to their slots of a paged cache, converted to its dtype: kernels/paged_attention.py.
#include <cstring>

#include "../ops.h"
#include "paged_attention.h"
#include "paged_rows.h"
#include "paged_tokens.h"

namespace fastppo {

void cache_write(uintptr_t k, uintptr_t v, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, int dtype,
                 uintptr_t k_cache, uintptr_t v_cache, int cache_dtype, uintptr_t slots, int64_t N, int64_t KV, int64_t D) {
  const int64_t* slot = reinterpret_cast<const int64_t*>(slots);
  const int64_t in = dtype == 0 ? 4 : 2, out = cache_dtype == 0 ? 4 : 2;
  auto one = [&](uintptr_t source, int64_t token, int64_t head, uintptr_t cache, int64_t n) {
    for (int64_t h = 0; h < KV; ++h) {
      const char* from = reinterpret_cast<const char*>(source) + (n * token + h * head) * in;
      char* to = reinterpret_cast<char*>(cache) + (slot[n] * KV + h) * D * out;
      if (dtype == cache_dtype) {
        std::memcpy(to, from, D * in);
      } else {
        float row[kMaxHead];
        widen(from, dtype, 0, D, row), narrow(row, 1.0f, D, cache_dtype, to, 0);
      }
    }
  };
  pybind11::gil_scoped_release release;
  parallel_for(N, KV * D, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (slot[n] < 0) continue;
      one(k, k_token, k_head, k_cache, n);
      one(v, v_token, v_head, v_cache, n);
    }
  });
}

}  // namespace fastppo
