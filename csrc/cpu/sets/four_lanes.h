// Vectors of four lanes for any processor, with the multiply-adds of SSE2 where they are. The sets portable and neondot
// differ in dot4 alone.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>

#include "cpu/events/list_bytes.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

struct FourLanes {
  static constexpr int lanes = 4;
  using Int = VectorTypes<lanes>::Int;

  static constexpr bool interleaves = false;
  // With more accumulators SSE2 spills and halves its speed.
  static constexpr int block_vectors_16 = 4, block_vectors_8 = 4;
  static constexpr int analog_vectors = 2;
  static constexpr int dense_vectors = 4, dense_rows = 6;
  static constexpr int max_dense_input = 127;

  // Sums of products of int16 pairs.
  static Int dot2(Int acc, Int a, Int b) {
#if defined(__SSE2__)
    return acc + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }

  // A multiplication gathers the lowest bits of eight bytes.
  static constexpr int fired_bytes = 8;
  static std::uint32_t fired(const std::uint8_t* x, std::uint8_t wanted) {
    const std::uint64_t word = load<std::uint64_t>(x) & 0x0101010101010101ull * wanted;
    const std::uint64_t low7 = 0x7f7f7f7f7f7f7f7full;
    const std::uint64_t set = (((word & low7) + low7) | word) >> 7 & 0x0101010101010101ull;
    return static_cast<std::uint32_t>(set * 0x0102040810204080ull >> 56);
  }
  static std::uint16_t* list_bytes(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted, std::uint16_t first,
                                   std::uint16_t* out, std::uint16_t* value) {
    return list_bytes_by_table<FourLanes>(x, n, wanted, first, out, value);
  }
};

}    // namespace
}    // namespace qcfs::cpu
