#include "cuda/emulation/emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define QCFS_ASAN 1
#endif

namespace qcfs::cuda::emulation {

Index thread_index, block_index;
int capability = 90;
std::uint64_t schedule_seed = 1;
bool (*run_elsewhere)(const KernelLaunch&) = nullptr;

std::uint64_t random() {
  schedule_seed ^= schedule_seed << 13;
  schedule_seed ^= schedule_seed >> 7;
  schedule_seed ^= schedule_seed << 17;
  return schedule_seed;
}

namespace {

constexpr std::size_t stack_bytes = 256 * 1024;
constexpr int warp_size = 32;

enum class State { ready, at_collective, at_barrier, at_cluster_barrier, finished };

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
};

// Where a thread of execution stands.
struct Place {
  ucontext_t context;
  jmp_buf registers;
  bool begun = true;    // else `context` is its beginning
};

struct Fiber {
  Place place;
  int rank, thread;    // of its block in the cluster, and its own in the block
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* fake_stack = nullptr;
  State state = State::ready;
  Collective collective = nullptr;
  void* operands = nullptr;
  std::vector<std::vector<Copy>> groups;    // of copies: the last one is open
};

struct Free {
  void operator()(unsigned char* p) const { std::free(p); }
};

struct Block {
  Index index;
  std::unique_ptr<unsigned char, Free> shared;    // none after the last thread's end
  int running;                                    // threads
};

std::vector<std::unique_ptr<Fiber>> fibers;    // block after block
std::vector<Block> cluster;
Fiber* current = nullptr;
Place scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
const std::function<void()>* body = nullptr;
std::size_t shared_bytes = 0;

Block& block_of(const Fiber& f) { return cluster[static_cast<std::size_t>(f.rank)]; }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u %u %u)\n", what, block_index.x, block_index.y, block_index.z);
  std::abort();
}

void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom,
                  [[maybe_unused]] std::size_t size) {
#if defined(QCFS_ASAN)
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}

void finish_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom,
                   [[maybe_unused]] std::size_t* size) {
#if defined(QCFS_ASAN)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#endif
}

// Leaves `from`, where it comes back to, and goes on at `to`.
void go(Place& from, Place& to) {
#if defined(QCFS_ASAN)
  swapcontext(&from.context, &to.context);
#else    // without swapcontext's system call, which would take most of the time
  if (_setjmp(from.registers) != 0) return;
  if (to.begun) _longjmp(to.registers, 1);
  to.begun = true;
  setcontext(&to.context);
#endif
}

void yield(State state) {
  Fiber* self = current;
  self->state = state;
  start_switch(&self->fake_stack, scheduler_stack, scheduler_stack_bytes);
  go(self->place, scheduler);
  finish_switch(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void entry() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  current->state = State::finished;
  Block& block = block_of(*current);
  if (--block.running == 0) {
    std::memset(block.shared.get(), 0xa5, shared_bytes);
    block.shared.reset();
  }
  start_switch(nullptr, scheduler_stack, scheduler_stack_bytes);
  go(current->place, scheduler);
}

void resume(Fiber& f) {
  current = &f;
  thread_index = {static_cast<unsigned>(f.thread), 0, 0};
  block_index = block_of(f).index;
  start_switch(&scheduler_fake_stack, current->stack.get(), stack_bytes);
  go(scheduler, current->place);
  finish_switch(scheduler_fake_stack, nullptr, nullptr);
}

// Runs the lanes of one warp until all stand at a barrier or have finished.
void run_warp(std::size_t first, int lanes) {
  for (;;) {
    int collectives = 0, ready = 0;
    for (int i = 0; i < lanes; ++i) {
      Fiber& f = *fibers[first + static_cast<std::size_t>(i)];
      if (f.state == State::ready) resume(f);
      if (f.state == State::at_collective) ++collectives;
      if (f.state == State::ready) ++ready;
    }
    if (ready != 0) fail("a fiber yielded without a reason");
    if (collectives == 0) return;
    if (collectives != warp_size) fail("a warp instruction was not reached by all 32 lanes");
    void* operands[warp_size];
    Fiber& leader = *fibers[first];
    for (int i = 0; i < warp_size; ++i) {
      Fiber& f = *fibers[first + static_cast<std::size_t>(i)];
      if (f.collective != leader.collective) fail("the lanes of a warp execute different instructions");
      operands[i] = f.operands;
      f.state = State::ready;
    }
    leader.collective(operands);
  }
}

// Lets these fibers go on where all that still run wait at `barrier`. Returns whether there were any.
bool open_barrier(State barrier, std::size_t first, std::size_t count) {
  std::size_t waiting = 0, finished = 0;
  for (std::size_t i = first; i < first + count; ++i) {
    waiting += fibers[i]->state == barrier;
    finished += fibers[i]->state == State::finished;
  }
  if (waiting == 0 || waiting + finished != count) return false;
  if (barrier == State::at_barrier && finished != 0) return false;    // __syncthreads is for all threads of the block
  for (std::size_t i = first; i < first + count; ++i) {
    if (fibers[i]->state == barrier) fibers[i]->state = State::ready;
  }
  return true;
}

// Runs the blocks of a cluster side by side, each with `threads` threads.
void run_cluster(int threads) {
  const std::size_t block_fibers = static_cast<std::size_t>(threads), count = cluster.size() * block_fibers;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& f = *fibers[i];
    ucontext_t& beginning = f.place.context;
    getcontext(&beginning);
    beginning.uc_stack.ss_sp = f.stack.get();
    beginning.uc_stack.ss_size = stack_bytes;
    beginning.uc_link = nullptr;
    makecontext(&beginning, entry, 0);
    beginning.uc_stack.ss_size = 0;    // else ASan clears its notes about the whole stack at every switch
    f.place.begun = false;
    f.rank = static_cast<int>(i / block_fibers);
    f.thread = static_cast<int>(i % block_fibers);
    f.state = State::ready;
    f.groups.assign(1, {});
  }
  std::vector<std::size_t> warps;    // their first fibers
  for (std::size_t i = 0; i < count; ++i) {
    if (fibers[i]->thread % warp_size == 0) warps.push_back(i);
  }
  for (;;) {
    for (std::size_t w = warps.size(); w > 1; --w) std::swap(warps[w - 1], warps[random() % w]);
    for (const std::size_t first : warps) run_warp(first, std::min(threads - fibers[first]->thread, warp_size));
    bool opened = open_barrier(State::at_cluster_barrier, 0, count);
    for (std::size_t i = 0; i < count; i += block_fibers) {
      opened = open_barrier(State::at_barrier, i, block_fibers) || opened;
    }
    if (opened) continue;
    const auto finished = [](const Block& b) { return b.running == 0; };
    if (std::all_of(cluster.begin(), cluster.end(), finished)) return;
    fail("some threads wait at a barrier that others never reach");
  }
}

template <bool is_signed>
std::int32_t byte_of(std::uint32_t word, int i) {
  const std::uint32_t byte = word >> (8 * i) & 0xff;
  return is_signed ? static_cast<std::int8_t>(byte) : static_cast<std::int32_t>(byte);
}

void add_wrapping(std::int32_t& to, std::int64_t value) {
  to = static_cast<std::int32_t>(static_cast<std::uint32_t>(to) + static_cast<std::uint32_t>(value));
}

}    // namespace

unsigned char* shared_memory() { return block_of(*current).shared.get(); }

void barrier() { yield(State::at_barrier); }

void cluster_barrier() { yield(State::at_cluster_barrier); }

unsigned char* remote_shared(int rank) {
  if (rank < 0 || static_cast<std::size_t>(rank) >= cluster.size())
    fail("shared memory of a block outside the cluster");
  unsigned char* memory = cluster[static_cast<std::size_t>(rank)].shared.get();
  if (memory == nullptr) fail("shared memory of a block that has ended");
  return memory;
}

void collective(Collective execute, void* operands) {
  current->collective = execute;
  current->operands = operands;
  yield(State::at_collective);
}

namespace {
void execute(const Copy& c) {
  if (reinterpret_cast<std::uintptr_t>(c.to) % static_cast<unsigned>(c.bytes) != 0 ||
      reinterpret_cast<std::uintptr_t>(c.from) % static_cast<unsigned>(c.bytes) != 0) {
    fail("a misaligned asynchronous copy");
  }
  const auto offset = static_cast<std::size_t>(c.to - shared_memory());
  if (offset + static_cast<std::size_t>(c.bytes) > shared_bytes) fail("an asynchronous copy beyond shared memory");
  if (c.from == nullptr) {
    std::memset(c.to, 0, static_cast<std::size_t>(c.bytes));
  } else {
    std::memcpy(c.to, c.from, static_cast<std::size_t>(c.bytes));
  }
}
}    // namespace

void queue_copy(unsigned char* to, const void* from, int bytes) {
  const Copy c{to, from, bytes};
  if (capability < 80 || random() % 2 == 0) {
    execute(c);
  } else {
    current->groups.back().push_back(c);
  }
}

void commit_copies() { current->groups.emplace_back(); }

void wait_copies(int pending) {
  auto& groups = current->groups;
  while (groups.size() > static_cast<std::size_t>(pending) + 1) {
    for (const Copy& c : groups.front()) execute(c);
    groups.erase(groups.begin());
  }
}

void run_grid(Grid grid, int threads, std::size_t bytes, int cluster_blocks, const std::function<void()>& kernel) {
  if (grid.z % cluster_blocks != 0) fail("a grid that is no whole number of clusters");
  body = &kernel;
  shared_bytes = bytes;
  cluster.resize(static_cast<std::size_t>(cluster_blocks));
  for (std::int64_t z = 0; z < grid.z; z += cluster_blocks) {
    for (std::int64_t y = 0; y < grid.y; ++y) {
      for (std::int64_t x = 0; x < grid.x; ++x) {
        for (Block& block : cluster) {
          const auto rank = static_cast<unsigned>(&block - cluster.data());
          block.index = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z) + rank};
          block.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024)));
          std::memset(block.shared.get(), 0xa5, bytes);
          block.running = threads;
        }
        run_cluster(threads);
      }
    }
  }
  body = nullptr;
}

// ldmatrix .m8n8.x4 .b16: matrix i's row r is at the address lane 8*i + r gives; lane l receives of it, into register
// i, elements 2*(l%4) and 2*(l%4)+1 of row l/4.
void load_matrices(void* const* lanes) {
  for (int lane = 0; lane < warp_size; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const unsigned char* row = static_cast<const MatrixRows*>(lanes[8 * i + lane / 4])->row;
      const auto offset = static_cast<std::size_t>(row - shared_memory());
      if (offset % 16 != 0 || offset + 16 > shared_bytes)
        fail("ldmatrix reads a misaligned row or beyond shared memory");
      std::memcpy(static_cast<const MatrixRows*>(lanes[lane])->r + i, row + 4 * (lane % 4), 4);
    }
  }
}

// mma .m16n8k32, 8-bit operands, by the tables of the PTX manual. groupID = lane / 4, in = lane % 4:
//     a (16x32): element i: row = groupID (+ 8 for 4 <= i < 8 and i >= 12), col = 4*in + i%4 (+ 16 for i >= 8)
//     b (32x8):  element i: row = 4*in + i%4 (+ 16 for i >= 4), col = groupID
//     c (16x8):  element i: row = groupID (+ 8 for i >= 2), col = 2*in + i%2
template <bool is_signed>
void multiply_16x8x32(void* const* lanes) {
  std::int32_t a[16][32], b[32][8];
  for (int lane = 0; lane < warp_size; ++lane) {
    const auto& f = *static_cast<const Fragments*>(lanes[lane]);
    const int group = lane / 4, in = lane % 4;
    for (int i = 0; i < 16; ++i) {
      const int row = group + ((i >= 4 && i < 8) || i >= 12 ? 8 : 0);
      a[row][4 * in + i % 4 + (i >= 8 ? 16 : 0)] = byte_of<is_signed>(f.a[i / 4], i % 4);
    }
    for (int i = 0; i < 8; ++i) {
      b[4 * in + i % 4 + (i >= 4 ? 16 : 0)][group] = byte_of<true>(i < 4 ? f.b0 : f.b1, i % 4);
    }
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    std::int32_t* acc = static_cast<const Fragments*>(lanes[lane])->acc;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), col = 2 * (lane % 4) + i % 2;
      std::int64_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[row][k] * b[k][col];
      add_wrapping(acc[i], sum);
    }
  }
}

// mma .m8n8k16: a: row groupID, cols 4*in ..; b: rows 4*in .., col groupID; c: row groupID, cols 2*in, 2*in+1.
template <bool is_signed>
void multiply_8x8x16(void* const* lanes) {
  std::int32_t a[8][16], b[16][8];
  for (int lane = 0; lane < warp_size; ++lane) {
    const auto& f = *static_cast<const SmallFragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      a[lane / 4][4 * (lane % 4) + i] = byte_of<is_signed>(f.a, i);
      b[4 * (lane % 4) + i][lane / 4] = byte_of<true>(f.b, i);
    }
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    const auto& f = *static_cast<const SmallFragments*>(lanes[lane]);
    for (int i = 0; i < 2; ++i) {
      std::int64_t sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[lane / 4][k] * b[k][2 * (lane % 4) + i];
      add_wrapping(i == 0 ? *f.c0 : *f.c1, sum);
    }
  }
}

template void multiply_16x8x32<false>(void* const*);
template void multiply_16x8x32<true>(void* const*);
template void multiply_8x8x16<false>(void* const*);
template void multiply_8x8x16<true>(void* const*);

// wgmma .m64nNk32: a and acc as in mma .m16n8k32, for each warp its 16 rows; b by its descriptor.
void multiply_wgmma(void* const* lanes) {
  const auto& first = *static_cast<const WarpgroupFragments*>(lanes[0]);
  const auto field = [&](int low, int bits) {
    return static_cast<std::size_t>(first.descriptor >> low & ((std::uint64_t{1} << bits) - 1));
  };
  if (field(62, 2) != 2) fail("a descriptor with another swizzle than 64 bytes");
  const auto b = [&](std::size_t n, std::size_t k) {
    const std::size_t at = field(0, 14) * 16 + n / 8 * field(32, 14) * 16 + n % 8 * 64 + k;
    const std::size_t swizzled = at ^ (at >> 3 & 0x30);
    if (swizzled >= shared_bytes) fail("an asynchronous product reads beyond shared memory");
    return static_cast<std::int32_t>(static_cast<std::int8_t>(shared_memory()[swizzled]));
  };
  std::int32_t a[16][32];
  for (int lane = 0; lane < warp_size; ++lane) {
    const auto& f = *static_cast<const WarpgroupFragments*>(lanes[lane]);
    if (f.descriptor != first.descriptor) fail("the lanes of a warp have different descriptors");
    for (int i = 0; i < 16; ++i) {
      const int row = lane / 4 + ((i >= 4 && i < 8) || i >= 12 ? 8 : 0);
      a[row][4 * (lane % 4) + i % 4 + (i >= 8 ? 16 : 0)] = byte_of<false>(f.a[i / 4], i % 4);
    }
  }
  for (int fragment = 0; fragment < first.fragments; ++fragment) {
    std::int32_t weights[32][8];
    for (int k = 0; k < 32; ++k) {
      for (int n = 0; n < 8; ++n)
        weights[k][n] = b(static_cast<std::size_t>(8 * fragment + n), static_cast<std::size_t>(k));
    }
    for (int lane = 0; lane < warp_size; ++lane) {
      std::int32_t* acc = static_cast<const WarpgroupFragments*>(lanes[lane])->acc[fragment];
      for (int i = 0; i < 4; ++i) {
        std::int64_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += a[lane / 4 + (i >= 2 ? 8 : 0)][k] * weights[k][2 * (lane % 4) + i % 2];
        add_wrapping(acc[i], sum);
      }
    }
  }
}

void meet(void* const*) {}

void largest(void* const* lanes) {
  std::uint32_t most = 0;
  for (int lane = 0; lane < warp_size; ++lane) most = std::max(most, *static_cast<const std::uint32_t*>(lanes[lane]));
  for (int lane = 0; lane < warp_size; ++lane) *static_cast<std::uint32_t*>(lanes[lane]) = most;
}

}    // namespace qcfs::cuda::emulation
