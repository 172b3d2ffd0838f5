// AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernel_set.h"

namespace qcfs::cpu {
namespace {

#include "cpu/sets/x86_512.h"

}    // namespace

const KernelSet avx512_kernels = make_kernel_set("avx512", isa_avx2 | isa_avx512);

}    // namespace qcfs::cpu
