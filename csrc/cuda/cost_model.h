// Which tile and split of K a spiking layer gets: an estimate of the cycles of every candidate, of which the least is
// taken. Host code only, the same for the device build and the emulation. It never changes a result, only how long it
// takes.
//
// Estimated cycles of one launch, per streaming multiprocessor (SM):
//
//     block  = digits * stages / splits * max(BM * BN * 64 * T / macs, (BM + BN) * 64 / l2_bytes) + block_overhead
//     layer  = ceil(blocks / (SMs * resident)) * resident * block
//              + split-K: second_launch, and its partial sums over memory_bytes a cycle and SM
//
// `macs` are the int8 multiply-adds that mma.sync does in a cycle on an SM. Rates come from data sheets and overheads
// are estimates; none is measured.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace qcfs::cuda {

struct Device {
  int multiprocessors;
  int capability;      // 10 * major + minor
  int shared_bytes;    // per block, opt-in limit
  int code;            // what the loaded kernels were compiled for: 80 where a 9.0 GPU translates PTX of compute_80
};

enum class Path : int { direct = 0, tensor_cores = 1 };

// `wide`: for layers with enough work to fill the GPU; `small`: for the others; `counts`: for layers some input of
// which is count planes, T of them in shared memory.
enum class TileKind : int { wide = 0, small = 1, counts = 2 };

struct TileShape {
  int rows, cols;    // output pixels and channels of a block
  int warps;         // all along the pixels
  int row_parts;     // 16-row fragments of a warp
  int stages;        // of the copy pipeline
  int a_planes;      // byte planes of the input tile
};

struct Plan {
  Path path;
  TileKind tile;
  int splits;                     // of K; more than one: partial sums, then a second kernel
  int slices;                     // partial sums per output: `splits`, or 0 when fused
  std::int64_t membrane_bytes;    // and what else a neuron carries from launch to launch
  std::int64_t partial_bytes;
  std::int64_t workspace_bytes() const { return membrane_bytes + partial_bytes; }
};

constexpr int stage_bytes = 64;    // of K in one pipeline stage
constexpr int piece_bytes = 16;    // one asynchronous copy: channels of one tap are padded to this

// T of the kernel for a launch of `steps` <= 8 steps: kernels are compiled for powers of two, so some of T may be
// unused.
constexpr int compiled_steps(std::int64_t steps) { return steps > 4 ? 8 : steps > 2 ? 4 : steps > 1 ? 2 : 1; }

// The accumulators, row_parts * cols/8 * T * 4 registers a thread, are 128 at most.
constexpr TileShape tile_shape(int T, TileKind tile) {
  if (tile == TileKind::small) {
    return T == 8 ? TileShape{64, 16, 4, 1, 4, 1} : TileShape{64, 32, 4, 1, 4, 1};
  }
  if (tile == TileKind::counts && T > 1) {
    if (T == 8) return {32, 32, 2, 1, 3, 8};
    if (T == 4) return {64, 64, 4, 1, 3, 4};
    return {128, 64, 4, 2, 3, 2};
  }
  if (T == 8) return {64, 32, 4, 1, 4, 1};
  if (T == 4) return {64, 64, 4, 1, 4, 1};
  return {128, 64, 4, 2, 4, 1};
}

constexpr std::size_t tile_shared_bytes(const TileShape& s) {
  return static_cast<std::size_t>(s.stages) * static_cast<std::size_t>(s.rows * s.a_planes + s.cols) * stage_bytes;
}

constexpr int resident = 2;    // blocks on an SM: what registers allow the widest tiles

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Per cycle and SM: bytes that the L2 cache gives, and bytes that partial sums go to memory with.
constexpr double l2_bytes = 32, memory_bytes = 16;
// Cycles: filling the pipeline and the epilogue of a block; launching the second kernel of a split K.
constexpr double block_overhead = 1500, second_launch = 4000;

inline double macs_per_cycle(int capability) {
  switch (capability) {
    case 75:
    case 86:
    case 89:
    case 120:
      return 1024;
    case 90:
      return 2560;    // of 4096; mma.sync does not reach wgmma's rate
    default:
      return 2048;
  }
}

struct Work {
  std::int64_t pixels, out_channels, stages, steps;
  int digits;
  bool counts;
};

inline double estimate_cycles(const Work& w, const Device& d, TileKind tile, int splits) {
  const int T = compiled_steps(w.steps);
  const TileShape s = tile_shape(T, tile);
  const double tile_macs = static_cast<double>(s.rows) * s.cols * stage_bytes * T;
  const double product = tile_macs / macs_per_cycle(d.capability);
  const double traffic = static_cast<double>(s.rows * s.a_planes + s.cols) * stage_bytes / l2_bytes;
  // A block alone on an SM cannot use all four tensor units unless it has at least four warps.
  const double sharing = s.warps >= 4 ? 1.0 : 4.0 / s.warps / resident;
  const double block =
      static_cast<double>(w.digits * ceil_div(w.stages, splits)) * (product > traffic ? product : traffic) * sharing +
      block_overhead;
  const std::int64_t blocks = ceil_div(w.pixels, s.rows) * ceil_div(w.out_channels, s.cols) * splits;
  const std::int64_t on_sm = ceil_div(blocks, d.multiprocessors);
  const std::int64_t waves = on_sm <= resident ? on_sm : ceil_div(on_sm, resident) * resident;
  double cycles = static_cast<double>(waves) * block;
  if (splits > 1) {
    const double partial = 8.0 * static_cast<double>(w.pixels * w.out_channels * w.steps * splits);
    cycles += second_launch + partial / (memory_bytes * d.multiprocessors);
  }
  return cycles;
}

constexpr int split_choices[] = {1, 2, 3, 4, 6, 8, 12, 16};
constexpr std::int64_t max_partial_bytes = std::int64_t{64} << 20;

struct Choice {
  TileKind tile;
  int splits;
};

inline Choice choose_tile(const Work& w, const Device& d) {
  Choice best{w.counts ? TileKind::counts : TileKind::small, 1};
  double least = -1;
  for (const TileKind tile : {TileKind::wide, TileKind::small, TileKind::counts}) {
    const int T = compiled_steps(w.steps);
    // At one step a count plane is loaded as a mask plane is, so every tile serves.
    if (T > 1 && (tile == TileKind::counts) != w.counts) continue;
    if (T == 1 && tile == TileKind::counts) continue;
    if (tile_shared_bytes(tile_shape(T, tile)) > static_cast<std::size_t>(d.shared_bytes)) continue;
    for (const int splits : split_choices) {
      if (splits > 1 &&
          (splits * 2 > w.stages || splits * w.pixels * w.out_channels * w.steps * 4 > max_partial_bytes)) {
        break;
      }
      const double cycles = estimate_cycles(w, d, tile, splits);
      if (least < 0 || cycles < least) {
        least = cycles;
        best = {tile, splits};
      }
    }
  }
  return best;
}

}    // namespace qcfs::cuda
