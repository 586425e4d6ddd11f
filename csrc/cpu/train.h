// The calls that a training pass is made of. Addresses and sizes as fastppo/engine/kernels.py has them.
#pragma once
#include <array>
#include <cstdint>

namespace fastppo {

// address: x, add, sum, w, b, y, stats
void train_norm(const std::array<uintptr_t, 7>& a, int64_t N, int64_t D, double eps, bool layer, bool bf16);
// address: dy, x, stats, w, b, dres, out, y, dw, db
void train_norm_backward(const std::array<uintptr_t, 10>& a, int64_t N, int64_t D, bool layer, bool fresh, bool add, bool bf16);
// address: pre, act, dact, dpre (the last two 0: forward)
void train_activation(const std::array<uintptr_t, 4>& a, int64_t N, int64_t F, int kind, bool bf16);
// out[F] (+)= sum over rows of x [N, F], `stride` apart
void train_sum_columns(uintptr_t x, int64_t N, int64_t F, int64_t stride, uintptr_t out, bool add, bool bf16);
// address: q, k, v, out, lse, cos, sin, cu_seqlens, dout, dq, dk, dv (dout 0: forward).
// sizes: B, H, K, D, row strides of q, of k and v, of out, window (0: none).
void train_attention(const std::array<uintptr_t, 12>& a, const std::array<int64_t, 8>& sizes, double scale, bool bf16);

// products.cpp: C (+)= A B + bias on AMX tiles. addresses: A, B, C, bias or 0; sizes: M, N, K, strides of A, B and C;
// flags: k contiguous in A, in B, factors bf16, C bf16, bias bf16, add to C.
void product(const std::array<uintptr_t, 4>& addresses, const std::array<int64_t, 6>& sizes, int flags);
// small_products.cpp: the same of floats, faster where K is small
void small_product(const std::array<uintptr_t, 4>& addresses, const std::array<int64_t, 6>& sizes, int flags);

}  // namespace fastppo
