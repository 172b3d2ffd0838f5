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

inline Real multiply_add(Real a, double b, Real c) { return _mm512_fmadd_pd(a, _mm512_set1_pd(b), c); }

#include "cpu/kernels/generic.h"

}    // namespace

extern const KernelSet avx512_kernels;
const KernelSet avx512_kernels = make_kernel_set("avx512", isa_avx2 | isa_avx512);

}    // namespace qcfs::cpu
