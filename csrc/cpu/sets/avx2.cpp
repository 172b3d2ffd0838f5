// AVX2 and FMA.
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernel_set.h"

namespace qcfs::cpu {
namespace {

#include "cpu/sets/x86_256.h"

}    // namespace

const KernelSet avx2_kernels = make_kernel_set("avx2", isa_avx2);

}    // namespace qcfs::cpu
