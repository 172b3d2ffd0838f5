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

// Double to the grid: nearest, halves to even (the IEEE default), then clamped. NaN cannot occur:
// operands are finite integers and finite gains.
QCFS_HD static inline std::int32_t to_grid(double z, std::int32_t low, std::int32_t high) {
#if defined(__CUDA_ARCH__)
  const double r = rint(z);
#else
  const double r = __builtin_rint(z);
#endif
  if (r <= static_cast<double>(low)) return low;
  if (r >= static_cast<double>(high)) return high;
  return static_cast<std::int32_t>(r);
}

}    // namespace qcfs
