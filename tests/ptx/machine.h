// Runs PTX in place of the emulated kernels: see machine.cpp.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "program.h"

namespace ptx {

// 32 threads that execute one instruction together, where they stand at the same one. Values lie by register, then
// lane, extended to 64 bits according to the type of the instruction that wrote them.
struct Warp {
  int rank, first_thread, first_number, lanes;    // in the cluster; in the block; in the cluster; at most 32
  std::vector<std::uint64_t> registers;
  std::array<std::size_t, warp_size> at;    // the next instruction of each lane
  Lanes running, at_whole_warp, at_block_barrier, at_cluster_barrier;
  bool products_fenced;    // wgmma.fence since the last wait

  std::uint64_t* values(int number) { return registers.data() + static_cast<std::size_t>(number) * warp_size; }
  int thread(int lane) const { return first_number + lane; }
};

template <typename F>
void for_each_lane(Lanes lanes, F&& f) {
  for (int lane = 0; lane < warp_size; ++lane) {
    if (lanes == all_lanes || (lanes >> lane & 1) != 0) f(lane);
  }
}

Memory& memory();
int cluster_blocks();

// A thread of the cluster under way, among those of the launch.
std::uint64_t launch_thread(int number);

// The lane for which the instruction is being executed, for messages.
void set_current_lane(int lane);

}    // namespace ptx
