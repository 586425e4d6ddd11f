// Packed products on AMX bf16 tiles: 16 rows of x times 16 columns, 32 values of k an instruction.
//
// bf16 weights: x is rounded to bf16 too; the sums are floats.
// float weights: a float is the exact sum of three bf16 numbers (24 = 8 + 8 + 8 bits), h + m + l. Six of the nine products,
// hh + hm + mh + mm + hl + lh, leave out less than 2^-22 of one product, and multiply-adds on tiles are 14 times as fast as
// AVX-512's: 16 rows are then bound by memory and hundreds of rows take a fraction of the time.
//
// With few rows the next weights are fetched, taken apart (or copied) and put beside in L1 between the tile instructions,
// so that reading never waits for multiplying: tiles loaded from memory directly reach three fourths of the speed.
// Few rows of x each thread takes apart for itself: what another core wrote last costs more to write over than to make again.
// A row's sums are added in the same order however many rows there are.
#include "amx_linear.h"

#include <algorithm>
#include <vector>

#include "amx.h"
#include "simd.h"

namespace fastppo {

#ifdef FASTPPO_AMX
namespace {

constexpr int kTile = 512;          // bf16 numbers in a tile: 16 x 32
constexpr int64_t kChunk = 32;      // values of k in a tile
constexpr int kStrip = 16;          // rows of x in a tile
constexpr int64_t kRowBlock = 256;  // rows whose x stays in L2 while the panels pass
constexpr int64_t kAhead = 2048;    // bytes; further ahead the processor's own prefetching stops

// x as tiles: [strip][chunk][parts][16][32], rows and k padded with zeros.
struct Tiles {
  const uint16_t* data;
  int64_t chunks;
  int parts;
  const uint16_t* at(int64_t strip, int64_t chunk) const { return data + (strip * chunks + chunk) * parts * kTile; }
};

// A row of a tile must be one line of cache: two take twice as long.
template <typename T>
inline T* aligned(T* x) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(x) + 63) & ~uintptr_t{63});
}

// One row into its place in the tiles, each part rounded to nearest (ties to even) of what the parts before it left.
FASTPPO_AMX void part_row(const float* x, int64_t K, int parts, uint16_t* to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)), half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
  for (int64_t k = 0; k < K; k += 16) {
    uint16_t* tile = to + k / kChunk * parts * kTile + k % kChunk;
    const __mmask16 mask = K - k >= 16 ? 0xffff : (1 << (K - k)) - 1;
    __m512 rest = _mm512_maskz_loadu_ps(mask, x + k);
    for (int part = 0; part < parts; ++part) {
      const __m512i bits = _mm512_castps_si512(rest);
      const __m512i even = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), one);
      // x is finite, or the sampler raises on what comes of it
      const __m512i rounded = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(bits, half), even), upper);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile + part * kTile),
                          _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, rounded, 16)));
      rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(rounded));
    }
  }
  for (int64_t k = (K + 15) / 16 * 16; k % kChunk; k += 16) {  // the last chunk's second half
    for (int part = 0; part < parts; ++part) std::memset(to + k / kChunk * parts * kTile + part * kTile + k % kChunk, 0, 32);
  }
}

// 16 x 16 sums into `out`, which has N columns.
FASTPPO_AMX inline void write_tile(const float* sums, const float* bias, int rows, int64_t columns, float* out, int64_t N) {
  if (columns <= 0) return;
  const __mmask16 mask = columns >= 16 ? 0xffff : (1 << columns) - 1;
  const __m512 b = bias ? _mm512_maskz_loadu_ps(mask, bias) : _mm512_setzero_ps();
  for (int r = 0; r < rows; ++r) _mm512_mask_storeu_ps(out + r * N, mask, _mm512_add_ps(_mm512_load_ps(sums + r * 16), b));
}

// Up to 32 rows of panel p; `out` is their first row.
FASTPPO_AMX inline void write_strips(const Linear& f, int64_t p, float (*sums)[256], int rows, float* out) {
  for (int part = 0; part < (rows > kStrip ? 4 : 2); ++part) {
    const int r = part / 2 * kStrip;
    const int64_t column = p * kPanel + part % 2 * 16;
    write_tile(sums[part], f.bias ? f.bias + column : nullptr, std::min(rows - r, kStrip), f.N - column, out + r * f.N + column, f.N);
  }
}

// Two halves of panels [begin, end), read side by side, chunk after chunk: two streams from memory keep more lines on their way.
template <typename T>
struct Streams {
  const T *first, *second, *last;  // chunks; the last one is given again and again
  int64_t apart;                   // in panels

  Streams(const Linear& f, int64_t chunks, int64_t begin, int64_t end) : apart((end - begin + 1) / 2) {
    const T* packed = static_cast<const T*>(f.packed);
    last = packed + (end * chunks - 1) * kChunk * kPanel;
    first = packed + begin * chunks * kChunk * kPanel;
    second = std::min(first + apart * chunks * kChunk * kPanel, last);
  }
  void advance() {
    first = std::min(first + kChunk * kPanel, last);
    second = std::min(second + kChunk * kPanel, last);
  }
};

// --- float weights in three parts

// Two values of k of a panel's chunk, [2 * 16][32] floats, into six tiles: h, m and l of either half. A part is the upper
// half of the float's bits: what is left has 8 bits less, and the third part nothing left.
FASTPPO_AMX inline void split_pair(const float* w, int pair, uint16_t* tiles) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int line = 0; line < 4; ++line) _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + pair * 256 + line * 64, _MM_HINT_T0);
  for (int half = 0; half < 2; ++half) {
    __m512 a = _mm512_loadu_ps(w + pair * 64 + half * 16), b = _mm512_loadu_ps(w + pair * 64 + 32 + half * 16);
    for (int part = 0; part < 3; ++part) {
      const __m512i a_upper = _mm512_and_si512(_mm512_castps_si512(a), upper);
      const __m512i b_upper = _mm512_and_si512(_mm512_castps_si512(b), upper);
      _mm512_store_si512(tiles + (part * 2 + half) * kTile + pair * 32, _mm512_or_si512(reinterpret_cast<__m512i>(reinterpret_cast<__v16su>(a_upper) >> 16), b_upper));
      a = _mm512_sub_ps(a, _mm512_castsi512_ps(a_upper));
      b = _mm512_sub_ps(b, _mm512_castsi512_ps(b_upper));
    }
  }
}

FASTPPO_AMX inline void split_chunk(const float* w, uint16_t* tiles) {
  for (int pair = 0; pair < 16; ++pair) split_pair(w, pair, tiles);
}

FASTPPO_AMX inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

FASTPPO_AMX inline void store_sums(float (*sums)[256]) {
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  FASTPPO_TILE_FENCE;
}

FASTPPO_AMX inline void load_sums(float (*sums)[256]) {
  FASTPPO_TILE_FENCE;
  _tile_loadd(0, sums[0], 64);
  _tile_loadd(1, sums[1], 64);
  _tile_loadd(2, sums[2], 64);
  _tile_loadd(3, sums[3], 64);
}

// One chunk for 16 rows and half of the columns of two panels, whose sums are the tiles A and B, or for 32 rows of one panel
// (sums of the first rows' halves, then the others'). A sum gets lh, mh, hh, hm, mm, hl in turn, whichever of both adds them.
// AT(i): what else is done at that point.
#define PAIR(x, w, v, A, B, AT)                                                                                       \
  FASTPPO_TILE_FENCE;                                                                                                 \
  AT(0) _tile_loadd(4, x + 2 * kTile, 64); AT(1) _tile_loadd(6, w, 64); _tile_dpbf16ps(A, 4, 6);                       \
  AT(2) _tile_loadd(7, v, 64); _tile_dpbf16ps(B, 4, 7); AT(3) _tile_loadd(5, x + kTile, 64);                           \
  AT(4) _tile_dpbf16ps(A, 5, 6); _tile_dpbf16ps(B, 5, 7); AT(5) _tile_loadd(4, x, 64);                                 \
  AT(6) _tile_dpbf16ps(A, 4, 6); _tile_dpbf16ps(B, 4, 7); AT(7) _tile_loadd(6, w + 2 * kTile, 64);                     \
  AT(8) _tile_dpbf16ps(A, 4, 6); AT(9) _tile_dpbf16ps(A, 5, 6); _tile_loadd(7, v + 2 * kTile, 64);                     \
  AT(10) _tile_dpbf16ps(B, 4, 7); _tile_dpbf16ps(B, 5, 7); AT(11) _tile_loadd(6, w + 4 * kTile, 64);                   \
  AT(12) _tile_dpbf16ps(A, 4, 6); AT(13) _tile_loadd(7, v + 4 * kTile, 64);                                           \
  AT(14) _tile_dpbf16ps(B, 4, 7); AT(15)
#define FOUR _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)
#define ROWS(x, y, part) _tile_loadd(4, x + part * kTile, 64); _tile_loadd(5, y + part * kTile, 64)
#define WEIGHTS(w, part) _tile_loadd(6, w + part * 2 * kTile, 64); _tile_loadd(7, w + (part * 2 + 1) * kTile, 64)
#define TWO(x, y, w, AT)                                                                                              \
  FASTPPO_TILE_FENCE;                                                                                                 \
  AT(0) WEIGHTS(w, 0); AT(1) ROWS(x, y, 2); AT(2) FOUR; AT(3) ROWS(x, y, 1); AT(4) FOUR; AT(5) ROWS(x, y, 0);          \
  AT(6) FOUR; AT(7) WEIGHTS(w, 1); AT(8) FOUR; AT(9) ROWS(x, y, 1); AT(10) FOUR; AT(11) WEIGHTS(w, 2);                 \
  AT(12) ROWS(x, y, 0); AT(13) FOUR; AT(14) AT(15)
#define NOTHING(i)
#define SPLIT(from, to, i)  \
  FASTPPO_TILE_FENCE;       \
  split_pair(from, i, to);  \
  FASTPPO_TILE_FENCE;
#define SPLIT_FIRST(i) SPLIT(next.first, beside[0], i)
#define SPLIT_SECOND(i) SPLIT(next.second, beside[1], i)

// Panels [begin, end) for at most 16 rows.
FASTPPO_AMX void float_strip(const Linear& f, const Tiles& xs, float* out, int rows, int64_t begin, int64_t end) {
  alignas(64) static thread_local uint16_t tiles[2][2][6 * kTile];
  alignas(64) float sums[4][256];
  Streams<float> next(f, xs.chunks, begin, end);
  split_chunk(next.first, tiles[0][0]);
  split_chunk(next.second, tiles[0][1]);
  int side = 0;
  for (int64_t p = begin; p < begin + next.apart; ++p) {
    zero_sums();
    for (int64_t chunk = 0; chunk < xs.chunks; ++chunk, side ^= 1) {
      next.advance();
      const uint16_t *x = xs.at(0, chunk), *w = tiles[side][0], *v = tiles[side][1];
      auto beside = tiles[side ^ 1];
      PAIR(x, w, v, 0, 2, SPLIT_FIRST)
      PAIR(x, w + kTile, v + kTile, 1, 3, SPLIT_SECOND)
    }
    store_sums(sums);
    write_strips(f, p, sums, rows, out);
    if (p + next.apart < end) write_strips(f, p + next.apart, sums + 2, rows, out);
  }
}

// Panels [begin, end) for 17 to 32 rows: chunk after chunk, the next one taken apart while this one is multiplied.
FASTPPO_AMX void float_strip_pair(const Linear& f, const Tiles& xs, float* out, int rows, int64_t begin, int64_t end) {
  alignas(64) static thread_local uint16_t tiles[2][6 * kTile];
  alignas(64) float sums[4][256];
  const float* w = static_cast<const float*>(f.packed) + begin * xs.chunks * kChunk * kPanel;
  const float* last = w + ((end - begin) * xs.chunks - 1) * kChunk * kPanel;
  split_chunk(w, tiles[0]);
  int side = 0;
  for (int64_t p = begin; p < end; ++p) {
    zero_sums();
    for (int64_t chunk = 0; chunk < xs.chunks; ++chunk, side ^= 1) {
      w = std::min(w + kChunk * kPanel, last);
      const uint16_t *x = xs.at(0, chunk), *y = xs.at(1, chunk), *now = tiles[side];
      uint16_t* beside = tiles[side ^ 1];
#define SPLIT_NEXT(i) SPLIT(w, beside, i)
      TWO(x, y, now, SPLIT_NEXT)
    }
    store_sums(sums);
    write_strips(f, p, sums, rows, out);
  }
}

// 32 rows x one panel, chunks [c0, c0 + depth) of k; `tiles`: those chunks taken apart.
FASTPPO_AMX inline void add_product(const Tiles& xs, int64_t strip, int64_t other, int64_t c0, int64_t depth, const uint16_t (*tiles)[6 * kTile],
                                    float (*sums)[256]) {
  if (c0 == 0) zero_sums();
  else load_sums(sums);
  for (int64_t c = 0; c < depth; ++c) {
    const uint16_t *x = xs.at(strip, c0 + c), *y = xs.at(other, c0 + c), *now = tiles[c];
    TWO(x, y, now, NOTHING)
  }
  store_sums(sums);
}

// Panels [begin, end) for many rows. A part of k of the block of rows stays in L2 while a group of panels passes, each taken
// apart once for the block; the group's sums wait in memory.
FASTPPO_AMX void float_strips(const Linear& f, const Tiles& xs, float* out, int64_t rows, int64_t begin, int64_t end) {
  constexpr int64_t kGroup = 16, kDepth = 8;  // panels; chunks of k
  constexpr int kPair = 2 * kStrip;
  alignas(64) static thread_local uint16_t tiles[kDepth][6 * kTile];
  static thread_local std::vector<float> memory(kGroup * kRowBlock * kPanel + 16);
  auto sums = reinterpret_cast<float (*)[kRowBlock / kPair][4][256]>(aligned(memory.data()));
  for (int64_t r0 = 0; r0 < rows; r0 += kRowBlock) {
    const int64_t some = std::min(kRowBlock, rows - r0), first = r0 / kStrip, strips = (some + kStrip - 1) / kStrip;
    for (int64_t p0 = begin; p0 < end; p0 += kGroup) {
      const int64_t group = std::min(kGroup, end - p0);
      for (int64_t c0 = 0; c0 < xs.chunks; c0 += kDepth) {
        const int64_t depth = std::min(kDepth, xs.chunks - c0);
        for (int64_t p = 0; p < group; ++p) {
          const float* w = static_cast<const float*>(f.packed) + ((p0 + p) * xs.chunks + c0) * kChunk * kPanel;
          for (int64_t c = 0; c < depth; ++c) split_chunk(w + c * kChunk * kPanel, tiles[c]);
          for (int64_t s = 0; s < strips; s += 2) {
            const int64_t other = std::min(s + 1, strips - 1);  // an odd strip is multiplied twice
            add_product(xs, first + s, first + other, c0, depth, tiles, sums[p][s / 2]);
          }
        }
      }
      for (int64_t p = 0; p < group; ++p) {
        for (int64_t r = 0; r < some; r += kPair) {
          write_strips(f, p0 + p, sums[p][r / kPair], static_cast<int>(std::min<int64_t>(kPair, some - r)), out + (r0 + r) * f.N);
        }
      }
    }
  }
}

// --- bf16 weights

FASTPPO_AMX inline void copy_chunk(const uint16_t* w, uint16_t* beside) {
  for (int line = 0; line < 32; ++line) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead / 2 + line * 64, _MM_HINT_T0);
    _mm512_store_si512(beside + line * 32, _mm512_loadu_si512(w + line * 32));
  }
}

// Panels [begin, end) for at most 16 rows.
FASTPPO_AMX void half_strip(const Linear& f, const Tiles& xs, float* out, int rows, int64_t begin, int64_t end) {
  alignas(64) static thread_local uint16_t tiles[2][4 * kTile];
  alignas(64) float sums[4][256];
  Streams<uint16_t> next(f, xs.chunks, begin, end);
  copy_chunk(next.first, tiles[0]);
  copy_chunk(next.second, tiles[0] + 2 * kTile);
  int side = 0;
  for (int64_t p = begin; p < begin + next.apart; ++p) {
    zero_sums();
    for (int64_t chunk = 0; chunk < xs.chunks; ++chunk, side ^= 1) {
      next.advance();
      copy_chunk(next.first, tiles[side ^ 1]);
      copy_chunk(next.second, tiles[side ^ 1] + 2 * kTile);
      const uint16_t* now = tiles[side];
      FASTPPO_TILE_FENCE;
      _tile_loadd(4, xs.at(0, chunk), 64);
      _tile_loadd(6, now, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, now + 32, 128);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, now + 2 * kTile, 128);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, now + 2 * kTile + 32, 128);
      _tile_dpbf16ps(3, 4, 7);
    }
    store_sums(sums);
    write_strips(f, p, sums, rows, out);
    if (p + next.apart < end) write_strips(f, p + next.apart, sums + 2, rows, out);
  }
}

// Panels [begin, end) for many rows: 32 rows x 32 columns at a time.
FASTPPO_AMX void half_strips(const Linear& f, const Tiles& xs, float* out, int64_t rows, int64_t begin, int64_t end) {
  alignas(64) float sums[4][256];
  for (int64_t r0 = 0; r0 < rows; r0 += kRowBlock) {
    for (int64_t p = begin; p < end; ++p) {
      const uint16_t* w = static_cast<const uint16_t*>(f.packed) + p * xs.chunks * kChunk * kPanel;
      for (int64_t r = r0; r < std::min(rows, r0 + kRowBlock); r += 2 * kStrip) {
        const int64_t strip = r / kStrip, other = r + kStrip < rows ? strip + 1 : strip;
        zero_sums();
        for (int64_t chunk = 0; chunk < xs.chunks; ++chunk) {
          FASTPPO_TILE_FENCE;
          _tile_loadd(6, w + chunk * 2 * kTile, 128);
          _tile_loadd(7, w + chunk * 2 * kTile + 32, 128);
          _tile_loadd(4, xs.at(strip, chunk), 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, xs.at(other, chunk), 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        store_sums(sums);
        write_strips(f, p, sums, static_cast<int>(std::min<int64_t>(2 * kStrip, rows - r)), out + r * f.N);
      }
    }
  }
}

FASTPPO_AMX void panels(const Linear& f, const Tiles& xs, float* out, int64_t rows, int64_t begin, int64_t end) {
  const AMX amx;
  const int few = static_cast<int>(rows);
  if (f.is_bf16) {
    rows <= kStrip ? half_strip(f, xs, out, few, begin, end) : half_strips(f, xs, out, rows, begin, end);
  } else {
    if (rows > 2 * kStrip) float_strips(f, xs, out, rows, begin, end);
    else rows <= kStrip ? float_strip(f, xs, out, few, begin, end) : float_strip_pair(f, xs, out, few, begin, end);
  }
}

}  // namespace

void amx_linear(const Linear& f, const float* x, float* out, int64_t rows) {
  const int parts = f.is_bf16 ? 1 : 3;
  const int64_t chunks = (f.K + kChunk - 1) / kChunk, strips = (rows + kStrip - 1) / kStrip, strip = chunks * parts * kTile;
  const int64_t n = (f.N + kPanel - 1) / kPanel;
  auto make_room = [&] {
    static thread_local std::vector<uint16_t> memory;
    memory.resize(strips * strip + kChunk);
    uint16_t* to = aligned(memory.data());
    if (rows % kStrip) std::fill(to + (strips - 1) * strip, to + strips * strip, uint16_t{0});  // rows that nobody writes
    return to;
  };
  auto take_apart = [&](int64_t begin, int64_t end, uint16_t* to) {
    for (int64_t r = begin; r < end; ++r) part_row(x + r * f.K, f.K, parts, to + r / kStrip * strip + r % kStrip * 32);
  };
  if (rows <= 2 * kStrip) {
    return parallel_for(n, strips * strip, [&](int64_t begin, int64_t end) {
      uint16_t* mine = make_room();
      take_apart(0, rows, mine);
      panels(f, Tiles{mine, chunks, parts}, out, rows, begin, end);
    });
  }
  uint16_t* to = make_room();
  parallel_for(rows, f.K * parts, [&](int64_t begin, int64_t end) { take_apart(begin, end, to); });
  parallel_for(n, strips * strip, [&](int64_t begin, int64_t end) { panels(f, Tiles{to, chunks, parts}, out, rows, begin, end); });
}

#else

void amx_linear(const Linear&, const float*, float*, int64_t) {}

#endif

}  // namespace fastppo
