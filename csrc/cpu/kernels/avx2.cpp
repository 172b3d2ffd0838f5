// AVX2 and FMA.
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernels/kernel_set.h"

namespace qcfs::cpu {
namespace {

#include "cpu/kernels/x86_256.h"

}    // namespace

extern const KernelSet avx2_kernels;
const KernelSet avx2_kernels = make_kernel_set("avx2", isa_avx2);

}    // namespace qcfs::cpu
