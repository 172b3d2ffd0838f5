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
// sums so far are multiplied by the quotient of the scale before and its own. Then the epilogue: the recursion over T
// runs in registers, and the mask bytes pass through shared memory so that a store has 16 of them.
//
// Registers a thread: T * row_parts * BN / 2 accumulators (64 to 128), BN / 4 weight fragments, 4 to 8 masks, about 40
// addresses. With 128 threads that stays under 255 registers, without spills, and lets two blocks share an SM: one
// multiplies while the other is in its epilogue.
// Shared memory: stages * (BM * planes + BN) * 64 bytes, 20 to 60 KiB (cost_model.h).
// Exact: integers modulo 2^32, and the contract keeps every final value inside 32 bits. This is why the masks are
// shifted before the product and not the sums after it: a sum scaled by 2^t could leave 32 bits.
#pragma once

#include <cstdint>

#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/parameters.h"
#include "cuda/kernels/tensor_layout.h"

namespace qcfs::cuda {

// Where a thread's next copies come from. A thread copies piece `column` = thread % 4 of each stage, for rows
// thread / 4, thread / 4 + threads / 4, .. of the mask tile and of the weight tile. The addresses are kept from stage
// to stage, so advance() costs the loop around the products only a few additions. enter() computes them anew: at the
// start, at a new product and at the second digit.
template <int loads>
struct CopyCursor {
  std::int32_t product;
  std::int32_t stages_left;              // of this product
  std::int32_t kh, kw, piece, pieces;    // the tap, the piece within it, pieces of a tap
  std::int32_t height, width;            // of the input
  std::int32_t dy, dx;                   // of the tap, in pixels
  std::int64_t offset;                   // of tap and piece, in bytes
  std::intptr_t from[loads];             // address of each row's pixel under tap (0, 0), inside the input or not
  std::int32_t y[loads], x[loads];       // its coordinates
  const std::int8_t* weight;

  QCFS_DEVICE void enter(const LayerParams& p, std::int32_t next_product, std::int32_t first_stage, std::int32_t digit,
                         std::int32_t first_pixel, std::int32_t first_channel, std::int32_t threads) {
    const bool same_pixels = next_product == product;
    product = next_product;
    const ProductParams& q = p.products[product];
    const std::int32_t thread = threadIdx.x, column = thread % 4;
    const std::int32_t stages = stages_of(q.kernel_h * q.kernel_w, q.channels);
    stages_left = stages - first_stage;
    pieces = pieces_per_tap(q.channels);
    const std::int32_t first_piece = first_stage * (stage_bytes / piece_bytes) + column;
    piece = first_piece % pieces;
    kh = first_piece / pieces / q.kernel_w;
    kw = first_piece / pieces % q.kernel_w;
    height = q.height;
    width = q.width;
    set_tap(q);
    weight = static_cast<const std::int8_t*>(q.weight) + thread * piece_bytes +
             ((static_cast<std::int64_t>(digit) * stages + first_stage) * p.padded_out + first_channel) * stage_bytes;
    if (same_pixels) return;
    QCFS_UNROLL
    for (int i = 0; i < loads; ++i) {
      const std::int32_t at = first_pixel + thread / 4 + i * (threads / 4);
      const std::int32_t area = p.out_h * p.out_w;
      const bool exists = at < p.pixels;
      y[i] = exists ? at % area / p.out_w * q.stride_h - q.pad_h : -(1 << 30);    // no tap brings that inside
      x[i] = at % p.out_w * q.stride_w - q.pad_w;
      const std::int64_t row = static_cast<std::int64_t>(at / area) * height + y[i];
      from[i] = reinterpret_cast<std::intptr_t>(q.x) + (exists ? (row * width + x[i]) * q.channels : 0);
    }
  }

  // The offsets of tap (kh, kw) and the piece.
  QCFS_DEVICE void set_tap(const ProductParams& q) {
    dy = kh * q.dilation_h;
    dx = kw * q.dilation_w;
    offset = (static_cast<std::int64_t>(dy) * width + dx) * q.channels + piece * piece_bytes;
  }

  // To the next stage of the same product.
  QCFS_DEVICE void advance(const LayerParams& p) {
    weight += static_cast<std::int64_t>(p.padded_out) * stage_bytes;
    piece += stage_bytes / piece_bytes;
    offset += stage_bytes;
    if (piece < pieces) return;
    const ProductParams& q = p.products[product];
    do {
      piece -= pieces;
      if (++kw == q.kernel_w) {
        kw = 0;
        ++kh;
      }
    } while (piece >= pieces);
    set_tap(q);
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
  static constexpr int pairs = cols / 16;                       // of 8-channel fragments
  static constexpr int loads = rows * 4 / threads;              // 16-byte pieces of a mask tile that a thread copies
  static constexpr int transpose_channels = T == 8 ? 8 : 16;    // that the epilogue transposes at a time
  static_assert(rows * 4 % threads == 0 && threads % 32 == 0 && cols % 16 == 0, "tile shape");

  // Queues the copies of one stage. `to` is the place of the thread's first row. Its other rows are threads / 4 apart,
  // a multiple of 8, so the swizzle is the same for all of them.
  QCFS_DEVICE static void load(const LayerParams& p, unsigned char* to, const CopyCursor<loads>& k) {
    const ProductParams& q = p.products[k.product];
    const bool tap_exists = k.kh < q.kernel_h;
    QCFS_UNROLL
    for (int i = 0; i < loads; ++i) {
      const bool valid = tap_exists &&
                         static_cast<std::uint32_t>(k.y[i] + k.dy) < static_cast<std::uint32_t>(k.height) &&
                         static_cast<std::uint32_t>(k.x[i] + k.dx) < static_cast<std::uint32_t>(k.width);
      const std::uint8_t* from = reinterpret_cast<const std::uint8_t*>(k.from[i] + k.offset);
      unsigned char* place = to + i * (threads / 4 * stage_bytes);
      if (planes == 1) {
        copy_piece(q, k, place, from, valid);
      } else {
        const std::int64_t plane = static_cast<std::int64_t>(p.batch) * k.height * k.width * q.channels;
        const std::int32_t count = q.count ? p.steps : 1;
        for (std::int32_t t = 0; t < count; ++t) copy_piece(q, k, place + t * plane_bytes, from + t * plane, valid);
      }
    }
    // Weights: cols * 64 consecutive bytes, padded with zeros where needed when they were packed.
    QCFS_UNROLL
    for (int i = 0; i < cols * 4; i += threads) {
      if (cols * 4 - i >= threads || static_cast<int>(threadIdx.x) < cols * 4 - i) {
        copy16(to + a_bytes + i / 4 * stage_bytes, k.weight + i * piece_bytes, true);
      }
    }
  }

  // 16 channels, or what is left of them and zeros.
  QCFS_DEVICE static void copy_piece(const ProductParams& q, const CopyCursor<loads>& k, unsigned char* to,
                                     const std::uint8_t* from, bool valid) {
    if (!any_width || q.copy_bytes == 16) {
      copy16(to, from, valid);
      return;
    }
    const std::int32_t channels = valid ? q.channels - k.piece * piece_bytes : 0;
    if (q.copy_bytes == 4) {
      for (int j = 0; j < 16; j += 4) copy4(to + j, j < channels ? from + j : q.x, j < channels);
    } else {
      QCFS_ROLLED
      for (int j = 0; j < 16; ++j) to[j] = j < channels ? from[j] : 0;
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

  // The A fragment of step t: bit t of the masks. Masks have bits for all T, and nobody reads the sums of steps that
  // the launch does not have.
  QCFS_DEVICE static void extract_spikes(std::uint32_t (&a)[4], const std::uint32_t (&masks)[4], int t) {
    QCFS_UNROLL
    for (int r = 0; r < 4; ++r) a[r] = (masks[r] >> t) & 0x01010101u;
  }

  // acc += A * B of one stage, for all T steps. `a_lane` and `b_lane` are the lane's row addresses for ldmatrix in the
  // first 32 bytes of K; in the second, by the swizzle, bit 5 of the offset is inverted. `count`: the tile holds one
  // plane a step instead of masks.
  QCFS_DEVICE static void accumulate(const unsigned char* stage, std::int32_t a_lane, std::int32_t b_lane, bool count,
                                     std::int32_t steps, Accumulators& acc) {
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      std::uint32_t b[pairs][4];
      QCFS_UNROLL
      for (int j = 0; j < pairs; ++j)
        load_matrices(b[j], stage + a_bytes + j * 16 * stage_bytes + (b_lane ^ 32 * half));
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        const unsigned char* at = stage + i * 16 * stage_bytes + (a_lane ^ 32 * half);
        std::uint32_t masks[4];
        if (!count) load_matrices(masks, at);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          std::uint32_t a[4];
          if (count) {
            if (t >= steps) break;
            load_matrices(a, at + t * plane_bytes);
          } else {
            extract_spikes(a, masks, t);
          }
          QCFS_UNROLL
          for (int j = 0; j < pairs; ++j) {
            multiply(acc[t][i][2 * j], a, b[j][0], b[j][1]);
            multiply(acc[t][i][2 * j + 1], a, b[j][2], b[j][3]);
          }
        }
      }
    }
  }

#if defined(QCFS_HAS_WGMMA)
  // The same by asynchronous products of a warpgroup (four warps), which read B from shared memory.
  QCFS_DEVICE static void accumulate_wgmma(const unsigned char* stage, std::int32_t a_lane, bool count,
                                           std::int32_t steps, Accumulators& acc) {
    std::uint32_t a[2][parts][T][4];
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        const unsigned char* at = stage + i * 16 * stage_bytes + (a_lane ^ 32 * half);
        std::uint32_t masks[4];
        if (!count) load_matrices(masks, at);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          if (!count) {
            extract_spikes(a[half][i][t], masks, t);
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
        for (int t = 0; t < T; ++t) multiply_wgmma(acc[t][i], a[half][i][t], stage + a_bytes + 32 * half);
      }
    }
    wgmma_wait([&](auto&& change) { for_each(acc, change); });
  }
#endif

  // Index of a word in `currents`, [T, 16, transpose_channels] in shared memory. Rows of 16 channels are swizzled, so
  // that the pairs which 16 lanes store together fall into different banks.
  QCFS_DEVICE static std::int32_t transposed(std::int32_t t, std::int32_t row, std::int32_t col) {
    return (t * 16 + row) * transpose_channels + (transpose_channels == 16 ? col ^ (row & 2) * 4 : col);
  }

  // Ends 16 pixels x `transpose_channels` channels of a warp, four neighbouring channels a lane at a time. Fused: mask
  // bytes to `tile` [rows, cols] in shared memory. Split K: partial sums to global memory.
  QCFS_DEVICE static void epilogue(const LayerParams& p, const std::int32_t* currents, unsigned char* tile,
                                   std::int32_t first_pixel, std::int32_t first_channel) {
    const std::int32_t lane = threadIdx.x % 32;
    const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
    QCFS_ROLLED
    for (std::int32_t i = lane; i < 4 * transpose_channels; i += 32) {
      const std::int32_t row = i / (transpose_channels / 4), col = i % (transpose_channels / 4) * 4;
      const std::int32_t at = first_pixel + row, o = first_channel + col;
      if (at >= p.pixels || o >= p.out_channels) continue;
      const std::int64_t index = static_cast<std::int64_t>(at) * p.out_channels + o;
      if (p.quads) {
        std::int32_t sums[T][4];
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) load_values<4>(sums[t], currents + transposed(t, row, col));
        if (p.partial == nullptr) {
          const std::uint32_t bits = integrate_and_fire<T, 4>(p, index, o, sums);
          store_bytes<4>(tile + row * cols + col, bits);
        } else {
          QCFS_UNROLL
          for (int t = 0; t < T; ++t) {
            if (t < p.steps) store_values<4>(p.partial + (blockIdx.z * p.steps + t) * plane + index, sums[t]);
          }
        }
        continue;
      }
      QCFS_ROLLED
      for (int j = 0; j < 4 && o + j < p.out_channels; ++j) {
        std::int32_t sums[T][1];
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) sums[t][0] = currents[transposed(t, row, col) + j];
        if (p.partial == nullptr) {
          tile[row * cols + col + j] = end_neuron<T>(p, index + j, o + j, sums);
        } else {
          QCFS_UNROLL
          for (int t = 0; t < T; ++t) {
            if (t < p.steps) p.partial[(blockIdx.z * p.steps + t) * plane + index + j] = sums[t][0];
          }
        }
      }
    }
  }
};

template <int T, int parts, int cols, int warps, int stages, int planes, bool any_width>
__global__ void __launch_bounds__(32 * warps, resident) conv_if_kernel(const __grid_constant__ LayerParams p) {
  using Conv = ConvTile<T, parts, cols, warps, stages, planes, any_width>;
  constexpr bool any_counts = planes > 1 || T == 1;
  QCFS_SHARED(shared);
  const std::int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::int32_t first_pixel = static_cast<std::int32_t>(blockIdx.x) * Conv::rows;
  const std::int32_t first_channel = static_cast<std::int32_t>(blockIdx.y) * cols;

  // Every digit runs over this split's stages. Copies run ahead of the products by stages - 1.
  const std::int32_t split_begin = static_cast<std::int32_t>(blockIdx.z) * p.split_stages;
  const std::int32_t remaining = p.stages - split_begin;
  const std::int32_t digit_stages = remaining < p.split_stages ? remaining : p.split_stages;
  const std::int32_t total = digit_stages * p.digits;
  std::int32_t first_product = 0, first_stage = split_begin;    // with which the split begins
  for (;; ++first_product) {
    const ProductParams& q = p.products[first_product];
    const std::int32_t n = stages_of(q.kernel_h * q.kernel_w, q.channels);
    if (first_stage < n) break;
    first_stage -= n;
  }
  CopyCursor<Conv::loads> cursor;
  cursor.product = -1;
  cursor.stages_left = 0;
  std::int32_t loaded = 0;
  unsigned char* const place = shared + chunk_offset(thread / 4, thread % 4);
  auto load_next = [&](std::int32_t slot) {
    if (loaded < total) {
      if (cursor.stages_left == 0 || loaded == digit_stages) {
        const bool begins = loaded == 0 || loaded == digit_stages;
        cursor.enter(p, begins ? first_product : cursor.product + 1, begins ? first_stage : 0,
                     loaded >= digit_stages ? 1 : 0, first_pixel, first_channel, Conv::threads);
      } else {
        cursor.advance(p);
      }
      --cursor.stages_left;
      ++loaded;
      Conv::load(p, place + slot * Conv::bytes, cursor);
    }
    copies_commit();
  };
  QCFS_ROLLED
  for (std::int32_t s = 0; s < stages - 1; ++s) load_next(s);

  typename Conv::Accumulators acc;
  Conv::for_each(acc, [](std::int32_t& a) { a = 0; });
  const auto multiply_sums = [&](std::int32_t factor) {
    if (factor != 1) Conv::for_each(acc, [=](std::int32_t& a) { a = wrapping_multiply(a, factor); });
  };

  const std::int32_t a_lane = chunk_offset(16 * parts * warp + lane % 16, lane / 16);
  const std::int32_t b_lane = chunk_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  // The product being multiplied, and the stage at which the next one begins, or it again with the second digit.
  std::int32_t product = first_product, product_end = 0;
  const auto set_end = [&](std::int32_t done, std::int32_t stage_of_product) {
    const ProductParams& q = p.products[product];
    const std::int32_t end = done + stages_of(q.kernel_h * q.kernel_w, q.channels) - stage_of_product;
    product_end = done < digit_stages && end > digit_stages ? digit_stages : end;
  };
  set_end(0, first_stage);
  std::int32_t slot = 0;
  QCFS_ROLLED
  for (std::int32_t done = 0; done < total; ++done) {
    copies_wait<stages - 2>();
#if defined(QCFS_HAS_WGMMA)
    if (warps % 4 == 0) publish_shared();
#endif
    __syncthreads();    // everyone's copies have landed, and everyone has left the slot that is refilled next
    load_next(slot == 0 ? stages - 1 : slot - 1);
    if (done == product_end) {
      const bool second_digit = done == digit_stages;
      const std::int32_t before = product;
      product = second_digit ? first_product : product + 1;
      multiply_sums(scale_ratio(p.products[before], p.products[product], second_digit));
      set_end(done, second_digit ? first_stage : 0);
    }
    const bool count = any_counts && p.products[product].count;
#if defined(QCFS_HAS_WGMMA)
    if constexpr (warps % 4 == 0) {
      Conv::accumulate_wgmma(shared + slot * Conv::bytes, a_lane, count, p.steps, acc);
    } else
#endif
    {
      Conv::accumulate(shared + slot * Conv::bytes, a_lane, b_lane, count, p.steps, acc);
    }
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  multiply_sums(scale_of(p.products[product]));
  copies_wait<0>();
  __syncthreads();

  // Epilogue. In a 16 x 8 accumulator fragment lane l holds rows l/4 and l/4 + 8, channels 2*(l%4) and 2*(l%4) + 1. The
  // fragments are transposed through shared memory of the warp's own, `transpose_channels` at a time, so that each lane
  // ends four neighbouring channels with 16-byte loads and one 4-byte store.
  unsigned char* tile = shared;    // [rows, cols] mask bytes
  constexpr int transpose_channels = Conv::transpose_channels;
  constexpr int words = T * 16 * transpose_channels;    // of a warp
  std::int32_t* currents = reinterpret_cast<std::int32_t*>(shared + Conv::rows * cols) + warp * words;
  static_assert(Conv::rows * cols + warps * words * 4 <= stages * Conv::bytes, "shared memory");
  QCFS_UNROLL
  for (int i = 0; i < parts; ++i) {
    const std::int32_t row = 16 * (parts * warp + i);
    QCFS_UNROLL
    for (int first = 0; first < cols; first += transpose_channels) {
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        QCFS_UNROLL
        for (int j = 0; j < transpose_channels / 8; ++j) {
          QCFS_UNROLL
          for (int r = 0; r < 4; r += 2) {
            const std::int32_t (&pair)[4] = acc[t][i][first / 8 + j];
            const std::int32_t at = Conv::transposed(t, lane / 4 + r / 2 * 8, 8 * j + lane % 4 * 2);
            *reinterpret_cast<int2*>(currents + at) = int2{pair[r], pair[r + 1]};
          }
        }
      }
      sync_warp();
      Conv::epilogue(p, currents, tile + row * cols + first, first_pixel + row, first_channel + first);
      sync_warp();
    }
  }
  if (p.partial != nullptr) return;
  __syncthreads();
  for (std::int32_t i = thread * 16; i < Conv::rows * cols; i += Conv::threads * 16) {
    const std::int32_t at = first_pixel + i / cols, o = first_channel + i % cols;
    if (at >= p.pixels) continue;
    std::uint8_t* to = p.out + static_cast<std::int64_t>(at) * p.out_channels + o;
    if (p.wide_out && o < p.out_channels) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile + i);
    } else {
      for (int j = 0; j < 16 && o + j < p.out_channels; ++j) to[j] = tile[i + j];
    }
  }
}

// A launch of at most T steps with the tile that the plan chose.
template <int T, TileKind tile, bool any_width>
int launch_conv_if_tile(const LayerParams& p, int splits, void* stream) {
  constexpr TileShape s = tile_shape(T, tile);
  const Grid grid{ceil_div(p.pixels, s.rows), ceil_div(p.out_channels, s.cols), splits};
  return launch_kernel(conv_if_kernel<T, s.row_parts, s.cols, s.warps, s.stages, s.a_planes, any_width>, grid,
                       s.warps * 32, tile_shared_bytes(s), stream, p);
}

// Inputs whose rows are not whole, aligned 16-byte pieces have kernels of the small tile and of the counts' tile only.
template <int T>
int launch_conv_if(const LayerParams& p, TileKind tile, int splits, void* stream) {
  bool any_width = false;
  for (std::int32_t i = 0; i < p.product_count; ++i) any_width |= p.products[i].copy_bytes != 16;
  if constexpr (T > 1) {
    if (tile == TileKind::counts) return launch_conv_if_tile<T, TileKind::counts, true>(p, splits, stream);
  }
  if (any_width) return launch_conv_if_tile<T, TileKind::small, true>(p, splits, stream);
  if (tile == TileKind::small) return launch_conv_if_tile<T, TileKind::small, false>(p, splits, stream);
  return launch_conv_if_tile<T, TileKind::wide, false>(p, splits, stream);
}

}    // namespace qcfs::cuda
