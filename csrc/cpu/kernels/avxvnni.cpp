// AVX2 with AVX-VNNI dot products.
#define QCFS_VNNI
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernels/kernel_set.h"

namespace qcfs::cpu {
namespace {

#include "cpu/kernels/x86_256.h"

}    // namespace

extern const KernelSet avxvnni_kernels;
const KernelSet avxvnni_kernels = make_kernel_set("avxvnni", isa_avx2 | isa_avxvnni);

}    // namespace qcfs::cpu
