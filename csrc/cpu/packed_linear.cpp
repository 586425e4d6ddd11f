// Matrix products of a decode step. 2 * rows * N * K FLOPs and N * K * (4 or 2) bytes of weights: bound by memory at a
// few rows, by multiply-adds from about 16 on. torch's F.linear reads weights at a fifth of memory speed there.
//
// A panel is 32 columns of the output: for each k, 32 weights lie side by side. A tile of 8 rows x 32 columns stays in 16
// AVX-512 registers while k runs; a panel is read from memory once and from L2 for further tiles of rows.
// bf16 panels hold pairs (k, k + 1) side by side, the order of AMX's tiles; without AMX they are widened and multiplied as
// floats. Where the processor has AMX, amx_linear.cpp multiplies both kinds; K is padded to 32 for it.
#include "packed_linear.h"

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "amx.h"
#include "amx_linear.h"
#include "huge_pages.h"
#include "simd.h"

namespace fastppo {
namespace {

// elements of a packed panel
inline int64_t panel_size(int64_t K) { return (K + 31) / 32 * 32 * kPanel; }

constexpr int kTile = 8;           // rows of x in registers
constexpr int64_t kDepth = 256;     // even: bf16 panels hold pairs
constexpr int64_t kRowBlock = 128;  // rows whose part of x stays in L2 while the panels pass

FASTPPO_INLINE vec16 bits16(ivec16 bits) { return reinterpret_cast<vec16&>(bits); }

// sums [R, 32] (+)= x [R, some k] w. `ahead`: weights of the next panel, fetched while this one is at work, or nullptr;
// `more`: bytes from there to a second stream, where one tile of rows has to fetch the whole panel (0: none).
template <int R>
FASTPPO_INLINE void tile(const float* x, int64_t K, int64_t some, const float* w, const char* ahead, int64_t more, float* sums, bool fresh) {
  vec16 a[R], b[R];
  for (int r = 0; r < R; ++r) {
    a[r] = fresh ? vec16{} : load16(sums + r * kPanel);
    b[r] = fresh ? vec16{} : load16(sums + r * kPanel + 16);
  }
  for (int64_t k = 0; k < some; ++k, w += kPanel) {
    if (ahead) __builtin_prefetch(ahead + k * 64, 0, 2);
    if (ahead && more) __builtin_prefetch(ahead + more + k * 64, 0, 2);
    const vec16 w0 = load16(w), w1 = load16(w + 16);
    for (int r = 0; r < R; ++r) {
      const float xv = x[r * K + k];  // not splat(): its addition would take the multiply-adds' ports
      a[r] += xv * w0;
      b[r] += xv * w1;
    }
  }
  for (int r = 0; r < R; ++r) store16(sums + r * kPanel, a[r]), store16(sums + r * kPanel + 16, b[r]);
}

template <int R>
FASTPPO_INLINE void tile(const float* x, int64_t K, int64_t some, const uint16_t* w, const char* ahead, int64_t, float* sums, bool fresh) {
  vec16 a[R], b[R];
  for (int r = 0; r < R; ++r) {
    a[r] = fresh ? vec16{} : load16(sums + r * kPanel);
    b[r] = fresh ? vec16{} : load16(sums + r * kPanel + 16);
  }
  for (int64_t k = 0; k < some; k += 2, w += 2 * kPanel) {
    if (ahead) __builtin_prefetch(ahead + k * 32, 0, 2);
    const ivec16 p0 = *reinterpret_cast<const ivec16*>(w), p1 = *reinterpret_cast<const ivec16*>(w + kPanel);
    const bool odd = k + 1 == some;
    for (int r = 0; r < R; ++r) {
      const float x0 = x[r * K + k], x1 = odd ? 0.0f : x[r * K + k + 1];
      a[r] += x0 * bits16(p0 << 16) + x1 * bits16(p0 & static_cast<int32_t>(0xffff0000));
      b[r] += x0 * bits16(p1 << 16) + x1 * bits16(p1 & static_cast<int32_t>(0xffff0000));
    }
  }
  for (int r = 0; r < R; ++r) store16(sums + r * kPanel, a[r]), store16(sums + r * kPanel + 16, b[r]);
}

template <typename T>
FASTPPO_INLINE void tile_of(int rows, const float* x, int64_t K, int64_t some, const T* w, const char* ahead, int64_t more, float* sums, bool fresh) {
#define CASE(R) \
  case R: return tile<R>(x, K, some, w, ahead, more, sums, fresh);
  switch (rows) {
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) default: CASE(8)
  }
#undef CASE
}

// A part of the panel (kDepth values of k) stays in L1 while the tiles of many rows pass. Sums go on where they stopped, so
// the order of additions is the same however k is cut.
template <typename T>
FASTPPO_INLINE void panel_of(const T* w, const float* bias, int columns, const float* x, int64_t K, float* out, int64_t N,
                             int64_t rows, bool last) {
  float sums[kRowBlock * kPanel];
  const int64_t bytes = panel_size(K) * sizeof(T), line = sizeof(T) == 2 ? 32 : 64;
  const int64_t depth = rows <= 2 * kTile ? K : kDepth;
  for (int64_t k0 = 0; k0 < K; k0 += depth) {
    const int64_t some = std::min(depth, K - k0);
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int R = static_cast<int>(std::min<int64_t>(kTile, rows - r0));
      const int64_t passed = r0 / kTile * line * K + k0 * line;  // of the next panel, fetched by earlier tiles
      const char* ahead = !last && passed < bytes ? reinterpret_cast<const char*>(w) + bytes + passed : nullptr;
      tile_of(R, x + r0 * K + k0, K, some, w + k0 * kPanel, ahead, rows <= kTile ? line * K : 0, sums + r0 * kPanel, k0 == 0);
    }
  }
  float b[kPanel] = {};
  if (bias) std::memcpy(b, bias, columns * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = sums + r * kPanel;
    float* to = out + r * N;
    if (columns == kPanel) {
      store16(to, load16(from) + load16(b));
      store16(to + 16, load16(from + 16) + load16(b + 16));
    } else {
      for (int j = 0; j < columns; ++j) to[j] = from[j] + b[j];
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

void panels(const Linear& f, const float* x, float* out, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t r0 = 0; r0 < rows; r0 += kRowBlock) {
    const int64_t some = std::min(kRowBlock, rows - r0);
    for (int64_t p = begin; p < end; ++p) {
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, f.N - p * kPanel));
      const float* bias = f.bias ? f.bias + p * kPanel : nullptr;
      const float* xs = x + r0 * f.K;
      float* to = out + r0 * f.N + p * kPanel;
      const int64_t at = p * panel_size(f.K);
      if (f.is_bf16) {
        panel(static_cast<const uint16_t*>(f.packed) + at, bias, columns, xs, f.K, to, f.N, some, p + 1 == end);
      } else {
        panel(static_cast<const float*>(f.packed) + at, bias, columns, xs, f.K, to, f.N, some, p + 1 == end);
      }
    }
  }
}

}  // namespace

void packed_linear(const Linear& f, const float* x, float* out, int64_t rows, bool amx) {
  if (amx) return amx_linear(f, x, out, rows);
  const int64_t n = (f.N + kPanel - 1) / kPanel;
  parallel_for(n, rows * f.K * kPanel, [&](int64_t begin, int64_t end) { panels(f, x, out, rows, begin, end); });
}

void bind_packed_linear(pybind11::module_& m) {
  m.def("pack_linear", &pack_linear, "fastppo/generation/decode_program.py", pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def(
      "packed_linear",
      [](uintptr_t packed, bool is_bf16, uintptr_t bias, int64_t N, int64_t K, uintptr_t x, uintptr_t out, int64_t rows,
         bool amx) {
        const Linear linear{reinterpret_cast<const void*>(packed), is_bf16, reinterpret_cast<const float*>(bias), N, K};
        packed_linear(linear, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), rows, amx && amx_works());
      },
      "amx: use AMX tiles where there are any", pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("packed_size", [](int64_t N, int64_t K) { return (N + kPanel - 1) / kPanel * panel_size(K); },
        "elements of a packed [N, K] matrix");
  m.def("ask_for_huge_pages", &ask_for_huge_pages, "hint for the memory at (address, bytes)");
  m.def("amx_works", &amx_works, "whether this processor and kernel have AMX bf16 tiles");
}

}  // namespace fastppo
