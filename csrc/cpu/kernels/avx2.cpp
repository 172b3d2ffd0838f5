// AVX2 and FMA: eight lanes.
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernels/kernel_set.h"

namespace qcfs::cpu {
namespace {

constexpr int lanes = 8;
constexpr int block_vectors = 8;
using Int = std::int32_t __attribute__((vector_size(4 * lanes)));
using Real = double __attribute__((vector_size(4 * lanes)));

inline Int widen(const std::int16_t* w) {
  return (Int)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

inline Int widen(const std::int8_t* w) {
  return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w)));
}

constexpr bool pairs = true;

inline void add_pair(const std::int16_t* w0, const std::int16_t* w1, Int values, Int& low, Int& high) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w0));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w1));
  low += (Int)_mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), (__m256i)values);
  high += (Int)_mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), (__m256i)values);
}

// low holds channels 0-3 and 8-11, high 4-7 and 12-15.
inline void settle(Int& low, Int& high) {
  const __m256i a = (__m256i)low, b = (__m256i)high;
  low = (Int)_mm256_permute2x128_si256(a, b, 0x20);
  high = (Int)_mm256_permute2x128_si256(a, b, 0x31);
}

inline Real multiply_add(Real a, double b, Real c) { return _mm256_fmadd_pd(a, _mm256_set1_pd(b), c); }

#include "cpu/kernels/generic.h"

}    // namespace

extern const KernelSet avx2_kernels;
const KernelSet avx2_kernels = make_kernel_set("avx2", isa_avx2);

}    // namespace qcfs::cpu
