// Matrix products of training on AMX bf16 tiles: out (+)= A B (+ bias), factors read where they lie, in any orientation.
// 2 M N K FLOPs for bf16 factors, six times as many for floats, a float being the sum of three bf16 numbers, h + m + l: the
// products hl, hm, mm, mh, hh, lh leave out less than 2^-21 of one product.
//
// A block of A's rows is packed into tiles (amx_pack.h) that stay in L2, by all threads. Then every thread takes panels of 32
// columns of B: kDepth chunks of k of a panel are packed and stay in L1 while the block's rows pass, 32 at a time, with four
// tiles of sums in registers. Those sums are added up in the order of k, wherever the blocks begin and however many rows
// there are: an element of the result depends on its row of A, its column of B and K, in every bit.
#include <algorithm>
#include <array>
#include <vector>

#include <pybind11/stl.h>

#include "../ops.h"
#include "amx_pack.h"

namespace fastppo {

#ifdef FASTPPO_AMX
namespace {

constexpr int64_t kDepth = 8;               // chunks of k between additions to the sums in memory
constexpr int64_t kBlockBytes = 1280 << 10;  // of A's tiles, in 2 MB of L2
constexpr int64_t kSumsBytes = 8 << 20;      // of sums that wait for further k
constexpr int64_t kStrip = 32, kPanel = 32;  // rows and columns that are multiplied at a time

typedef float Sums[4][256];  // of a strip and a panel: upper left, upper right, lower left, lower right

struct Product {
  Factor a, b;
  void* out;  // [M, N], contiguous rows
  int64_t out_stride;
  const void* bias;  // [N] or nullptr
  bool out_is_bf16, bias_is_bf16, add;
};

FASTPPO_AMX inline void load_left(const uint16_t* a) {
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + kTile, 64);
}

FASTPPO_AMX inline void load_right(const uint16_t* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + kTile, 64);
}

FASTPPO_AMX inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

FASTPPO_AMX inline void multiply_floats(const uint16_t* a, const uint16_t* b) {
  constexpr int64_t kPart = 2 * kTile;
  load_left(a), load_right(b + 2 * kPart), multiply();
  load_right(b + kPart), multiply();
  load_left(a + kPart), multiply();
  load_right(b), multiply();
  load_left(a), multiply();
  load_left(a + 2 * kPart), multiply();
}

FASTPPO_AMX inline void multiply_halves(const uint16_t* a, const uint16_t* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(4, a, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + kTile, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + kTile, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The part of a panel of B that will be multiplied next: packed tile by tile between the products of this one, so that
// neither reading nor rearranging is waited for.
class Ahead {
 public:
  // `turns`: how many calls of turn() there will be.
  Ahead(const Factor& b, int64_t column, int64_t k, int64_t depth, uint16_t* to, int64_t turns)
      : b_(b), column_(column), k_(k), to_(to), tiles_(2 * depth), turns_(turns) {}

  FASTPPO_AMX inline void turn() {
    for (passed_ += tiles_; passed_ >= turns_; passed_ -= turns_) pack_one();
  }

  FASTPPO_AMX inline void finish() {
    while (done_ < tiles_) pack_one();
  }

 private:
  FASTPPO_AMX inline void pack_one() {
    const int64_t chunk = done_ / 2;
    fetch_tile(b_, column_ + done_ % 2 * kSide, k_ + (chunk + 2) * kChunk);
    pack_tile(b_, column_, k_ + chunk * kChunk, done_ % 2, to_ + chunk * 2 * b_.parts() * kTile);
    ++done_;
  }

  const Factor& b_;
  const int64_t column_, k_;
  uint16_t* to_;
  const int64_t tiles_, turns_;
  int64_t passed_ = 0, done_ = 0;
};

// A strip times a panel over `depth` chunks, added to `sums` (fresh: written there).
template <int parts>
FASTPPO_AMX void add_block(const uint16_t* a, const uint16_t* b, int64_t depth, bool fresh, Sums& sums, Ahead& ahead) {
  alignas(64) Sums made;
  Sums& to = fresh ? sums : made;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < depth; ++c, a += 2 * parts * kTile, b += 2 * parts * kTile) {
    FASTPPO_TILE_FENCE;
    parts == 3 ? multiply_floats(a, b) : multiply_halves(a, b);
    FASTPPO_TILE_FENCE;
    ahead.turn();
  }
  _tile_stored(0, to[0], 64);
  _tile_stored(1, to[1], 64);
  _tile_stored(2, to[2], 64);
  _tile_stored(3, to[3], 64);
  FASTPPO_TILE_FENCE;
  if (fresh) return;
  for (int tile = 0; tile < 4; ++tile) {
    for (int i = 0; i < 256; i += 16) {
      _mm512_store_ps(sums[tile] + i, _mm512_add_ps(_mm512_load_ps(sums[tile] + i), _mm512_load_ps(made[tile] + i)));
    }
  }
}

FASTPPO_AMX inline __m512 load_some(const void* from, int64_t at, bool is_bf16, __mmask16 mask) {
  if (!is_bf16) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16));
}

FASTPPO_AMX inline void store_some(void* to, int64_t at, bool is_bf16, __mmask16 mask, __m512 x) {
  if (!is_bf16) return _mm512_mask_storeu_ps(static_cast<float*>(to) + at, mask, x);
  const __m512i bits = _mm512_castps_si512(x), even = _mm512_and_si512(shift_down(bits), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + at, mask, _mm512_maskz_cvtepi32_epi16(0xffff, shift_down(out)));
}

FASTPPO_AMX void write_sums(const Product& f, int64_t row, int64_t column, const Sums& sums) {
  for (int part = 0; part < 4; ++part) {
    const int64_t first = row + part / 2 * kSide, left = column + part % 2 * kSide;
    const int64_t rows = std::min<int64_t>(kSide, f.a.lines - first), columns = f.b.lines - left;
    if (rows <= 0 || columns <= 0) continue;
    const __mmask16 mask = static_cast<__mmask16>(first_bits(std::min<int64_t>(columns, kSide)));
    const __m512 bias = f.bias ? load_some(f.bias, left, f.bias_is_bf16, mask) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first + r) * f.out_stride + left;
      __m512 x = _mm512_add_ps(_mm512_load_ps(sums[part] + r * kSide), bias);
      if (f.add) x = _mm512_add_ps(x, load_some(f.out, at, f.out_is_bf16, mask));
      store_some(f.out, at, f.out_is_bf16, mask, x);
    }
  }
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Part of the product that is at work: strips of A's rows from `row` on, panels of B's columns, chunks of k, A's tiles.
struct Block {
  int64_t row, strips, column, panels, k, chunks;
  bool last;            // no further k
  uint16_t* tiles;      // [strips][chunks][parts][2][512]
  Sums* sums;           // [panels][strips]; or nullptr: k is whole, a thread's own will do
};

FASTPPO_AMX void pack_left(const Factor& a, const Block& at, int64_t begin, int64_t end) {
  const AMX mode;  // denormals are 0
  const int64_t groups = divide_up(at.chunks, kDepth), chunk = 2 * a.parts() * kTile;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t strip = i / groups, c0 = i % groups * kDepth;
    for (int64_t c = c0; c < std::min(at.chunks, c0 + kDepth); ++c) {
      for (int half = 0; half < 2; ++half) {
        pack_tile(a, at.row + strip * kStrip, at.k + c * kChunk, half, at.tiles + (strip * at.chunks + c) * chunk);
      }
    }
  }
}

// A row of a tile must be one line of cache: two take twice as long.
template <typename T>
T* aligned(std::vector<char>& memory, int64_t count) {
  memory.resize(std::max(memory.size(), count * sizeof(T) + 64));
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

// Items [begin, end) of panels x strips.
template <int parts>
FASTPPO_AMX void multiply_items(const Product& f, const Block& at, int64_t begin, int64_t end) {
  static thread_local std::vector<char> memory, sums_memory;
  const AMX mode;
  constexpr int64_t kPacked = 2 * parts * kTile;
  uint16_t* panel = aligned<uint16_t>(memory, 2 * kDepth * kPacked);
  uint16_t* next = panel + kDepth * kPacked;
  Sums* own = at.sums ? nullptr : aligned<Sums>(sums_memory, at.strips);
  Ahead(f.b, at.column + begin / at.strips * kPanel, at.k, std::min(kDepth, at.chunks), panel, 1).finish();
  for (int64_t p = begin / at.strips; p * at.strips < end; ++p) {
    const int64_t s0 = std::max<int64_t>(0, begin - p * at.strips), s1 = std::min(at.strips, end - p * at.strips);
    Sums* sums = own ? own : at.sums + p * at.strips;
    for (int64_t c0 = 0; c0 < at.chunks; c0 += kDepth) {
      const int64_t depth = std::min(kDepth, at.chunks - c0), c1 = c0 + depth == at.chunks ? 0 : c0 + depth;
      const int64_t following = c1 ? p : p + 1;  // the panel that comes next
      Ahead ahead(f.b, at.column + following * kPanel, at.k + c1 * kChunk,
                  following * at.strips < end ? std::min(kDepth, at.chunks - c1) : 0, next, (s1 - s0) * depth);
      for (int64_t s = s0; s < s1; ++s) {
        add_block<parts>(at.tiles + (s * at.chunks + c0) * kPacked, panel, depth, at.k == 0 && c0 == 0, sums[s], ahead);
      }
      std::swap(panel, next);
    }
    if (!at.last) continue;
    for (int64_t s = s0; s < s1; ++s) write_sums(f, at.row + s * kStrip, at.column + p * kPanel, sums[s]);
  }
}

void multiply_block(const Product& f, const Block& at) {
  const int64_t work = at.chunks * kChunk * kStrip;
  parallel_for(at.strips * divide_up(at.chunks, kDepth), work, [&](int64_t begin, int64_t end) { pack_left(f.a, at, begin, end); });
  parallel_for(at.strips * at.panels, work * kPanel, [&](int64_t begin, int64_t end) {
    f.a.is_bf16 ? multiply_items<1>(f, at, begin, end) : multiply_items<3>(f, at, begin, end);
  });
}

// As even parts of `total` as blocks of at most `most` can be, in multiples of `unit`.
inline int64_t even(int64_t total, int64_t most, int64_t unit) {
  return divide_up(divide_up(total, divide_up(total, most)), unit) * unit;
}

void multiply_all(const Product& f) {
  static thread_local std::vector<char> memory, sums_memory;
  const int64_t M = f.a.lines, N = f.b.lines, K = f.a.K, bytes = 2 * f.a.parts();
  const int64_t depth = even(K, f.a.is_bf16 ? 2048 : 768, kDepth * kChunk);
  const int64_t rows = even(M, std::max(kStrip, kBlockBytes / (std::min(depth, divide_up(K, kChunk) * kChunk) * bytes)), kStrip);
  const int64_t strips = rows / kStrip, all = divide_up(N, kPanel);
  const int64_t panels = depth >= K ? all : even(all, std::max<int64_t>(1, kSumsBytes / (strips * sizeof(Sums))), 1);
  uint16_t* tiles = aligned<uint16_t>(memory, strips * kStrip * depth * bytes / 2);
  Sums* sums = depth >= K ? nullptr : aligned<Sums>(sums_memory, panels * strips);
  for (int64_t row = 0; row < M; row += rows) {
    for (int64_t p = 0; p < all; p += panels) {
      for (int64_t k = 0; k < K; k += depth) {
        multiply_block(f, {row, divide_up(std::min(rows, M - row), kStrip), p * kPanel, std::min(panels, all - p), k,
                           divide_up(std::min(depth, K - k), kChunk), k + depth >= K, tiles, sums});
      }
    }
  }
}

}  // namespace
#endif

// addresses: A, B, out, bias or 0. sizes: M, N, K, strides of A, B and out. flags: k contiguous in A, in B, factors bf16, out
// bf16, bias bf16, add to out.
void product(const std::array<uintptr_t, 4>& addresses, const std::array<int64_t, 6>& sizes, int flags) {
#ifdef FASTPPO_AMX
  const auto flag = [&](int i) { return (flags >> i & 1) != 0; };
  const auto [M, N, K, a_stride, b_stride, out_stride] = sizes;
  const Factor a{reinterpret_cast<void*>(addresses[0]), a_stride, flag(0), flag(2), true, M, K};
  const Factor b{reinterpret_cast<void*>(addresses[1]), b_stride, flag(1), flag(2), false, N, K};
  const Product f{a, b, reinterpret_cast<void*>(addresses[2]), out_stride, reinterpret_cast<void*>(addresses[3]), flag(3), flag(4), flag(5)};
  if (!amx_works()) return;
  if (M * N * K < (1 << 17)) return multiply_all(f);
  with_team([&] { multiply_all(f); });
#endif
}

void bind_products(pybind11::module_& m) {
  m.def("product", &product, "kernels/_products.py", pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastppo
