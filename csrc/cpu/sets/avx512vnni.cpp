// AVX-512 with VNNI dot products.
#include "cpu/isa.h"
#include "cpu/sets/generic.h"
#include "cpu/sets/x86_512_vnni.h"

namespace qcfs::cpu {
namespace {

struct Avx512Vnni : X86Vectors512Vnni {
  using DenseBlock = VectorBlock<Avx512Vnni>;
};

}    // namespace

constexpr KernelSet avx512vnni_kernels =
    make_kernel_set<Avx512Vnni>("avx512vnni", isa_avx2 | isa_avx512 | isa_avx512vnni);

}    // namespace qcfs::cpu
