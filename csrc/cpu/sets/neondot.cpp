// NEON with the dot products of ARMv8.2.
#define QCFS_NEON_DOT
#include <arm_neon.h>

#include "cpu/isa.h"
#include "cpu/kernel_set.h"

namespace qcfs::cpu {
namespace {

#include "cpu/sets/four_lanes.h"

}    // namespace

const KernelSet neondot_kernels = make_kernel_set("neondot", isa_neondot);

}    // namespace qcfs::cpu
