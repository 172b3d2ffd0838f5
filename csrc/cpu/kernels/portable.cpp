// Any processor: vectors of four lanes, which compilers map to SSE2 or NEON.
#include "cpu/isa.h"
#include "cpu/kernels/kernel_set.h"

namespace qcfs::cpu {
namespace {

constexpr int lanes = 4;
constexpr int block_vectors = 8;
using Int = std::int32_t __attribute__((vector_size(4 * lanes)));
using Real = double __attribute__((vector_size(4 * lanes)));

template <typename Weight>
inline Int widen(const Weight* w) {
  return Int{w[0], w[1], w[2], w[3]};
}

inline Real multiply_add(Real a, double b, Real c) { return a * b + c; }

#include "cpu/kernels/generic.h"

}    // namespace

extern const KernelSet portable_kernels;
const KernelSet portable_kernels = make_kernel_set("portable", isa_portable);

}    // namespace qcfs::cpu
