// Vectors of four lanes for any processor, with the multiply-adds of SSE2 and NEON where they are. Included by
// portable.cpp and neondot.cpp (which defines QCFS_NEON_DOT), in their namespaces.
constexpr int lanes = 4;
using Int = std::int32_t __attribute__((vector_size(4 * lanes)));

// With more accumulators SSE2 spills and halves its speed.
constexpr int block_vectors_16 = 4;
constexpr int block_vectors_8 = 4;
constexpr int analog_vectors = 2;

// Sums of products of int16 pairs.
inline Int dot2(Int acc, Int a, Int b) {
#if defined(__SSE2__)
  return acc + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Sums of products of four bytes; both signed, which is right for inputs up to 127.
#if defined(QCFS_NEON_DOT)
inline Int dot4(Int acc, Int u, Int s) { return (Int)vdotq_s32((int32x4_t)acc, (int8x16_t)u, (int8x16_t)s); }
#else
inline Int dot4(Int acc, Int u, Int s) {
  for (int b = 0; b < 4; ++b) acc += (u << (24 - 8 * b) >> 24) * (s << (24 - 8 * b) >> 24);
  return acc;
}
#endif
constexpr int max_dense_input = 127;
constexpr int dense_vectors = 4;
constexpr int dense_rows = 6;

#if defined(__ARM_NEON)
constexpr const char* portable_name = "neon";
#else
constexpr const char* portable_name = "portable";
#endif

#include "cpu/sets/generic.h"
