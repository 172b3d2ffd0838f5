// AVX-512 vectors: sixteen lanes. The sets avx512, avx512vnni and amx differ in their dot products and in the register
// block of the dense engine.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

struct X86Vectors512 {
  static constexpr int lanes = 16;
  using Int = VectorTypes<lanes>::Int;

  static constexpr bool interleaves = true;
  static constexpr int block_vectors_16 = 2, block_vectors_8 = 4;
  static constexpr int analog_vectors = 4;
  static constexpr int dense_vectors = 4, dense_rows = 6;

  // Words and bytes of two rows in turns, within each 16 bytes.
  static Int low_words(Int a, Int b) { return (Int)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
  static Int high_words(Int a, Int b) { return (Int)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
  static Int low_bytes(Int a, Int b) { return (Int)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
  static Int high_bytes(Int a, Int b) { return (Int)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }

  static Int add_words(Int a, Int b) { return (Int)_mm512_add_epi16((__m512i)a, (__m512i)b); }
  static Int first_words(Int a) { return (Int)_mm512_cvtepi16_epi32(_mm512_castsi512_si256((__m512i)a)); }
  static Int last_words(Int a) { return (Int)_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64((__m512i)a, 1)); }

  static Int widen_bytes(const std::uint8_t* p) {
    return (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Int widen_bytes(const std::int8_t* p) {
    return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(std::uint8_t* p, Int x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
  }

  // Writes the lanes of x where `kept` is not zero, in order, and whatever behind them; returns how many.
  static int compress(Int x, Int kept, std::int32_t* out) {
    const __mmask16 set = _mm512_test_epi32_mask((__m512i)kept, (__m512i)kept);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(set, (__m512i)x));
    return __builtin_popcount(set);
  }

  // Unsigned times signed bytes, pairs summed to words.
  static Int dot_bytes(Int u, Int s) { return (Int)_mm512_maddubs_epi16((__m512i)u, (__m512i)s); }

  // Sixteen bytes at a time. Compressed in a register: the form that writes to memory is slow on some processors.
  static std::uint16_t* list_bytes(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted, std::uint16_t first,
                                   std::uint16_t* out, std::uint16_t* value) {
    static_assert(row_bytes == 64, "iota counts weight rows");
    const __m512i iota = _mm512_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960);
    const __m512i bits = _mm512_set1_epi8(static_cast<char>(wanted));
    for (std::int64_t k = 0; k < n; k += 64) {
      const __mmask64 exist = n - k >= 64 ? ~0ull : (1ull << (n - k)) - 1;
      std::uint64_t set = _mm512_mask_test_epi8_mask(exist, _mm512_maskz_loadu_epi8(exist, x + k), bits);
      std::int32_t base = static_cast<std::int32_t>(first + row_bytes * k);
      for (int part = 0; part < 4; ++part, set >>= 16, base += 16 * row_bytes) {
        const __mmask16 some = static_cast<__mmask16>(set);
        const __m512i positions = _mm512_maskz_compress_epi32(some, _mm512_add_epi32(iota, _mm512_set1_epi32(base)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(positions));
        const int found = __builtin_popcount(some);
        if (value != nullptr) {
          const __mmask16 here = static_cast<__mmask16>(exist >> (16 * part));
          const __m512i counts = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, x + k + 16 * part));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(value),
                              _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(some, counts)));
          value += found;
        }
        out += found;
      }
    }
    return out;
  }
};

}    // namespace
}    // namespace qcfs::cpu
