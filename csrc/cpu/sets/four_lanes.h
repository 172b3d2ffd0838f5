// Vectors of four lanes for any processor, with the multiply-adds of SSE2 where they are. The sets portable and neondot
// differ in dot4 alone.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
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

#if defined(__SSE2__)
  static Int widen_bytes(const std::uint8_t* p) {
    const __m128i zero = _mm_setzero_si128();
    return (Int)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(load<std::int32_t>(p)), zero), zero);
  }
  static Int widen_bytes(const std::int8_t* p) {
    const __m128i x = _mm_cvtsi32_si128(load<std::int32_t>(p)), pairs = _mm_unpacklo_epi8(x, x);
    return (Int)_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24);
  }
  static void store_bytes(std::uint8_t* p, Int x) {
    const __m128i words = _mm_packs_epi32((__m128i)(x & 255), _mm_setzero_si128());
    store(p, _mm_cvtsi128_si32(_mm_packus_epi16(words, words)));
  }
#elif defined(__ARM_NEON)
  static Int widen_bytes(const std::uint8_t* p) {
    return (Int)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(load<std::uint32_t>(p)))));
  }
  static Int widen_bytes(const std::int8_t* p) {
    return (Int)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load<std::uint32_t>(p)))));
  }
  static void store_bytes(std::uint8_t* p, Int x) {
    const uint16x4_t words = vmovn_u32((uint32x4_t)x);
    store(p, vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0));
  }
#else
  template <typename Byte>
  static Int widen_bytes(const Byte* p) {
    return Int{p[0], p[1], p[2], p[3]};
  }
  static void store_bytes(std::uint8_t* p, Int x) {
    for (int i = 0; i < lanes; ++i) p[i] = static_cast<std::uint8_t>(x[i]);
  }
#endif

  // Writes the lanes of x where `kept` is not zero, in order, and whatever behind them; returns how many.
  static int compress(Int x, Int kept, std::int32_t* out) {
    int n = 0;
    for (int i = 0; i < lanes; ++i) {
      out[n] = x[i];
      n += kept[i] != 0;
    }
    return n;
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
