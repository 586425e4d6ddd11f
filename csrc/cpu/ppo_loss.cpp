// PPO loss on the CPU: one pass over the tokens; formula in kernels/ppo_loss.py.
#include "ppo_loss.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <vector>

#include "../ops.h"
#include "sums.h"

namespace fastppo {
namespace {

constexpr int64_t kChunk = 4096;   // tokens per partial sum: fixed, so that sums do not depend on the thread count
constexpr int kBlock = 256;        // tokens whose terms stay in L1 and are summed in float before they go to double
constexpr float kNever = 3.0e38f;  // the dual clip's bound where there is none
constexpr int kTerms = kRatioMax + 1;

// Plain loops that the vectoriser turns into each clone's own instructions. (GCC lowers comparisons of vector-extension
// types to scalars before it makes the clones, and this op is mostly comparisons.)
struct Block {
  const float *logprobs, *values, *entropy, *old_logprobs, *old_values, *advantages, *returns;
  const uint8_t* mask;
};
struct BlockGradients {
  alignas(64) float logprobs[kBlock], values[kBlock], entropy[kBlock];
};
struct Terms {
  alignas(64) float at[kTerms][kBlock];  // by PPOStat; the two m2 rows are not used
};

// Each token's terms and gradients, n <= kBlock. A False token's inputs count as 0, and then so does all that it adds.
FASTPPO_INLINE void token_terms(const Block& b, int n, const PPOLossOptions& o, Terms& t, BlockGradients& g) {
  const float grad_value = o.vf_coef * o.scale, grad_entropy = -o.entropy_coef * o.scale;
  const float low_ratio = o.ratio_low, high_ratio = o.ratio_high, range = o.cliprange_value, scale = o.scale;
  const float mean = o.whiten_mean, rstd = o.whiten_rstd, dual_clip = o.dual_clip;
  const float never = dual_clip > 0 ? 0.0f : kNever;
  for (int i = 0; i < n; ++i) {
    const float log_ratio = b.logprobs[i] - b.old_logprobs[i];
    t.at[kPolicyKL][i] = b.mask[i] ? -log_ratio : 0.0f;
    t.at[kCount][i] = b.mask[i] ? 1.0f : 0.0f;
  }
  for (int i = 0; i < n; ++i) {
    const float advantage = (b.advantages[i] - mean) * rstd, value = b.values[i], ret = b.returns[i];
    const float old_value = b.old_values[i], entropy = b.entropy[i];
    t.at[kAdvantage][i] = b.mask[i] ? advantage : 0.0f;
    t.at[kValue][i] = b.mask[i] ? value : 0.0f;
    t.at[kReturn][i] = b.mask[i] ? ret : 0.0f;
    t.at[kOldValue][i] = b.mask[i] ? old_value : 0.0f;
    t.at[kEntropy][i] = b.mask[i] ? entropy : 0.0f;
  }
  for (int i = 0; i < n; ++i) {
    const float log_ratio = -t.at[kPolicyKL][i], advantage = t.at[kAdvantage][i];
    const float ratio = log_ratio == log_ratio ? t.at[kCount][i] * exp_scalar(log_ratio) : log_ratio;
    const float above = ratio < low_ratio ? low_ratio : ratio;
    const float clipped_ratio = above > high_ratio ? high_ratio : above;
    const float plain = -advantage * ratio, clipped = -advantage * clipped_ratio;
    // compared so that a NaN stays: the trainer's guard looks for it in the loss and the gradients
    const float surrogate = clipped > plain ? clipped : plain;
    const float moving = plain <= clipped ? 0.0f : plain;  // d(-A r)/d logprob = -A r
    const float grad = clipped_ratio == ratio ? plain : moving;
    const float bound = advantage < 0.0f ? -advantage * dual_clip + never : kNever;
    t.at[kRatio][i] = ratio;
    t.at[kApproxKL][i] = 0.5f * log_ratio * log_ratio;
    t.at[kPolicyLoss][i] = surrogate > bound ? bound : surrogate;
    t.at[kPolicyClipped][i] = clipped > plain ? 1.0f : 0.0f;
    t.at[kDualClipped][i] = surrogate > bound ? 1.0f : 0.0f;
    g.logprobs[i] = surrogate > bound ? 0.0f : grad * scale;
  }
  for (int i = 0; i < n; ++i) {
    const float value = t.at[kValue][i], ret = t.at[kReturn][i], old_value = t.at[kOldValue][i];
    const float low = old_value - range, high = old_value + range;
    const float risen = value < low ? low : value;
    const float clipped_value = risen > high ? high : risen;
    const float distance = value - ret, clipped_distance = clipped_value - ret;
    const float error = distance * distance, clipped_error = clipped_distance * clipped_distance;
    // torch.maximum halves the gradient at a tie; inside the clip range both sides carry it.
    const float outside = error > clipped_error ? 1.0f : 0.0f;
    const float halved = error == clipped_error ? 0.5f : outside;
    const float weight = clipped_value == value ? 1.0f : halved;
    t.at[kValueError][i] = error;
    t.at[kValueLoss][i] = 0.5f * (clipped_error > error ? clipped_error : error);
    t.at[kValueClipped][i] = clipped_error > error ? 1.0f : 0.0f;
    g.values[i] = distance * weight * grad_value;
    g.entropy[i] = t.at[kCount][i] * grad_entropy;
  }
}

FASTPPO_INLINE void add_terms(Terms& t, int n, double* sums) {
  for (int k : {kCount, kPolicyLoss, kValueLoss, kEntropy, kPolicyClipped, kValueClipped, kDualClipped, kApproxKL,
                kPolicyKL, kRatio, kAdvantage, kValue, kValueError})
    sums[k] += row_sum(t.at[k], n);
  row_moments(t.at[kReturn], n, sums + kReturn);
  row_moments(t.at[kOldValue], n, sums + kOldValue);
  for (int i = n; i % 16; ++i) t.at[kRatio][i] = 0.0f;
  float most[16] = {};  // sixteen maxima, because the vectoriser does not reorder one (NaN)
  for (int i = 0; i < n; i += 16)
    for (int j = 0; j < 16; ++j) most[j] = t.at[kRatio][i + j] > most[j] ? t.at[kRatio][i + j] : most[j];
  for (float x : most)
    if (x > sums[kRatioMax]) sums[kRatioMax] = x;
}

}  // namespace

FASTPPO_CLONES void ppo_loss_chunk(const PPOLossTokens& t, int64_t begin, int64_t end, const PPOLossOptions& options,
                                   double* sums) {
  uint8_t every[kBlock];
  float none[kBlock] = {};
  std::memset(every, 1, sizeof every);
  BlockGradients g;
  Terms terms;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const Block b = {t.logprobs + at,     t.values + at,  t.entropy ? t.entropy + at : none, t.old_logprobs + at,
                     t.old_values + at,   t.advantages + at, t.returns + at,                 t.mask ? t.mask + at : every};
    token_terms(b, n, options, terms, g);
    add_terms(terms, n, sums);
    if (t.grad_logprobs) std::memcpy(t.grad_logprobs + at, g.logprobs, n * sizeof(float));
    if (t.grad_values) std::memcpy(t.grad_values + at, g.values, n * sizeof(float));
    if (t.grad_entropy) std::memcpy(t.grad_entropy + at, g.entropy, n * sizeof(float));
  }
}

namespace {

int64_t count_true(const uint8_t* mask, int64_t N) {
  int64_t count = 0;
  for (int64_t i = 0; i < N; ++i) count += mask[i] != 0;
  return count;
}

// options: the fields of PPOLossOptions with normalizer in place of scale; normalizer <= 0 means the mask's count.
double ppo_loss(const std::vector<uint64_t>& address, int64_t N, const std::vector<double>& o, uint64_t stats) {
  auto floats = [&](int i) { return reinterpret_cast<float*>(address[i]); };
  const PPOLossTokens tokens = {floats(0), floats(1), floats(2), floats(3), floats(4), floats(5), floats(6),
                                reinterpret_cast<uint8_t*>(address[7]), floats(8), floats(9), floats(10)};
  double normalizer = o[8];
  if (normalizer <= 0) normalizer = tokens.mask ? count_true(tokens.mask, N) : N;
  if (normalizer <= 0) normalizer = 1;
  const PPOLossOptions options = {float(o[0]), float(o[1]), float(o[2]), float(o[3]), float(o[4]),
                                  float(o[5]), float(o[6]), float(o[7]), float(1 / normalizer)};
  const int64_t chunks = (N + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks * kPPOStats, 0.0);
  parallel_for(chunks, kChunk * 8, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      ppo_loss_chunk(tokens, c * kChunk, (c + 1) * kChunk < N ? (c + 1) * kChunk : N, options, &partial[c * kPPOStats]);
  });
  double* total = reinterpret_cast<double*>(stats);
  for (int i = 0; i < kPPOStats; ++i) total[i] = 0;
  for (int64_t c = 0; c < chunks; ++c) ppo_loss_add(total, &partial[c * kPPOStats]);
  return ppo_loss_finish(total, options);
}

}  // namespace

void bind_ppo_loss(pybind11::module_& m) {
  m.def("ppo_loss", &ppo_loss,
        "addresses (logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask, grad_logprobs, "
        "grad_values, grad_entropy; 0 = none), N, options, address of float64 stats -> loss");
}

}  // namespace fastppo
