// A forward pass as a list of operations on rows (tokens), run without Python and torch in between.
//
// fastppo/generation/decode_program.py makes the list from the model's own graph, traced for one token. Every value is a
// buffer [rows, n] of floats; all operations treat rows alike and apart, but for attention, which reads the pages.
// Operations between two products or attentions run together, a block of rows at a time, so that values stay in cache.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../ops.h"
#include "amx.h"
#include "huge_pages.h"
#include "packed_linear.h"
#include "paged_attention.h"
#include "sampling.h"
#include "simd.h"

namespace fastppo {
namespace {

enum Kind { kEmbed, kUnary, kBinary, kScalar, kMean, kLayerNorm, kSlice, kPlace, kRMSNorm, kLinear, kAttention };
enum Unary { kNeg, kCos, kSin, kRsqrt, kRelu, kSilu, kGelu, kGeluTanh, kTanh, kSigmoid, kExp, kSqrt, kReciprocal, kAbs };
enum Arithmetic { kAdd, kSub, kMul, kDiv, kPow };
// How the second operand covers the first: alike; repeated; one per group; kOne: a constant longer than a one-element row.
enum Spread { kFull, kTail, kHead, kOne };

// The fields' meaning by kind is in decode_program.py, beside the function that fills them.
struct Op {
  int kind, mode, out, a, b, c;
  std::array<int64_t, 5> i;
  double f, g;
  uintptr_t p, q;
};

using Tuple = std::tuple<int, int, int, int, int, int, std::array<int64_t, 5>, double, double, uintptr_t, uintptr_t>;

FASTPPO_INLINE vec16 tanh16(vec16 x) {
  // (e^2x - 1) / (e^2x + 1) loses digits near 0, where the series has them
  vec16 magnitude = max16(x, -x);
  vec16 e = exp16(magnitude * 2.0f);
  vec16 far = 1.0f - 2.0f / (e + 1.0f);
  far = x < splat(0.0f) ? -far : far;
  vec16 s = x * x;
  vec16 near = x + x * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)));
  return magnitude < splat(0.2f) ? near : far;
}

// Abramowitz & Stegun 7.1.26: absolute error below 1.5e-7
FASTPPO_INLINE vec16 erf16(vec16 x) {
  vec16 z = max16(x, -x);
  vec16 t = 1.0f / (1.0f + 0.3275911f * z);
  vec16 p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  vec16 y = 1.0f - p * exp16(-z * z);
  return x < splat(0.0f) ? -y : y;
}

FASTPPO_INLINE vec16 sqrt16(vec16 x) {
  vec16 y;
  for (int i = 0; i < 16; ++i) y[i] = std::sqrt(x[i]);
  return y;
}

FASTPPO_INLINE vec16 unary16(int mode, vec16 x) {
  switch (mode) {
    case kNeg: return -x;
    case kRsqrt: return 1.0f / sqrt16(x);
    case kRelu: return max16(x, splat(0.0f));
    case kSilu: return x / (1.0f + exp16(-x));
    case kGelu: return 0.5f * x * (1.0f + erf16(x * 0.70710678f));
    case kGeluTanh: return x / (1.0f + exp16(-1.59576912f * (x + 0.044715f * x * x * x)));  // (1 + tanh z) / 2 = sigmoid(2 z)
    case kTanh: return tanh16(x);
    case kSigmoid: return 1.0f / (1.0f + exp16(-x));
    case kExp: return exp16(x);
    case kSqrt: return sqrt16(x);
    case kReciprocal: return 1.0f / x;
    default: return max16(x, -x);  // kAbs
  }
}

FASTPPO_INLINE vec16 arithmetic16(int mode, vec16 a, vec16 b) {
  switch (mode) {
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    default: return a / b;
  }
}

// A lambda in a clone must be inlined too: a call would pass vectors by another ISA's convention.
#define INLINE_LAMBDA __attribute__((always_inline))

// out[0 .. n) = f(lane) for whole vectors, then for a padded last one
template <typename F>
FASTPPO_INLINE void map16(float* out, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, f(i, 16));
  if (i < n) {
    vec16 last = f(i, static_cast<int>(n - i));
    std::memcpy(out + i, &last, (n - i) * sizeof(float));
  }
}

FASTPPO_INLINE vec16 load_some(const float* p, int lanes) {
  if (lanes == 16) return load16(p);
  vec16 x{};
  std::memcpy(&x, p, lanes * sizeof(float));
  return x;
}

FASTPPO_CLONES void unary(int mode, const float* x, float* out, int64_t n) {
  if (mode == kCos || mode == kSin) {
    for (int64_t i = 0; i < n; ++i) out[i] = mode == kCos ? std::cos(x[i]) : std::sin(x[i]);
    return;
  }
#define CASE(M) \
  case M: map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA { return unary16(M, load_some(x + i, lanes)); }); break;
  switch (mode) {
    CASE(kNeg) CASE(kRsqrt) CASE(kRelu) CASE(kSilu) CASE(kGelu) CASE(kGeluTanh) CASE(kTanh)
    CASE(kSigmoid) CASE(kExp) CASE(kSqrt) CASE(kReciprocal) default: CASE(kAbs)
  }
#undef CASE
}

FASTPPO_CLONES void binary(int mode, const float* a, const float* b, float* out, int64_t n, bool swapped) {
  map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA {
    vec16 x = load_some(a + i, lanes), y = load_some(b + i, lanes);
    return swapped ? arithmetic16(mode, y, x) : arithmetic16(mode, x, y);
  });
}

FASTPPO_CLONES void scalar(int mode, const float* a, float b, float* out, int64_t n, bool swapped) {
  if (mode == kPow) {
    if (b == 2.0f) return map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA { vec16 x = load_some(a + i, lanes); return x * x; });
    if (b == 3.0f) return map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA { vec16 x = load_some(a + i, lanes); return x * x * x; });
    for (int64_t i = 0; i < n; ++i) out[i] = std::pow(a[i], b);
    return;
  }
  map16(out, n, [&](int64_t i, int lanes) INLINE_LAMBDA {
    vec16 x = load_some(a + i, lanes), y = splat(b);
    return swapped ? arithmetic16(mode, y, x) : arithmetic16(mode, x, y);
  });
}

FASTPPO_INLINE float sum_of(vec16 x) {
  float s = 0.0f;
  for (int i = 0; i < 16; ++i) s += x[i];
  return s;
}

FASTPPO_CLONES void mean(const float* x, float* out, int64_t groups, int64_t n, float scale) {
  for (int64_t r = 0; r < groups; ++r, x += n) {
    vec16 sum{};
    for (int64_t i = 0; i < n; i += 16) sum += load_some(x + i, static_cast<int>(std::min<int64_t>(16, n - i)));
    out[r] = sum_of(sum) * scale;
  }
}

FASTPPO_CLONES void layer_norm(const float* x, float* out, int64_t groups, int64_t n, float eps, const float* weight,
                               const float* bias) {
  for (int64_t r = 0; r < groups; ++r, x += n, out += n) {
    vec16 sum{}, squares{};
    for (int64_t i = 0; i < n; i += 16) sum += load_some(x + i, static_cast<int>(std::min<int64_t>(16, n - i)));
    const float center = sum_of(sum) / n;
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] - center;
    for (int64_t i = 0; i < n; i += 16) {
      vec16 d = load_some(out + i, static_cast<int>(std::min<int64_t>(16, n - i)));
      squares += d * d;
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / n + eps);
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
  }
}

FASTPPO_CLONES void rms_norm(const float* x, float* out, int64_t groups, int64_t n, float eps, const float* weight) {
  for (int64_t r = 0; r < groups; ++r, x += n, out += n) {
    vec16 squares{};
    for (int64_t i = 0; i < n; i += 16) {
      vec16 v = load_some(x + i, static_cast<int>(std::min<int64_t>(16, n - i)));
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / n + eps);
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
  }
}

// Several decode steps of B sequences: state in, samples out. Arrays of B unless said; S steps, M pages, D hidden.
// decode_program.py has the same fields in the same order.
struct Steps {
  int64_t steps, B, M;
  uintptr_t tokens, positions, seeds, left;  // int64; left: tokens that a sequence may still get
  uintptr_t tables;                          // int32 [B, M], with the pages for all steps
  uintptr_t sampled_tokens, counts, numbers, hidden;  // int64 [S, B]; int64; float [3, S, B]; float [S, B, D]
  int tokens_buffer, positions_buffer, hidden_buffer, logits_buffer;
  bool stop_at_end;  // return as soon as a sequence ends: others wait for its place
  std::vector<int64_t> eos;
};

struct Draw {
  double temperature;
  int64_t top_k;
  double top_p, min_p, logprob_temperature;
};

// What one forward pass reads and writes besides the program.
struct Pass {
  int64_t rows, sequences;
  uintptr_t slots, tables, lens, starts;  // starts: 0 when every row is a sequence
  int64_t table_width;
};

class DecodeProgram {
 public:
  DecodeProgram(std::vector<int64_t> sizes, const std::vector<Tuple>& ops, int64_t block_size)
      : sizes_(std::move(sizes)), block_size_(block_size), buffers_(sizes_.size()) {
    for (const auto& [kind, mode, out, a, b, c, i, f, g, p, q] : ops) ops_.push_back({kind, mode, out, a, b, c, i, f, g, p, q});
  }

  // Runs operations [first, last). `given`: buffers that live outside (inputs and results).
  void run(int64_t first, int64_t last, const Pass& pass, const std::vector<std::pair<int, uintptr_t>>& given) {
    place(first, last, pass.rows, given);
    for (int64_t i = first; i < last;) {
      const Op& op = ops_[i];
      if (op.kind == kLinear) {
        const Linear linear{reinterpret_cast<const void*>(op.p), op.mode == 1, reinterpret_cast<const float*>(op.q), op.i[0], op.i[1]};
        packed_linear(linear, buffers_[op.a], buffers_[op.out], pass.rows, amx_works());
        ++i;
      } else if (op.kind == kAttention) {
        attend(op, pass);
        ++i;
      } else {
        int64_t end = i, work = 0;
        for (; end < last && ops_[end].kind < kLinear; ++end) work += sizes_[ops_[end].out];
        parallel_for(pass.rows, work * 4, [&](int64_t begin, int64_t stop) {
          constexpr int64_t kBlock = 8;
          for (int64_t r = begin; r < stop; r += kBlock) {
            for (int64_t k = i; k < end; ++k) rowwise(ops_[k], r, std::min(stop, r + kBlock) - r);
          }
        });
        i = end;
      }
    }
  }

  // Sequences leave when they end; returns after the steps, when none is left, or after a row that can't be sampled.
  void decode(const Steps& f, const Draw& draw) {
    Running now(f, sizes_, f.tables, block_size_);
    for (int64_t step = 0; step < f.steps && now.count(); ++step) {
      const Pass pass = now.pass();
      std::vector<std::pair<int, uintptr_t>> given{{f.tokens_buffer, address(now.inputs[0])},
                                                   {f.positions_buffer, address(now.inputs[1])},
                                                   {f.hidden_buffer, address(now.hidden)},
                                                   {f.logits_buffer, address(now.logits)}};
      run(0, static_cast<int64_t>(ops_.size()), pass, given);
      const int64_t V = sizes_[f.logits_buffer];
      sampling(address(now.logits), 0, now.count(), V, V, address(now.seeds), address(now.next), 0, 0, 0, 0, 0, draw.temperature,
               draw.top_k, draw.top_p, draw.min_p, 1.0, draw.logprob_temperature, address(now.drawn), address(now.numbers[0]),
               address(now.numbers[1]), address(now.numbers[2]));
      if (now.advance(step)) return;
    }
  }

 private:
  template <typename T>
  static uintptr_t address(const std::vector<T>& x) {
    return reinterpret_cast<uintptr_t>(x.data());
  }

  // The sequences that go on, packed: row i is sequence index[i] of the caller.
  class Running {
   public:
    Running(const Steps& f, const std::vector<int64_t>& sizes, uintptr_t tables, int64_t block)
        : f_(f), D_(sizes[f.hidden_buffer]), block_(block), all_tables_(reinterpret_cast<const int32_t*>(tables)) {
      const int64_t* token = reinterpret_cast<const int64_t*>(f.tokens);
      const int64_t* position = reinterpret_cast<const int64_t*>(f.positions);
      const int64_t* seed = reinterpret_cast<const int64_t*>(f.seeds);
      for (int64_t b = 0; b < f.B; ++b) index_.push_back(b), drawn.push_back(token[b]), next.push_back(position[b]), seeds.push_back(seed[b]);
      for (auto& x : inputs) x.resize(f.B);
      for (auto& x : numbers) x.resize(f.B);
      slots_.resize(f.B), lens_.resize(f.B), tables_.resize(f.B * f.M);
      hidden.resize(f.B * D_), logits.resize(f.B * sizes[f.logits_buffer]);
      place();
    }

    int64_t count() const { return static_cast<int64_t>(index_.size()); }
    Pass pass() const { return Pass{count(), count(), address(slots_), address(tables_), address(lens_), 0, f_.M}; }

    // Writes the step's samples down and drops the sequences that end; true when the caller has to look.
    bool advance(int64_t step) {
      int64_t kept = 0;
      bool look = false;
      for (int64_t i = 0, n = count(); i < n; ++i) {
        const int64_t b = index_[i], at = step * f_.B + b;
        reinterpret_cast<int64_t*>(f_.sampled_tokens)[at] = drawn[i];
        for (int64_t k = 0; k < 3; ++k) reinterpret_cast<float*>(f_.numbers)[k * f_.steps * f_.B + at] = numbers[k][i];
        if (f_.hidden) std::copy_n(hidden.data() + i * D_, D_, reinterpret_cast<float*>(f_.hidden) + at * D_);
        const int64_t made = ++reinterpret_cast<int64_t*>(f_.counts)[b];
        const bool ends = drawn[i] < 0 || made >= reinterpret_cast<const int64_t*>(f_.left)[b] ||
                          std::find(f_.eos.begin(), f_.eos.end(), drawn[i]) != f_.eos.end();
        look |= drawn[i] < 0 || (ends && f_.stop_at_end);
        if (ends) continue;
        index_[kept] = b, drawn[kept] = drawn[i], next[kept] = next[i], seeds[kept] = seeds[i];
        ++kept;
      }
      index_.resize(kept);
      place();
      return look;
    }

    std::vector<float> inputs[2];  // tokens and positions, as the program reads them
    std::vector<float> hidden, logits, numbers[3];
    std::vector<int64_t> drawn, next, seeds;  // last token; the position that is sampled next; of each sequence

   private:
    // Where the last token of each sequence goes, and what it sees.
    void place() {
      for (int64_t i = 0; i < count(); ++i) {
        const int32_t* table = all_tables_ + index_[i] * f_.M;
        const int64_t position = next[i]++;
        inputs[0][i] = static_cast<float>(drawn[i]), inputs[1][i] = static_cast<float>(position);
        lens_[i] = static_cast<int32_t>(position + 1);
        if (position / block_ < f_.M) slots_[i] = table[position / block_] * block_ + position % block_;
        std::copy_n(table, f_.M, tables_.data() + i * f_.M);
      }
    }

    const Steps& f_;
    const int64_t D_, block_;
    const int32_t* all_tables_;
    std::vector<int64_t> index_, slots_;
    std::vector<int32_t> lens_, tables_;
  };

  // Memory for what the operations write; none for what lives outside: logits of a whole prompt would be its largest part.
  void place(int64_t first, int64_t last, int64_t rows, const std::vector<std::pair<int, uintptr_t>>& given) {
    std::fill(buffers_.begin(), buffers_.end(), nullptr);
    for (const auto& [buffer, address] : given) buffers_.at(buffer) = reinterpret_cast<float*>(address);
    std::vector<std::pair<int, int64_t>> starts;
    int64_t total = 0;
    for (int64_t i = first; i < last; ++i) {
      const int out = ops_[i].out;
      if (buffers_[out] || std::any_of(starts.begin(), starts.end(), [&](const auto& x) { return x.first == out; })) continue;
      starts.emplace_back(out, total);
      total += (sizes_[out] * rows + 15) / 16 * 16;
    }
    if (total > size_) {
      memory_.reset(new float[size_ = total]);  // not a vector, which would write zeros first
      ask_for_huge_pages(reinterpret_cast<uintptr_t>(memory_.get()), total * sizeof(float));
    }
    for (const auto& [out, start] : starts) buffers_[out] = memory_.get() + start;
  }

  void attend(const Op& op, const Pass& pass) {
    const int64_t H = op.i[0], KV = op.i[1], D = op.i[2], window = op.i[3];
    auto address = [&](int buffer) { return reinterpret_cast<uintptr_t>(buffers_[buffer]); };
    cache_write(address(op.b), address(op.c), KV * D, D, KV * D, D, 0, op.p, op.q, op.mode, pass.slots, pass.rows, KV, D);
    paged_attention(address(op.a), H * D, D, 0, op.p, op.q, op.mode, pass.tables, pass.table_width, pass.lens, pass.starts,
                    address(op.out), pass.sequences, H, KV, D, block_size_, op.f, window, op.g);
  }

  // rows [r, r + R) of one operation
  void rowwise(const Op& op, int64_t r, int64_t R) {
    const int64_t n = sizes_[op.out];
    float* out = buffers_[op.out] + r * n;
    const float* a = op.a < 0 ? nullptr : buffers_[op.a] + r * sizes_[op.a];
    switch (op.kind) {
      case kEmbed: return embed(op, a, out, n, R);
      case kUnary: return unary(op.mode, a, out, n * R);
      case kBinary: return spread(op, a, out, n, r, R);
      case kScalar: return scalar(op.mode, a, static_cast<float>(op.f), out, n * R, op.i[0] != 0);
      case kMean: return mean(a, out, n * R, op.i[0], static_cast<float>(op.f));
      case kLayerNorm:
        return layer_norm(a, out, n / op.i[0] * R, op.i[0], static_cast<float>(op.f), reinterpret_cast<const float*>(op.p),
                          reinterpret_cast<const float*>(op.q));
      case kRMSNorm:
        return rms_norm(a, out, n / op.i[0] * R, op.i[0], static_cast<float>(op.f), reinterpret_cast<const float*>(op.p));
      default: return copy(op, a, out, R);
    }
  }

  void embed(const Op& op, const float* a, float* out, int64_t n, int64_t R) const {
    for (int64_t r = 0; r < R; ++r) {
      const int64_t at = static_cast<int64_t>(a[r]);  // exact: indices stay below 2^24
      if (at < 0 || at >= op.i[0]) {
        std::fill(out + r * n, out + (r + 1) * n, std::nanf(""));
      } else if (op.mode == 0) {
        std::memcpy(out + r * n, reinterpret_cast<const float*>(op.p) + at * n, n * sizeof(float));
      } else {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(op.p) + at * n;
        for (int64_t i = 0; i < n; ++i) {
          uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
          std::memcpy(out + r * n + i, &bits, 4);
        }
      }
    }
  }

  // i: spread, period of b (kTail) or elements of a per element of b (kHead), swapped.   b < 0: a constant at p
  void spread(const Op& op, const float* a, float* out, int64_t n, int64_t r, int64_t R) const {
    const bool constant = op.b < 0, swapped = op.i[2] != 0;
    const int64_t nb = constant ? 0 : sizes_[op.b], m = op.i[1];
    const float* b = constant ? reinterpret_cast<const float*>(op.p) : buffers_[op.b] + r * nb;
    if (op.i[0] == kOne) {
      for (int64_t k = 0; k < R; ++k) scalar(op.mode, b, a[k], out + k * n, n, !swapped);
      return;
    }
    if (op.i[0] == kFull && !constant) return binary(op.mode, a, b, out, n * R, swapped);
    for (int64_t k = 0; k < R; ++k, a += n, out += n, b += nb) {
      if (op.i[0] == kHead) {
        for (int64_t j = 0; j < n / m; ++j) scalar(op.mode, a + j * m, b[j], out + j * m, m, swapped);
      } else {
        const int64_t period = op.i[0] == kFull ? n : m;
        for (int64_t j = 0; j < n; j += period) binary(op.mode, a + j, b, out + j, period, swapped);
      }
    }
  }

  // i: outer, length, size of the longer side's row, start in it; kSlice reads from the longer side, kPlace writes to it
  void copy(const Op& op, const float* a, float* out, int64_t R) const {
    const auto [outer, length, size, start, unused] = op.i;
    for (int64_t k = 0; k < R * outer; ++k) {
      const float* from = op.kind == kSlice ? a + k * size + start : a + k * length;
      std::memcpy(op.kind == kSlice ? out + k * length : out + k * size + start, from, length * sizeof(float));
    }
  }

  std::vector<int64_t> sizes_;
  int64_t block_size_;
  std::vector<Op> ops_;
  std::vector<float*> buffers_;
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
};

}  // namespace

void bind_decode_program(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<DecodeProgram>(m, "DecodeProgram", "fastppo/generation/decode_program.py")
      .def(py::init<std::vector<int64_t>, const std::vector<Tuple>&, int64_t>())
      .def("decode", [](DecodeProgram& self, const std::array<int64_t, 3>& sizes, const std::array<uintptr_t, 9>& p,
                        const std::array<int, 4>& buffers, bool stop_at_end, std::vector<int64_t> eos,
                        const std::tuple<double, int64_t, double, double, double>& draw) {
        const Steps steps{sizes[0], sizes[1], sizes[2], p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8],
                          buffers[0], buffers[1], buffers[2], buffers[3], stop_at_end, std::move(eos)};
        const auto& [temperature, top_k, top_p, min_p, logprob_temperature] = draw;
        with_team([&] { self.decode(steps, Draw{temperature, top_k, top_p, min_p, logprob_temperature}); });
      })
      .def("run", [](DecodeProgram& self, int64_t first, int64_t last, int64_t rows, int64_t sequences, uintptr_t slots,
                     uintptr_t tables, int64_t table_width, uintptr_t lens, uintptr_t starts,
                     const std::vector<std::pair<int, uintptr_t>>& given) {
        with_team([&] { self.run(first, last, Pass{rows, sequences, slots, tables, lens, starts, table_width}, given); });
      });
}

}  // namespace fastppo
