// Sampling on a CPU: kernels/sampling.py has the formula. One row is one work item.
//
// Pass 1 reads the row once, a tile of 1024 columns at a time: maximum, sum e, sum e * z while the tile is in L1, and the
// maximum of each of the 16 lanes. Later passes find the row in L2 and touch only what the threshold leaves:
//   top_k   the k-th largest lane maximum is at most the k-th largest logit, so only lanes whose maximum reaches it can
//           hold one of the k largest: a few hundred candidates, never a sort of the row
//   top_p   a histogram of probability mass over value, then a sort of the one bin where the mass is reached
// Sums over tiles and within the chosen tile are in double and in column order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../ops.h"
#include "../philox.h"
#include "sampling.h"
#include "sampling_thresholds.h"

namespace fastppo {
namespace {

constexpr int64_t kBadNumber = -1, kNothingLeft = -2, kBadHistory = -3;

struct Job {
  const void* logits;
  int dtype;  // half.h
  int64_t B, V, stride;
  const int64_t *seeds, *positions, *history;
  const uint8_t* history_mask;
  int64_t L;
  const uint8_t* banned;
  int64_t banned_stride;
  float temperature;
  int64_t top_k;
  double top_p, min_p;
  float penalty, logprob_temperature;
  int64_t* tokens;
  float *sampled, *logprob, *entropy;
};

class Sampler {
 public:
  Sampler(const Job& job, Scratch& s) : j(job), s(s), V(job.V), tiles((job.V + kTile - 1) / kTile) {
    s.max_x.resize(tiles), s.sum_x.resize(tiles), s.dot_x.resize(tiles), s.max_y.resize(tiles), s.weight.resize(tiles);
    s.lane_max.resize(tiles * 16), s.tail.resize(kTile), s.e.resize(kTile), s.bin.resize(kTile);
    greedy = j.temperature == 0 || j.top_k == 1;
    adjusted = j.banned || (j.history && j.penalty != 1.0f);
    rate = greedy ? 1.0f : 1.0f / j.temperature;
  }

  void run(int64_t b) {
    load(b);
    int64_t bad = raw_stats() ? 0 : kBadNumber;
    if (!bad && adjusted) bad = adjust(b);
    if (!bad && max_y() == kNegInf) bad = kNothingLeft;
    if (bad) return write(b, bad, NAN, NAN, NAN);
    float sampled = 0;
    int64_t token = greedy ? argmax() : draw(b, &sampled);
    double c = 1.0 / j.logprob_temperature, log_sum = std::log(sum);
    write(b, token, sampled, (double(x.at(token)) - max) * c - log_sum, log_sum - c * dot / sum);
  }

 private:
  void write(int64_t b, int64_t token, float sampled, double logprob, double entropy) {
    j.tokens[b] = token, j.sampled[b] = sampled;
    j.logprob[b] = static_cast<float>(logprob), j.entropy[b] = static_cast<float>(entropy);
  }

  int64_t tail_start() const { return (tiles - 1) * kTile; }

  void load(int64_t b) {
    row = static_cast<const char*>(j.logits) + b * j.stride * (j.dtype == 0 ? 4 : 2);
    if (j.dtype == 0) {
      const float* p = reinterpret_cast<const float*>(row);
      std::memcpy(s.tail.data(), p + tail_start(), (V - tail_start()) * 4);
      pad_tail(s.tail.data(), V - tail_start());
      x = {p, s.tail.data(), V, tiles};
    } else {
      s.x.resize(tiles * kTile);
      x = {s.x.data(), s.x.data() + tail_start(), V, tiles};
    }
    y = x;
  }

  // Statistics of softmax(x / logprob_temperature), while each tile is in L1. False for NaN or +inf.
  bool raw_stats() {
    float c = 1.0f / j.logprob_temperature;
    bool nan = false;
    max = kNegInf;
    for (int64_t t = 0; t < tiles; ++t) {
      if (j.dtype) {
        int64_t n = std::min<int64_t>(kTile, V - t * kTile);
        widen_tile(row + t * kTile * 2, j.dtype, n, s.x.data() + t * kTile);
        if (n < kTile) pad_tail(s.x.data() + t * kTile, n);
      }
      bool bad;
      tile_max(x.tile(t), x.padded(t), &s.lane_max[t * 16], &s.max_x[t], &bad);
      nan |= bad;
      TileStats stats;
      tile_stats(x.tile(t), x.padded(t), s.max_x[t], c, &stats);
      s.sum_x[t] = stats.sum, s.dot_x[t] = stats.dot;
      max = std::max(max, s.max_x[t]);
    }
    sum = dot = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      if (s.max_x[t] == kNegInf) continue;
      double shift = double(s.max_x[t]) - max, scale = std::exp(shift * c);
      sum += scale * s.sum_x[t];
      dot += scale * (s.dot_x[t] + shift * s.sum_x[t]);
    }
    std::copy(s.max_x.begin(), s.max_x.begin() + tiles, s.max_y.begin());
    return !nan && max != -kNegInf;
  }

  // y = x with the repetition penalty and the bans, and y's maxima.
  int64_t adjust(int64_t b) {
    s.y.resize(tiles * kTile);
    std::memcpy(s.y.data(), x.base, tail_start() * 4);
    std::memcpy(s.y.data() + tail_start(), x.tail, x.padded(tiles - 1) * 4);
    y = {s.y.data(), s.y.data() + tail_start(), V, tiles};
    for (int64_t i = 0; j.history && j.penalty != 1.0f && i < j.L; ++i) {
      if (!j.history_mask[b * j.L + i]) continue;
      int64_t token = j.history[b * j.L + i];
      if (token < 0 || token >= V) return kBadHistory;
      float old = x.at(token);
      s.y[token] = old > 0 ? old / j.penalty : old * j.penalty;
    }
    const uint8_t* banned = j.banned ? j.banned + b * j.banned_stride : nullptr;
    for (int64_t i = 0; banned && i < V; ++i) s.y[i] = banned[i] ? kNegInf : s.y[i];
    bool nan;
    for (int64_t t = 0; t < tiles; ++t) tile_max(y.tile(t), y.padded(t), &s.lane_max[t * 16], &s.max_y[t], &nan);
    return 0;
  }

  float max_y() const { return *std::max_element(s.max_y.begin(), s.max_y.begin() + tiles); }

  int64_t argmax() const {
    float best = max_y();
    int64_t t = 0;
    while (s.max_y[t] != best) ++t;
    const float* p = y.tile(t);
    int64_t i = 0;
    while (p[i] != best) ++i;
    return t * kTile + i;
  }

  int64_t draw(int64_t b, float* sampled) {
    float top = max_y(), threshold = kLowest;
    Thresholds kept(y, s, rate);
    if (j.top_k > 0 && j.top_k < V) threshold = std::max(threshold, kept.kth_largest(j.top_k));
    if (j.top_p < 1) threshold = std::max(threshold, kept.top_p(j.top_p, top, threshold));
    if (j.min_p > 0) threshold = std::max(threshold, static_cast<float>(top + std::log(j.min_p) * j.temperature));
    double total = tile_weights(top, threshold);
    Uniforms u = philox_uniforms(j.seeds[b], j.positions[b]);
    int64_t t = first_above(s.weight.data(), tiles, total * u.tile);
    float weight;
    tile_weight(y.tile(t), y.padded(t), top, rate, threshold, s.e.data(), &weight);
    double inside = 0;
    int n = y.padded(t);
    for (int i = 0; i < n; ++i) inside += s.e[i];
    int64_t token = t * kTile + first_above(s.e.data(), n, inside * u.token);
    *sampled = static_cast<float>(double((y.at(token) - top) * rate) - std::log(total));
    return token;
  }

  double tile_weights(float top, float threshold) {
    bool reuse = !adjusted && threshold == kLowest && j.temperature == j.logprob_temperature;
    double total = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      float w = 0;
      if (reuse) {
        w = s.max_x[t] == kNegInf ? 0 : s.sum_x[t] * std::exp((double(s.max_x[t]) - top) * rate);
      } else if (s.max_y[t] >= threshold) {
        tile_weight(y.tile(t), y.padded(t), top, rate, threshold, nullptr, &w);
      }
      total += s.weight[t] = w;
    }
    return total;
  }

  // The first index whose running sum exceeds `target`; the last with weight if rounding leaves none.
  template <typename W>
  static int64_t first_above(const W* weight, int64_t n, double target) {
    double running = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
      running += weight[i];
      if (running > target) return i;
      if (weight[i] > 0) last = i;
    }
    return last;
  }

  const Job& j;
  Scratch& s;
  int64_t V, tiles;
  bool greedy, adjusted;
  float rate;
  const char* row = nullptr;
  Row x{}, y{};
  float max = 0;
  double sum = 0, dot = 0;
};

}  // namespace

void sampling(uintptr_t logits, int dtype, int64_t B, int64_t V, int64_t stride, uintptr_t seeds, uintptr_t positions,
              uintptr_t history, uintptr_t history_mask, int64_t L, uintptr_t banned, int64_t banned_stride,
              double temperature, int64_t top_k, double top_p, double min_p, double penalty, double logprob_temperature,
              uintptr_t tokens, uintptr_t sampled, uintptr_t logprob, uintptr_t entropy) {
  Job job{reinterpret_cast<const void*>(logits), dtype, B, V, stride,
          reinterpret_cast<const int64_t*>(seeds), reinterpret_cast<const int64_t*>(positions),
          reinterpret_cast<const int64_t*>(history), reinterpret_cast<const uint8_t*>(history_mask), L,
          reinterpret_cast<const uint8_t*>(banned), banned_stride, static_cast<float>(temperature), top_k, top_p, min_p,
          static_cast<float>(penalty), static_cast<float>(logprob_temperature), reinterpret_cast<int64_t*>(tokens),
          reinterpret_cast<float*>(sampled), reinterpret_cast<float*>(logprob), reinterpret_cast<float*>(entropy)};
  pybind11::gil_scoped_release release;
  parallel_for(B, V, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Sampler sampler(job, scratch);
    for (int64_t b = begin; b < end; ++b) sampler.run(b);
  });
}

void bind_sampling(pybind11::module_& m) { m.def("sampling", &sampling, "kernels/sampling.py"); }

}  // namespace fastppo
