// Matrix products of training on AMX bf16 tiles: out (+)= A B (+ bias), factors read where they lie, in any orientation.
// 2 M N K FLOPs for bf16 factors, six times as many for floats, a float being the sum of three bf16 numbers, h + m + l: the
// products hl, hm, mm, mh, hh, lh leave out less than 2^-21 of one product.
//
// A block of A's rows is packed into tiles (amx_pack.h) that stay in L2. Then panels of 32 columns of B pass: kDepth chunks of k
// of a panel are packed and stay in L1 while the block's rows pass, 32 at a time, with four tiles of sums in registers. Those
// sums are added up in the order of k, wherever the blocks begin and however many rows and threads there are: an element of
// the result depends on its row of A, its column of B and K, in every bit.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "../ops.h"
#include "amx_result.h"

namespace fastppo {

#ifdef FASTPPO_AMX
namespace {

constexpr int64_t kDepth = 8;               // chunks of k between additions to the sums in memory
constexpr int64_t kBlockBytes = 896 << 10;  // of A's tiles, in 2 MB of L2
constexpr int64_t kSumsBytes = 2 << 20;      // of sums that wait for further k
constexpr int64_t kGroup = 2;  // panels packed side by side: where columns are contiguous, reads of whole pairs of lines

struct Product {
  Factor a, b;
  Result out;
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
  Ahead(const Factor& b, int64_t column, int64_t panels, int64_t k, int64_t depth, uint16_t* to, int64_t turns)
      : b_(b), column_(column), panels_(panels), k_(k), to_(to), tiles_(2 * panels * depth), turns_(turns) {}

  FASTPPO_AMX inline void turn() {
    for (passed_ += tiles_; passed_ >= turns_; passed_ -= turns_) pack_one();
  }

  FASTPPO_AMX inline void finish() {
    while (done_ < tiles_) pack_one();
  }

 private:
  FASTPPO_AMX inline void pack_one() {
    const int64_t half = done_ % 2, panel = done_ / 2 % panels_, chunk = done_ / (2 * panels_);
    fetch_tile(b_, column_ + panel * kPanel + half * kSide, k_ + (chunk + 2) * kChunk);
    pack_tile(b_, column_ + panel * kPanel, k_ + chunk * kChunk, half, to_ + (panel * kDepth + chunk) * 2 * b_.parts() * kTile);
    ++done_;
  }

  const Factor& b_;
  const int64_t column_, panels_, k_;
  uint16_t* to_;  // [panels][kDepth][parts][2][512]
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

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Part of a product: strips of A's rows from `row` on, panels of B's columns, chunks of k, A's tiles.
struct Block {
  int64_t row, strips, column, panels, k, chunks;
  bool last;        // no further k
  uint16_t* tiles;  // [strips][chunks][parts][2][512]
  Sums* sums;       // [panels][strips]; where k is whole, of one panel
};

FASTPPO_AMX void pack_left(const Factor& a, const Block& at) {
  uint16_t* to = at.tiles;
  for (int64_t row = at.row; row < at.row + at.strips * kStrip; row += kStrip) {
    for (int64_t c = 0; c < at.chunks; ++c, to += 2 * a.parts() * kTile) {
      for (int half = 0; half < 2; ++half) {
        fetch_tile(a, row + half * kSide, at.k + (c + 2) * kChunk);
        pack_tile(a, row, at.k + c * kChunk, half, to);
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

template <int parts>
FASTPPO_AMX void multiply_block(const Product& f, const Block& at) {
  static thread_local std::vector<char> memory;
  constexpr int64_t kPacked = 2 * parts * kTile, kBuffer = kGroup * kDepth * kPacked;
  uint16_t* packed = aligned<uint16_t>(memory, 2 * kBuffer);
  uint16_t* next = packed + kBuffer;
  Ahead(f.b, at.column, std::min(kGroup, at.panels), at.k, std::min(kDepth, at.chunks), packed, 1).finish();
  for (int64_t p = 0; p < at.panels; p += kGroup) {
    const int64_t group = std::min(kGroup, at.panels - p), column = at.column + p * kPanel;
    Sums* sums = at.k == 0 && at.last ? at.sums : at.sums + p * at.strips;
    for (int64_t c0 = 0; c0 < at.chunks; c0 += kDepth) {
      const int64_t depth = std::min(kDepth, at.chunks - c0), c1 = c0 + depth == at.chunks ? 0 : c0 + depth;
      const int64_t p1 = p + (c1 ? 0 : kGroup);  // what comes next
      Ahead ahead(f.b, at.column + p1 * kPanel, std::max<int64_t>(0, std::min(kGroup, at.panels - p1)), at.k + c1 * kChunk,
                  std::min(kDepth, at.chunks - c1), next, group * at.strips * depth);
      const bool first = at.k == 0 && c0 == 0, last = at.last && c0 + depth == at.chunks;
      for (int64_t i = 0; i < group * at.strips; ++i) {
        const int64_t panel = i / at.strips, s = i % at.strips;
        const Corner to = corner(f.out, at.row + s * kStrip, column + panel * kPanel);
        if (last) fetch(f.out, to);
        add_block<parts>(at.tiles + (s * at.chunks + c0) * kPacked, packed + panel * kDepth * kPacked, depth, first, sums[i], ahead);
        if (last) write_sums(f.out, column + panel * kPanel, to, sums[i]);
      }
      std::swap(packed, next);
    }
  }
}

// As even parts of `total` as blocks of at most `most` can be, in multiples of `unit`.
inline int64_t even(int64_t total, int64_t most, int64_t unit) {
  return divide_up(divide_up(total, divide_up(total, most)), unit) * unit;
}

// Rows [row, row_end) and columns [column, column_end), on one thread.
FASTPPO_AMX void multiply_part(const Product& f, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  static thread_local std::vector<char> memory, sums_memory;
  if (row >= row_end || column >= column_end) return;
  const AMX mode;
  const int64_t K = f.a.K, bytes = 2 * f.a.parts(), all = divide_up(column_end - column, kPanel);
  const int64_t depth = std::min(even(K, f.a.is_bf16 ? 2048 : 768, kDepth * kChunk), divide_up(K, kChunk) * kChunk);
  const int64_t rows = even(row_end - row, std::max(kStrip, kBlockBytes / (depth * bytes) / kStrip * kStrip), kStrip);
  const int64_t strips = rows / kStrip;
  const int64_t panels = depth >= K ? all : even(all, std::max<int64_t>(1, kSumsBytes / (strips * sizeof(Sums))), 1);
  uint16_t* tiles = aligned<uint16_t>(memory, rows * depth * bytes / 2);
  Sums* sums = aligned<Sums>(sums_memory, (depth >= K ? kGroup : panels) * strips);
  for (; row < row_end; row += rows) {
    for (int64_t p = 0; p < all; p += panels) {
      for (int64_t k = 0; k < K; k += depth) {
        const Block block{row, divide_up(std::min(rows, row_end - row), kStrip), column + p * kPanel, std::min(panels, all - p), k,
                          divide_up(std::min(depth, K - k), kChunk), k + depth >= K, tiles, sums};
        pack_left(f.a, block);
        f.a.is_bf16 ? multiply_block<1>(f, block) : multiply_block<3>(f, block);
      }
    }
  }
}

// A grid of parts, one for each thread. Every thread packs its rows and columns for itself: what neighbours pack twice costs
// less than waiting for each other. Packing a strip or panel takes about as long as multiplying two.
void multiply_all(const Product& f) {
  const int64_t threads = num_threads(), strips = divide_up(f.a.lines, kStrip), panels = divide_up(f.b.lines, kPanel);
  int64_t best = INT64_MAX, down = 1, across = 1;
  for (int64_t i = 1; i <= std::min(threads, strips); ++i) {
    const int64_t s = divide_up(strips, i), p = divide_up(panels, std::min(panels, threads / i)), cost = s * p + 2 * (s + p);
    if (cost < best) best = cost, down = i, across = divide_up(panels, p);
  }
  const int64_t work = strips * panels * kStrip * kPanel * f.a.K / (down * across);
  const int64_t rows = divide_up(strips, down) * kStrip, columns = divide_up(panels, across) * kPanel;
  parallel_for(down * across, work / 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * rows, column = i % across * columns;
      multiply_part(f, row, std::min(f.a.lines, row + rows), column, std::min(f.b.lines, column + columns));
    }
  });
}

}  // namespace
#endif

// addresses: A, B, out, bias or 0. sizes: M, N, K, strides of A, B and out. flags: k contiguous in A, in B, factors bf16, out
// bf16, bias bf16, add to out.
void product(const std::array<uintptr_t, 4>& addresses, const std::array<int64_t, 6>& sizes, int flags) {
#ifdef FASTPPO_AMX
  const auto flag = [&](int i) { return (flags >> i & 1) != 0; };
  const auto [M, N, K, a_stride, b_stride, out_stride] = sizes;
  if (K < 1) throw std::invalid_argument("product: K, the length of the sums, must be at least 1; got " + std::to_string(K));
  if (M < 1 || N < 1) return;  // no thread could be given a part of nothing
  const Factor a{reinterpret_cast<void*>(addresses[0]), a_stride, flag(0), flag(2), true, M, K};
  const Factor b{reinterpret_cast<void*>(addresses[1]), b_stride, flag(1), flag(2), false, N, K};
  const Result out{reinterpret_cast<void*>(addresses[2]), out_stride, M, N, flag(3), flag(5), reinterpret_cast<void*>(addresses[3]), flag(4)};
  if (amx_works()) multiply_all({a, b, out});
#endif
}

void bind_products(pybind11::module_& m) {
  m.def("product", &product, "kernels/_products.py", pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastppo
