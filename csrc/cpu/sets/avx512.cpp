// AVX-512 (F, BW, VL, DQ).
#include "cpu/isa.h"
#include "cpu/sets/generic.h"
#include "cpu/sets/x86_512.h"

namespace qcfs::cpu {
namespace {

struct Avx512 : X86Vectors512 {
  using DenseBlock = VectorBlock<Avx512>;
  static Int dot2(Int acc, Int a, Int b) { return acc + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
  // Words saturate: right for inputs up to 127.
  static Int dot4(Int acc, Int u, Int s) {
    return acc + (Int)_mm512_madd_epi16((__m512i)dot_bytes(u, s), _mm512_set1_epi16(1));
  }
  static constexpr int dot2_chains = 2;
  static constexpr int max_dense_input = 127;
};

}    // namespace

constexpr KernelSet avx512_kernels = make_kernel_set<Avx512>("avx512", isa_avx2 | isa_avx512);

}    // namespace qcfs::cpu
