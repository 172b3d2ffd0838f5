// Spiking convolution and linear layer on tensor cores: implicit GEMM over spike masks, integrate-and-fire fused.
//
//     I[t] = sum_k scale * w[k] * x[k, t] + residuals + current + bias        k over products, taps, input channels
//     v[-1] = n/2     v += I[t]     s[t] = v >= n  (inclusive)     v -= n * s[t]  (soft reset, one spike a step)
//
// Operands (T sits in the bits of a mask byte; in the leading dimension of count planes):
//     x        masks uint8 [N, H, W, C], bit t is step t of the launch; or counts uint8 [T, N, H, W, C]
//     weight   packed int8 [digits, stages, O rounded up to 64, 64], see tensor_layout.h
//     out      masks uint8 [N, OH, OW, O]
//
// A block computes BM output pixels x BN output channels for all T steps of the launch. Each of its warps has an equal
// share of the pixels and all BN channels. K runs in stages of 64 bytes = 4 pieces of 16 channels of one tap:
//
//              64 bytes of K                    BN channels
//            +---------------+              +----------------+
//      BM    | masks (one    |      64 of K |  one digit     |        `stages` such pairs in shared memory,
//    pixels  | byte: T steps)|              |  of the weight |        filled by cp.async, 16-byte chunks swizzled
//            +---------------+              +----------------+
//                   |  ldmatrix                    | ldmatrix: one load of weights serves all T steps
//         m (4 bytes a register)                   |
//          |  (m >> t) & 0x01010101                |
//          +--> A fragment of step t ----> mma.sync m16n8k32 u8 x s8 --> acc[t], 32-bit, in registers
//
// 16-bit weights are two digits, w = 256 * d1 + d0. The loop runs over all of K with d1, then acc *= 256, then over all
// of K with d0 (Horner), so no second set of accumulators exists. Scales work likewise: where a product begins, the
// sums so far are multiplied by the quotient of the scale before and its own.
//
// The loop around the products holds nothing else than a wait, a barrier, the products of a stage and, after half of
// them, the copies for a later one. What changes between products and digits happens between two of its runs (Walk).
//
// The accumulators of a split K meet, and neurons end, in tile_end.h.
//
// Registers a thread: T * row_parts * BN / 2 accumulators (64 to 128), BN / 4 weight fragments, 4 to 8 masks, about 50
// addresses. With 128 threads that stays under 255 registers, without spills, and lets two blocks share an SM: one
// multiplies while the other is in its epilogue.
// Shared memory: stages * (BM * planes + BN) * 64 bytes, 20 to 60 KiB, or the accumulators of a cluster.
//
// Exact: integers modulo 2^32, and the contract keeps every final value inside 32 bits. This is why the masks are
// shifted before the product and not the sums after it: a sum scaled by 2^t could leave 32 bits.
#pragma once

#include <cstdint>

#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/parameters.h"
#include "cuda/kernels/tensor_layout.h"
#include "cuda/kernels/tile_end.h"
#include "cuda/kernels/walk.h"

namespace qcfs::cuda {

// The work of one block. Template parameters (tile_shape() in cost_model.h chooses them):
//
//     T            time steps, each with its own accumulators
//     parts        16-row fragments of a warp, so BM = 16 * parts * warps
//     cols         BN
//     warps        of the block, all along the pixels
//     stages       of the copy pipeline
//     planes       byte planes of the mask tile: T where an input may be counts, else 1
//     any_width    some input's rows are not multiples of 16 bytes, or not so aligned
template <int T, int parts, int cols, int warps, int stages, int planes, bool any_width>
struct ConvTile {
  static constexpr int rows = 16 * parts * warps;
  static constexpr int threads = 32 * warps;
  static constexpr int plane_bytes = planes > 1 ? rows * stage_bytes : 0;    // from one count plane to the next
  static constexpr int a_bytes = rows * planes * stage_bytes;
  static constexpr int bytes = a_bytes + cols * stage_bytes;
  static constexpr int pairs = cols / 16;             // of 8-channel fragments
  static constexpr int loads = rows * 4 / threads;    // 16-byte pieces of a mask tile that a thread copies
  static_assert(rows * 4 % threads == 0 && threads % 32 == 0 && cols % 16 == 0, "tile shape");

  // Queues the copies of one stage's masks. `to` is the place of the thread's first row. Its other rows are
  // threads / 4 apart, a multiple of 8, so the swizzle is the same for all of them.
  QCFS_DEVICE static void load_masks(const LayerParams& p, SharedAddress to, const CopyCursor<loads>& k) {
    QCFS_UNROLL
    for (int i = 0; i < loads; ++i) {
      const bool valid = static_cast<std::uint32_t>(k.y[i] + k.dy) < static_cast<std::uint32_t>(k.height) &&
                         static_cast<std::uint32_t>(k.x[i] + k.dx) < static_cast<std::uint32_t>(k.width);
      const std::uint8_t* from = reinterpret_cast<const std::uint8_t*>(k.from[i] + k.offset);
      const SharedAddress place = to + i * (threads / 4 * stage_bytes);
      if constexpr (planes == 1) {
        copy_piece(p, k, place, from, valid);
      } else {
        const ProductParams& q = p.products[k.product];
        const std::int64_t plane = static_cast<std::int64_t>(p.batch) * k.height * k.width * q.channels;
        const std::int32_t count = q.count ? p.steps : 1;
        for (std::int32_t t = 0; t < count; ++t) copy_piece(p, k, place + t * plane_bytes, from + t * plane, valid);
      }
    }
  }

  // The same for weights: cols * 64 consecutive bytes, padded with zeros where needed when they were packed.
  QCFS_DEVICE static void load_weights(SharedAddress to, const std::int8_t* weight) {
    QCFS_UNROLL
    for (int i = 0; i < cols * 4; i += threads) {
      if (cols * 4 - i >= threads || static_cast<int>(threadIdx.x) < cols * 4 - i) {
        copy16(to + a_bytes + i / 4 * stage_bytes, weight + i * piece_bytes, true);
      }
    }
  }

  // 16 channels, or what is left of them and zeros.
  QCFS_DEVICE static void copy_piece(const LayerParams& p, const CopyCursor<loads>& k, SharedAddress to,
                                     const std::uint8_t* from, bool valid) {
    if constexpr (!any_width) {
      copy16(to, from, valid);
    } else {
      const ProductParams& q = p.products[k.product];
      if (q.copy_bytes == 16) return copy16(to, from, valid);
      const std::int32_t channels = valid ? q.channels - k.piece * piece_bytes : 0;
      if (q.copy_bytes == 4) {
        for (int j = 0; j < 16; j += 4) copy4(to + j, j < channels ? from + j : q.x, j < channels);
      } else {
        QCFS_ROLLED
        for (int j = 0; j < 16; ++j) copy1(to + j, from + j, j < channels);
      }
    }
  }

  using End = TileEnd<T, parts, cols, warps>;
  using Accumulators = typename End::Accumulators;
  static_assert(End::shared_bytes <= stages * bytes, "shared memory");

  // A lane's row addresses for ldmatrix in the first stage, for the two halves of K.
  struct Lane {
    SharedAddress a[2], b[2];

    QCFS_DEVICE explicit Lane(SharedAddress tiles) {
      const std::int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      QCFS_UNROLL
      for (int half = 0; half < 2; ++half) {
        // By the swizzle, bit 5 of the offset is inverted in the second half.
        const std::int32_t in_a = chunk_offset(16 * parts * warp + lane % 16, lane / 16) ^ 32 * half;
        const std::int32_t in_b = chunk_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2) ^ 32 * half;
        a[half] = in_register(tiles + in_a);
        b[half] = in_register(tiles + a_bytes + in_b);
      }
    }
  };

  // What a stage's tile holds. With one step a count plane lies as a mask plane does, and all bits are kept of it.
  struct Input {
    bool planes_of_counts;    // a plane a step
    std::uint32_t bits;       // of a byte that is a step's, in each of four

    QCFS_DEVICE explicit Input(const ProductParams& q)
        : planes_of_counts(planes > 1 && q.count), bits(T == 1 && q.count ? 0xffffffffu : 0x01010101u) {}

    // The A fragment of step t, bit t of the masks. Masks have bits for all T, and nobody reads the sums of steps that
    // the launch does not have.
    QCFS_DEVICE void extract(std::uint32_t (&a)[4], const std::uint32_t (&masks)[4], int t) const {
      QCFS_UNROLL
      for (int r = 0; r < 4; ++r) a[r] = (masks[r] >> t) & bits;
    }
  };

  // acc += A * B of the stage that begins `stage` bytes after the first, for all T steps. The copies for a later stage
  // are queued by `load` once the tensor cores have work: their addresses need not wait for that.
  template <typename Load>
  QCFS_DEVICE static void accumulate(SharedAddress stage, const Lane& lane, const Input& input, std::int32_t steps,
                                     Accumulators& acc, Load&& load) {
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      std::uint32_t b[pairs][4];
      QCFS_UNROLL
      for (int j = 0; j < pairs; ++j) load_matrices(b[j], stage + lane.b[half] + j * 16 * stage_bytes);
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        const SharedAddress at = stage + lane.a[half] + i * 16 * stage_bytes;
        std::uint32_t masks[4];
        if (!input.planes_of_counts) load_matrices(masks, at);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          std::uint32_t a[4];
          if (input.planes_of_counts) {
            if (t >= steps) break;
            load_matrices(a, at + t * plane_bytes);
          } else {
            input.extract(a, masks, t);
          }
          QCFS_UNROLL
          for (int j = 0; j < pairs; ++j) {
            multiply(acc[t][i][2 * j], a, b[j][0], b[j][1]);
            multiply(acc[t][i][2 * j + 1], a, b[j][2], b[j][3]);
          }
        }
      }
      if (half == 0) load();
    }
  }

#if defined(QCFS_HAS_WGMMA)
  // The same by asynchronous products of a warpgroup (four warps), which read B from shared memory.
  template <typename Load>
  QCFS_DEVICE static void accumulate_wgmma(SharedAddress tile, SharedAddress stage, const Lane& lane,
                                           const Input& input, std::int32_t steps, Accumulators& acc, Load&& load) {
    std::uint32_t a[2][parts][T][4];
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        const SharedAddress at = stage + lane.a[half] + i * 16 * stage_bytes;
        std::uint32_t masks[4];
        if (!input.planes_of_counts) load_matrices(masks, at);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          if (!input.planes_of_counts) {
            input.extract(a[half][i][t], masks, t);
          } else if (t < steps) {
            load_matrices(a[half][i][t], at + t * plane_bytes);
          } else {
            QCFS_UNROLL
            for (int r = 0; r < 4; ++r) a[half][i][t][r] = 0;
          }
        }
      }
    }
    wgmma_begin();
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) multiply_wgmma(acc[t][i], a[half][i][t], tile + a_bytes + 32 * half);
      }
    }
    load();
    wgmma_wait([&](auto&& change) { End::for_each(acc, change); });
  }
#endif
};

template <int T, int parts, int cols, int warps, int stages, int planes, bool any_width>
__global__ void __launch_bounds__(32 * warps, resident) conv_if_kernel(const __grid_constant__ LayerParams p) {
  using Conv = ConvTile<T, parts, cols, warps, stages, planes, any_width>;
  QCFS_SHARED(shared);
  const SharedAddress tiles = in_register(shared_address(shared));
  const std::int32_t thread = threadIdx.x;
  const std::int32_t first_pixel = static_cast<std::int32_t>(blockIdx.x) * Conv::rows;
  const std::int32_t first_channel = static_cast<std::int32_t>(blockIdx.y) * cols;
  const std::uint32_t weights = in_register(static_cast<std::uint32_t>(p.padded_out) * stage_bytes);    // of a stage

  // Copies run ahead of the products by stages - 1. Those of weights that the first segment has begin before the launch
  // before has ended: packing ends with an empty launch, so that one has not written them.
  const Share share(p);
  const std::int32_t total = share.stages * p.digits;
  Walk walk(p, share), ahead = walk;
  CopyCursor<Conv::loads> cursor;
  cursor.enter(p, ahead, first_pixel, first_channel, Conv::threads);
  const SharedAddress place = tiles + chunk_offset(thread / 4, thread % 4);
  const std::int32_t early = ahead.left;
  QCFS_ROLLED
  for (std::int32_t s = 0; s < stages - 1 && s < early; ++s) {
    Conv::load_weights(place + s * Conv::bytes, cursor.weight + s * weights);
  }
  wait_for_launch_before();

  std::int32_t loaded = 0;
  const auto enter_next = [&] {
    if (ahead.left > 0 || loaded == total) return;
    ahead.next(p, share);
    cursor.enter(p, ahead, first_pixel, first_channel, Conv::threads);
  };
  QCFS_ROLLED
  for (std::int32_t s = 0; s < stages - 1; ++s) {
    enter_next();
    if (loaded < total) {
      Conv::load_masks(p, place + s * Conv::bytes, cursor);
      if (s >= early) Conv::load_weights(place + s * Conv::bytes, cursor.weight);
      cursor.advance(weights);
      --ahead.left;
      ++loaded;
    }
    copies_commit();
  }

  typename Conv::Accumulators acc;
  Conv::End::for_each(acc, [](std::int32_t& a) { a = 0; });
  const auto multiply_sums = [&](std::int32_t factor) {
    if (factor != 1) Conv::End::for_each(acc, [=](std::int32_t& a) { a = wrapping_multiply(a, factor); });
  };
  const typename Conv::Lane lane(tiles);
  SharedAddress read = 0, write = (stages - 1) * Conv::bytes;    // stages of the pipeline, from `tiles` on
  QCFS_ROLLED
  for (std::int32_t done = 0; done < total;) {
    enter_next();
    if (walk.left == 0) {
      const Walk before = walk;
      walk.next(p, share);
      multiply_sums(scale_ratio(p.products[before.product], p.products[walk.product], walk.digit - before.digit));
    }
    const bool loading = loaded < total;
    const typename Conv::Input input(p.products[walk.product]);
    const std::int32_t run = loading && ahead.left < walk.left ? ahead.left : walk.left;
    QCFS_ROLLED
    for (std::int32_t i = 0; i < run; ++i) {
      copies_wait<stages - 2>();
#if defined(QCFS_HAS_WGMMA)
      if (warps % 4 == 0) publish_shared();
#endif
      __syncthreads();    // everyone's copies have landed, and everyone has left the stage that is refilled next
      const auto load = [&] {
        if (loading) {
          Conv::load_masks(p, place + write, cursor);
          Conv::load_weights(place + write, cursor.weight);
          cursor.advance(weights);
        }
        copies_commit();
      };
#if defined(QCFS_HAS_WGMMA)
      if constexpr (warps % 4 == 0) {
        Conv::accumulate_wgmma(tiles + read, read, lane, input, p.steps, acc, load);
      } else
#endif
      {
        Conv::accumulate(read, lane, input, p.steps, acc, load);
      }
      write = read;
      read = read + Conv::bytes == stages * Conv::bytes ? 0 : read + Conv::bytes;
    }
    done += run;
    walk.left -= run;
    if (loading) {
      ahead.left -= run;
      loaded += run;
    }
  }
  multiply_sums(scale_of(p.products[walk.product]));
  copies_wait<0>();
  __syncthreads();    // everyone has left the stages, whose memory serves the epilogue

  Conv::End::end(p, acc, shared, first_pixel, first_channel);
}

// A launch of at most T steps with the tile that the plan chose.
template <int T, TileKind tile, bool any_width>
int launch_conv_if_tile(const LayerParams& p, int splits, const Launch& launch) {
  constexpr TileShape s = tile_shape(T, tile);
  const Grid grid{ceil_div(p.pixels, s.rows), ceil_div(p.out_channels, s.cols), splits};
  LaunchOptions options = after_launch_before(launch);
  options.cluster = p.cluster;
  if (launch.device.max_cluster > 1) options.most_shared = shared_bytes(s, T, true);
  return launch_kernel(conv_if_kernel<T, s.row_parts, s.cols, s.warps, s.stages, s.a_planes, any_width>, grid,
                       s.warps * 32, shared_bytes(s, T, p.cluster > 1), launch.stream, p, options);
}

// Inputs whose rows are not whole, aligned 16-byte pieces have kernels of the small tile and of the counts' tile only.
template <int T>
int launch_conv_if(const LayerParams& p, TileKind tile, int splits, const Launch& launch) {
  bool any_width = false;
  for (std::int32_t i = 0; i < p.product_count; ++i) any_width |= p.products[i].copy_bytes != 16;
  if constexpr (T > 1) {
    if (tile == TileKind::counts) return launch_conv_if_tile<T, TileKind::counts, true>(p, splits, launch);
  }
  if (any_width) return launch_conv_if_tile<T, TileKind::small, true>(p, splits, launch);
  if (tile == TileKind::small) return launch_conv_if_tile<T, TileKind::small, false>(p, splits, launch);
  return launch_conv_if_tile<T, TileKind::wide, false>(p, splits, launch);
}

}    // namespace qcfs::cuda
