// GAE on the CPU, with KL shaping in the same pass where log-probs are given; formula in kernels/gae.py.
//
// A row's steps wait for each other (one multiply-add each), so kTogether rows walk back side by side. The outputs serve
// as scratch: returns hold the masked value and advantages the reward, then delta, until a row is finished.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../ops.h"
#include "kl_reward.h"

namespace fastppo {
namespace {

constexpr int kTogether = 8;
enum Masked { kZero, kStop, kCarry };  // order of MASKED in kernels/gae.py

struct GAE {
  const float *rewards, *logprobs, *ref, *values;  // rewards, or logprobs and ref
  const uint8_t* mask;                             // null: every token counts
  const float* scores;                             // null with rewards
  const int32_t* cu_seqlens;                       // null: rows of T
  float *advantages, *returns, *kl_sums;           // kl_sums null with rewards
  int64_t B, T;
  float gamma, lam, kl_coef;
  int kind, masked;
};

struct Row {
  int64_t at, n;
};
FASTPPO_INLINE Row row_of(const GAE& g, int64_t b) {
  if (!g.cu_seqlens) return {b * g.T, g.T};
  return {g.cu_seqlens[b], g.cu_seqlens[b + 1] - g.cu_seqlens[b]};
}

// advantages = reward, returns = value, both 0 at False.
FASTPPO_INLINE void load_row(const GAE& g, int64_t b, const Row& row) {
  const uint8_t* mask = g.mask ? g.mask + row.at : nullptr;
  const float* values = g.values + row.at;
  float *reward = g.advantages + row.at, *value = g.returns + row.at;
  std::memcpy(value, values, row.n * sizeof(float));
  if (!g.kl_sums) {  // not g.rewards: the address of an empty tensor is null too
    std::memcpy(reward, g.rewards + row.at, row.n * sizeof(float));
  } else {
    kl_row(g.kind, g.logprobs + row.at, g.ref + row.at, mask, reward, row.n);
    g.kl_sums[b] = static_cast<float>(row_sum(reward, row.n));
    const float weight = -g.kl_coef;
    for (int64_t t = 0; t < row.n; ++t) reward[t] *= weight;
    const int64_t last = last_true(mask, row.n);
    if (last >= 0) reward[last] += g.scores[b];
  }
  if (mask)
    for (int64_t t = 0; t < row.n; ++t) {
      const float r = reward[t], v = value[t];
      reward[t] = mask[t] ? r : 0.0f;
      value[t] = mask[t] ? v : 0.0f;
    }
}

// advantages = delta.
FASTPPO_INLINE void delta_row(const GAE& g, const Row& row) {
  if (row.n == 0) return;
  const uint8_t* mask = g.mask ? g.mask + row.at : nullptr;
  float *delta = g.advantages + row.at, *value = g.returns + row.at;
  if (g.masked == kCarry && mask) {  // the next value is that of the next token that counts
    float next = 0;
    for (int64_t t = row.n - 1; t >= 0; --t) {
      if (!mask[t]) continue;
      delta[t] += g.gamma * next - value[t];
      next = value[t];
    }
    return;
  }
  for (int64_t t = 0; t + 1 < row.n; ++t) delta[t] += g.gamma * value[t + 1] - value[t];
  delta[row.n - 1] -= value[row.n - 1];
  if (g.masked == kStop && mask)
    for (int64_t t = 0; t < row.n; ++t) {
      const float d = delta[t];
      delta[t] = mask[t] ? d : 0.0f;
    }
}

// advantages = the scan, `count` rows side by side from their ends.
FASTPPO_INLINE void scan_rows(const GAE& g, const Row* rows, int count) {
  const float step = g.gamma * g.lam;
  const float decay[2] = {g.masked == kZero ? step : g.masked == kStop ? 0.0f : 1.0f, step};  // by mask
  float carried[kTogether] = {}, *ends[kTogether];
  const uint8_t* masks[kTogether];
  int64_t shared = count == kTogether ? rows[0].n : 0;
  for (int j = 0; j < count; ++j) {
    ends[j] = g.advantages + rows[j].at + rows[j].n;
    masks[j] = g.mask ? g.mask + rows[j].at + rows[j].n : nullptr;
    if (rows[j].n < shared) shared = rows[j].n;
  }
  if (!g.mask || g.masked == kZero) {
    for (int64_t k = 1; k <= shared; ++k)
      for (int j = 0; j < kTogether; ++j) ends[j][-k] = carried[j] = ends[j][-k] + step * carried[j];
  } else {
    for (int64_t k = 1; k <= shared; ++k)
      for (int j = 0; j < kTogether; ++j) ends[j][-k] = carried[j] = ends[j][-k] + decay[masks[j][-k]] * carried[j];
  }
  for (int j = 0; j < count; ++j)
    for (int64_t k = shared + 1; k <= rows[j].n; ++k)
      ends[j][-k] = carried[j] = ends[j][-k] + (masks[j] ? decay[masks[j][-k]] : step) * carried[j];
}

// Zeros at False, returns, and (count, sum, sum of squares) of the advantages.
FASTPPO_INLINE void finish_row(const GAE& g, const Row& row, double* sums) {
  const uint8_t* mask = g.mask ? g.mask + row.at : nullptr;
  float *advantage = g.advantages + row.at, *value = g.returns + row.at;
  if (mask)
    for (int64_t t = 0; t < row.n; ++t) {
      const float a = advantage[t];
      advantage[t] = mask[t] ? a : 0.0f;
    }
  for (int64_t t = 0; t < row.n; ++t) value[t] += advantage[t];
  int64_t counted = mask ? 0 : row.n;
  if (mask)
    for (int64_t t = 0; t < row.n; ++t) counted += mask[t] != 0;
  sums[0] += static_cast<double>(counted);
  row_moments(advantage, row.n, sums + 1);
}

FASTPPO_CLONES void gae_group(const GAE& g, int64_t group, double* sums) {
  Row rows[kTogether];
  const int64_t first = group * kTogether;
  const int count = static_cast<int>(g.B - first < kTogether ? g.B - first : kTogether);
  for (int j = 0; j < count; ++j) {
    rows[j] = row_of(g, first + j);
    load_row(g, first + j, rows[j]);
    delta_row(g, rows[j]);
  }
  scan_rows(g, rows, count);
  for (int j = 0; j < count; ++j) finish_row(g, rows[j], sums);
}

// options: gamma, lam, kl_coef; kind and masked as in the enums. moments: float64 count, mean, squared distances from it.
void gae(const std::vector<uint64_t>& address, int64_t B, int64_t T, double gamma, double lam, double kl_coef, int kind,
         int masked, uint64_t moments) {
  auto floats = [&](int i) { return reinterpret_cast<float*>(address[i]); };
  const GAE g = {floats(0), floats(1), floats(2), floats(3), reinterpret_cast<uint8_t*>(address[4]), floats(5),
                 reinterpret_cast<int32_t*>(address[6]), floats(7), floats(8), floats(9), B, T, float(gamma), float(lam),
                 float(kl_coef), kind, masked};
  const int64_t groups = (B + kTogether - 1) / kTogether;
  std::vector<double> partial(groups * 3, 0.0);
  const int64_t tokens = g.cu_seqlens ? g.cu_seqlens[B] : B * T;
  parallel_for(groups, groups ? tokens / groups : 0, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) gae_group(g, group, &partial[group * 3]);
  });
  double count = 0, sum = 0, squares = 0;
  for (int64_t group = 0; group < groups; ++group) {
    count += partial[group * 3];
    sum += partial[group * 3 + 1];
    squares += partial[group * 3 + 2];
  }
  const double mean = count > 0 ? sum / count : 0, m2 = squares - sum * mean;
  double* out = reinterpret_cast<double*>(moments);
  out[0] = count;
  out[1] = mean;
  out[2] = m2 > 0 ? m2 : 0;
}

}  // namespace

void bind_gae(pybind11::module_& m) {
  m.def("gae", &gae,
        "addresses (rewards, logprobs, ref_logprobs, values, mask, scores, cu_seqlens, advantages, returns, kl_sums; 0 = "
        "none), B, T, gamma, lam, kl_coef, kind, masked, address of float64 moments");
}

}  // namespace fastppo
