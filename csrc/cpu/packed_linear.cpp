// Matrix products of a decode step. 2 * rows * N * K FLOPs and N * K * (4 or 2) bytes of weights: bound by memory at a
// few rows, by multiply-adds from about 16 on. torch's F.linear reads weights at a fifth of memory speed there.
//
// A panel is 32 columns of the output: for each k, 32 weights lie side by side. A tile of 8 rows x 32 columns stays in 16
// AVX-512 registers while k runs; a panel is read from memory once and from L2 for further tiles of rows.
#include "packed_linear.h"

#include <algorithm>

#include "../ops.h"
#include "simd.h"

namespace fastppo {
namespace {

constexpr int kTile = 8;           // rows of x in registers
constexpr int64_t kRowBlock = 128;  // rows whose part of x stays in L2 while the panels pass

FASTPPO_INLINE vec16 weights16(const float* p) { return load16(p); }
FASTPPO_INLINE vec16 weights16(const uint16_t* p) { return load16_bf16(p); }

// `ahead`: weights of the next panel, fetched while this one is at work (one cache line a step), or nullptr.
template <int R, typename T>
FASTPPO_INLINE void tile(const float* x, int64_t K, const T* w, const char* ahead, vec16* low, vec16* high) {
  vec16 a[R], b[R];
  for (int r = 0; r < R; ++r) a[r] = b[r] = vec16{};
  for (int64_t k = 0; k < K; ++k, w += kPanel) {
    if (ahead) __builtin_prefetch(ahead + k * 64, 0, 2);
    const vec16 w0 = weights16(w), w1 = weights16(w + 16);
    for (int r = 0; r < R; ++r) {
      const vec16 xv = splat(x[r * K + k]);
      a[r] += xv * w0;
      b[r] += xv * w1;
    }
  }
  for (int r = 0; r < R; ++r) low[r] = a[r], high[r] = b[r];
}

template <typename T>
FASTPPO_INLINE void tile_of(int rows, const float* x, int64_t K, const T* w, const char* ahead, vec16* low, vec16* high) {
  switch (rows) {
    case 1: return tile<1>(x, K, w, ahead, low, high);
    case 2: return tile<2>(x, K, w, ahead, low, high);
    case 3: return tile<3>(x, K, w, ahead, low, high);
    case 4: return tile<4>(x, K, w, ahead, low, high);
    case 5: return tile<5>(x, K, w, ahead, low, high);
    case 6: return tile<6>(x, K, w, ahead, low, high);
    case 7: return tile<7>(x, K, w, ahead, low, high);
    default: return tile<8>(x, K, w, ahead, low, high);
  }
}

template <typename T>
FASTPPO_INLINE void panel_of(const T* w, const float* bias, int columns, const float* x, int64_t K, float* out, int64_t N,
                             int64_t rows, bool last) {
  float b[kPanel] = {};
  if (bias) std::memcpy(b, bias, columns * sizeof(float));
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    const int R = static_cast<int>(std::min<int64_t>(kTile, rows - r0));
    vec16 low[kTile], high[kTile];
    const int64_t passed = r0 / kTile * 64 * K;  // bytes of the next panel that earlier tiles have fetched
    const char* ahead = reinterpret_cast<const char*>(w + K * kPanel) + passed;
    const bool more = !last && passed < static_cast<int64_t>(K * kPanel * sizeof(T));
    tile_of(R, x + r0 * K, K, w, more ? ahead : nullptr, low, high);
    for (int r = 0; r < R; ++r) {
      float* to = out + (r0 + r) * N;
      float full[kPanel];
      float* direct = columns == kPanel ? to : full;
      store16(direct, low[r] + load16(b));
      store16(direct + 16, high[r] + load16(b + 16));
      if (columns != kPanel) std::memcpy(to, full, columns * sizeof(float));
    }
  }
}

FASTPPO_CLONES void panel(const float* w, const float* bias, int columns, const float* x, int64_t K, float* out, int64_t N,
                          int64_t rows, bool last) {
  panel_of(w, bias, columns, x, K, out, N, rows, last);
}

FASTPPO_CLONES void panel(const uint16_t* w, const float* bias, int columns, const float* x, int64_t K, float* out,
                          int64_t N, int64_t rows, bool last) {
  panel_of(w, bias, columns, x, K, out, N, rows, last);
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Weight (n, k) lies at n * n_stride + k * k_stride: nn.Linear and its transpose, GPT-2's Conv1D.
void pack(uintptr_t weight, bool from_is_bf16, int64_t n_stride, int64_t k_stride, int64_t N, int64_t K, uintptr_t packed,
          bool to_is_bf16) {
  auto read = [&](int64_t i) {
    return from_is_bf16 ? from_bf16(reinterpret_cast<const uint16_t*>(weight)[i]) : reinterpret_cast<const float*>(weight)[i];
  };
  parallel_for((N + kPanel - 1) / kPanel, K * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t columns = std::min<int64_t>(kPanel, N - p * kPanel);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t at = (p * K + k) * kPanel;
        for (int64_t j = 0; j < kPanel; ++j) {
          const float w = j < columns ? read((p * kPanel + j) * n_stride + k * k_stride) : 0.0f;
          if (to_is_bf16) {
            reinterpret_cast<uint16_t*>(packed)[at + j] = to_bf16(w);
          } else {
            reinterpret_cast<float*>(packed)[at + j] = w;
          }
        }
      }
    }
  });
}

}  // namespace

void packed_linear(const Linear& f, const float* x, float* out, int64_t rows) {
  const int64_t panels = (f.N + kPanel - 1) / kPanel;
  parallel_for(panels, rows * f.K * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t r0 = 0; r0 < rows; r0 += kRowBlock) {
      const int64_t some = std::min(kRowBlock, rows - r0);
      for (int64_t p = begin; p < end; ++p) {
        const int columns = static_cast<int>(std::min<int64_t>(kPanel, f.N - p * kPanel));
        const float* bias = f.bias ? f.bias + p * kPanel : nullptr;
        const float* xs = x + r0 * f.K;
        float* to = out + r0 * f.N + p * kPanel;
        const int64_t at = p * f.K * kPanel;
        if (f.is_bf16) {
          panel(static_cast<const uint16_t*>(f.packed) + at, bias, columns, xs, f.K, to, f.N, some, p + 1 == end);
        } else {
          panel(static_cast<const float*>(f.packed) + at, bias, columns, xs, f.K, to, f.N, some, p + 1 == end);
        }
      }
    }
  });
}

void bind_packed_linear(pybind11::module_& m) {
  m.def("pack_linear", &pack, "fastppo/generation/decode_program.py", pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def(
      "packed_linear",
      [](uintptr_t packed, bool is_bf16, uintptr_t bias, int64_t N, int64_t K, uintptr_t x, uintptr_t out, int64_t rows) {
        const Linear linear{reinterpret_cast<const void*>(packed), is_bf16, reinterpret_cast<const float*>(bias), N, K};
        packed_linear(linear, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), rows);
      },
      "fastppo/generation/decode_program.py", pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastppo
