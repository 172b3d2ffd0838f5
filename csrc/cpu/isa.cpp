// Detection only: compiled without instruction-set flags, so it runs on any processor.
#include "cpu/isa.h"

#include <cstddef>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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

// Linux hands out the tile registers on request (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA); the grant holds for the
// process and all threads that it starts.
bool tiles_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}    // namespace

std::uint32_t host_isa() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return isa_portable;
  const bool osxsave = bit(c, 27), fma = bit(c, 12), avx = bit(c, 28);
  if (!osxsave || !avx) return isa_portable;
  const std::uint64_t state = enabled_state();
  if ((state & 0x6) != 0x6) return isa_portable;    // XMM and YMM saved by the system
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return isa_portable;
  const std::uint32_t subleaves = a;
  std::uint32_t found = isa_portable;
  if (bit(b, 5) && fma) found |= isa_avx2;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);    // F, DQ, BW, VL
  if ((found & isa_avx2) && avx512 && (state & 0xe6) == 0xe6) {
    found |= isa_avx512;
    if (bit(c, 11)) found |= isa_avx512vnni;
    const bool tiles = bit(d, 24) && bit(d, 25) && (state & 0x60000) == 0x60000;    // AMX-TILE, AMX-INT8
    if (bit(c, 11) && tiles && tiles_permitted()) found |= isa_amx;
  }
  if ((found & isa_avx2) && subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 4)) {
    found |= isa_avxvnni;
  }
  return found;
}

#elif defined(__aarch64__)

std::uint32_t host_isa() {
#if defined(__linux__)
  constexpr unsigned long dot_product = 1ul << 20;    // HWCAP_ASIMDDP
  return isa_neon | ((getauxval(AT_HWCAP) & dot_product) != 0 ? isa_neondot : 0u);
#elif defined(__APPLE__)
  int found = 0;
  std::size_t size = sizeof(found);
  const bool known = sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0;
  return isa_neon | (known && found != 0 ? isa_neondot : 0u);
#else
  return isa_neon;
#endif
}

#else

std::uint32_t host_isa() { return isa_portable; }

#endif

}    // namespace qcfs::cpu
