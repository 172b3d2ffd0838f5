// Any processor: vectors of four lanes, which compilers map to SSE2 or NEON.
#include "cpu/isa.h"
#include "cpu/kernel_set.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace qcfs::cpu {
namespace {

#include "cpu/sets/four_lanes.h"

}    // namespace

const KernelSet portable_kernels = make_kernel_set(portable_name, isa_portable);

}    // namespace qcfs::cpu
