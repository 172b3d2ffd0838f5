// The instructions that the kernels are made of, one function each: asynchronous copies, ldmatrix, tensor-core
// products, correctly rounded float operations; and the launch. Without nvcc the same names come from
// emulation/emulation.h, which runs the kernels on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/neuron.h"

namespace qcfs::cuda {

// Sums of products are formed modulo 2^32, as the tensor cores form them; only the final value is bound to fit.
QCFS_HD static inline std::int32_t wrapping_add(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}
QCFS_HD static inline std::int32_t wrapping_multiply(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) * static_cast<std::uint32_t>(b));
}

// An address in the shared memory of a block: 32 bits, as instructions take it.
using SharedAddress = std::uint32_t;

// What a launch asks for beside its grid, from sm_90 on.
struct LaunchOptions {
  int cluster = 1;           // blocks of a cluster, along z
  bool dependent = false;    // it may begin before the launch before it has ended; its kernel waits for that itself
  std::size_t most_shared = 0;    // of the kernel in any launch: a limit that one launch lowers may not hold in a graph
};

// Where wgmma finds a matrix in shared memory: rows of 64 bytes with the swizzle of chunk_offset() (tensor_layout.h),
// which is the hardware's "64 byte" mode: bits 4 and 5 of an address are XORed with bits 7 and 8. Fields, low to high:
// address / 16; a stride that this mode ignores; the stride from eight rows to the next, 512 bytes / 16; the mode, 2.
// Shared memory is aligned to 512.
QCFS_HD static inline std::uint64_t wgmma_descriptor(std::uint32_t address) {
  return (address & 0x3ffff) >> 4 | std::uint64_t{1} << 16 | std::uint64_t{512 >> 4} << 32 | std::uint64_t{2} << 62;
}

}    // namespace qcfs::cuda

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define QCFS_DEVICE __device__ __forceinline__
#if defined(__CUDA_ARCH__)
#define QCFS_UNROLL _Pragma("unroll")
#define QCFS_ROLLED _Pragma("unroll 1")
#else
#define QCFS_UNROLL
#define QCFS_ROLLED
#endif
#define QCFS_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace qcfs::cuda {

// Hides from the compiler where a number comes from, or it would compute it anew in every loop, from special registers
// even, to save a register.
QCFS_DEVICE std::uint32_t in_register(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The address of shared memory as instructions take it.
QCFS_DEVICE SharedAddress shared_address(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

// 16 bytes, global to shared, without passing through registers from sm_80 on; zeros where `valid` is false.
// Nothing is read then, whatever the address.
QCFS_DEVICE void copy16(SharedAddress shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0));
#else
  const uint4 v = valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// 4 bytes, likewise.
QCFS_DEVICE void copy4(SharedAddress shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0));
#else
  const unsigned v = valid ? __ldg(static_cast<const unsigned*>(global)) : 0u;
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(shared), "r"(v) : "memory");
#endif
}

// One byte, through a register.
QCFS_DEVICE void copy1(SharedAddress shared, const std::uint8_t* global, bool valid) {
  unsigned v = 0;
  // Not the read-only path: a dependent launch is alive while the one before it writes.
  if (valid) asm volatile("ld.global.u8 %0, [%1];\n" : "=r"(v) : "l"(global) : "memory");
  asm volatile("st.shared.u8 [%0], %1;\n" ::"r"(shared), "r"(v) : "memory");
}

// Closes the group of copies issued so far by this thread.
QCFS_DEVICE void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
QCFS_DEVICE void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements, here 8 rows of 16 bytes each: lane i gives the row i%8 of matrix
// i/8 and receives, of each matrix, bytes 4*(i%4) .. +3 of row i/4.
QCFS_DEVICE void load_matrices(std::uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

// acc[16x8] += a[16x32] * b[32x8, s8], modulo 2^32. Turing knows 8x8x16 only: the same registers in four parts.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define QCFS_MULTIPLY(type, acc, a, b0, b1)                                                \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." type                               \
               ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define QCFS_MULTIPLY_8816(type, c0, c1, a, b)                                                          \
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." type ".s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};\n" \
               : "+r"(c0), "+r"(c1)                                                                     \
               : "r"(a), "r"(b))
#define QCFS_MULTIPLY(type, acc, a, b0, b1)           \
  QCFS_MULTIPLY_8816(type, acc[0], acc[1], a[0], b0); \
  QCFS_MULTIPLY_8816(type, acc[2], acc[3], a[1], b0); \
  QCFS_MULTIPLY_8816(type, acc[0], acc[1], a[2], b1); \
  QCFS_MULTIPLY_8816(type, acc[2], acc[3], a[3], b1)
#endif
QCFS_DEVICE void multiply(std::int32_t (&acc)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  QCFS_MULTIPLY("u8", acc, a, b0, b1);
}
QCFS_DEVICE void multiply_signed(std::int32_t (&acc)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                 std::uint32_t b1) {
  QCFS_MULTIPLY("s8", acc, a, b0, b1);
}
#undef QCFS_MULTIPLY
#undef QCFS_MULTIPLY_8816

// Hopper's asynchronous products of a warpgroup (four warps): acc[64 x cols] += a[64x32, u8] * b[32 x cols, s8]. a is
// in registers as for mma.sync (16 rows a warp), b in shared memory behind a descriptor. Only with QCFS_FAST_WGMMA, see
// docs/cuda.md.
#if defined(QCFS_FAST_WGMMA) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QCFS_HAS_WGMMA 1
#endif
#if defined(QCFS_HAS_WGMMA)
// Makes what was written to shared memory before this visible to asynchronous products after the next barrier.
QCFS_DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
QCFS_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Waits for the products. The empty asm then names every accumulator, so that none is read before.
template <typename Accumulators>
QCFS_DEVICE void wgmma_wait(Accumulators&& for_each_accumulator) {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" ::: "memory");
  for_each_accumulator([](std::int32_t& a) { asm volatile("" : "+r"(a)::"memory"); });
}

// Operands of asm have numbers, not names. `d` lists the numbers of the accumulators, which are the variadic arguments,
// four a fragment; `a_names` those of the registers of a; `b_name` is that of b's descriptor.
#define QCFS_FRAGMENT(i) "+r"(acc[i][0]), "+r"(acc[i][1]), "+r"(acc[i][2]), "+r"(acc[i][3])
#define QCFS_WGMMA(columns, d, a_names, b_name, ...)                                                                   \
  asm volatile(                                                                                                        \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, 1, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n" columns "k32.s32.u8.s8 {" d "}, {" a_names "}, " b_name ", accumulate;\n}\n" \
      : __VA_ARGS__                                                                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(weights))
#define QCFS_0_TO_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QCFS_0_TO_15 QCFS_0_TO_7 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QCFS_0_TO_31 QCFS_0_TO_15 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
template <int fragments>
QCFS_DEVICE void multiply_wgmma(std::int32_t (&acc)[fragments][4], const std::uint32_t (&a)[4], SharedAddress shared) {
  const std::uint64_t weights = wgmma_descriptor(shared);
  static_assert(fragments == 2 || fragments == 4 || fragments == 8, "16, 32 or 64 columns");
  if constexpr (fragments == 2) {
    QCFS_WGMMA("16", QCFS_0_TO_7, "%8, %9, %10, %11", "%12", QCFS_FRAGMENT(0), QCFS_FRAGMENT(1));
  } else if constexpr (fragments == 4) {
    QCFS_WGMMA("32", QCFS_0_TO_15, "%16, %17, %18, %19", "%20", QCFS_FRAGMENT(0), QCFS_FRAGMENT(1), QCFS_FRAGMENT(2),
               QCFS_FRAGMENT(3));
  } else {
    QCFS_WGMMA("64", QCFS_0_TO_31, "%32, %33, %34, %35", "%36", QCFS_FRAGMENT(0), QCFS_FRAGMENT(1), QCFS_FRAGMENT(2),
               QCFS_FRAGMENT(3), QCFS_FRAGMENT(4), QCFS_FRAGMENT(5), QCFS_FRAGMENT(6), QCFS_FRAGMENT(7));
  }
}
#undef QCFS_FRAGMENT
#undef QCFS_WGMMA
#undef QCFS_0_TO_7
#undef QCFS_0_TO_15
#undef QCFS_0_TO_31
#endif

QCFS_DEVICE void sync_warp() { __syncwarp(); }

// One step of a neuron whose current is in v already: the spike is `bit` of `bits`. Predicated, because the compiler
// makes two selections and two additions of it.
QCFS_DEVICE void fire_into(std::uint32_t& bits, std::uint32_t bit, std::int32_t& v, std::int32_t threshold) {
  asm("{\n.reg .pred spike;\nsetp.ge.s32 spike, %0, %2;\n@spike sub.s32 %0, %0, %2;\n@spike or.b32 %1, %1, %3;\n}\n"
      : "+r"(v), "+r"(bits)
      : "r"(threshold), "r"(bit));
}
// v += amplitude where `bits` has `bit`.
QCFS_DEVICE void add_where(std::int32_t& v, std::int32_t amplitude, std::uint32_t bits, std::uint32_t bit) {
  asm("{\n.reg .pred spike;\n.reg .b32 one;\nand.b32 one, %2, %3;\nsetp.ne.u32 spike, one, 0;\n@spike add.s32 %0, %0, "
      "%1;\n}\n"
      : "+r"(v)
      : "r"(amplitude), "r"(bits), "r"(bit));
}

// Programmatic dependent launch (`LaunchOptions::dependent`): waits until the launch before has ended. Until then a
// kernel reads nothing that the launch before may have written, and writes nothing. Then the next launch may begin,
// once every block has come here: not earlier, so that it finds all but this launch complete.
QCFS_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Clusters: blocks that run at the same time and read each other's shared memory.
#if __CUDA_ARCH__ >= 900
#define QCFS_HAS_CLUSTERS 1
// For every thread of the cluster; what they wrote to shared memory before is seen by all after.
QCFS_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// The same, but what they wrote is not asked for: nobody leaves before all have come.
QCFS_DEVICE void leave_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
QCFS_DEVICE SharedAddress in_block(SharedAddress at, std::int32_t rank) {
  SharedAddress remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(at), "r"(rank));
  return remote;
}
QCFS_DEVICE void load_remote(std::int32_t (&to)[2], SharedAddress at) {
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];\n" : "=r"(to[0]), "=r"(to[1]) : "r"(at) : "memory");
}
#endif

// The largest of the warp's values, in every lane.
QCFS_DEVICE std::uint32_t warp_max(std::uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
  QCFS_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  return x;
#endif
}

// Four of the bytes 0-3 (a) and 4-7 (b), the lowest named by the selector's lowest digit.
QCFS_DEVICE std::uint32_t pick_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Round to nearest, never contracted into a fused multiply-add.
QCFS_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
QCFS_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
QCFS_DEVICE double div_rn(double a, double b) { return __ddiv_rn(a, b); }
QCFS_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
QCFS_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
// Halves to even; beyond int32 its nearest value.
QCFS_DEVICE std::int32_t round_to_int(double x) { return __double2int_rn(x); }
QCFS_DEVICE std::uint32_t bits_of(float x) { return __float_as_uint(x); }
QCFS_DEVICE float float_of(std::uint32_t x) { return __uint_as_float(x); }

struct Grid {
  std::int64_t x, y = 1, z = 1;
};

// Queues one kernel whose only parameter is a struct; returns the runtime's code.
template <typename Params>
int launch_kernel(void (*kernel)(Params), Grid grid, int threads, std::size_t shared, void* stream,
                  const Params& params, LaunchOptions options = {}) {
  if (grid.x == 0 || grid.y == 0) return 0;
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) return cudaErrorInvalidConfiguration;
  const void* function = reinterpret_cast<const void*>(kernel);
  const std::size_t most = options.most_shared > shared ? options.most_shared : shared;
  if (most > 48 * 1024) {
    const cudaError_t e =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (options.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = a.val.clusterDim.y = 1;
    a.val.clusterDim.z = static_cast<unsigned>(options.cluster);
  }
  if (options.dependent) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernelExC(&config, function, arguments);
}

inline int clear_words(std::uint32_t* words, std::size_t count, void* stream) {
  return cudaMemsetAsync(words, 0, count * sizeof(*words), static_cast<cudaStream_t>(stream));
}

}    // namespace qcfs::cuda

#else
#include "cuda/emulation/emulation.h"
#endif
