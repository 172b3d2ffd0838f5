// AVX2 and FMA.
#include "cpu/isa.h"
#include "cpu/sets/generic.h"
#include "cpu/sets/x86_256.h"

namespace qcfs::cpu {
namespace {

struct Avx2 : X86Vectors256 {
  using DenseBlock = VectorBlock<Avx2>;
  static Int dot2(Int acc, Int a, Int b) { return acc + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
  // Words saturate: right for inputs up to 127.
  static Int dot4(Int acc, Int u, Int s) {
    return acc + (Int)_mm256_madd_epi16((__m256i)dot_bytes(u, s), _mm256_set1_epi16(1));
  }
  static constexpr int dot2_chains = 1;
  static constexpr int max_dense_input = 127;
};

}    // namespace

constexpr KernelSet avx2_kernels = make_kernel_set<Avx2>("avx2", isa_avx2);

}    // namespace qcfs::cpu
