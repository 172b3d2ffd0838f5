// The CUDA programming model on one CPU thread, enough to run this backend's kernels unchanged: index arithmetic,
// barriers, shared memory, asynchronous copies, warp instructions.
//
//     CUDA thread     a fiber (ucontext) with its own stack
//     __syncthreads   the fiber yields; a block goes on when all its fibers have arrived
//     warp collective ldmatrix and mma: every lane leaves its operands and yields; when all 32 have arrived one of
//                     them executes for all, by the fragment tables of the PTX manual
//     shared memory   a heap block of exactly the launch's size (ASan sees its ends), filled with garbage
//     cluster         its blocks run side by side; a block's shared memory goes when the block ends
//     cp.async        executed either at once or by the wait that guarantees it, drawn from a seed: a missing wait
//                     reads garbage, a slot of the pipeline filled too early is overwritten while it is read
//
// Between barriers the warps of a cluster run one after the other in an order drawn from the seed, so that a missing
// barrier shows as wrong data in some order. Memory operands are plain host memory.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda/device.h"    // which includes this file at its end

#define QCFS_DEVICE inline
#define QCFS_UNROLL
#define QCFS_ROLLED
#define QCFS_SHARED(name) unsigned char* const name = ::qcfs::cuda::emulation::shared_memory()
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace qcfs::cuda {

struct Grid {
  std::int64_t x, y = 1, z = 1;
};

namespace emulation {

struct Index {
  unsigned x, y, z;
};
extern Index thread_index, block_index;

// Architecture to imitate: below 80 mma is 8x8x16 and copies are immediate.
extern int capability;
extern std::uint64_t schedule_seed;
std::uint64_t random();    // the next number from the seed

unsigned char* shared_memory();
void barrier();
void cluster_barrier();
unsigned char* remote_shared(int rank);
// Runs `execute` once for the warp with the 32 lanes' operand pointers.
using Collective = void (*)(void* const* lanes);
void collective(Collective execute, void* operands);
void queue_copy(unsigned char* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending);
void run_grid(Grid grid, int threads, std::size_t shared, int cluster_blocks, const std::function<void()>& kernel);

// Whoever runs kernels by other means takes launches here, and says whether it has run this one.
struct KernelLaunch {
  const void* kernel;
  Grid grid;
  int threads;
  std::size_t shared;
  const void* parameters;
  std::size_t parameter_bytes;
  LaunchOptions options;
};
extern bool (*run_elsewhere)(const KernelLaunch&);

void load_matrices(void* const* lanes);
template <bool is_signed>    // the first operand
void multiply_16x8x32(void* const* lanes);
template <bool is_signed>
void multiply_8x8x16(void* const* lanes);
void multiply_wgmma(void* const* lanes);    // one warp's part of it
void meet(void* const* lanes);
void largest(void* const* lanes);    // of 32 uint32, each of which becomes it

struct MatrixRows {
  std::uint32_t* r;
  const unsigned char* row;
};
struct Fragments {
  std::int32_t* acc;
  const std::uint32_t* a;
  std::uint32_t b0, b1;
};
struct WarpgroupFragments {
  std::int32_t (*acc)[4];
  int fragments;
  const std::uint32_t* a;
  std::uint64_t descriptor;
};
struct SmallFragments {
  std::int32_t *c0, *c1;
  std::uint32_t a, b;
};

}    // namespace emulation

#define threadIdx ::qcfs::cuda::emulation::thread_index
#define blockIdx ::qcfs::cuda::emulation::block_index
#define __syncthreads ::qcfs::cuda::emulation::barrier

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  std::int32_t x, y;
};
struct alignas(16) int4 {
  std::int32_t x, y, z, w;
};

inline std::uint32_t in_register(std::uint32_t x) { return x; }

// Offsets in the block's shared memory; the byte above them is the rank of another block of the cluster, plus one.
inline SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(static_cast<const unsigned char*>(p) - emulation::shared_memory());
}
inline unsigned char* at_address(SharedAddress at) {
  const int block = static_cast<int>(at >> 24) - 1;
  return (block < 0 ? emulation::shared_memory() : emulation::remote_shared(block)) + (at & 0xffffff);
}

inline void copy16(SharedAddress shared, const void* global, bool valid) {
  emulation::queue_copy(at_address(shared), valid ? global : nullptr, 16);
}
inline void copy4(SharedAddress shared, const void* global, bool valid) {
  emulation::queue_copy(at_address(shared), valid ? global : nullptr, 4);
}
inline void copy1(SharedAddress shared, const std::uint8_t* global, bool valid) {
  *at_address(shared) = valid ? *global : 0;
}
inline void copies_commit() { emulation::commit_copies(); }
template <int pending>
void copies_wait() {
  emulation::wait_copies(pending);
}

inline void load_matrices(std::uint32_t (&r)[4], SharedAddress row) {
  emulation::MatrixRows operands{r, at_address(row)};
  emulation::collective(emulation::load_matrices, &operands);
}

template <bool is_signed>
inline void multiply_any(std::int32_t (&acc)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if (emulation::capability >= 80) {
    emulation::Fragments operands{acc, a, b0, b1};
    emulation::collective(emulation::multiply_16x8x32<is_signed>, &operands);
    return;
  }
  emulation::SmallFragments parts[4] = {{&acc[0], &acc[1], a[0], b0},
                                        {&acc[2], &acc[3], a[1], b0},
                                        {&acc[0], &acc[1], a[2], b1},
                                        {&acc[2], &acc[3], a[3], b1}};
  for (auto& part : parts) emulation::collective(emulation::multiply_8x8x16<is_signed>, &part);
}
inline void multiply(std::int32_t (&acc)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  multiply_any<false>(acc, a, b0, b1);
}
inline void multiply_signed(std::int32_t (&acc)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  multiply_any<true>(acc, a, b0, b1);
}

#if defined(QCFS_FAST_WGMMA)
#define QCFS_HAS_WGMMA 1
inline void publish_shared() {}
inline void wgmma_begin() {}
template <typename Accumulators>
void wgmma_wait(Accumulators&&) {}
template <int fragments>
void multiply_wgmma(std::int32_t (&acc)[fragments][4], const std::uint32_t (&a)[4], SharedAddress shared) {
  emulation::WarpgroupFragments operands{acc, fragments, a, wgmma_descriptor(shared)};
  emulation::collective(emulation::multiply_wgmma, &operands);
}
#endif

inline void fire_into(std::uint32_t& bits, std::uint32_t bit, std::int32_t& v, std::int32_t threshold) {
  if (fire(v, 0, threshold) != 0) bits |= bit;
}
inline void add_where(std::int32_t& v, std::int32_t amplitude, std::uint32_t bits, std::uint32_t bit) {
  if ((bits & bit) != 0) v += amplitude;
}

#define QCFS_HAS_CLUSTERS 1
inline void cluster_barrier() { emulation::cluster_barrier(); }
inline void leave_cluster() { emulation::cluster_barrier(); }
inline SharedAddress in_block(SharedAddress at, std::int32_t rank) {
  return at | (static_cast<SharedAddress>(rank) + 1) << 24;
}
inline void load_remote(std::int32_t (&to)[2], SharedAddress at) { std::memcpy(to, at_address(at), sizeof(to)); }
inline void wait_for_launch_before() {}

inline void sync_warp() { emulation::collective(emulation::meet, nullptr); }
inline std::uint32_t warp_max(std::uint32_t x) {
  emulation::collective(emulation::largest, &x);
  return x;
}
inline std::uint32_t pick_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  std::uint32_t picked = 0;
  for (int i = 0; i < 32; i += 8) {
    const std::uint32_t byte = selector >> (i / 2) & 7;
    picked |= ((byte < 4 ? a : b) >> (8 * (byte % 4)) & 0xff) << i;
  }
  return picked;
}

// Compiled with -ffp-contract=off.
inline double mul_rn(double a, double b) { return a * b; }
inline double add_rn(double a, double b) { return a + b; }
inline double div_rn(double a, double b) { return a / b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline std::int32_t round_to_int(double x) {
  return static_cast<std::int32_t>(std::nearbyint(std::fmax(INT32_MIN, std::fmin(INT32_MAX, x))));
}
inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline std::uint32_t atomicMax(std::uint32_t* at, std::uint32_t value) {
  const std::uint32_t old = *at;
  if (value > old) *at = value;
  return old;
}

template <typename Params>
int launch_kernel(void (*kernel)(Params), Grid grid, int threads, std::size_t shared, void*, const Params& params,
                  LaunchOptions options = {}) {
  const emulation::KernelLaunch launch{
      reinterpret_cast<const void*>(kernel), grid, threads, shared, &params, sizeof(params), options};
  if (emulation::run_elsewhere != nullptr && emulation::run_elsewhere(launch)) return 0;
  emulation::run_grid(grid, threads, shared, options.cluster, [&] { kernel(params); });
  return 0;
}

inline int clear_words(std::uint32_t* words, std::size_t count, void*) {
  std::memset(words, 0, count * sizeof(*words));
  return 0;
}

}    // namespace qcfs::cuda
