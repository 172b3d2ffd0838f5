// The kernel sets of this build, best first, and the choice among them. CMake defines QCFS_SET_.. for those that the
// processor family has and the compiler knows.
#include "cpu/cpu.h"
#include "cpu/kernel_set.h"

namespace qcfs::cpu {
namespace {

const KernelSet* const kernel_sets[] = {
#if defined(QCFS_SET_AMX)
    &amx_kernels,
#endif
#if defined(QCFS_SET_AVX512VNNI)
    &avx512vnni_kernels,
#endif
#if defined(QCFS_SET_AVX512)
    &avx512_kernels,
#endif
#if defined(QCFS_SET_AVXVNNI)
    &avxvnni_kernels,
#endif
#if defined(QCFS_SET_AVX2)
    &avx2_kernels,
#endif
#if defined(QCFS_SET_NEONDOT)
    &neondot_kernels,
#endif
    &portable_kernels,
};

}    // namespace

const KernelSet& choose(std::uint32_t isa) {
  for (const KernelSet* k : kernel_sets) {
    if ((k->isa & ~isa) == 0) return *k;
  }
  return portable_kernels;    // needs nothing: never reached
}

int kernel_set_count() { return static_cast<int>(sizeof(kernel_sets) / sizeof(kernel_sets[0])); }
const char* kernel_set_name(int index) { return kernel_sets[index]->name; }
std::uint32_t kernel_set_isa(int index) { return kernel_sets[index]->isa; }
const char* chosen_kernel_set(std::uint32_t isa) { return choose(isa).name; }

}    // namespace qcfs::cpu
