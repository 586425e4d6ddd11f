// y = x W^T + b with W packed once into panels, for few rows of x (decoding) and constant weights (a rollout).
#pragma once
#include <cstdint>

namespace fastppo {

constexpr int kPanel = 32;  // output columns that are computed together

struct Linear {
  const void* packed;  // [ceil(N / 32)][K padded to 32][32] float, or bf16 with k and k + 1 side by side
  bool is_bf16;
  const float* bias;  // or nullptr
  int64_t N, K;
};

// Weight (n, k) at n * n_stride + k * k_stride (nn.Linear and its transpose, GPT-2's Conv1D) into panels at `packed`.
void pack_linear(uintptr_t weight, bool from_is_bf16, int64_t n_stride, int64_t k_stride, int64_t N, int64_t K, uintptr_t packed,
                 bool to_is_bf16);

// out [rows, N] = x [rows, K] W^T + bias, on all threads. A row's result does not depend on the other rows in any bit.
// amx: on AMX tiles (amx.h), only where amx_works().
void packed_linear(const Linear& linear, const float* x, float* out, int64_t rows, bool amx);

}  // namespace fastppo
