// Which instruction sets the processor and the operating system offer.
#pragma once

#include <cstdint>

namespace qcfs::cpu {

enum Isa : std::uint32_t {
  isa_portable = 0,
  isa_avx2 = 1u << 0,      // AVX2 and FMA
  isa_avx512 = 1u << 1,    // F, BW, VL, DQ
  isa_neon = 1u << 2,      // arm64 baseline
};

// Every bit returned has been checked with CPUID and, for the wide registers, with XGETBV.
std::uint32_t host_isa();

}    // namespace qcfs::cpu
