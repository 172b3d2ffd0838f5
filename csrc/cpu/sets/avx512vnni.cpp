// AVX-512 with VNNI dot products.
#define QCFS_VNNI
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernel_set.h"

namespace qcfs::cpu {
namespace {

#include "cpu/sets/x86_512.h"

}    // namespace

const KernelSet avx512vnni_kernels = make_kernel_set("avx512vnni", isa_avx2 | isa_avx512 | isa_avx512vnni);

}    // namespace qcfs::cpu
