// Runs PTX that nvcc wrote, in place of the emulated kernels: the launches of csrc/cuda come here, and the kernels that
// the files of QCFS_PTX (paths, separated by colons) hold are executed instruction by instruction. All others stay with
// the emulation, which runs their C++.
//
// A warp executes the instruction of the lanes that are furthest behind, for all lanes that stand there. So lanes that
// went different ways meet again where their ways join, and an instruction of the whole warp waits for all 32. Between
// barriers the warps of a cluster run one after the other in an order drawn from the schedule's seed. That order hides
// no race: memory.h compares every access by the barriers between, not by what happened to come first.
#include "machine.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>

#include "cuda/emulation/emulation.h"
#include "layers.h"

namespace ptx {

namespace {

using qcfs::cuda::emulation::KernelLaunch;

std::map<std::string, Kernel> kernels;
Memory device_memory;

// The launch, cluster and instruction under way.
const KernelLaunch* launch = nullptr;
const Kernel* kernel = nullptr;
std::array<std::uint32_t, 3> first_block;    // of the cluster
std::vector<Warp> warps;
const Warp* current_warp = nullptr;
const Instruction* current_instruction = nullptr;
int current_lane = 0;

struct Counts {
  long long launches = 0, others = 0, instructions = 0;
  ~Counts() {
    if (kernels.empty()) return;
    std::printf("ptx_launches %lld emulated_launches %lld ptx_instructions %lld checked_bytes %zu\n", launches, others,
                instructions, device_memory.checked_bytes);
  }
} counts;

std::array<std::uint32_t, 3> block_of(const Warp& w) {
  return {first_block[0], first_block[1], first_block[2] + static_cast<std::uint32_t>(w.rank)};
}

// --------------------------------------------------------------------------------------------------------- one warp

std::uint64_t special_value(const std::string& name, const Warp& w, int lane, const unsigned char* parameters) {
  const auto block = block_of(w);
  if (name == "parameters") return reinterpret_cast<std::uint64_t>(parameters);
  if (name == "%tid.x") return static_cast<std::uint64_t>(w.first_thread + lane);
  if (name == "%ntid.x") return static_cast<std::uint64_t>(launch->threads);
  if (name == "%ctaid.x") return block[0];
  if (name == "%ctaid.y") return block[1];
  if (name == "%ctaid.z") return block[2];
  if (name == "%nctaid.x") return static_cast<std::uint64_t>(launch->grid.x);
  if (name == "%nctaid.y") return static_cast<std::uint64_t>(launch->grid.y);
  if (name == "%nctaid.z") return static_cast<std::uint64_t>(launch->grid.z);
  if (name == "%cluster_ctarank") return static_cast<std::uint64_t>(w.rank);
  if (name == "%cluster_nctarank") return static_cast<std::uint64_t>(cluster_blocks());
  layers::fail(kernel->name + ": a special register that the PTX machine does not know: " + name);
}

void begin(Warp& w, const unsigned char* parameters) {
  w.registers.resize(static_cast<std::size_t>(kernel->registers) * warp_size);
  for (const auto& [number, value] : kernel->constants) std::fill_n(w.values(number), warp_size, value);
  for (const auto& [name, number] : kernel->special) {
    for (int lane = 0; lane < warp_size; ++lane) w.values(number)[lane] = special_value(name, w, lane, parameters);
  }
  w.at.fill(0);
  w.running = w.lanes == warp_size ? all_lanes : (Lanes{1} << w.lanes) - 1;
  w.at_whole_warp = w.at_block_barrier = w.at_cluster_barrier = 0;
  w.products_fenced = false;
}

void advance(Warp& w, Lanes lanes) {
  for_each_lane(lanes, [&](int lane) { ++w.at[static_cast<std::size_t>(lane)]; });
}

// Moves the lanes past an instruction that they have all reached, and executes it.
void execute_whole_warp(Warp& w, const Instruction& i) {
  if (w.at_whole_warp != all_lanes) fail("an instruction of the whole warp that not all 32 lanes reach");
  for (const std::size_t at : w.at) {
    if (at != w.at[0]) fail("the lanes of a warp stand at different instructions of the whole warp");
  }
  i.meaning(w, i, all_lanes);
  advance(w, all_lanes);
  w.at_whole_warp = 0;
  w.running = all_lanes;
}

// Lanes that stand at the lowest instruction, as far as nobody else comes into their way.
void execute_group(Warp& w) {
  constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
  std::size_t at = none, others = none;    // the group's instruction; the lowest of the other lanes
  Lanes group = 0;
  for_each_lane(w.running, [&](int lane) {
    const std::size_t own = w.at[static_cast<std::size_t>(lane)];
    if (own < at) {
      others = at;
      at = own;
      group = 0;
    }
    if (own == at) group |= Lanes{1} << lane;
    if (own > at) others = std::min(others, own);
  });
  const auto leave = [&] { for_each_lane(group, [&](int lane) { w.at[static_cast<std::size_t>(lane)] = at; }); };
  for (; at < others; ++at) {
    const Instruction& i = kernel->code.at(at);
    current_instruction = &i;
    Lanes active = group;
    if (i.guard >= 0) {
      const std::uint64_t* guard = w.values(i.guard);
      active = 0;
      for_each_lane(group, [&](int lane) { active |= Lanes{(guard[lane] != 0) == i.guard_value} << lane; });
    }
    ++counts.instructions;
    if (active == 0) continue;
    switch (i.flow) {
      case Flow::next:
        i.meaning(w, i, active);
        break;
      case Flow::branch:
        leave();
        advance(w, group & ~active);
        for_each_lane(active, [&](int lane) { w.at[static_cast<std::size_t>(lane)] = i.target; });
        return;
      case Flow::exit:
        leave();
        advance(w, group & ~active);
        w.running &= ~active;
        return;
      default:
        if (active != group) fail("a guarded instruction of the whole warp, or barrier, that not all lanes execute");
        leave();
        w.running &= ~group;
        (i.flow == Flow::whole_warp      ? w.at_whole_warp
         : i.flow == Flow::block_barrier ? w.at_block_barrier
                                         : w.at_cluster_barrier) |= group;
        return;
    }
  }
  leave();
}

// Until every lane waits at a barrier or has ended.
void run(Warp& w) {
  current_warp = &w;
  for (;;) {
    while (w.running != 0) execute_group(w);
    if (w.at_whole_warp == 0) return;
    int lane = 0;
    while ((w.at_whole_warp >> lane & 1) == 0) ++lane;
    current_instruction = &kernel->code.at(w.at[static_cast<std::size_t>(lane)]);
    execute_whole_warp(w, *current_instruction);
  }
}

// ------------------------------------------------------------------------------------------------------ a cluster

bool has_ended(const Warp& w) { return (w.running | w.at_block_barrier | w.at_cluster_barrier) == 0; }

// Lets the warps of a block go on where all of its threads have come to bar.sync.
bool open_block_barrier(int rank) {
  for (const Warp& w : warps) {
    if (w.rank == rank && static_cast<int>(__builtin_popcount(w.at_block_barrier)) != w.lanes) return false;
  }
  for (Warp& w : warps) {
    if (w.rank != rank) continue;
    current_warp = &w;
    for_each_lane(w.at_block_barrier, [&](int lane) {
      if (w.at[static_cast<std::size_t>(lane)] != w.at[0]) fail("the lanes of a warp stand at different barriers");
    });
    for_each_lane(w.at_block_barrier, [&](int lane) {
      Thread& t = memory().thread(w.thread(lane));
      ++t.barriers;
      t.fences_at_barrier = t.fences;
    });
    advance(w, w.at_block_barrier);
    w.running = w.at_block_barrier;
    w.at_block_barrier = 0;
  }
  return true;
}

// Likewise barrier.cluster.wait, for all threads of the cluster that still run.
bool open_cluster_barrier() {
  bool any = false;
  for (const Warp& w : warps) {
    if ((w.running | w.at_block_barrier) != 0) return false;
    any |= w.at_cluster_barrier != 0;
  }
  for (Warp& w : warps) {
    for_each_lane(w.at_cluster_barrier, [&](int lane) {
      Thread& t = memory().thread(w.thread(lane));
      current_warp = &w;
      current_lane = lane;
      if (t.arrivals != ++t.waits) fail("barrier.cluster.wait without one barrier.cluster.arrive before it");
    });
    advance(w, w.at_cluster_barrier);
    w.running = w.at_cluster_barrier;
    w.at_cluster_barrier = 0;
  }
  return any;
}

void run_cluster(const unsigned char* parameters) {
  memory().begin_cluster(cluster_blocks(), launch->threads, launch->shared);
  for (Warp& w : warps) begin(w, parameters);
  std::vector<Warp*> order;
  for (Warp& w : warps) order.push_back(&w);
  for (;;) {
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[qcfs::cuda::emulation::random() % i]);
    for (Warp* w : order) {
      run(*w);
      const auto left_or_ended = [&](const Warp& other) { return other.rank != w->rank || has_ended(other); };
      if (std::all_of(warps.begin(), warps.end(), left_or_ended)) memory().end_block(w->rank);
    }
    bool opened = open_cluster_barrier();
    for (int rank = 0; rank < cluster_blocks(); ++rank) opened = open_block_barrier(rank) || opened;
    if (opened) continue;
    if (std::all_of(warps.begin(), warps.end(), has_ended)) return;
    fail("some threads wait at a barrier that others never reach");
  }
}

// -------------------------------------------------------------------------------------------------------- launches

void run_grid() {
  // A heap block of the parameter's size and no more: AddressSanitizer sees its end.
  const std::unique_ptr<unsigned char[]> parameters(new unsigned char[launch->parameter_bytes]);
  std::memcpy(parameters.get(), launch->parameters, launch->parameter_bytes);
  if (launch->grid.z % cluster_blocks() != 0) layers::fail("a grid that is no whole number of clusters");
  warps.clear();
  for (int rank = 0; rank < cluster_blocks(); ++rank) {
    for (int first = 0; first < launch->threads; first += warp_size) {
      Warp w{};
      w.rank = rank;
      w.first_thread = first;
      w.first_number = rank * launch->threads + first;
      w.lanes = std::min(launch->threads - first, warp_size);
      warps.push_back(std::move(w));
    }
  }
  for (std::int64_t z = 0; z < launch->grid.z; z += cluster_blocks()) {
    for (std::int64_t y = 0; y < launch->grid.y; ++y) {
      for (std::int64_t x = 0; x < launch->grid.x; ++x) {
        first_block = {static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y), static_cast<std::uint32_t>(z)};
        run_cluster(parameters.get());
      }
    }
  }
}

// Returns whether the kernel's PTX is at hand, and has run.
bool run_launch(const KernelLaunch& l) {
  memory().begin_launch(l.options.dependent);
  Dl_info info{};
  if (dladdr(l.kernel, &info) == 0 || info.dli_sname == nullptr)
    layers::fail("a kernel that has no name for the linker; it must not be static");
  const auto entry = kernels.find(info.dli_sname);
  if (entry == kernels.end()) {
    ++counts.others;
    return false;
  }
  launch = &l;
  kernel = &entry->second;
  if (kernel->parameter_bytes != l.parameter_bytes) layers::fail(kernel->name + ": the host has another parameter");
  ++counts.launches;
  run_grid();
  return true;
}

const bool installed = [] {
  const char* paths = std::getenv("QCFS_PTX");
  if (paths == nullptr) return false;
  std::stringstream list(paths);
  for (std::string path; std::getline(list, path, ':');) {
    for (Kernel& k : read_kernels(path)) kernels[k.name] = std::move(k);
  }
  qcfs::cuda::emulation::run_elsewhere = run_launch;
  return true;
}();

}    // namespace

Memory& memory() { return device_memory; }

int cluster_blocks() { return launch->options.cluster; }

std::uint64_t launch_thread(int number) {
  const auto rank = static_cast<std::uint64_t>(number / launch->threads);
  const auto x = static_cast<std::uint64_t>(launch->grid.x), y = static_cast<std::uint64_t>(launch->grid.y);
  const std::uint64_t block = ((first_block[2] + rank) * y + first_block[1]) * x + first_block[0];
  return block * static_cast<std::uint64_t>(launch->threads) + static_cast<std::uint64_t>(number % launch->threads);
}

void set_current_lane(int lane) { current_lane = lane; }

void fail(const std::string& what) {
  const auto block = block_of(*current_warp);
  layers::fail("PTX: " + what + "\n  at line " + std::to_string(current_instruction->line) + ", " +
               current_instruction->text + "\n  thread " + std::to_string(current_warp->first_thread + current_lane) +
               " of block " + std::to_string(block[0]) + " " + std::to_string(block[1]) + " " +
               std::to_string(block[2]) + ", " + kernel->name);
}

}    // namespace ptx
