// Any processor: vectors of four lanes, which compilers map to SSE2 or NEON.
#include "cpu/isa.h"
#include "cpu/sets/four_lanes.h"
#include "cpu/sets/generic.h"

namespace qcfs::cpu {
namespace {

struct Portable : FourLanes {
  using DenseBlock = VectorBlock<Portable>;
  // Both operands are signed, which is right for inputs up to 127.
  static Int dot4(Int acc, Int u, Int s) {
    for (int b = 0; b < 4; ++b) acc += (u << (24 - 8 * b) >> 24) * (s << (24 - 8 * b) >> 24);
    return acc;
  }
};

#if defined(__ARM_NEON)
constexpr const char* name = "neon";
#else
constexpr const char* name = "portable";
#endif

}    // namespace

constexpr KernelSet portable_kernels = make_kernel_set<Portable>(name, isa_portable);

}    // namespace qcfs::cpu
