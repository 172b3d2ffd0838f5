// AVX-512 (F, BW, VL, DQ): sixteen lanes.
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernels/kernel_set.h"

namespace qcfs::cpu {
namespace {

constexpr int lanes = 16;
constexpr int block_vectors = 8;
using Int = std::int32_t __attribute__((vector_size(4 * lanes)));
using Real = double __attribute__((vector_size(4 * lanes)));

inline Int widen(const std::int16_t* w) {
  return (Int)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}

inline Int widen(const std::int8_t* w) {
  return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

constexpr bool pairs = true;

inline void add_pair(const std::int16_t* w0, const std::int16_t* w1, Int values, Int& low, Int& high) {
  const __m512i a = _mm512_loadu_si512(w0), b = _mm512_loadu_si512(w1);
  low += (Int)_mm512_madd_epi16(_mm512_unpacklo_epi16(a, b), (__m512i)values);
  high += (Int)_mm512_madd_epi16(_mm512_unpackhi_epi16(a, b), (__m512i)values);
}

// Quarter q of low holds channels 8q .. 8q+3, of high 8q+4 .. 8q+7.
inline void settle(Int& low, Int& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512i a = (__m512i)low, b = (__m512i)high;
  low = (Int)_mm512_permutex2var_epi32(a, first, b);
  high = (Int)_mm512_permutex2var_epi32(a, second, b);
}

inline Real multiply_add(Real a, double b, Real c) { return _mm512_fmadd_pd(a, _mm512_set1_pd(b), c); }

#include "cpu/kernels/generic.h"

}    // namespace

extern const KernelSet avx512_kernels;
const KernelSet avx512_kernels = make_kernel_set("avx512", isa_avx2 | isa_avx512);

}    // namespace qcfs::cpu
