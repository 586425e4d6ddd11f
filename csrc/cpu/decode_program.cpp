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
#include "row_ops.h"
#include "running.h"
#include "sampling.h"
#include "simd.h"

namespace fastppo {
namespace {

enum Kind { kEmbed, kUnary, kBinary, kScalar, kMean, kLayerNorm, kSlice, kPlace, kRMSNorm, kLinear, kAttention };
// How the second operand covers the first: alike; repeated; one per group; kOne: a constant longer than a one-element row.
enum Spread { kFull, kTail, kHead, kOne };

// The fields' meaning by kind is in decode_program.py, beside the function that fills them.
struct Op {
  int kind, mode, out, a, b, c;
  std::array<int64_t, 5> i;
  double f, g;
  uintptr_t p, q;
};

// Memory for the values between operations. It outlives the program: pages of fresh memory cost more than what is written there.
class Workspace {
 public:
  // At least n floats, not what they were before.
  float* floats(int64_t n) {
    if (n > size_) {
      memory_.reset();
      memory_.reset(new float[size_ = n]);  // not a vector, which would write zeros first
      ask_for_huge_pages(reinterpret_cast<uintptr_t>(memory_.get()), n * sizeof(float));
    }
    return memory_.get();
  }
  int64_t bytes() const { return size_ * sizeof(float); }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
};

using Tuple = std::tuple<int, int, int, int, int, int, std::array<int64_t, 5>, double, double, uintptr_t, uintptr_t>;

class DecodeProgram {
 public:
  DecodeProgram(std::vector<int64_t> sizes, const std::vector<Tuple>& ops, int64_t block_size, std::shared_ptr<Workspace> workspace)
      : sizes_(std::move(sizes)), block_size_(block_size), buffers_(sizes_.size()), workspace_(std::move(workspace)) {
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
    float* memory = workspace_->floats(total);
    for (const auto& [out, start] : starts) buffers_[out] = memory + start;
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
  std::shared_ptr<Workspace> workspace_;
};

}  // namespace

void bind_decode_program(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Workspace, std::shared_ptr<Workspace>>(m, "Workspace", "memory of a DecodeProgram, for the next one too")
      .def(py::init<>())
      .def_property_readonly("bytes", &Workspace::bytes);
  py::class_<DecodeProgram>(m, "DecodeProgram", "fastppo/generation/decode_program.py")
      .def(py::init<std::vector<int64_t>, const std::vector<Tuple>&, int64_t, std::shared_ptr<Workspace>>())
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
