// Any processor: vectors of four lanes, which compilers map to SSE2 or NEON.
#include "cpu/isa.h"
#include "cpu/kernels/kernel_set.h"

namespace qcfs::cpu {
namespace {

constexpr int lanes = 4;
constexpr int block_vectors = 4;
using Int = std::int32_t __attribute__((vector_size(4 * lanes)));
using Real = double __attribute__((vector_size(4 * lanes)));

inline Int widen(const std::int16_t* w) {
  std::int16_t v __attribute__((vector_size(2 * lanes)));
  __builtin_memcpy(&v, w, sizeof(v));
  return __builtin_convertvector(v, Int);
}

inline Int widen(const std::int8_t* w) {
  std::int8_t v __attribute__((vector_size(lanes)));
  __builtin_memcpy(&v, w, sizeof(v));
  return __builtin_convertvector(v, Int);
}

constexpr bool pairs = false;
inline void add_pair(const std::int16_t*, const std::int16_t*, Int, Int&, Int&) {}
inline void settle(Int&, Int&) {}

inline Real multiply_add(Real a, double b, Real c) { return a * b + c; }

#include "cpu/kernels/generic.h"

}    // namespace

extern const KernelSet portable_kernels;
const KernelSet portable_kernels = make_kernel_set("portable", isa_portable);

}    // namespace qcfs::cpu
