// AVX-512 vectors: sixteen lanes. Included by avx512.cpp, avx512vnni.cpp and amx.cpp (the latter define QCFS_VNNI), in
// their namespaces.
constexpr int lanes = 16;
using Int = std::int32_t __attribute__((vector_size(4 * lanes)));

#define QCFS_PAIRS
constexpr int block_vectors_16 = 2;
constexpr int block_vectors_8 = 4;
constexpr int analog_vectors = 4;

// Words and bytes of two rows in turns, within each 16 bytes.
inline Int low_words(Int a, Int b) { return (Int)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
inline Int high_words(Int a, Int b) { return (Int)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
inline Int low_bytes(Int a, Int b) { return (Int)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
inline Int high_bytes(Int a, Int b) { return (Int)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }

inline Int add_words(Int a, Int b) { return (Int)_mm512_add_epi16((__m512i)a, (__m512i)b); }
inline Int first_words(Int a) { return (Int)_mm512_cvtepi16_epi32(_mm512_castsi512_si256((__m512i)a)); }
inline Int last_words(Int a) { return (Int)_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64((__m512i)a, 1)); }

// Unsigned times signed bytes, pairs summed to words.
inline Int dot_bytes(Int u, Int s) { return (Int)_mm512_maddubs_epi16((__m512i)u, (__m512i)s); }

#if defined(QCFS_VNNI)
inline Int dot2(Int acc, Int a, Int b) { return (Int)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
inline Int dot4(Int acc, Int u, Int s) { return (Int)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s); }
constexpr int dot2_chains = 2;
constexpr int max_dense_input = 255;
#else
inline Int dot2(Int acc, Int a, Int b) { return acc + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
// Words saturate: right for inputs up to 127.
inline Int dot4(Int acc, Int u, Int s) {
  return acc + (Int)_mm512_madd_epi16((__m512i)dot_bytes(u, s), _mm512_set1_epi16(1));
}
constexpr int dot2_chains = 2;
constexpr int max_dense_input = 127;
#endif
#if !defined(QCFS_TILES)
constexpr int dense_vectors = 4;
constexpr int dense_rows = 6;
#endif

// As in events.h, sixteen bytes at a time. Compressed in a register: the form that writes to memory is slow on some
// processors.
#define QCFS_OWN_LISTING
inline std::uint16_t* list_bytes(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted, std::uint16_t first,
                                 std::uint16_t* out, std::uint16_t* value) {
  const __m512i iota = _mm512_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960);
  const __m512i bits = _mm512_set1_epi8(static_cast<char>(wanted));
  for (std::int64_t k = 0; k < n; k += 64) {
    const __mmask64 exist = n - k >= 64 ? ~0ull : (1ull << (n - k)) - 1;
    std::uint64_t set = _mm512_mask_test_epi8_mask(exist, _mm512_maskz_loadu_epi8(exist, x + k), bits);
    std::int32_t base = static_cast<std::int32_t>(first + row_bytes * k);
    for (int part = 0; part < 4; ++part, set >>= 16, base += 16 * row_bytes) {
      const __mmask16 some = static_cast<__mmask16>(set);
      const __m512i places = _mm512_maskz_compress_epi32(some, _mm512_add_epi32(iota, _mm512_set1_epi32(base)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(places));
      const int found = __builtin_popcount(some);
      if (value != nullptr) {
        const __m512i counts =
            _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>(exist >> (16 * part)), x + k + 16 * part));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(value),
                            _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(some, counts)));
        value += found;
      }
      out += found;
    }
  }
  return out;
}

#include "cpu/sets/generic.h"
