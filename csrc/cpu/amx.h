// AMX bf16 tiles: what the processor has, and the few helpers around them. Elsewhere amx_works() is false.
#pragma once
#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define FASTPPO_AMX __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16")))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "simd.h"
#endif

namespace fastppo {

#ifdef FASTPPO_AMX

// The processor has the tiles and the kernel lets this process use them (asked for once); FASTPPO_AMX=0 says no.
inline bool amx_works() {
  static const bool works = [] {
    const char* wish = std::getenv("FASTPPO_AMX");
    if (wish && *wish == '0') return false;
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
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

// While one lives: eight tiles of 16 rows x 64 bytes on this thread, and denormals are 0 as AMX has them (the parts of a
// number below 1e-33 would each take a microcode assist). GCC's intrinsics don't tell the compiler all of what they
// read, so the configuration is a constant and not a local, and a fence stands before the tiles.
class AMX {
 public:
  FASTPPO_AMX AMX() : control_(_mm_getcsr()) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    _mm_setcsr(control_ | 0x8040);
  }
  FASTPPO_AMX ~AMX() {
    _tile_release();
    _mm_setcsr(control_);
  }
  AMX(const AMX&) = delete;

 private:
  unsigned control_;
};

#define FASTPPO_TILE_FENCE __asm__ volatile("" ::: "memory")

#else

inline bool amx_works() { return false; }

#endif

}  // namespace fastppo
