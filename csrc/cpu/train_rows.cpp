// The rows of a training step between the matrix products: norms, activations, bias and embedding gradients.
// fastppo/engine/kernels.py has the signatures; formulas stand at each function. T: what the products read and write, float
// or bf16; the residual stream, statistics and gradients of parameters are float. All sums over rows go over blocks of
// kBlock rows in order, so that no bit depends on the number of threads.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../ops.h"
#include "half.h"
#include "lanes.h"
#include "train.h"

namespace fastppo {
namespace {

constexpr int64_t kBlock = 64;

template <typename T>
FASTPPO_INLINE vec16 part(const T* p, int n) {
  if (n == 16) return load(p);
  T lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T>
FASTPPO_INLINE void put(T* p, vec16 x, int n) {
  if (n == 16) return store(p, x);
  T lanes[16];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

FASTPPO_INLINE int lanes_at(int64_t j, int64_t D) { return D - j < 16 ? static_cast<int>(D - j) : 16; }
FASTPPO_INLINE vec16 ones(int n) {
  vec16 x{};
  for (int i = 0; i < n; ++i) x[i] = 1.0f;
  return x;
}

// --- norms: y = (x - mean) rstd w + b, or x rstd w (RMSNorm: mean 0, rstd over x^2, no b) ---------------------------------

struct Norm {
  const float* x;  // [N, D]
  const void* add;  // T [N, D] or null: x + add is normed, and written to sum
  float* sum;
  const float *w, *b;
  void* y;  // T [N, D]
  float* stats;  // [N, 2] mean, rstd
  int64_t D;
  float eps;
  bool layer;
};

template <typename T>
FASTPPO_INLINE void norm_row(const Norm& f, int64_t i) {
  const int64_t D = f.D;
  const float* x = f.x + i * D;
  vec16 total{};
  if (f.add) {
    const T* add = static_cast<const T*>(f.add) + i * D;
    float* to = f.sum + i * D;
    for (int64_t j = 0; j < D; j += 16) {
      const int n = lanes_at(j, D);
      const vec16 v = part(x + j, n) + part(add + j, n);
      put(to + j, v, n);
      total += v;
    }
    x = to;
  } else if (f.layer) {
    for (int64_t j = 0; j < D; j += 16) total += part(x + j, lanes_at(j, D));
  }
  const float mean = f.layer ? sum16(total) / D : 0.0f;
  vec16 squares{};
  for (int64_t j = 0; j < D; j += 16) {
    const int n = lanes_at(j, D);
    const vec16 v = part(x + j, n) - (n == 16 ? splat(mean) : ones(n) * mean);
    squares += v * v;
  }
  const float rstd = 1.0f / std::sqrt(sum16(squares) / D + f.eps);
  f.stats[2 * i] = mean, f.stats[2 * i + 1] = rstd;
  T* y = static_cast<T*>(f.y) + i * D;
  for (int64_t j = 0; j < D; j += 16) {
    const int n = lanes_at(j, D);
    vec16 v = (part(x + j, n) - mean) * rstd * part(f.w + j, n);
    if (f.b) v += part(f.b + j, n);
    put(y + j, v, n);
  }
}

FASTPPO_CLONES void norm_rows_float(const Norm& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) norm_row<float>(f, i);
}
FASTPPO_CLONES void norm_rows_bf16(const Norm& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) norm_row<bf16_t>(f, i);
}

// g = dy w,  x^ = (x - mean) rstd:  dx = rstd (g - mean(g) - x^ mean(g x^))  (RMSNorm: without mean(g)),
// dres += dx, out = dres as T, y = the forward's output once more, dw = sum dy x^, db = sum dy.
struct NormBackward {
  const void* dy;
  const float *x, *stats, *w, *b;
  float* dres;
  void *out, *y;  // T [N, D] or null
  float* sums;    // [blocks, 2, D] or null: no gradient for w and b
  int64_t N, D;
  bool layer, fresh;  // fresh: dres = dx
};

template <typename T>
FASTPPO_INLINE void norm_backward_row(const NormBackward& f, int64_t i, float* dw, float* db) {
  const int64_t D = f.D;
  const T* dy = static_cast<const T*>(f.dy) + i * D;
  const float *x = f.x + i * D, mean = f.stats[2 * i], rstd = f.stats[2 * i + 1];
  vec16 sum_g{}, sum_gx{};
  for (int64_t j = 0; j < D; j += 16) {
    const int n = lanes_at(j, D);
    const vec16 d = part(dy + j, n), hat = (part(x + j, n) - mean) * rstd, g = d * part(f.w + j, n);
    sum_g += g;
    sum_gx += g * hat;
    if (dw) {
      put(dw + j, part(dw + j, n) + d * hat, n);
      put(db + j, part(db + j, n) + d, n);
    }
  }
  const float a = f.layer ? sum16(sum_g) / D : 0.0f, c = sum16(sum_gx) / D;
  for (int64_t j = 0; j < D; j += 16) {
    const int n = lanes_at(j, D);
    const vec16 w = part(f.w + j, n), hat = (part(x + j, n) - mean) * rstd;
    vec16 dx = rstd * (part(dy + j, n) * w - a - hat * c);
    if (!f.fresh) dx += part(f.dres + i * D + j, n);
    put(f.dres + i * D + j, dx, n);
    if (f.out) put(static_cast<T*>(f.out) + i * D + j, dx, n);
    if (f.y) put(static_cast<T*>(f.y) + i * D + j, f.b ? hat * w + part(f.b + j, n) : hat * w, n);
  }
}

template <typename T>
FASTPPO_INLINE void norm_backward_blocks(const NormBackward& f, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    float* dw = f.sums ? f.sums + k * 2 * f.D : nullptr;
    if (dw) std::memset(dw, 0, 2 * f.D * sizeof(float));
    for (int64_t i = k * kBlock; i < std::min(f.N, (k + 1) * kBlock); ++i)
      norm_backward_row<T>(f, i, dw, dw ? dw + f.D : nullptr);
  }
}
FASTPPO_CLONES void norm_backward_float(const NormBackward& f, int64_t b, int64_t e) { norm_backward_blocks<float>(f, b, e); }
FASTPPO_CLONES void norm_backward_bf16(const NormBackward& f, int64_t b, int64_t e) { norm_backward_blocks<bf16_t>(f, b, e); }

// --- activations ----------------------------------------------------------------------------------------------------------

// pre [N, F] -> act: kGelu  x s, s = sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3));  kGated (pre [N, 2F]: gate, up)  x sigmoid(x) up.
enum Kind { kGelu, kGated };
struct Activation {
  const void* pre;  // [N, F], gate and up side by side in rows of 2F
  void *act, *dact, *dpre;  // backward: dact [N, F] -> dpre as pre (may be dact for kGelu), act once more
  int64_t F;
  int kind;
};

FASTPPO_INLINE vec16 sigmoid(vec16 x) { return 1.0f / (1.0f + exp16(-x)); }

template <typename T, bool kBackward>
FASTPPO_INLINE void act_row(const Activation& f, int64_t i) {
  const int64_t F = f.F, wide = f.kind == kGelu ? F : 2 * F;
  const T* x = static_cast<const T*>(f.pre) + i * wide;
  T *act = static_cast<T*>(f.act) + i * F, *dpre = static_cast<T*>(f.dpre) + i * wide;
  const T* dact = static_cast<const T*>(f.dact) + i * F;
  for (int64_t j = 0; j < F; j += 16) {
    const int n = lanes_at(j, F);
    const vec16 v = part(x + j, n);
    if (f.kind == kGelu) {
      const vec16 s = sigmoid(1.5957691216f * v * (1.0f + 0.044715f * v * v));
      if (kBackward) {
        const vec16 slope = 1.5957691216f * (1.0f + 0.134145f * v * v), d = part(dact + j, n);
        put(dpre + j, d * (s + v * s * (1.0f - s) * slope), n);
      }
      put(act + j, v * s, n);
      continue;
    }
    const vec16 s = sigmoid(v), up = part(x + F + j, n), silu = v * s;
    if (kBackward) {
      const vec16 d = part(dact + j, n);
      put(dpre + j, d * up * (s + silu * (1.0f - s)), n);
      put(dpre + F + j, d * silu, n);
    }
    put(act + j, silu * up, n);
  }
}
FASTPPO_CLONES void act_float(const Activation& f, int64_t b, int64_t e) {
  for (int64_t i = b; i < e; ++i) act_row<float, false>(f, i);
}
FASTPPO_CLONES void act_bf16(const Activation& f, int64_t b, int64_t e) {
  for (int64_t i = b; i < e; ++i) act_row<bf16_t, false>(f, i);
}
FASTPPO_CLONES void act_backward_float(const Activation& f, int64_t b, int64_t e) {
  for (int64_t i = b; i < e; ++i) act_row<float, true>(f, i);
}
FASTPPO_CLONES void act_backward_bf16(const Activation& f, int64_t b, int64_t e) {
  for (int64_t i = b; i < e; ++i) act_row<bf16_t, true>(f, i);
}

// --- sums -----------------------------------------------------------------------------------------------------------------

// out[j] (+)= sum_i x[i, j] for columns [begin, end) * 16
template <typename T>
FASTPPO_INLINE void column_sums(const T* x, int64_t N, int64_t F, int64_t stride, float* out, bool add, int64_t begin, int64_t end) {
  for (int64_t j = begin * 16; j < std::min(F, end * 16); j += 16) {
    const int n = lanes_at(j, F);
    vec16 s = add ? part(out + j, n) : vec16{};
    for (int64_t i = 0; i < N; ++i) s += part(x + i * stride + j, n);
    put(out + j, s, n);
  }
}
FASTPPO_CLONES void column_sums_float(const float* x, int64_t N, int64_t F, int64_t stride, float* out, bool add, int64_t b, int64_t e) {
  column_sums(x, N, F, stride, out, add, b, e);
}
FASTPPO_CLONES void column_sums_bf16(const bf16_t* x, int64_t N, int64_t F, int64_t stride, float* out, bool add, int64_t b, int64_t e) {
  column_sums(x, N, F, stride, out, add, b, e);
}

FASTPPO_CLONES void add_rows(const int64_t* tokens, const float* x, int64_t N, int64_t D, float* out, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < N; ++i) {
    float* to = out + tokens[i] * D;
    for (int64_t j = begin * 16; j < std::min(D, end * 16); j += 16) {
      const int n = lanes_at(j, D);
      put(to + j, part(to + j, n) + part(x + i * D + j, n), n);
    }
  }
}

// Sum of squares in floats over blocks of kSquares numbers, in doubles over the blocks, in order.
constexpr int64_t kSquares = 4096;
FASTPPO_CLONES double block_squares(const float* x, int64_t n) {
  vec16 a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const vec16 p = load16(x + i), q = load16(x + i + 16), r = load16(x + i + 32), s = load16(x + i + 48);
    a += p * p, b += q * q, c += r * r, d += s * s;
  }
  double sum = sum16((a + b) + (c + d));
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

constexpr int64_t kCopied = 16384;  // numbers at a time
FASTPPO_CLONES void round_block(const float* from, bf16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) put(to + i, part(from + i, lanes_at(i, n)), lanes_at(i, n));
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void embedding_backward(uintptr_t tokens, uintptr_t x, int64_t N, int64_t D, uintptr_t out) {
  parallel_for((D + 15) / 16, N * 16, [&](int64_t b, int64_t e) {
    add_rows(at<int64_t>(tokens), at<float>(x), N, D, at<float>(out), b, e);
  });
}

double sum_of_squares(const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& sizes) {
  std::vector<std::pair<const float*, int64_t>> blocks;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t i = 0; i < sizes[t]; i += kSquares) blocks.emplace_back(at<float>(tensors[t]) + i, std::min(kSquares, sizes[t] - i));
  std::vector<double> sums(blocks.size());
  parallel_for(int64_t(blocks.size()), kSquares, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) sums[i] = block_squares(blocks[i].first, blocks[i].second);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// addresses: of each tensor and of its copy, in floats or rounded to bf16
void copy_all(const std::vector<std::array<uintptr_t, 2>>& addresses, const std::vector<int64_t>& sizes, bool bf16) {
  struct Block {
    const float* from;
    uintptr_t to;
    int64_t n;
  };
  std::vector<Block> blocks;
  for (size_t t = 0; t < sizes.size(); ++t)
    for (int64_t i = 0; i < sizes[t]; i += kCopied)
      blocks.push_back({at<float>(addresses[t][0]) + i, addresses[t][1] + i * (bf16 ? 2 : 4), std::min(kCopied, sizes[t] - i)});
  parallel_for(int64_t(blocks.size()), kCopied, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      if (bf16) round_block(blocks[i].from, at<bf16_t>(blocks[i].to), blocks[i].n);
      else std::memcpy(at<void>(blocks[i].to), blocks[i].from, blocks[i].n * sizeof(float));
    }
  });
}

}  // namespace

void train_norm(const std::array<uintptr_t, 7>& a, int64_t N, int64_t D, double eps, bool layer, bool bf16) {
  const Norm f = {at<float>(a[0]), at<void>(a[1]), at<float>(a[2]), at<float>(a[3]), at<float>(a[4]), at<void>(a[5]),
                  at<float>(a[6]), D, float(eps), layer};
  parallel_for(N, D * 4, [&](int64_t b, int64_t e) { bf16 ? norm_rows_bf16(f, b, e) : norm_rows_float(f, b, e); });
}

void train_norm_backward(const std::array<uintptr_t, 10>& a, int64_t N, int64_t D, bool layer, bool fresh, bool add, bool bf16) {
  const int64_t blocks = (N + kBlock - 1) / kBlock;
  const bool asked = a[8] || a[9];
  std::vector<float> sums(asked ? blocks * 2 * D : 0);
  const NormBackward f = {at<void>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3]), at<float>(a[4]), at<float>(a[5]),
                          at<void>(a[6]), at<void>(a[7]), asked ? sums.data() : nullptr, N, D, layer, fresh};
  parallel_for(blocks, kBlock * D * 8, [&](int64_t b, int64_t e) { bf16 ? norm_backward_bf16(f, b, e) : norm_backward_float(f, b, e); });
  for (int which = 0; which < 2; ++which) {
    float* out = at<float>(a[8 + which]);
    if (!out) continue;
    if (!add) std::memset(out, 0, D * sizeof(float));
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t j = 0; j < D; ++j) out[j] += sums[(k * 2 + which) * D + j];
  }
}

void train_activation(const std::array<uintptr_t, 4>& a, int64_t N, int64_t F, int kind, bool bf16) {
  const Activation f = {at<void>(a[0]), at<void>(a[1]), at<void>(a[2]), at<void>(a[3]), F, kind};
  auto run = a[2] ? (bf16 ? act_backward_bf16 : act_backward_float) : (bf16 ? act_bf16 : act_float);
  parallel_for(N, F * 8, [&](int64_t b, int64_t e) { run(f, b, e); });
}

void train_sum_columns(uintptr_t x, int64_t N, int64_t F, int64_t stride, uintptr_t out, bool add, bool bf16) {
  parallel_for((F + 15) / 16, N * 16, [&](int64_t b, int64_t e) {
    if (bf16) return column_sums_bf16(at<bf16_t>(x), N, F, stride, at<float>(out), add, b, e);
    column_sums_float(at<float>(x), N, F, stride, at<float>(out), add, b, e);
  });
}

void bind_train_rows(pybind11::module_& m) {
  pybind11::call_guard<pybind11::gil_scoped_release> guard;
  m.def("train_norm", &train_norm, "fastppo/engine/kernels.py", guard);
  m.def("train_norm_backward", &train_norm_backward, "fastppo/engine/kernels.py", guard);
  m.def("train_activation", &train_activation, "fastppo/engine/kernels.py", guard);
  m.def("train_sum_columns", &train_sum_columns, "fastppo/engine/kernels.py", guard);
  m.def("train_copy", &copy_all, "fastppo/engine/kernels.py", guard);
  m.def("train_sum_of_squares", &sum_of_squares, "(addresses, sizes) of float32 tensors", guard);
  m.def("train_embedding_backward", &embedding_backward, "fastppo/engine/kernels.py", guard);
}

}  // namespace fastppo
