// What top-k and top-p leave of a row of logits, for sampling.cpp: the smallest value that may be drawn.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "sampling_tiles.h"

namespace fastppo {
namespace {

struct Scratch {
  std::vector<float> x, y, tail, candidates, lane_max;
  std::vector<float> max_x, max_y;
  std::vector<double> sum_x, dot_x, weight;
  std::vector<double> mass;
  std::vector<float> e;
  std::vector<int> bin;
};

// y: the row. s.max_y and s.lane_max hold its tiles' maxima. rate: 1 / temperature.
class Thresholds {
 public:
  Thresholds(const Row& y, Scratch& s, float rate) : y(y), s(s), rate(rate) {}

  // The k-th largest of y.
  float kth_largest(int64_t k) {
    const int64_t tiles = y.tiles, tail = (tiles - 1) * kTile;
    std::vector<float>& c = s.candidates;
    sorted = k <= tiles * 8 && k <= 2048;
    if (!sorted) {
      c.resize(y.V);
      std::copy(y.base, y.base + tail, c.begin());
      std::copy(y.tail, y.tail + (y.V - tail), c.begin() + tail);
      std::nth_element(c.begin(), c.begin() + (k - 1), c.end(), std::greater<float>());
      return c[k - 1];
    }
    c.assign(s.lane_max.begin(), s.lane_max.begin() + tiles * 16);
    std::nth_element(c.begin(), c.begin() + (k - 1), c.end(), std::greater<float>());
    float bound = std::max(c[k - 1], kLowest);
    c.clear();
    for (int64_t t = 0; t < tiles; ++t) {
      if (s.max_y[t] < bound) continue;
      for (int lane = 0; lane < 16; ++lane) {
        if (s.lane_max[t * 16 + lane] < bound) continue;
        const float* p = y.tile(t);
        for (int i = lane, n = y.padded(t); i < n; i += 16)
          if (p[i] >= bound) c.push_back(p[i]);
      }
    }
    std::sort(c.begin(), c.end(), std::greater<float>());
    float kth = static_cast<int64_t>(c.size()) < k ? kLowest : c[k - 1];
    while (!c.empty() && c.back() < kth) c.pop_back();
    return kth;
  }

  // The smallest value kept by top-p among those >= threshold, of which `top` is the largest.
  float top_p(double share, float top, float threshold) {
    std::vector<float>& c = s.candidates;
    if (sorted) {
      double total = 0;
      for (float v : c) total += weight_of(v, top);
      return walk(c, top, 0, share * total);
    }
    s.mass.assign(2 * (kBins + 1), 0.0);
    double *even = s.mass.data(), *odd = even + kBins + 1;
    for (int64_t t = 0; t < y.tiles; ++t) {
      if (s.max_y[t] < threshold) continue;
      int n = y.padded(t);
      tile_bins(y.tile(t), n, top, rate, threshold, s.e.data(), s.bin.data());
      for (int i = 0; i < n; i += 2) even[s.bin[i]] += s.e[i], odd[s.bin[i + 1]] += s.e[i + 1];
    }
    double total = 0, above = 0;
    for (int i = 0; i < kBins; ++i) total += even[i] += odd[i];
    int bin = 0, last = 0;
    for (int i = 0; i < kBins; ++i) last = even[i] > 0 ? i : last;
    while (bin < last && above + even[bin] < share * total) above += even[bin++];
    while (bin < last && even[bin] == 0) ++bin;
    collect_bin(bin, top, threshold);
    return walk(c, top, above, share * total);
  }

 private:
  double weight_of(float value, float top) const { return std::exp(double((value - top) * rate)); }

  // The smallest value of `c`, largest first, such that what is larger (`above` included) weighs less than `target`.
  float walk(const std::vector<float>& c, float top, double above, double target) const {
    double mass = above;
    size_t i = 0;
    float kept = c.front();
    while (i < c.size() && mass < target) {
      kept = c[i];
      double each = weight_of(kept, top);
      for (; i < c.size() && c[i] == kept; ++i) mass += each;
    }
    return kept;
  }

  void collect_bin(int bin, float top, float threshold) {
    s.candidates.clear();
    for (int64_t t = 0; t < y.tiles; ++t) {
      if (s.max_y[t] < threshold) continue;
      int n = y.padded(t);
      const float* p = y.tile(t);
      tile_bins(p, n, top, rate, threshold, s.e.data(), s.bin.data());
      for (int i = 0; i < n; ++i)
        if (s.bin[i] == bin) s.candidates.push_back(p[i]);
    }
    std::sort(s.candidates.begin(), s.candidates.end(), std::greater<float>());
  }

  const Row& y;
  Scratch& s;
  const float rate;
  bool sorted = false;  // s.candidates holds everything >= the k-th largest, largest first
};

}  // namespace
}  // namespace fastppo
