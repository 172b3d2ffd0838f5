// AVX2 with AVX-VNNI dot products.
#define QCFS_VNNI
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernel_set.h"

namespace qcfs::cpu {
namespace {

#include "cpu/sets/x86_256.h"

}    // namespace

const KernelSet avxvnni_kernels = make_kernel_set("avxvnni", isa_avx2 | isa_avxvnni);

}    // namespace qcfs::cpu
