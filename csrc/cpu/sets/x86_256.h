// AVX2 vectors: eight lanes. The sets avx2 and avxvnni differ in their dot products alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/events/list_bytes.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

struct X86Vectors256 {
  static constexpr int lanes = 8;
  using Int = VectorTypes<lanes>::Int;

  static constexpr bool interleaves = true;
  static constexpr int block_vectors_16 = 4, block_vectors_8 = 8;
  static constexpr int analog_vectors = 2;
  static constexpr int dense_vectors = 2, dense_rows = 6;

  // Words and bytes of two rows in turns, within each 16 bytes.
  static Int low_words(Int a, Int b) { return (Int)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
  static Int high_words(Int a, Int b) { return (Int)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
  static Int low_bytes(Int a, Int b) { return (Int)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
  static Int high_bytes(Int a, Int b) { return (Int)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }

  static Int add_words(Int a, Int b) { return (Int)_mm256_add_epi16((__m256i)a, (__m256i)b); }
  static Int first_words(Int a) { return (Int)_mm256_cvtepi16_epi32(_mm256_castsi256_si128((__m256i)a)); }
  static Int last_words(Int a) { return (Int)_mm256_cvtepi16_epi32(_mm256_extracti128_si256((__m256i)a, 1)); }

  static Int widen_bytes(const std::uint8_t* p) { return (Int)_mm256_cvtepu8_epi32(_mm_loadu_si64(p)); }
  static Int widen_bytes(const std::int8_t* p) { return (Int)_mm256_cvtepi8_epi32(_mm_loadu_si64(p)); }
  static void store_bytes(std::uint8_t* p, Int x) {
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);    // of each 16 bytes, to their first four
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)x, lowest);
    _mm_storeu_si64(p, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  }

  // Writes the lanes of x where `kept` is not zero, in order, and whatever behind them; returns how many.
  static int compress(Int x, Int kept, std::int32_t* out) {
    const __m256i dropped = _mm256_cmpeq_epi32((__m256i)kept, _mm256_setzero_si256());
    const unsigned set = 0xff & ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(dropped)));
    const __m128i* position = reinterpret_cast<const __m128i*>(position_table.position[set]);
    const __m256i lane = _mm256_srli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(position)), 6);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32((__m256i)x, lane));
    return __builtin_popcount(set);
  }

  // Unsigned times signed bytes, pairs summed to words.
  static Int dot_bytes(Int u, Int s) { return (Int)_mm256_maddubs_epi16((__m256i)u, (__m256i)s); }

  static constexpr int fired_bytes = 32;
  static std::uint32_t fired(const std::uint8_t* x, std::uint8_t wanted) {
    const __m256i bits = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                                          _mm256_set1_epi8(static_cast<char>(wanted)));
    return ~static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bits, _mm256_setzero_si256())));
  }
  static std::uint16_t* list_bytes(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted, std::uint16_t first,
                                   std::uint16_t* out, std::uint16_t* value) {
    return list_bytes_by_table<X86Vectors256>(x, n, wanted, first, out, value);
  }
};

}    // namespace
}    // namespace qcfs::cpu
