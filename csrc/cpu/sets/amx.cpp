// AMX tiles for dense layers, AVX-512 with VNNI for the rest.
//
// With QCFS_EMULATE_TILES the tile instructions are plain loops over arrays, so that tests run these kernels on
// machines without AMX; everything but the instructions is the same.
#include "cpu/dense/dense_tiles.h"
#include "cpu/isa.h"
#include "cpu/sets/generic.h"
#include "cpu/sets/x86_512_vnni.h"

#if defined(QCFS_EMULATE_TILES)
#include "cpu/sets/tile_emulation.h"
#endif

namespace qcfs::cpu {
namespace {

#if !defined(QCFS_EMULATE_TILES)

// Palette 1, eight tiles of 16 rows of 64 bytes. In constant storage: compilers may think that the instruction reads
// eight bytes only and drop stores to the rest.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfiguration tile_configuration;

// In assembly, because GCC's intrinsics take the tile as a literal, not as a template parameter. A load does not say
// which memory it reads: TileBlock::multiply begins with a barrier for the compiler.
struct Tiles {
  static void configure() { _tile_loadconfig(&tile_configuration); }
  static void release() { _tile_release(); }

  template <int tile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride));
  }
  template <int tile>
  static void store(void* to, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
  }
  // Adds positions (16 x 64 unsigned bytes) times weights (64 x 16 signed bytes) to sums (16 x 16 int32).
  template <int sums, int positions, int weights>
  static void dot() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(positions), "i"(weights));
  }
};

#endif

struct Amx : X86Vectors512Vnni {
  using DenseBlock = TileBlock<Tiles>;
};

}    // namespace

constexpr KernelSet amx_kernels = make_kernel_set<Amx>("amx", isa_avx2 | isa_avx512 | isa_avx512vnni | isa_amx);

}    // namespace qcfs::cpu
