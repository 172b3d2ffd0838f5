// NEON with the dot products of ARMv8.2.
#include <arm_neon.h>

#include "cpu/isa.h"
#include "cpu/sets/four_lanes.h"
#include "cpu/sets/generic.h"

namespace qcfs::cpu {
namespace {

struct NeonDot : FourLanes {
  using DenseBlock = VectorBlock<NeonDot>;
  // Both operands are signed, which is right for inputs up to 127.
  static Int dot4(Int acc, Int u, Int s) { return (Int)vdotq_s32((int32x4_t)acc, (int8x16_t)u, (int8x16_t)s); }
};

}    // namespace

constexpr KernelSet neondot_kernels = make_kernel_set<NeonDot>("neondot", isa_neondot);

}    // namespace qcfs::cpu
