// Arithmetic shared by every backend, small enough to be checked by eye.
//
// `static`, not plain `inline`: these functions are compiled once for each instruction set, and with
// external linkage the linker could keep the AVX-512 copy for every caller.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QCFS_HD __host__ __device__
#else
#define QCFS_HD
#endif

namespace qcfs {

// One step of the integrate-and-fire neuron with soft reset; returns the spike.
QCFS_HD static inline std::int32_t fire(std::int32_t& v, std::int32_t current, std::int32_t threshold) {
  v += current;
  const std::int32_t spike = v >= threshold;
  v -= spike ? threshold : 0;
  return spike;
}

// Double to the grid: clamped, then nearest, halves to even. Adding and subtracting 1.5 * 2^52 rounds exactly so
// below 2^51 and, unlike a call of rint, vectorises on every machine. NaN cannot occur: operands are finite
// integers and finite gains.
QCFS_HD static inline std::int32_t to_grid(double z, std::int32_t low, std::int32_t high) {
  constexpr double rounder = 6755399441055744.0;
  const double floor = static_cast<double>(low), ceiling = static_cast<double>(high);
  z = z < floor ? floor : z;
  z = z > ceiling ? ceiling : z;
  return static_cast<std::int32_t>((z + rounder) - rounder);
}

}    // namespace qcfs
