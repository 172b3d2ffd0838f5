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
// The epilogue of simple layers (epilogue.h) runs on the accumulators as they lie: a lane has two neighbouring channels
// of a pixel. The mask bytes pass through shared memory so that a store has 16 of them. Any other layer's accumulators
// go through shared memory a few channels at a time, and neurons end one by one in a loop: its code is long.
//
// Split K, where one block for each tile would leave the GPU idle. From sm_90 on the blocks of a tile are a cluster:
// each leaves its accumulators in its shared memory and ends a share of the tile's neurons on the sums of all. Before,
// they go to a workspace, and a second launch ends the layer.
//
// Registers a thread: T * row_parts * BN / 2 accumulators (64 to 128), BN / 4 weight fragments, 4 to 8 masks, about 50
// addresses. With 128 threads that stays under 255 registers, without spills, and lets two blocks share an SM: one
// multiplies while the other is in its epilogue.
// Shared memory: stages * (BM * planes + BN) * 64 bytes, 20 to 60 KiB; clusters: at least the accumulators
// (cost_model.h). Exact: integers modulo 2^32, and the contract keeps every final value inside 32 bits. This is why the
// masks are shifted before the product and not the sums after it: a sum scaled by 2^t could leave 32 bits.
#pragma once

#include <cstdint>

#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/parameters.h"
#include "cuda/kernels/tensor_layout.h"

namespace qcfs::cuda {

// A block's share of K, the same for every digit: `stages` of them, from stage `first_stage` of a product on.
struct Share {
  std::int32_t first_product, first_stage, stages;

  QCFS_DEVICE explicit Share(const LayerParams& p) {
    first_stage = static_cast<std::int32_t>(blockIdx.z) * p.split_stages;
    const std::int32_t remaining = p.stages - first_stage;
    stages = remaining < p.split_stages ? remaining : p.split_stages;
    for (first_product = 0;; ++first_product) {
      const ProductParams& q = p.products[first_product];
      const std::int32_t n = stages_of(q.kernel_h * q.kernel_w, q.channels);
      if (first_stage < n) return;
      first_stage -= n;
    }
  }
};

// A walk over the share: for each digit, the products one after the other. A segment is the part of one product, with
// one digit. The copies and the products walk alike, the copies ahead by up to `stages` - 1 stages.
struct Walk {
  std::int32_t digit, product, first_stage;
  std::int32_t left;    // stages of this segment that are still to come
  std::int32_t rest;    // stages of the segments that follow with the same digit

  QCFS_DEVICE Walk(const LayerParams& p, const Share& share) { begin(p, share, 0); }

  QCFS_DEVICE void next(const LayerParams& p, const Share& share) {
    if (rest > 0) {
      enter(p, product + 1, 0, rest);
    } else {
      begin(p, share, digit + 1);
    }
  }

 private:
  QCFS_DEVICE void begin(const LayerParams& p, const Share& share, std::int32_t next_digit) {
    digit = next_digit;
    enter(p, share.first_product, share.first_stage, share.stages);
  }

  QCFS_DEVICE void enter(const LayerParams& p, std::int32_t next_product, std::int32_t stage, std::int32_t stages) {
    product = next_product;
    first_stage = stage;
    const ProductParams& q = p.products[product];
    const std::int32_t n = stages_of(q.kernel_h * q.kernel_w, q.channels) - stage;
    left = n < stages ? n : stages;
    rest = stages - left;
  }
};

// Where a thread's next copies come from. A thread copies piece `column` = thread % 4 of each stage, for rows
// thread / 4, thread / 4 + threads / 4, .. of the mask tile and of the weight tile. The addresses are kept from stage
// to stage in registers, so advance() costs the loop around the products a few additions. enter() computes them anew.
template <int loads>
struct CopyCursor {
  static constexpr std::int32_t outside = 1 << 29;    // no row of pixels is as far, nor brought inside by it

  std::int32_t product = -1;
  std::int32_t piece, pieces;                  // the piece within the tap; pieces of a tap
  std::int32_t columns_left, rows_left;        // taps to come in this row of the kernel; rows of it
  std::int32_t kernel_w, step_x, step_y;       // dilations
  std::int32_t height, width;                  // of the input
  std::int32_t dy, dx;                         // of the tap, in pixels
  std::int64_t offset;                         // of tap and piece, in bytes
  std::int64_t to_next_column, to_next_row;    // what offset grows by
  std::intptr_t from[loads];                   // address of each row's pixel under tap (0, 0), inside the input or not
  std::int32_t y[loads], x[loads];             // its coordinates
  const std::int8_t* weight;

  QCFS_DEVICE void enter(const LayerParams& p, const Walk& at, std::int32_t first_pixel, std::int32_t first_channel,
                         std::int32_t threads) {
    const bool same_pixels = at.product == product;
    product = at.product;
    const ProductParams& q = p.products[product];
    const std::int32_t thread = threadIdx.x, column = thread % 4;
    const std::int32_t stages = stages_of(q.kernel_h * q.kernel_w, q.channels);
    pieces = pieces_per_tap(q.channels);
    const std::int32_t first_piece = at.first_stage * (stage_bytes / piece_bytes) + column, tap = first_piece / pieces;
    piece = first_piece % pieces;
    kernel_w = q.kernel_w;
    columns_left = kernel_w - tap % kernel_w;
    rows_left = q.kernel_h - tap / kernel_w;
    step_x = q.dilation_w;
    step_y = q.dilation_h;
    height = q.height;
    width = q.width;
    dx = tap % kernel_w * step_x;
    dy = rows_left > 0 ? tap / kernel_w * step_y : outside;
    offset = (static_cast<std::int64_t>(tap / kernel_w * step_y) * width + dx) * q.channels + piece * piece_bytes;
    to_next_column = static_cast<std::int64_t>(step_x) * q.channels - pieces * piece_bytes;
    to_next_row =
        (static_cast<std::int64_t>(step_y) * width - static_cast<std::int64_t>(kernel_w) * step_x) * q.channels;
    weight =
        static_cast<const std::int8_t*>(q.weight) + thread * piece_bytes +
        ((static_cast<std::int64_t>(at.digit) * stages + at.first_stage) * p.padded_out + first_channel) * stage_bytes;
    if (same_pixels) return;
    QCFS_UNROLL
    for (int i = 0; i < loads; ++i) {
      const std::int32_t pixel = first_pixel + thread / 4 + i * (threads / 4);
      const std::int32_t area = p.out_h * p.out_w;
      const bool exists = pixel < p.pixels;
      y[i] = exists ? pixel % area / p.out_w * q.stride_h - q.pad_h : -2 * outside;
      x[i] = pixel % p.out_w * q.stride_w - q.pad_w;
      const std::int64_t row = static_cast<std::int64_t>(pixel / area) * height + y[i];
      from[i] = reinterpret_cast<std::intptr_t>(q.x) + (exists ? (row * width + x[i]) * q.channels : 0);
    }
  }

  // To the next stage of the same segment; `weights` bytes lie between two stages of packed weights.
  QCFS_DEVICE void advance(std::uint32_t weights) {
    weight += weights;
    piece += stage_bytes / piece_bytes;
    offset += stage_bytes;
    while (piece >= pieces) {    // to the next tap
      piece -= pieces;
      dx += step_x;
      offset += to_next_column;
      if (--columns_left > 0) continue;
      columns_left = kernel_w;
      dx = 0;
      offset += to_next_row;
      dy = --rows_left > 0 ? dy + step_y : outside;
    }
  }
};

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

  using Accumulators = std::int32_t[T][parts][2 * pairs][4];

  template <typename Change>
  QCFS_DEVICE static void for_each(Accumulators& acc, Change&& change) {
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        QCFS_UNROLL
        for (int j = 0; j < 2 * pairs; ++j) {
          QCFS_UNROLL
          for (int r = 0; r < 4; ++r) change(acc[t][i][j][r]);
        }
      }
    }
  }

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
    wgmma_wait([&](auto&& change) { for_each(acc, change); });
  }
#endif

  // In a 16 x 8 accumulator fragment lane l holds rows l/4 and l/4 + 8, channels 2*(l%4) and 2*(l%4) + 1: two pairs of
  // neighbouring channels. Calls see(pair, row, column) with the pair's row and its first column within the tile.
  template <typename See>
  QCFS_DEVICE static void for_each_pair(See&& see) {
    const std::int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    QCFS_UNROLL
    for (int j = 0; j < 2 * pairs; ++j) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        QCFS_UNROLL
        for (int half = 0; half < 2; ++half) {
          see(Pair{i, j, half}, 16 * (parts * warp + i) + 8 * half + lane / 4, 8 * j + lane % 4 * 2);
        }
      }
    }
  }
  struct Pair {
    int i, j, half;
    QCFS_DEVICE void of(const Accumulators& acc, std::int32_t (&currents)[T][2]) const {
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        currents[t][0] = acc[t][i][j][2 * half];
        currents[t][1] = acc[t][i][j][2 * half + 1];
      }
    }
    // To the place `by` fragments before, in ascending order of fragments.
    QCFS_DEVICE void move_down(Accumulators& acc, int by) const {
      if (j < by) return;
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        acc[t][i][j - by][2 * half] = acc[t][i][j][2 * half];
        acc[t][i][j - by][2 * half + 1] = acc[t][i][j][2 * half + 1];
      }
    }
  };

  // Bytes from one row of the mask bytes in shared memory to the next: the pairs of a fragment fall into different
  // banks, and 16 bytes stay aligned.
  static constexpr int mask_row = cols == 16 ? 16 : cols + 16;

  // Ends a simple layer's neurons on the accumulators as they lie. Mask bytes go to `masks` [rows, mask_row] in shared
  // memory; those of pixels and channels that do not exist are never read.
  template <bool has_residual, bool has_state>
  QCFS_DEVICE static void end_pairs(const LayerParams& p, const Accumulators& acc, unsigned char* masks,
                                    std::int32_t first_pixel, std::int32_t first_channel) {
    std::uint32_t residual[2 * pairs][parts][2];    // all asked for before any is used
    for_each_pair([&](Pair at, std::int32_t row, std::int32_t col) {
      const std::int32_t pixel = first_pixel + row, o = first_channel + col;
      const bool asked = has_residual && p.residual_count > 0 && pixel < p.pixels && o < p.out_channels;
      const std::int64_t index = static_cast<std::int64_t>(pixel) * p.out_channels + o;
      residual[at.j][at.i][at.half] = asked ? load_bytes<2>(p.residuals[0].data + index) : 0;
    });
    QCFS_UNROLL
    for (int j = 0; j < 2 * pairs; ++j) {
      const std::int32_t o = first_channel + 8 * j + threadIdx.x % 4 * 2;
      const ChannelPair channels(p, o < p.out_channels ? o : 0);
      for_each_pair([&](Pair at, std::int32_t row, std::int32_t col) {
        if (at.j != j) return;
        std::int32_t currents[T][2];
        at.of(acc, currents);
        const std::int32_t pixel = first_pixel + row;
        if (has_state && (pixel >= p.pixels || o >= p.out_channels)) return;
        const std::int64_t index = static_cast<std::int64_t>(pixel) * p.out_channels + o;
        const std::uint32_t bits = fire_pair<T, has_residual, has_state>(
            p, channels, index, has_residual ? residual[j][at.i][at.half] : 0, currents);
        store_bytes<2>(masks + row * mask_row + col, bits);
      });
    }
  }

  // The mask bytes of a tile, 16 a store where the output is so aligned.
  QCFS_DEVICE static void store_masks(const LayerParams& p, const unsigned char* masks, std::int32_t first_pixel,
                                      std::int32_t first_channel) {
    for (std::int32_t i = threadIdx.x * 16; i < rows * cols; i += threads * 16) {
      const std::int32_t at = first_pixel + i / cols, o = first_channel + i % cols;
      if (at >= p.pixels) continue;
      const unsigned char* from = masks + i / cols * mask_row + i % cols;
      std::uint8_t* to = p.out + static_cast<std::int64_t>(at) * p.out_channels + o;
      if (p.wide_out && o < p.out_channels) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < 16 && o + j < p.out_channels; ++j) to[j] = from[j];
      }
    }
  }

  // Partial sums of a split K, for a second launch.
  QCFS_DEVICE static void store_partial(const LayerParams& p, const Accumulators& acc, std::int32_t first_pixel,
                                        std::int32_t first_channel) {
    const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
    for_each_pair([&](Pair at, std::int32_t row, std::int32_t col) {
      const std::int32_t pixel = first_pixel + row, o = first_channel + col;
      if (pixel >= p.pixels || o >= p.out_channels) return;
      std::int32_t* to =
          p.partial + blockIdx.z * p.steps * plane + static_cast<std::int64_t>(pixel) * p.out_channels + o;
      std::int32_t currents[T][2];
      at.of(acc, currents);
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        if (t >= p.steps) break;
        if (p.out_channels % 2 == 0) {    // four lanes fill a sector
          store_values<2>(to + t * plane, currents[t]);
        } else {
          to[t * plane] = currents[t][0];
          if (o + 1 < p.out_channels) to[t * plane + 1] = currents[t][1];
        }
      }
    });
  }

  // Accumulators of `height` pixels x `width` channels in shared memory, int32 [T, height, row]. Rows are padded so
  // that the pairs which half a warp stores fall into different banks.
  template <int height, int width>
  struct SharedCurrents {
    static constexpr int row = width == 8 ? 8 : width + 8, words = T * height * row;
    std::int32_t* memory;
    std::int32_t blocks;    // of the cluster: a neuron's currents are the sums of theirs; 1: of this block alone

    QCFS_DEVICE static int at(int t, std::int32_t y, std::int32_t x) { return (t * height + y) * row + x; }

    QCFS_DEVICE void load(std::int32_t y, std::int32_t x, std::int32_t (&sums)[T][2]) const {
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) load_values<2>(sums[t], memory + at(t, y, x));
#if defined(QCFS_HAS_CLUSTERS)
      for (std::int32_t block = 1; block < blocks; ++block) {
        // Each block begins with itself and goes round, so that not all ask the same one.
        const std::int32_t rank = (static_cast<std::int32_t>(blockIdx.z) + block) % blocks;
        const SharedAddress from = in_block(shared_address(memory), rank);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          std::int32_t value[2];
          load_remote(value, from + at(t, y, x) * 4);
          sums[t][0] = wrapping_add(sums[t][0], value[0]);
          sums[t][1] = wrapping_add(sums[t][1], value[1]);
        }
      }
#endif
    }

    // Ends the neurons: pairs `first`, `first` + `stride`, .. of them. The first one is at pixel and channel given.
    QCFS_DEVICE void end(const LayerParams& p, std::int32_t first, std::int32_t stride, std::int32_t first_pixel,
                         std::int32_t first_channel) const {
      QCFS_ROLLED
      for (std::int32_t i = first; i < height * width / 2; i += stride) {
        const std::int32_t y = i / (width / 2), x = i % (width / 2) * 2;
        const std::int32_t pixel = first_pixel + y, o = first_channel + x;
        if (pixel >= p.pixels || o >= p.out_channels) continue;
        const std::int64_t index = static_cast<std::int64_t>(pixel) * p.out_channels + o;
        std::int32_t sums[T][2];
        load(y, x, sums);
        if (p.simple) {
          const ChannelPair channels(p, o);
          const std::uint32_t residual = p.residual_count > 0 ? load_bytes<2>(p.residuals[0].data + index) : 0;
          const std::uint32_t bits = fire_pair<T, true, true>(p, channels, index, residual, sums);
          store_bytes<2>(p.out + index, bits);
          continue;
        }
        std::uint32_t bytes = 0;
        QCFS_ROLLED
        for (int k = 0; k < 2 && o + k < p.out_channels; ++k) {
          std::int32_t currents[T];
          QCFS_UNROLL
          for (int t = 0; t < T; ++t) currents[t] = k == 0 ? sums[t][0] : sums[t][1];
          bytes |= static_cast<std::uint32_t>(end_neuron<T>(p, index + k, o + k, currents)) << 8 * k;
        }
        if (p.wide_out) {
          store_bytes<2>(p.out + index, bytes);
        } else {
          for (int k = 0; k < 2 && o + k < p.out_channels; ++k)
            p.out[index + k] = static_cast<std::uint8_t>(bytes >> 8 * k);
        }
      }
    }
  };

  template <int height, int width>
  QCFS_DEVICE static void put_pair(const SharedCurrents<height, width>& to, const Accumulators& acc, Pair pair,
                                   std::int32_t y, std::int32_t x) {
    std::int32_t currents[T][2];
    pair.of(acc, currents);
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) store_values<2>(to.memory + to.at(t, y, x), currents[t]);
  }

  // Ends neurons of any mode, a few channels of a warp's pixels at a time.
  QCFS_DEVICE static void end_by_warps(const LayerParams& p, Accumulators& acc, unsigned char* shared,
                                       std::int32_t first_pixel, std::int32_t first_channel) {
    constexpr int width = T == 8 ? 8 : 16, height = 16 * parts;
    using Currents = SharedCurrents<height, width>;
    static_assert(warps * Currents::words * 4 <= stages * bytes, "shared memory");
    const std::int32_t lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * height;
    const Currents currents{reinterpret_cast<std::int32_t*>(shared) + threadIdx.x / 32 * Currents::words, 1};
    QCFS_ROLLED
    for (std::int32_t first = 0; first < cols; first += width) {
      for_each_pair([&](Pair pair, std::int32_t row, std::int32_t col) {
        if (pair.j < width / 8) put_pair(currents, acc, pair, row - first_row, col);
        pair.move_down(acc, width / 8);    // registers have no index
      });
      sync_warp();
      currents.end(p, lane, 32, first_pixel + first_row, first_channel + first);
      sync_warp();
    }
  }

#if defined(QCFS_HAS_CLUSTERS)
  // Ends this block's share of the neurons of the cluster's tile.
  QCFS_DEVICE static void end_in_cluster(const LayerParams& p, const Accumulators& acc, unsigned char* shared,
                                         std::int32_t first_pixel, std::int32_t first_channel) {
    const SharedCurrents<rows, cols> currents{reinterpret_cast<std::int32_t*>(shared), p.cluster};
    for_each_pair([&](Pair pair, std::int32_t row, std::int32_t col) { put_pair(currents, acc, pair, row, col); });
    cluster_barrier();
    currents.end(p, blockIdx.z * threads + threadIdx.x, p.cluster * threads, first_pixel, first_channel);
    leave_cluster();    // not while others read from it
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
  Conv::for_each(acc, [](std::int32_t& a) { a = 0; });
  const auto multiply_sums = [&](std::int32_t factor) {
    if (factor != 1) Conv::for_each(acc, [=](std::int32_t& a) { a = wrapping_multiply(a, factor); });
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

#if defined(QCFS_HAS_CLUSTERS)
  if (p.cluster > 1) return Conv::end_in_cluster(p, acc, shared, first_pixel, first_channel);
#endif
  if (p.partial != nullptr) return Conv::store_partial(p, acc, first_pixel, first_channel);
  if (!p.simple) return Conv::end_by_warps(p, acc, shared, first_pixel, first_channel);
  static_assert(Conv::rows * Conv::mask_row <= stages * Conv::bytes, "shared memory");
  if (p.state_in != nullptr || p.state_out != nullptr) {
    Conv::template end_pairs<true, true>(p, acc, shared, first_pixel, first_channel);
  } else if (p.residual_count > 0) {
    Conv::template end_pairs<true, false>(p, acc, shared, first_pixel, first_channel);
  } else {
    Conv::template end_pairs<false, false>(p, acc, shared, first_pixel, first_channel);
  }
  __syncthreads();
  Conv::store_masks(p, shared, first_pixel, first_channel);
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
