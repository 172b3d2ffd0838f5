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

inline Real multiply_add(Real a, double b, Real c) { return _mm256_fmadd_pd(a, _mm256_set1_pd(b), c); }

#include "cpu/kernels/generic.h"

}    // namespace

extern const KernelSet avx2_kernels;
const KernelSet avx2_kernels = make_kernel_set("avx2", isa_avx2);

}    // namespace qcfs::cpu
