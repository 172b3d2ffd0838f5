// The tile instructions of AMX as plain loops (Intel 64 and IA-32 Architectures Software Developer's Manual: TILELOADD,
// TILESTORED, TDPBUSD), for tests on machines without them. A tile used before `configure` is an error.
#pragma once

#include <cstdint>

namespace qcfs::cpu {
namespace {

struct EmulatedTiles {
  bool configured = false;
  std::uint8_t bytes[8][16][64];
};
thread_local EmulatedTiles emulated;

inline EmulatedTiles& configured_tiles() {
  if (!emulated.configured) __builtin_trap();
  return emulated;
}

struct Tiles {
  static void configure() { fill(true); }
  static void release() { fill(false); }

  template <int tile>
  static void zero() {
    __builtin_memset(configured_tiles().bytes[tile], 0, sizeof(EmulatedTiles::bytes[tile]));
  }
  template <int tile>
  static void load(const void* from, std::int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      __builtin_memcpy(configured_tiles().bytes[tile][r], static_cast<const char*>(from) + r * stride, 64);
    }
  }
  template <int tile>
  static void store(void* to, std::int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      __builtin_memcpy(static_cast<char*>(to) + r * stride, configured_tiles().bytes[tile][r], 64);
    }
  }
  template <int sums, int positions, int weights>
  static void dot() {
    EmulatedTiles& tiles = configured_tiles();
    for (int m = 0; m < 16; ++m) {
      std::int32_t row[16];
      __builtin_memcpy(row, tiles.bytes[sums][m], 64);
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          for (int i = 0; i < 4; ++i) {
            row[n] +=
                tiles.bytes[positions][m][4 * k + i] * static_cast<std::int8_t>(tiles.bytes[weights][k][4 * n + i]);
          }
        }
      }
      __builtin_memcpy(tiles.bytes[sums][m], row, 64);
    }
  }

 private:
  static void fill(bool on) {
    __builtin_memset(emulated.bytes, on ? 0 : 0xa5, sizeof(emulated.bytes));
    emulated.configured = on;
  }
};

}    // namespace
}    // namespace qcfs::cpu
