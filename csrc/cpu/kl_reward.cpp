// KL reward on the CPU, one row at a time; formula in kernels/kl_reward.py.
#include "kl_reward.h"

#include <pybind11/pybind11.h>

#include "../ops.h"

namespace fastppo {
namespace {

struct Rows {
  const float *logprobs, *ref;
  const uint8_t* mask;
  const float* scores;
  float *rewards, *non_score, *kl;
  int64_t T;
  float kl_coef;
  int kind;
};

FASTPPO_CLONES void reward_row(const Rows& r, int64_t b) {
  const int64_t at = b * r.T;
  const uint8_t* mask = r.mask + at;
  float *kl = r.kl + at, *non_score = r.non_score + at, *rewards = r.rewards + at;
  kl_row(r.kind, r.kind == kFull ? nullptr : r.logprobs + at, r.ref + at, mask, kl, r.T);
  const float weight = -r.kl_coef;
  for (int64_t t = 0; t < r.T; ++t) non_score[t] = weight * kl[t];
  std::memcpy(rewards, non_score, r.T * sizeof(float));
  const int64_t last = last_true(mask, r.T);
  if (last >= 0) rewards[last] += r.scores[b];
}

void kl_reward(uint64_t logprobs, uint64_t ref, uint64_t mask, uint64_t scores, uint64_t rewards, uint64_t non_score,
               uint64_t kl, int64_t B, int64_t T, float kl_coef, int kind) {
  auto floats = [](uint64_t address) { return reinterpret_cast<float*>(address); };
  const Rows rows = {floats(logprobs), floats(ref), reinterpret_cast<uint8_t*>(mask), floats(scores), floats(rewards),
                     floats(non_score), floats(kl), T, kl_coef, kind};
  parallel_for(B, T, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) reward_row(rows, b);
  });
}

}  // namespace

void bind_kl_reward(pybind11::module_& m) {
  m.def("kl_reward", &kl_reward,
        "addresses (logprobs, ref_logprobs, mask, scores, rewards, non_score, kl), B, T, kl_coef, kind");
}

}  // namespace fastppo
