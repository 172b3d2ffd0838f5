// AVX2 with AVX-VNNI dot products.
#include "cpu/isa.h"
#include "cpu/sets/generic.h"
#include "cpu/sets/x86_256.h"

namespace qcfs::cpu {
namespace {

struct AvxVnni : X86Vectors256 {
  using DenseBlock = VectorBlock<AvxVnni>;
  static Int dot2(Int acc, Int a, Int b) { return (Int)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b); }
  static Int dot4(Int acc, Int u, Int s) { return (Int)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)u, (__m256i)s); }
  static constexpr int dot2_chains = 2;
  static constexpr int max_dense_input = 255;
};

}    // namespace

constexpr KernelSet avxvnni_kernels = make_kernel_set<AvxVnni>("avxvnni", isa_avx2 | isa_avxvnni);

}    // namespace qcfs::cpu
