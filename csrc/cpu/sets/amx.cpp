// AMX tiles for dense layers, AVX-512 with VNNI for the rest.
//
// With QCFS_EMULATE_TILES the tile instructions are plain loops over arrays, so that tests run these kernels on
// machines without AMX; everything but the instructions is the same.
#define QCFS_VNNI
#define QCFS_TILES
#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/kernel_set.h"

namespace qcfs::cpu {
namespace {

#if defined(QCFS_EMULATE_TILES)

#include "cpu/sets/tile_emulation.h"

#else

// Palette 1, eight tiles of 16 rows of 64 bytes. In constant storage: compilers may think that the instruction reads
// eight bytes only and drop stores to the rest.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfiguration tile_configuration;

#define TILE_CONFIGURE() _tile_loadconfig(&tile_configuration)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_DOT(sums, positions, weights) _tile_dpbusd(sums, positions, weights)

#endif

#include "cpu/sets/x86_512.h"

}    // namespace

const KernelSet amx_kernels = make_kernel_set("amx", isa_avx2 | isa_avx512 | isa_avx512vnni | isa_amx);

}    // namespace qcfs::cpu
