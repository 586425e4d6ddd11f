// One row of logits: online statistics, log-prob and entropy, and the gradient. Shared by logprob, linear_logprob and
// linear_ppo_loss; the bodies are in logprob_row.cpp.
//
// A raw product x becomes u = scale * (x + bias), optionally u = cap * tanh(u / cap), and the tempered logit u / T. All
// exponentials are taken to base 2: y = u * log2(e) / T, so that 2^y needs no range reduction by ln 2.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace fastppo {

struct LogitMap {
  float to_log2;        // u (or tanh) to base-2 tempered logit
  float to_tanh = 0;    // x + bias to tanh's argument
  float cap = 0;        // 0: no soft cap
  float grad;           // d(tempered logit) / dx, without tanh's factor 1 - tanh^2
  const float* bias = nullptr;

  LogitMap(double temperature, double scale = 1, double soft_cap = 0, const float* bias_V = nullptr)
      : cap(static_cast<float>(soft_cap)), grad(static_cast<float>(scale / temperature)), bias(bias_V) {
    constexpr double kLog2E = 1.4426950408889634;
    to_log2 = static_cast<float>((soft_cap > 0 ? soft_cap : scale) * kLog2E / temperature);
    if (soft_cap > 0) to_tanh = static_cast<float>(scale / soft_cap);
  }
};

// sum over the row so far of 2^(y - max2) and of (y - max2) 2^(y - max2).
struct RowState {
  double max2 = -std::numeric_limits<double>::infinity(), sum = 0, dot = 0;
};

struct RowResult {
  float logprob, entropy;  // nats
};

// What row_grad needs: dx_j = map' * (g [j = token] - 2^(y_j - max2) (a + b (y_j - max2))).
struct RowCoefficients {
  float max2, a, b, g;
  int64_t token;  // outside [0, n): the token is in another tile
};

// Add `n` columns to the state; bias (map.bias) belongs to the same columns.
void row_stats(const void* x, int dtype, int64_t n, const LogitMap& map, RowState& state);
// y of one column, in double.
double row_log2(const void* x, int dtype, int64_t column, const LogitMap& map);
// dx may be x.
void row_grad(const void* x, void* dx, int dtype, int64_t n, const LogitMap& map, const RowCoefficients& k);

constexpr double kLn2 = 0.6931471805599453;

inline RowResult row_result(const RowState& s, double target2) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  double log_sum = std::log2(s.sum), entropy = kLn2 * (log_sum - s.dot / s.sum);
  double logprob = kLn2 * (target2 - s.max2 - log_sum);
  if (s.max2 == -std::numeric_limits<double>::infinity() || std::isnan(entropy)) logprob = entropy = nan;
  // Rounding may leave 1e-8 on the wrong side; comparisons keep a NaN.
  return {static_cast<float>(logprob > 0 ? 0 : logprob), static_cast<float>(entropy < 0 ? 0 : entropy)};
}

// g, h: upstream gradients of log-prob and entropy. dH/dz_j = -p_j (log p_j + H).
inline RowCoefficients row_coefficients(double max2, double sum, double entropy, double g, double h, int64_t token) {
  double log_sum = std::log2(sum);
  double a = h == 0 ? g : g + h * (entropy - kLn2 * log_sum), b = h * kLn2;
  return {static_cast<float>(max2), static_cast<float>(a / sum), static_cast<float>(b / sum), static_cast<float>(g), token};
}

}  // namespace fastppo
