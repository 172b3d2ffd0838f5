// Which instruction sets the processor and the operating system offer.
#pragma once

#include <cstdint>

namespace qcfs::cpu {

enum Isa : std::uint32_t {
  isa_portable = 0,
  isa_avx2 = 1u << 0,          // AVX2 and FMA
  isa_avx512 = 1u << 1,        // F, BW, VL, DQ
  isa_avxvnni = 1u << 2,       // AVX-VNNI: dot products of AVX2 registers
  isa_avx512vnni = 1u << 3,    // AVX512_VNNI
  isa_amx = 1u << 4,           // AMX-TILE and AMX-INT8, and the system's permission to use them
  isa_neon = 1u << 5,          // arm64 baseline
  isa_neondot = 1u << 6,       // dot products of ARMv8.2
};

// Every bit returned has been checked with CPUID and, for the wide registers, with XGETBV; for the tiles the system
// has been asked too (it may refuse, which means: no AMX).
std::uint32_t host_isa();

}    // namespace qcfs::cpu
