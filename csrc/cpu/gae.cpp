// GAE on the CPU, with KL shaping in the same pass where log-probs are given; formula in kernels/gae.py.
//
// A row is walked from its end, sixteen steps in one vector: reward, delta, an inclusive scan of four shifted multiply-adds
// (Kogge and Stone 1973), the advantage carried from the right, return and sums, all in registers, every token touched once.
// With masked="carry" a row's True tokens are packed first: the scan then knows no holes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../ops.h"
#include "kl_reward.h"

namespace fastppo {
namespace {

constexpr int64_t kTogether = 8;  // rows per work item
constexpr int64_t kBlocks = 16;   // blocks between two additions to the sums in double
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

// One row's tensors. `reward` is ref (or the KL itself) where KL is shaped; logprobs is null where it isn't or for kFull.
struct Row {
  const float *logprobs, *reward, *values;
  const uint8_t* mask;
  float *advantages, *returns;
  int64_t n, last;     // last: the last True, where the score goes; -1: there is none
  const float* score;  // kScore zeros, the score, 15 zeros
};
constexpr int64_t kScore = 15;

// What the scan hands from a block to the one on its left, and the row's sums.
struct Carried {
  vec16 values = {}, advantage = {};  // advantage: the same number in all lanes
  vec16 kl = {}, kls = {};            // of kBlocks blocks, and of those before
  // Moments of kBlocks blocks, in float: about `pivot`, the mean of those before, so that squares keep their digits.
  vec16 pivot = {}, sum = {}, squares = {};
  ivec16 count = {};  // of each lane, times -1
  double sums[3] = {};  // count, sum, sum of squares of what is no longer in those
  bool first = true;    // the row's first block from the right: it has the score, and gives the first pivot
};

struct Coefficients {
  vec16 step[4], powers;  // gamma * lam to the 1, 2, 4, 8; to the 16 - lane
};

FASTPPO_INLINE Coefficients coefficients_of(const GAE& g) {
  Coefficients c;
  float step = g.gamma * g.lam, power = 1;
  for (int lane = 15; lane >= 0; --lane) c.powers[lane] = power *= step;
  for (int k = 0; k < 4; ++k, step *= step) c.step[k] = splat(step);
  return c;
}

// Lane i is x's lane i + kBy, at the end `right`'s first ones. Without one-register shuffles of 16 lanes: through memory.
template <int kBy, bool kShuffle>
FASTPPO_INLINE vec16 left(vec16 x, vec16 right) {
  if (kShuffle) {
    constexpr int b = kBy;
    return __builtin_shuffle(x, right, ivec16{b, b + 1, b + 2, b + 3, b + 4, b + 5, b + 6, b + 7, b + 8, b + 9, b + 10,
                                              b + 11, b + 12, b + 13, b + 14, b + 15});
  }
  float both[32];
  store16(both, x), store16(both + 16, right);
  return load16(both + kBy);
}

// Sixteen steps of the scan; `on` has all bits of a lane set where its token counts.
template <bool kShuffle, bool kStops>
FASTPPO_INLINE vec16 scan16(const Coefficients& c, vec16 x, ivec16 on, vec16 carried) {
  const vec16 none = {};
  if (!kStops) {
    x += c.step[0] * left<1, kShuffle>(x, none);
    x += c.step[1] * left<2, kShuffle>(x, none);
    x += c.step[2] * left<4, kShuffle>(x, none);
    x += c.step[3] * left<8, kShuffle>(x, none);
    return x + c.powers * carried;
  }
  const vec16 one = splat(1.0f);
  vec16 a = as_float(as_int(c.step[0]) & on);
  x += a * left<1, kShuffle>(x, none), a *= left<1, kShuffle>(a, one);
  x += a * left<2, kShuffle>(x, none), a *= left<2, kShuffle>(a, one);
  x += a * left<4, kShuffle>(x, none), a *= left<4, kShuffle>(a, one);
  x += a * left<8, kShuffle>(x, none), a *= left<8, kShuffle>(a, one);
  return x + a * carried;
}

// Of the row's first block: exact, in double; their mean is the pivot of what follows.
FASTPPO_INLINE void first_moments(const float* advantages, const uint8_t* mask, Carried& k) {
  for (int i = 0; i < 16; ++i) {
    const double on = !mask || mask[i], a = advantages[i];  // a is 0 where not on
    k.sums[0] += on, k.sums[1] += a, k.sums[2] += a * a;
  }
  k.pivot = splat(static_cast<float>(k.sums[0] > 0 ? k.sums[1] / k.sums[0] : 0.0));
  k.first = false;
}

template <bool kShuffle, bool kMask, bool kStops>
FASTPPO_INLINE void block16(const GAE& g, const Coefficients& c, const Row& row, int64_t t, Carried& k) {
  vec16 value = load16(row.values + t), reward = load16(row.reward + t);
  ivec16 on = {};
  if (kMask) {
    on = true16(row.mask + t);
    value = as_float(as_int(value) & on);
  }
  if (g.kl_sums) {
    if (g.kind != kFull) reward = load16(row.logprobs + t) - reward;
    if (kMask) reward = as_float(as_int(reward) & on);
    reward = kl16(g.kind, reward);
    k.kl += reward;
    reward *= -g.kl_coef;
    if (k.first && row.last >= 0) reward += load16(row.score + kScore - (row.last - t));
  } else if (kMask) {
    reward = as_float(as_int(reward) & on);
  }
  vec16 delta = reward + g.gamma * left<1, kShuffle>(value, k.values) - value;
  if (kStops) delta = as_float(as_int(delta) & on);
  vec16 advantage = scan16<kShuffle, kStops>(c, delta, on, k.advantage);
  k.values = value;
  k.advantage = splat(advantage[0]);
  const vec16 carried = advantage;
  if (kMask) advantage = as_float(as_int(advantage) & on);
  store16(row.advantages + t, advantage);
  store16(row.returns + t, advantage + value);
  if (k.first) return first_moments(row.advantages + t, kMask ? row.mask + t : nullptr, k);
  vec16 away = carried - k.pivot;
  if (kMask) {
    away = as_float(as_int(away) & on);
    k.count += on;
  }
  k.sum += away;
  k.squares += away * away;
}

// The row's first n % 16 tokens, in a block whose rest, on the left, is masked.
template <bool kShuffle, bool kMask, bool kStops>
FASTPPO_INLINE void block_of(const GAE& g, const Coefficients& c, const Row& row, int64_t n, Carried& k) {
  float logprobs[16] = {}, reward[16] = {}, values[16] = {}, advantages[16], returns[16];
  uint8_t mask[16] = {};
  const int64_t at = 16 - n;
  std::memcpy(values + at, row.values, n * 4), std::memcpy(reward + at, row.reward, n * 4);
  if (row.logprobs) std::memcpy(logprobs + at, row.logprobs, n * 4);
  if (kMask) std::memcpy(mask + at, row.mask, n);
  if (!kMask) std::memset(mask + at, 1, n);
  Row part = row;
  part.logprobs = logprobs, part.reward = reward, part.values = values, part.mask = mask;
  part.advantages = advantages, part.returns = returns;
  part.last = row.last < 0 ? -1 : row.last + at;
  block16<kShuffle, true, kStops>(g, c, part, 0, k);
  std::memcpy(row.advantages, advantages + at, n * 4), std::memcpy(row.returns, returns + at, n * 4);
}

// Adds the moments of the blocks since the last call, `count` tokens or as k.count says. k's pivot is then their mean.
FASTPPO_INLINE void add_moments(Carried& k, int64_t count) {
  double sum = 0, squares = 0;
  for (int i = 0; i < 16; ++i) sum += k.sum[i], squares += k.squares[i], count -= k.count[i];
  const double n = static_cast<double>(count), pivot = k.pivot[0];
  k.sums[0] += n;
  k.sums[1] += sum + n * pivot;
  k.sums[2] += squares + pivot * (2 * sum + n * pivot);
  if (count > 0) k.pivot = splat(static_cast<float>(pivot + sum / n));
  k.sum = k.squares = vec16{}, k.count = ivec16{};
  k.kls += k.kl, k.kl = vec16{};
}

// sums: count, sum, sum of squares of the advantages, added to. Returns the KL's sum.
template <bool kShuffle, bool kMask, bool kStops>
FASTPPO_INLINE double walk(const GAE& g, const Coefficients& c, const Row& row, double* sums) {
  Carried k;
  int64_t t = row.n - (row.n - 1 - row.last) / 16 * 16;  // nothing comes in from padding on the right
  if (t < row.n) std::memset(row.advantages + t, 0, (row.n - t) * 4), std::memset(row.returns + t, 0, (row.n - t) * 4);
  while (t >= 16) {
    const int64_t end = k.first ? t - 16 : std::max(t % 16, t - 16 * kBlocks), count = kMask || k.first ? 0 : t - end;
    for (; t > end; t -= 16) {
      // The next row's block: the hardware's prefetch ends at a page, and a row is often just that.
      const int64_t next = t - 16 + row.n;
      __builtin_prefetch(row.values + next), __builtin_prefetch(row.reward + next);
      if (row.logprobs) __builtin_prefetch(row.logprobs + next);
      block16<kShuffle, kMask, kStops>(g, c, row, t - 16, k);
    }
    add_moments(k, count);
  }
  if (t > 0) block_of<kShuffle, kMask, kStops>(g, c, row, t, k), add_moments(k, 0);
  double kl = 0;
  for (int i = 0; i < 3; ++i) sums[i] += k.sums[i];
  for (int i = 0; i < 16; ++i) kl += k.kls[i];
  return kl;
}

// As walk, over the row's True tokens alone.
template <bool kShuffle>
FASTPPO_INLINE double walk_packed(const GAE& g, const Coefficients& c, const Row& row, double* sums) {
  static thread_local std::vector<float> space;
  if (static_cast<int64_t>(space.size()) < 5 * row.n + 5) space.resize(5 * row.n + 5);
  float *logprobs = space.data(), *reward = logprobs + row.n, *values = reward + row.n;
  float *advantages = values + row.n, *returns = advantages + row.n + 1;
  int64_t n = 0;
  for (int64_t t = 0; t < row.n; n += row.mask[t++] != 0) {  // what isn't kept is overwritten by the next
    values[n] = row.values[t], reward[n] = row.reward[t];
    if (row.logprobs) logprobs[n] = row.logprobs[t];
  }
  const Row packed = {row.logprobs ? logprobs : nullptr, reward, values, nullptr, advantages, returns, n, n - 1, row.score};
  const double kl = walk<kShuffle, false, false>(g, c, packed, sums);
  advantages[n] = returns[n] = 0;  // read, and dropped, after the last True
  for (int64_t t = 0, i = 0; t < row.n; i += row.mask[t++] != 0) {
    const float a = advantages[i], r = returns[i];
    row.advantages[t] = row.mask[t] ? a : 0.0f, row.returns[t] = row.mask[t] ? r : 0.0f;
  }
  return kl;
}

FASTPPO_INLINE Row row_of(const GAE& g, int64_t b, float* score) {
  if (g.kl_sums) score[kScore] = g.scores[b];
  const int64_t at = g.cu_seqlens ? g.cu_seqlens[b] : b * g.T, n = g.cu_seqlens ? g.cu_seqlens[b + 1] - at : g.T;
  const bool shaped = g.kl_sums;  // not g.rewards: the address of an empty tensor is null too
  const uint8_t* mask = g.mask ? g.mask + at : nullptr;
  return {shaped && g.kind != kFull ? g.logprobs + at : nullptr, (shaped ? g.ref : g.rewards) + at, g.values + at, mask,
          g.advantages + at, g.returns + at, n, last_true(mask, n), score};
}

template <bool kShuffle>
FASTPPO_INLINE void rows(const GAE& g, int64_t item, double* sums) {
  const Coefficients c = coefficients_of(g);
  float score[2 * kScore + 1] = {};
  for (int64_t b = item * kTogether; b < std::min(g.B, (item + 1) * kTogether); ++b) {
    const Row row = row_of(g, b, score);
    double kl;
    if (!row.mask)
      kl = walk<kShuffle, false, false>(g, c, row, sums);
    else if (g.masked == kZero)
      kl = walk<kShuffle, true, false>(g, c, row, sums);
    else if (g.masked == kStop)
      kl = walk<kShuffle, true, true>(g, c, row, sums);
    else
      kl = walk_packed<kShuffle>(g, c, row, sums);
    if (g.kl_sums) g.kl_sums[b] = static_cast<float>(kl);
  }
}

FASTPPO_AVX512 void rows_avx512(const GAE& g, int64_t item, double* sums) { rows<true>(g, item, sums); }
FASTPPO_CLONES void rows_any(const GAE& g, int64_t item, double* sums) { rows<false>(g, item, sums); }

// options: gamma, lam, kl_coef; kind and masked as in the enums. moments: float64 count, mean, squared distances from it.
void gae(const std::vector<uint64_t>& address, int64_t B, int64_t T, double gamma, double lam, double kl_coef, int kind,
         int masked, uint64_t moments) {
  auto floats = [&](int i) { return reinterpret_cast<float*>(address[i]); };
  const GAE g = {floats(0), floats(1), floats(2), floats(3), reinterpret_cast<uint8_t*>(address[4]), floats(5),
                 reinterpret_cast<int32_t*>(address[6]), floats(7), floats(8), floats(9), B, T, float(gamma), float(lam),
                 float(kl_coef), kind, masked};
  const int64_t items = (B + kTogether - 1) / kTogether;
  std::vector<double> partial(items * 3, 0.0);
  const int64_t tokens = g.cu_seqlens ? g.cu_seqlens[B] : B * T;
  const auto run = has_avx512() ? rows_avx512 : rows_any;
  // Threads take the next item: the one that calls is at work before the others wake. Sums are added in row order below.
  parallel_items(items, items ? tokens / items : 0, [&](int64_t item) { run(g, item, &partial[item * 3]); });
  double count = 0, sum = 0, squares = 0;
  for (int64_t item = 0; item < items; ++item) {
    count += partial[item * 3];
    sum += partial[item * 3 + 1];
    squares += partial[item * 3 + 2];
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
