// AVX-512 with the dot products of VNNI, for the sets avx512vnni and amx.
#pragma once

#include "cpu/sets/x86_512.h"

namespace qcfs::cpu {
namespace {

struct X86Vectors512Vnni : X86Vectors512 {
  static Int dot2(Int acc, Int a, Int b) { return (Int)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
  static Int dot4(Int acc, Int u, Int s) { return (Int)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s); }
  static constexpr int dot2_chains = 2;
  static constexpr int max_dense_input = 255;
};

}    // namespace
}    // namespace qcfs::cpu
