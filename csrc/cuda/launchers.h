// The C entry points of csrc/cuda/*.cu: they launch on `stream` and return what went wrong, or nullptr.
#pragma once
#include <stdint.h>

// Rows of a strided tensor whose leading dimensions collapse to two; strides in elements.
struct LogprobRows {
  int64_t count, inner, outer_stride, inner_stride;
};

struct LogprobForward {
  const void* logits;
  int dtype;  // 0 float, 1 bfloat16, 2 half
  LogprobRows rows;
  int64_t vocab;
  float temperature;
  const int64_t* tokens;
  float *logprob, *entropy, *stats;  // [rows], [rows], [rows, 2]
};

struct LogprobBackward {
  const void* logits;
  void* grads;  // may be logits
  int dtype;
  LogprobRows rows, grad_rows;
  int64_t vocab;
  float temperature;
  const int64_t* tokens;
  const float *stats, *entropy, *upstream, *upstream_entropy;
};

extern "C" const char* fastppo_logprob_forward(const LogprobForward* arguments, void* stream);
extern "C" const char* fastppo_logprob_backward(const LogprobBackward* arguments, void* stream);
