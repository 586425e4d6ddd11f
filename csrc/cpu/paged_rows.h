// Rows of queries, scores and sums in paged attention: to and from other dtypes, softmax of a chunk, merge of parts.
#pragma once
#include <cstdint>

namespace fastppo {

// n elements from `at` of an array of any dtype as floats, and floats times a factor back.
void widen(const void* base, int dtype, int64_t at, int64_t n, float* to);
void narrow(const float* from, float factor, int64_t n, int dtype, void* base, int64_t at);

// The order of rows that meet bfloat16: of each full block of 32 the even elements and then the odd ones; and back.
void interleave(const float* from, int64_t D, float* to);
void uninterleave(const float* from, int64_t D, float* to);

struct SoftmaxArgs {
  float scale, softcap;
  int lo, hi;  // visible tokens of the chunk
};

// Turns s [kChunk] into e^(s - max), zero outside [lo, hi); updates the running maximum and sum. Returns the factor of what
// came before.
float softmax_row(float* s, const SoftmaxArgs& a, float* max, float* sum);

// acc = acc * old + part * new
void merge_row(float* acc, const float* part, int padded, float* max, float* sum, float part_max, float part_sum);

}  // namespace fastppo
