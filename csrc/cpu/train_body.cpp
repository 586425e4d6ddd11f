// The blocks of a model, forward and backward over packed sequences, in one call each and on threads that stay together
// (team.h): what fastppo/engine/body.py does call by call, where a small model's time goes into the calls. Products run on AMX
// tiles (products.cpp). T: float or bf16, what the products read and write.
// Past the last block's attention only the rows that the head reads go on.
//   x1 = x + add;  qkv = norm1(x1) Wqkv;  out = attention(qkv);  x2 = x1 + out Wout;  pre = norm2(x2) Wup;  add = act(pre) Wdown
// Kept of each block for backward: x1, x2, the norms' statistics, qkv, out, lse, pre.
#include <pybind11/stl.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "simd.h"
#include "train.h"

namespace fastppo {
namespace {

// y[:, first : first + n] = x W^T + b. turned: W^T lies in memory. stride: of its rows.
struct Part {
  uintptr_t w, b;
  int64_t stride, first, n;
  bool turned;
};
struct Matrix {
  int64_t inputs, outputs;
  std::vector<Part> parts;
};
struct Norm {
  uintptr_t w, b;
  double eps;
};
enum { kQkv, kOut, kUp, kDown };
struct Layer {
  std::array<Norm, 2> norms;
  std::array<Matrix, 4> matrices;
};
using PartTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, bool>;
using MatrixTuple = std::tuple<int64_t, int64_t, std::vector<PartTuple>>;
using NormTuple = std::tuple<uintptr_t, uintptr_t, double>;
using LayerTuple = std::tuple<std::array<NormTuple, 2>, std::array<MatrixTuple, 4>>;

// Where gradients go: address, add to what is there, first column of dy, columns, [inputs, columns] instead of the reverse.
using Piece = std::tuple<uintptr_t, bool, int64_t, int64_t, bool>;
using Pieces = std::vector<Piece>;
using NormGradients = std::tuple<uintptr_t, uintptr_t, bool>;
// norm1, norm2;  of qkv, out, up, down: weights and biases
using LayerGradients = std::tuple<std::array<NormGradients, 2>, std::array<std::array<Pieces, 2>, 4>>;

struct Shape {
  int64_t D, F, H, K, head, window;
  int activation;
  bool layer_norm, bf16;
  double scale;
  int64_t width() const { return (H + 2 * K) * head; }
  int64_t wide() const { return F * (1 + activation); }
  int64_t size() const { return bf16 ? 2 : 4; }
};

// A pack: its tokens, the rows that the head reads, sequences, cu_seqlens, cos and sin of the rotary embedding or 0.
struct Pack {
  int64_t N, R, sequences;
  const int64_t* rows;
  uintptr_t starts, cos, sin;
};
using PackTuple = std::tuple<std::array<int64_t, 3>, std::array<uintptr_t, 4>>;
Pack pack(const PackTuple& t) {
  const auto& [sizes, at] = t;
  return {sizes[0], sizes[1], sizes[2], reinterpret_cast<const int64_t*>(at[0]), at[1], at[2], at[3]};
}

// Memory handed out piece by piece, each at a line of cache.
struct Carver {
  uintptr_t at;
  uintptr_t take(int64_t bytes) {
    const uintptr_t taken = at;
    at += (bytes + 63) / 64 * 64;
    return taken;
  }
};

struct Kept {
  uintptr_t x1, stats1, qkv, out, lse, x2, stats2, pre;
  Kept(const Shape& f, int64_t N, Carver c)
      : x1(c.take(N * f.D * 4)), stats1(c.take(N * 8)), qkv(c.take(N * f.width() * f.size())), out(c.take(N * f.H * f.head * f.size())),
        lse(c.take(N * f.H * 4)), x2(c.take(N * f.D * 4)), stats2(c.take(N * 8)), pre(c.take(N * f.wide() * f.size())), end(c.at) {}
  uintptr_t end;
};

// What a call needs for its own time; `add` outlives a forward. read: of the last block, attention's output where the head
// reads; rows: floats there.
struct Scratch {
  uintptr_t add, normed, dnormed, act, dact, wide, qkv, heads, read, rows;
  Scratch(const Shape& f, int64_t N, Carver c)
      : add(c.take(N * f.D * f.size())), normed(c.take(N * f.D * f.size())), dnormed(c.take(N * f.D * f.size())),
        act(c.take(N * f.F * f.size())), dact(c.take(N * f.F * f.size())), wide(c.take(N * f.wide() * f.size())), qkv(c.take(N * f.width() * f.size())),
        heads(c.take(N * f.H * f.head * f.size())), read(c.take(N * f.H * f.head * f.size())), rows(c.take(N * f.D * 4)), end(c.at) {}
  uintptr_t end;
};

class TrainBody {
 public:
  TrainBody(const std::array<int64_t, 9>& sizes, double scale, const std::vector<LayerTuple>& layers)
      : f_{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], int(sizes[6]), sizes[7] != 0, sizes[8] != 0, scale} {
    for (const auto& [norms, matrices] : layers) {
      Layer layer;
      for (int i = 0; i < 2; ++i) layer.norms[i] = {std::get<0>(norms[i]), std::get<1>(norms[i]), std::get<2>(norms[i])};
      for (int i = 0; i < 4; ++i) {
        layer.matrices[i] = {std::get<0>(matrices[i]), std::get<1>(matrices[i]), {}};
        for (const auto& [w, b, stride, first, n, turned] : std::get<2>(matrices[i]))
          layer.matrices[i].parts.push_back({w, b, stride, first, n, turned});
      }
      layers_.push_back(layer);
    }
  }

  // Bytes of a block's memory, of a call's, and where in the first lies x2. x1 comes first in the first, add in the second.
  std::array<int64_t, 3> bytes(int64_t N) const {
    const Kept kept(f_, N, {0});
    return {int64_t(kept.end), int64_t(Scratch(f_, N, {0}).end), int64_t(kept.x2)};
  }

  // memory: x1 of the first block is in it. step: from one block's memory to the next; 0: nothing is kept.
  void forward(const Pack& t, uintptr_t memory, uintptr_t scratch, int64_t step) const {
    const Scratch s(f_, t.N, {scratch});
    uintptr_t x = memory;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      const bool last = i + 1 == layers_.size();
      const int64_t N = last ? t.R : t.N, width = f_.H * f_.head * f_.size();
      const Kept kept(f_, t.N, {memory + i * step});
      norm(layer.norms[0], t.N, x, i ? s.add : 0, kept.x1, kept.stats1, s.normed);
      multiply(layer.matrices[kQkv], t.N, s.normed, kept.qkv);
      attention(t, kept, 0, 0);
      if (last) gather(t, kept.out, width, s.read), gather(t, kept.x1, f_.D * 4, s.rows);
      multiply(layer.matrices[kOut], N, last ? s.read : kept.out, s.add);
      norm(layer.norms[1], N, last ? s.rows : kept.x1, s.add, kept.x2, kept.stats2, s.normed);
      multiply(layer.matrices[kUp], N, s.normed, kept.pre);
      train_activation({kept.pre, s.act, 0, 0}, N, f_.F, f_.activation, f_.bf16);
      multiply(layer.matrices[kDown], N, s.act, s.add);
      x = kept.x2;
    }
  }

  // given: dy (T) and dres (float), [R, D], dloss/dx behind the last block, used up; [N, D] for that before the first, float.
  void backward(const Pack& t, uintptr_t memory, uintptr_t scratch, int64_t step, const std::array<uintptr_t, 3>& given,
                const std::vector<LayerGradients>& gradients) const {
    const Scratch s(f_, t.N, {scratch});
    uintptr_t dy = given[0], dres = given[1];
    for (size_t i = layers_.size(); i-- > 0;) {
      const Layer& layer = layers_[i];
      const bool last = i + 1 == layers_.size();
      const int64_t N = last ? t.R : t.N, width = f_.H * f_.head * f_.size();
      const auto& [norms, matrices] = gradients[i];
      const Kept kept(f_, t.N, {memory + i * step});
      multiply_back(layer.matrices[kDown], N, dy, s.dact);
      train_activation({kept.pre, s.act, s.dact, s.wide}, N, f_.F, f_.activation, f_.bf16);
      add_gradients(layer.matrices[kDown], N, s.act, dy, matrices[kDown]);
      multiply_back(layer.matrices[kUp], N, s.wide, s.dnormed);
      norm_backward(layer.norms[1], s, N, kept.x2, kept.stats2, dres, dy, norms[1]);
      add_gradients(layer.matrices[kUp], N, s.normed, s.wide, matrices[kUp]);
      multiply_back(layer.matrices[kOut], N, dy, last ? s.read : s.heads);
      if (last) {
        scatter(t, s.read, width, s.heads);
        gather(t, kept.out, width, s.read);
        add_gradients(layer.matrices[kOut], N, s.read, dy, matrices[kOut]);
        scatter(t, dres, f_.D * 4, given[2]);
        dres = given[2], dy = f_.bf16 ? s.add : dres;
      } else {
        add_gradients(layer.matrices[kOut], N, kept.out, dy, matrices[kOut]);
      }
      attention(t, kept, s.heads, s.qkv);
      multiply_back(layer.matrices[kQkv], t.N, s.qkv, s.dnormed);
      norm_backward(layer.norms[0], s, t.N, kept.x1, kept.stats1, dres, dy, norms[0]);
      add_gradients(layer.matrices[kQkv], t.N, s.normed, s.qkv, matrices[kQkv]);
    }
  }

 private:
  // flags of product()
  static constexpr int64_t kLeastRows = 24, kLeastDepth = 48, kLeastWork = 1 << 21;
  enum { kAlongA = 1, kAlongB = 2, kHalf = 4, kHalfOut = 8, kHalfBias = 16, kAdd = 32 };

  void norm(const Norm& n, int64_t N, uintptr_t x, uintptr_t add, uintptr_t sum, uintptr_t stats, uintptr_t y) const {
    train_norm({x, add, sum, n.w, n.b, y, stats}, N, f_.D, n.eps, f_.layer_norm, f_.bf16);
  }

  // of dnormed: dres += dx, in bf16 dy = dres; normed = the norm's output once more
  void norm_backward(const Norm& n, const Scratch& s, int64_t N, uintptr_t x, uintptr_t stats, uintptr_t dres, uintptr_t dy,
                     const NormGradients& to) const {
    const auto& [dw, db, add] = to;
    const std::array<uintptr_t, 10> addresses{s.dnormed, x, stats, n.w, n.b, dres, f_.bf16 ? dy : 0, s.normed, dw, db};
    train_norm_backward(addresses, N, f_.D, f_.layer_norm, false, add, f_.bf16);
  }

  void attention(const Pack& t, const Kept& kept, uintptr_t dout, uintptr_t dqkv) const {
    const auto part = [&](uintptr_t x, int64_t heads) { return x ? x + heads * f_.head * f_.size() : 0; };
    train_attention({kept.qkv, part(kept.qkv, f_.H), part(kept.qkv, f_.H + f_.K), kept.out, kept.lse, t.cos, t.sin, t.starts, dout, dqkv,
                     part(dqkv, f_.H), part(dqkv, f_.H + f_.K)},
                    {t.sequences, f_.H, f_.K, f_.head, f_.width(), f_.width(), f_.H * f_.head, f_.window}, f_.scale, f_.bf16);
  }

  void multiply(const std::array<uintptr_t, 4>& addresses, const std::array<int64_t, 6>& sizes, int flags) const {
    // a float costs six products of tiles; below these sizes (kernels/_products.py) vectors are faster
    const bool small = !f_.bf16 && (sizes[0] < kLeastRows || sizes[2] < kLeastDepth || sizes[0] * sizes[1] * sizes[2] < kLeastWork);
    (small ? small_product : product)(addresses, sizes, flags);
  }

  // out = x W^T + b
  void multiply(const Matrix& m, int64_t N, uintptr_t x, uintptr_t out) const {
    const int flags = kAlongA | (f_.bf16 ? kHalf | kHalfOut | kHalfBias : 0);
    for (const Part& p : m.parts)
      multiply({x, p.w, out + p.first * f_.size(), p.b}, {N, p.n, m.inputs, m.inputs, p.stride, m.outputs}, flags | (p.turned ? 0 : kAlongB));
  }

  // out = dy W
  void multiply_back(const Matrix& m, int64_t N, uintptr_t dy, uintptr_t out) const {
    int flags = kAlongA | (f_.bf16 ? kHalf | kHalfOut : 0);
    for (const Part& p : m.parts) {
      const std::array<int64_t, 6> sizes{N, m.inputs, p.n, m.outputs, p.stride, m.inputs};
      multiply({dy + p.first * f_.size(), p.w, out, 0}, sizes, flags | (p.turned ? kAlongB : 0));
      flags |= kAdd;
    }
  }

  // dW = dy^T x, db = the sums of dy's columns
  void add_gradients(const Matrix& m, int64_t N, uintptr_t x, uintptr_t dy, const std::array<Pieces, 2>& to) const {
    const int half = f_.bf16 ? kHalf : 0;
    for (const auto& [w, add, first, n, turned] : to[0]) {
      const uintptr_t part = dy + first * f_.size();
      const int flags = half | (add ? kAdd : 0);
      if (turned) multiply({x, part, w, 0}, {m.inputs, n, N, m.inputs, m.outputs, n}, flags);
      else multiply({part, x, w, 0}, {n, m.inputs, N, m.outputs, m.inputs, m.inputs}, flags);
    }
    for (const auto& [b, add, first, n, turned] : to[1])
      train_sum_columns(dy + first * f_.size(), N, n, m.outputs, b, add, f_.bf16);
  }

  // to [R] = the head's rows of from [N]; rows of `bytes`
  static void gather(const Pack& t, uintptr_t from, int64_t bytes, uintptr_t to) {
    for (int64_t r = 0; r < t.R; ++r)
      std::memcpy(reinterpret_cast<void*>(to + r * bytes), reinterpret_cast<void*>(from + t.rows[r] * bytes), bytes);
  }

  // to [N] = from [R] at the head's rows, 0 elsewhere
  static void scatter(const Pack& t, uintptr_t from, int64_t bytes, uintptr_t to) {
    std::memset(reinterpret_cast<void*>(to), 0, t.N * bytes);
    for (int64_t r = 0; r < t.R; ++r)
      std::memcpy(reinterpret_cast<void*>(to + t.rows[r] * bytes), reinterpret_cast<void*>(from + r * bytes), bytes);
  }

  Shape f_;
  std::vector<Layer> layers_;
};

}  // namespace

void bind_train_body(pybind11::module_& m) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> guard;
  m.def("small_product", &small_product, "csrc/cpu/train.h", guard);
  py::class_<TrainBody>(m, "TrainBody", "fastppo/engine/native.py")
      .def(py::init<const std::array<int64_t, 9>&, double, const std::vector<LayerTuple>&>())
      .def("bytes", &TrainBody::bytes)
      .def("forward", [](const TrainBody& self, const PackTuple& t, uintptr_t memory, uintptr_t scratch, int64_t step) {
        with_team([&] { self.forward(pack(t), memory, scratch, step); });
      }, guard)
      .def("backward", [](const TrainBody& self, const PackTuple& t, uintptr_t memory, uintptr_t scratch, int64_t step,
                          const std::array<uintptr_t, 3>& given, const std::vector<LayerGradients>& gradients) {
        with_team([&] { self.backward(pack(t), memory, scratch, step, given, gradients); });
      }, guard);
}

}  // namespace fastppo
