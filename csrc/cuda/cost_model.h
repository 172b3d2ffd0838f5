// Which tile and split of K a spiking layer gets: an estimate of the cycles of every candidate, of which the least is
// taken. Host code only, the same for the device build and the emulation. It never changes a result, only how long it
// takes.
//
// Estimated cycles of one launch, per streaming multiprocessor (SM), on which up to `together` blocks run at once:
//
//     busy   = max(BM * BN * 64 * T / macs, (BM + BN) * 64 / l2_bytes)
//     stage  = max(together * busy, BM * BN * 64 * T / macs + stage_latency)
//     round  = digits * stages / splits * stage + block_overhead
//     layer  = the rounds that blocks / SMs take
//              + split K: in a cluster cluster_overhead; else second_launch, and the partial sums at memory_bytes
//
// A block that has an SM for itself pays the latency of every stage: the wait, the barrier, ldmatrix, the first
// product. `macs` are the int8 multiply-adds that mma.sync does in a cycle on an SM. Rates come from data sheets and
// latencies are estimates; none is measured.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace qcfs::cuda {

struct Device {
  int multiprocessors;
  int capability;      // 10 * major + minor
  int shared_bytes;    // per block, opt-in limit
  int max_cluster;     // blocks of a thread-block cluster: 1 where there are none, 8 at most
  bool dependent;      // launches may begin before the one before has ended
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
  int splits;                     // of K, each a block for every tile
  int slices;                     // partial sums of an output that a second kernel adds: `splits`, or 0 when fused
  std::int64_t membrane_bytes;    // and what else a neuron carries from launch to launch
  std::int64_t partial_bytes;
  std::int64_t workspace_bytes() const { return membrane_bytes + partial_bytes; }
  // Blocks of a cluster: the splits that share a tile without a second kernel.
  int cluster() const { return slices == 0 ? splits : 1; }
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

// Words from a row of accumulators of `cols` channels in shared memory to the next: padded so that the pairs which half
// a warp stores fall into different banks.
constexpr int currents_row(int cols) { return cols == 8 ? 8 : cols + 8; }

// The pipeline's; blocks of a cluster need room for their accumulators too.
constexpr std::size_t shared_bytes(const TileShape& s, int T, bool cluster) {
  const int pipeline = s.stages * (s.rows * s.a_planes + s.cols) * stage_bytes;
  const int currents = cluster ? T * s.rows * currents_row(s.cols) * 4 : 0;
  return static_cast<std::size_t>(pipeline > currents ? pipeline : currents);
}

constexpr int resident = 2;    // blocks on an SM: what registers allow the widest tiles

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Per cycle and SM: bytes that the L2 cache gives, and bytes that partial sums go to memory with.
constexpr double l2_bytes = 24, memory_bytes = 16;
// Cycles: of a stage until its first product has begun; of a block outside of its stages (launch, filling the pipeline,
// epilogue); of a cluster's two barriers and of reading other blocks' sums; of launching a second kernel.
constexpr double stage_latency = 120, block_overhead = 3000, cluster_overhead = 1500, second_launch = 7000;

struct Rates {
  double macs;         // int8 multiply-adds of a cycle and SM
  int shared_on_sm;    // KiB of shared memory
};
constexpr Rates rates(int capability) {
  switch (capability) {
    case 75:
      return {1024, 64};
    case 86:
    case 89:
    case 120:
      return {1024, 100};
    case 90:
      return {2560, 228};    // of 4096; mma.sync does not reach wgmma's rate
    case 80:
      return {2048, 164};
    default:
      return {2048, 228};
  }
}

struct Work {
  std::int64_t pixels, out_channels, stages, steps;
  int digits;
  bool counts;
  bool any_width;    // rows that are not whole 16-byte pieces: only the small tile and that of counts take them
};

// Blocks that an SM holds at once, by registers (about 36 and 1.5 for each accumulator) and shared memory.
constexpr int together(const TileShape& s, int T, bool cluster, int capability) {
  const int accumulators = s.row_parts * s.cols / 2 * T;
  const int by_registers = 65536 / (32 * s.warps * (36 + accumulators * 3 / 2));
  const int by_memory = rates(capability).shared_on_sm * 1024 / (static_cast<int>(shared_bytes(s, T, cluster)) + 1024);
  const int blocks = by_registers < by_memory ? by_registers : by_memory;
  return blocks > 1 ? blocks : 1;
}

inline double estimate_cycles(const Work& w, const Device& d, TileKind tile, int splits, bool cluster) {
  const int T = compiled_steps(w.steps);
  const TileShape s = tile_shape(T, tile);
  // A block cannot use all four tensor units unless it has at least four warps.
  const double product = static_cast<double>(s.rows) * s.cols * stage_bytes * T / rates(d.capability).macs;
  const double alone = product * (s.warps < 4 ? 4.0 / s.warps : 1.0) + stage_latency;
  const double traffic = static_cast<double>(s.rows * s.a_planes + s.cols) * stage_bytes / l2_bytes;
  const double stages = static_cast<double>(w.digits * ceil_div(w.stages, splits));
  const auto round = [&](double blocks) {
    const double shared = blocks * (product > traffic ? product : traffic);
    return stages * (shared > alone ? shared : alone) + block_overhead;
  };
  const std::int64_t blocks = ceil_div(w.pixels, s.rows) * ceil_div(w.out_channels, s.cols) * splits;
  const std::int64_t on_sm = ceil_div(blocks, d.multiprocessors), most = together(s, T, cluster, d.capability);
  double cycles = static_cast<double>(on_sm / most) * round(static_cast<double>(most));
  if (on_sm % most != 0) cycles += round(static_cast<double>(on_sm % most));
  if (cluster) return cycles + cluster_overhead;
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
  bool cluster;
};

inline Choice choose_tile(const Work& w, const Device& d) {
  Choice best{w.counts ? TileKind::counts : TileKind::small, 1, false};
  const int T = compiled_steps(w.steps);
  double least = -1;
  for (const TileKind tile : {TileKind::wide, TileKind::small, TileKind::counts}) {
    // At one step a count plane is loaded as a mask plane is, so every tile serves.
    if (T > 1 && (tile == TileKind::counts) != w.counts) continue;
    if (T == 1 && tile == TileKind::counts) continue;
    if (tile == TileKind::wide && w.any_width) continue;
    for (const int splits : split_choices) {
      const bool cluster = splits > 1 && d.max_cluster > 1;
      const std::int64_t share = ceil_div(w.stages, splits);
      if (splits * 2 > w.stages && splits > 1) break;
      if (cluster && (splits > d.max_cluster || (splits & (splits - 1)) != 0)) continue;
      if ((splits - 1) * share >= w.stages) continue;    // one would be empty
      if (!cluster && splits > 1 && splits * w.pixels * w.out_channels * w.steps * 4 > max_partial_bytes) break;
      if (shared_bytes(tile_shape(T, tile), T, cluster) > static_cast<std::size_t>(d.shared_bytes)) continue;
      const double cycles = estimate_cycles(w, d, tile, splits, cluster);
      if (least < 0 || cycles < least) {
        least = cycles;
        best = {tile, splits, cluster};
      }
    }
  }
  return best;
}

}    // namespace qcfs::cuda
