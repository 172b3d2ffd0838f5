// AVX2 vectors: eight lanes. Included by avx2.cpp and avxvnni.cpp (which defines QCFS_VNNI), in their namespaces.
constexpr int lanes = 8;
using Int = std::int32_t __attribute__((vector_size(4 * lanes)));

#define QCFS_PAIRS
constexpr int block_vectors_16 = 4;
constexpr int block_vectors_8 = 8;
constexpr int analog_vectors = 2;

// Words and bytes of two rows in turns, within each 16 bytes.
inline Int low_words(Int a, Int b) { return (Int)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
inline Int high_words(Int a, Int b) { return (Int)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
inline Int low_bytes(Int a, Int b) { return (Int)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
inline Int high_bytes(Int a, Int b) { return (Int)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }

inline Int add_words(Int a, Int b) { return (Int)_mm256_add_epi16((__m256i)a, (__m256i)b); }
inline Int first_words(Int a) { return (Int)_mm256_cvtepi16_epi32(_mm256_castsi256_si128((__m256i)a)); }
inline Int last_words(Int a) { return (Int)_mm256_cvtepi16_epi32(_mm256_extracti128_si256((__m256i)a, 1)); }

// See events.h.
#define QCFS_FIRED
constexpr int fired_bytes = 32;
inline std::uint32_t fired(const std::uint8_t* x, std::uint8_t wanted) {
  const __m256i bits = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                                        _mm256_set1_epi8(static_cast<char>(wanted)));
  return ~static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bits, _mm256_setzero_si256())));
}

// Unsigned times signed bytes, pairs summed to words.
inline Int dot_bytes(Int u, Int s) { return (Int)_mm256_maddubs_epi16((__m256i)u, (__m256i)s); }

#if defined(QCFS_VNNI)
inline Int dot2(Int acc, Int a, Int b) { return (Int)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b); }
inline Int dot4(Int acc, Int u, Int s) { return (Int)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)u, (__m256i)s); }
constexpr int dot2_chains = 2;
constexpr int max_dense_input = 255;
#else
inline Int dot2(Int acc, Int a, Int b) { return acc + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
// Words saturate: right for inputs up to 127.
inline Int dot4(Int acc, Int u, Int s) {
  return acc + (Int)_mm256_madd_epi16((__m256i)dot_bytes(u, s), _mm256_set1_epi16(1));
}
constexpr int dot2_chains = 1;
constexpr int max_dense_input = 127;
#endif
constexpr int dense_vectors = 2;
constexpr int dense_rows = 6;

#include "cpu/sets/generic.h"
