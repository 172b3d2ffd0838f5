// Detection only: compiled without instruction-set flags, so it runs on any processor.
#include "cpu/isa.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace qcfs::cpu {

#if defined(__x86_64__) || defined(__i386__)

namespace {

std::uint64_t enabled_state() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

bool bit(std::uint32_t word, int index) { return (word >> index) & 1u; }

}    // namespace

std::uint32_t host_isa() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return isa_portable;
  const bool osxsave = bit(c, 27), fma = bit(c, 12), avx = bit(c, 28);
  if (!osxsave || !avx) return isa_portable;
  const std::uint64_t state = enabled_state();
  if ((state & 0x6) != 0x6) return isa_portable;    // XMM and YMM saved by the system
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return isa_portable;
  std::uint32_t found = isa_portable;
  if (bit(b, 5) && fma) found |= isa_avx2;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);    // F, DQ, BW, VL
  if ((found & isa_avx2) && avx512 && (state & 0xe6) == 0xe6) found |= isa_avx512;
  return found;
}

#elif defined(__aarch64__)

std::uint32_t host_isa() { return isa_neon; }

#else

std::uint32_t host_isa() { return isa_portable; }

#endif

}    // namespace qcfs::cpu
