// The register block of dense.h on tile registers (AMX): 32 positions times 32 columns as two by two tiles of sums, so
// that every tile loaded feeds two products. A tile of the left matrix is 16 positions x 64 channels, read in
// place with the position's stride; a tile of weights is 64 inputs x 16 columns, stored as the product wants it:
// [16 groups of four inputs][16 columns][4].
//
//                     weights 6      weights 7          16-bit weights: 6 high digits, 7 low digits
//     positions 4      sums 0         sums 1             of the same 16 channels
//     positions 5      sums 2         sums 3
//
// `Tiles` is the tile instructions (sets/amx.cpp) or their emulation in tests (sets/tile_emulation.h).
#pragma once

#include <cstdint>

#include "cpu/layout.h"

namespace qcfs::cpu {
namespace {

template <class Tiles>
struct TileBlock {
  static constexpr int rows = 32;
  static constexpr int columns = 32;
  static constexpr int depth = 64;

  static constexpr int place(int k, int column) { return column / 16 * 1024 + k / 4 * 64 + column % 16 * 4 + k % 4; }

  static void begin() { Tiles::configure(); }
  static void end() { Tiles::release(); }

  // After about 200 ns without a product the processor slows its tile unit down for the next few hundred products
  // (measured on Sapphire Rapids): neurons that take as long are interrupted by a product whose sums nobody reads.
  static constexpr int awake_rows = 8;
  static void stay_awake() { Tiles::template dot<0, 4, 6>(); }

  static void multiply(const Segment* segments, int count, std::int64_t sample, std::int64_t t, std::int64_t q0,
                       std::int64_t positions, std::int64_t used, const std::int8_t* packed, std::int32_t* sums,
                       bool first) {
    const auto part = positions > 16 ? used > 16 ? multiply_part<true, true> : multiply_part<true, false>
                      : used > 16    ? multiply_part<false, true>
                                     : multiply_part<false, false>;
    part(segments, count, sample, t, q0, packed, sums, first);
  }

  // `more`: sums 2 and 3 matter; `wide`: sums 1 and 3 matter.
  template <bool more, bool wide>
  static void multiply_part(const Segment* segments, int count, std::int64_t sample, std::int64_t t, std::int64_t q0,
                            const std::int8_t* packed, std::int32_t* sums, bool first) {
    __asm__ volatile("" ::: "memory");    // what tiles load has been written: see sets/amx.cpp
    constexpr std::int64_t sum_bytes = columns * sizeof(std::int32_t);
    if (first) {
      Tiles::template zero<0>();
      if (wide) Tiles::template zero<1>();
      if (more) Tiles::template zero<2>();
      if (more && wide) Tiles::template zero<3>();
    } else {
      Tiles::template load<0>(sums, sum_bytes);
      if (wide) Tiles::template load<1>(sums + 16, sum_bytes);
      if (more) Tiles::template load<2>(sums + 16 * columns, sum_bytes);
      if (more && wide) Tiles::template load<3>(sums + 16 * columns + 16, sum_bytes);
    }
    for (int s = 0; s < count; ++s) {
      const Segment& segment = segments[s];
      const std::int64_t pitch = segment.row_bytes;
      const std::uint8_t* x = segment.a + sample * segment.sample_bytes + t * segment.step_bytes + q0 * pitch;
      for (std::int64_t k = 0; k < segment.blocks; ++k, x += 64, packed += 2048) {
        Tiles::template load<6>(packed, 64);
        Tiles::template load<4>(x, pitch);
        if (wide) Tiles::template load<7>(packed + 1024, 64);
        Tiles::template dot<0, 4, 6>();
        if (more) Tiles::template load<5>(x + 16 * pitch, pitch);
        if (wide) Tiles::template dot<1, 4, 7>();
        if (more) Tiles::template dot<2, 5, 6>();
        if (more && wide) Tiles::template dot<3, 5, 7>();
      }
    }
    Tiles::template store<0>(sums, sum_bytes);
    if (wide) Tiles::template store<1>(sums + 16, sum_bytes);
    if (more) Tiles::template store<2>(sums + 16 * columns, sum_bytes);
    if (more && wide) Tiles::template store<3>(sums + 16 * columns + 16, sum_bytes);
  }

  // A loop of tile products alone.
  static double matrix_loop(std::int64_t rounds) {
    Tiles::configure();
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    Tiles::template zero<2>();
    Tiles::template zero<3>();
    Tiles::template zero<4>();
    Tiles::template zero<5>();
    Tiles::template zero<6>();
    Tiles::template zero<7>();
    for (std::int64_t r = 0; r < rounds; ++r) {
      Tiles::template dot<0, 4, 6>();
      Tiles::template dot<1, 4, 7>();
      Tiles::template dot<2, 5, 6>();
      Tiles::template dot<3, 5, 7>();
    }
    Tiles::release();
    return 4.0 * 16 * 16 * 64 * static_cast<double>(rounds);
  }
};

}    // namespace
}    // namespace qcfs::cpu
