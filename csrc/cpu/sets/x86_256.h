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
