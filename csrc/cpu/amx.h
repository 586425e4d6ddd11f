// AMX bf16 tiles behind four functions; on other machines amx_works() is false and the rest is never called.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define FASTPPO_AMX __attribute__((target("amx-tile,amx-bf16")))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastppo {

#ifdef FASTPPO_AMX

// The processor has the tiles and the kernel lets this process use them (asked for once).
inline bool amx_works() {
  static const bool works = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return works;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Per thread: eight tiles of 16 rows x 64 bytes. GCC's intrinsics don't tell the compiler all of what they read, so the
// configuration is a constant and not a local, and a barrier stands before the tiles.
FASTPPO_AMX inline void amx_begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

FASTPPO_AMX inline void amx_end() { _tile_release(); }

// c[2 * strip + half] = x[16 rows of strip] times 16 columns of the panel. w: [K / 2][32][2] bf16, K a multiple of 32.
FASTPPO_AMX inline void amx_block(const uint16_t* x, int64_t K, const uint16_t* w, int strips, bool fetch_next,
                                  float (*c)[256]) {
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* next = reinterpret_cast<const char*>(w + K * 32);
  for (int64_t k = 0; k < K; k += 32) {
    if (fetch_next) {
      for (int line = 0; line < 32; ++line) __builtin_prefetch(next + k * 64 + line * 64, 0, 2);
    }
    _tile_loadd(6, w + k * 32, 128);
    _tile_loadd(7, w + k * 32 + 32, 128);
    _tile_loadd(4, x + k, K * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (strips == 2) {
      _tile_loadd(5, x + 16 * K + k, K * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  if (strips == 2) {
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
  }
}

#else

inline bool amx_works() { return false; }
inline void amx_begin() {}
inline void amx_end() {}
inline void amx_block(const uint16_t*, int64_t, const uint16_t*, int, bool, float (*)[256]) {}

#endif

}  // namespace fastppo
