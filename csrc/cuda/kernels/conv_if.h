// Spiking convolution and linear layer on tensor cores: implicit GEMM over spike masks, integrate-and-fire fused.
//
//     I[t] = sum_k w[k] * x[k, t] + residuals + current + bias        k over products, taps, input channels
//     v[-1] = n/2     v += I[t]     s[t] = v >= n  (inclusive)     v -= n * s[t]  (soft reset, one spike a step)
//
// Operands (T sits in the bits of a mask byte; in the leading dimension of count planes):
//     x        masks uint8 [N, H, W, C], bit t is step t of the group; or counts uint8 [T, N, H, W, C]
//     weight   packed int8 [digits, stages, O rounded up to 64, 64], see layer.h
//     out      masks uint8 [N, OH, OW, O]
//
// A block computes BM output pixels x BN output channels for all T steps of the group; warp w has pixels w * BM / WM
// .., and all BN channels. K runs in stages of 64 bytes = 4 pieces of 16 channels of one tap:
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
// One load of masks and one of weights serve all T steps. 16-bit weights are two digits, w = 256 * d1 + d0: all of K
// with d1, acc <<= 8, then all of K with d0 (Horner), so no second set of accumulators exists. Then the recursion over
// T in registers, one mask byte a neuron through shared memory, 16 bytes a store.
//
// Registers a thread: T * row_parts * BN / 2 accumulators (64 to 128), BN / 4 weight fragments, 4 to 8 masks, about 30
// addresses: under 255 without spills at 256 threads, one block an SM; two with 128 threads.
// Shared memory: stages * (BM * planes + BN) * 64 bytes, 24 to 60 KiB (cost_model.h).
// Exact: integers modulo 2^32, and the contract keeps every final value inside 32 bits. So the bits are shifted down
// before the product, not the sums after it: a sum scaled by 2^t could leave 32 bits.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels/layer.h"

namespace qcfs::cuda {

// Byte offset of a 16-byte chunk of a 64-byte row. Two rows fill the 128 bytes of all banks; the swizzle spreads the
// same chunk of 8 consecutive rows over all of them, as ldmatrix reads it.
QCFS_HD static inline std::int32_t chunk_offset(std::int32_t row, std::int32_t chunk) {
  return row * stage_bytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// Where one thread's piece of K stands: product, tap, piece of the tap. The four pieces of a stage belong to four
// neighbouring threads; advance() moves on by one stage.
struct Cursor {
  std::int32_t product, stage, stages;    // stage within the product
  std::int32_t kh, kw, piece, pieces;

  QCFS_DEVICE void enter(const LayerParams& p, std::int32_t first_stage, std::int32_t column) {
    const ProductParams& q = p.products[product];
    pieces = pieces_per_tap(q.channels);
    stages = stages_of(q.kernel_h * q.kernel_w, q.channels);
    stage = first_stage;
    const std::int32_t all = first_stage * (stage_bytes / piece_bytes) + column;
    const std::int32_t tap = all / pieces;
    piece = all % pieces;
    kh = tap / q.kernel_w;
    kw = tap % q.kernel_w;
  }

  // To stage `at` of the whole K.
  QCFS_DEVICE void seek(const LayerParams& p, std::int32_t at, std::int32_t column) {
    for (product = 0;; ++product) {
      const ProductParams& q = p.products[product];
      const std::int32_t n = stages_of(q.kernel_h * q.kernel_w, q.channels);
      if (at < n) break;
      at -= n;
    }
    enter(p, at, column);
  }

  QCFS_DEVICE void advance(const LayerParams& p, std::int32_t column) {
    if (++stage == stages) {
      if (++product < p.product_count) enter(p, 0, column);
      return;
    }
    piece += stage_bytes / piece_bytes;
    while (piece >= pieces) {
      piece -= pieces;
      if (++kw == p.products[product].kernel_w) {
        kw = 0;
        ++kh;
      }
    }
  }
};

struct Pixel {
  std::int32_t sample, row, col;    // sample < 0: past the end
};

template <int T, int parts, int cols, int warps, int stages, int planes>
struct ConvTile {
  static constexpr int rows = 16 * parts * warps;
  static constexpr int threads = 32 * warps;
  static constexpr int a_bytes = rows * planes * stage_bytes;
  static constexpr int bytes = a_bytes + cols * stage_bytes;
  static constexpr int pairs = cols / 16;             // of 8-channel fragments
  static constexpr int loads = rows * 4 / threads;    // 16-byte pieces of a mask tile a thread
  static_assert(rows * 4 % threads == 0 && cols % 16 == 0, "tile shape");

  // Queues the copies of one stage. Thread i has piece i % 4 of rows i / 4, i / 4 + threads / 4, ..
  QCFS_DEVICE static void load(const LayerParams& p, unsigned char* stage, const Cursor& k, std::int32_t digit,
                               std::int32_t first_channel, const Pixel (&pixel)[loads]) {
    const std::int32_t thread = threadIdx.x, column = thread % 4;
    const ProductParams& q = p.products[k.product];
    const std::int32_t channel = k.piece * piece_bytes;
    const bool tap_exists = k.kh < q.kernel_h;
    const int step_planes = planes > 1 && q.count ? p.steps : 1;
    QCFS_UNROLL
    for (int i = 0; i < loads; ++i) {
      const std::int32_t row = thread / 4 + i * (threads / 4);
      const std::int32_t y = pixel[i].row * q.stride_h - q.pad_h + k.kh * q.dilation_h;
      const std::int32_t x = pixel[i].col * q.stride_w - q.pad_w + k.kw * q.dilation_w;
      const bool valid = tap_exists && pixel[i].sample >= 0 && y >= 0 && y < q.height && x >= 0 && x < q.width;
      const std::int64_t at =
          valid ? ((static_cast<std::int64_t>(pixel[i].sample) * q.height + y) * q.width + x) * q.channels + channel
                : 0;
      unsigned char* to = stage + chunk_offset(row, column);
      for (int t = 0; t < step_planes; ++t) {
        const std::uint8_t* from = q.x + at + static_cast<std::int64_t>(t) * p.batch * q.height * q.width * q.channels;
        unsigned char* to_plane = to + t * rows * stage_bytes;
        if (q.copy_bytes == 16) {
          copy16(to_plane, from, valid);
        } else if (q.copy_bytes == 4) {
          QCFS_UNROLL
          for (int j = 0; j < 16; j += 4) {
            const bool inside = valid && channel + j < q.channels;
            copy4(to_plane + j, inside ? from + j : q.x, inside);
          }
        } else {
          for (int j = 0; j < 16; ++j) to_plane[j] = valid && channel + j < q.channels ? from[j] : 0;
        }
      }
    }
    // Weights: cols * 64 consecutive bytes, padded with zeros where needed when they were packed.
    const std::int8_t* weights =
        static_cast<const std::int8_t*>(q.weight) +
        ((static_cast<std::int64_t>(digit) * k.stages + k.stage) * p.padded_out + first_channel) * stage_bytes;
    QCFS_UNROLL
    for (int i = 0; i < cols * 4; i += threads) {
      const std::int32_t chunk = i + thread;
      if (cols * 4 % threads == 0 || chunk < cols * 4) {
        copy16(stage + a_bytes + chunk_offset(chunk / 4, chunk % 4), weights + chunk * 16, true);
      }
    }
  }

  // acc += tile, for all T steps. `count`: the tile holds one plane a step instead of bits.
  QCFS_DEVICE static void accumulate(const unsigned char* stage, bool count, std::int32_t steps,
                                     std::int32_t (&acc)[T][parts][2 * pairs][4]) {
    const std::int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      std::uint32_t b[pairs][4];
      QCFS_UNROLL
      for (int j = 0; j < pairs; ++j) {
        const std::int32_t channel = 16 * j + lane / 16 * 8 + lane % 8;
        load_matrices(b[j], stage + a_bytes + chunk_offset(channel, 2 * half + lane / 8 % 2));
      }
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        const std::int32_t row = 16 * (parts * warp + i) + lane / 8 % 2 * 8 + lane % 8;
        const unsigned char* at = stage + chunk_offset(row, 2 * half + lane / 16);
        std::uint32_t m[4];
        if (!count) load_matrices(m, at);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          std::uint32_t a[4];
          if (count) {
            if (t >= steps) break;
            load_matrices(a, at + (planes > 1 ? t : 0) * rows * stage_bytes);
          } else {
            QCFS_UNROLL
            for (int r = 0; r < 4; ++r) a[r] = (m[r] >> t) & 0x01010101u;
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
};

template <int T, int parts, int cols, int warps, int stages, int planes>
__global__ void __launch_bounds__(32 * warps) conv_if_kernel(const __grid_constant__ LayerParams p) {
  using Tile = ConvTile<T, parts, cols, warps, stages, planes>;
  constexpr bool any_counts = planes > 1 || T == 1;
  QCFS_SHARED(shared);
  const std::int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32, column = thread % 4;
  const std::int32_t first_pixel = static_cast<std::int32_t>(blockIdx.x) * Tile::rows;
  const std::int32_t first_channel = static_cast<std::int32_t>(blockIdx.y) * cols;

  Pixel pixel[Tile::loads];
  QCFS_UNROLL
  for (int i = 0; i < Tile::loads; ++i) {
    const std::int32_t at = first_pixel + thread / 4 + i * (Tile::threads / 4);
    const std::int32_t area = p.out_h * p.out_w;
    pixel[i] = at < p.pixels ? Pixel{at / area, at % area / p.out_w, at % p.out_w} : Pixel{-1, 0, 0};
  }

  // This split's stages, once a digit; loads run ahead of the products by stages - 1.
  const std::int32_t stage0 = static_cast<std::int32_t>(blockIdx.z) * p.split_stages;
  const std::int32_t left = p.stages - stage0;
  const std::int32_t once = left < p.split_stages ? left : p.split_stages;
  const std::int32_t total = once * p.digits;
  Cursor k;
  k.seek(p, stage0, column);
  std::int32_t loaded = 0, digit = 0, digit_end = once;
  auto load_next = [&](unsigned char* to) {
    if (loaded < total) {
      Tile::load(p, to, k, digit, first_channel, pixel);
      if (++loaded == digit_end) {
        ++digit;
        digit_end += once;
        k.seek(p, stage0, column);
      } else {
        k.advance(p, column);
      }
    }
    copies_commit();
  };
  for (int s = 0; s < stages - 1; ++s) load_next(shared + s * Tile::bytes);

  std::int32_t acc[T][parts][2 * Tile::pairs][4];
  auto for_each_accumulator = [&](auto&& change) {
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        QCFS_UNROLL
        for (int j = 0; j < 2 * Tile::pairs; ++j) {
          QCFS_UNROLL
          for (int r = 0; r < 4; ++r) change(acc[t][i][j][r]);
        }
      }
    }
  };
  for_each_accumulator([](std::int32_t& a) { a = 0; });

  std::int32_t product = k.product, product_left = 0;    // of the stage being multiplied; count layers only
  if (any_counts) {
    Cursor start;
    start.seek(p, stage0, 0);
    product = start.product;
    product_left = start.stages - start.stage;
  }
  int slot = 0;
  for (std::int32_t done = 0; done < total; ++done) {
    copies_wait<stages - 2>();
    __syncthreads();    // everyone's copies have landed, and everyone has left the slot that is refilled next
    load_next(shared + (slot == 0 ? stages - 1 : slot - 1) * Tile::bytes);
    if (done == once) {
      for_each_accumulator([](std::int32_t& a) { a = shift_left(a, 8); });
      if (any_counts) {
        Cursor start;
        start.seek(p, stage0, 0);
        product = start.product;
        product_left = start.stages - start.stage;
      }
    }
    Tile::accumulate(shared + slot * Tile::bytes, any_counts && p.products[product].count, p.steps, acc);
    if (any_counts && --product_left == 0 && product + 1 < p.product_count) {
      ++product;
      const ProductParams& q = p.products[product];
      product_left = stages_of(q.kernel_h * q.kernel_w, q.channels);
    }
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  if (p.digits == 1) for_each_accumulator([](std::int32_t& a) { a = shift_left(a, 8); });
  copies_wait<0>();
  __syncthreads();

  // Lane l holds, of each 16 x 8 fragment, rows l/4 and l/4 + 8 and channels 2*(l%4) and one more. The end of a layer
  // is too long to stand in the code once for each of these registers: they pass through the thread's own words of
  // shared memory, 2 * pairs * T at a time, to be indexed by a loop.
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  unsigned char* tile = shared;    // [rows, cols] mask bytes
  std::int32_t* own = reinterpret_cast<std::int32_t*>(shared + Tile::rows * cols) + thread;
  static_assert(Tile::rows * cols + 2 * Tile::pairs * T * Tile::threads * 4 <= stages * Tile::bytes, "shared memory");
  QCFS_UNROLL
  for (int i = 0; i < parts; ++i) {
    QCFS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const std::int32_t row = 16 * (parts * warp + i) + lane / 4 + r / 2 * 8;
      const std::int32_t at = first_pixel + row;
      QCFS_UNROLL
      for (int j = 0; j < 2 * Tile::pairs; ++j) {
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) own[(j * T + t) * Tile::threads] = acc[t][i][j][r];
      }
      if (at >= p.pixels) continue;
      QCFS_ROLLED
      for (int j = 0; j < 2 * Tile::pairs; ++j) {
        const std::int32_t col = 8 * j + lane % 4 * 2 + r % 2;
        const std::int32_t o = first_channel + col;
        if (o >= p.out_channels) break;
        const std::int64_t index = static_cast<std::int64_t>(at) * p.out_channels + o;
        std::int32_t currents[T];
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) currents[t] = own[(j * T + t) * Tile::threads];
        if (p.partial == nullptr) {
          tile[row * cols + col] = integrate<T>(p, index, o, currents);
        } else {
          QCFS_UNROLL
          for (int t = 0; t < T; ++t) {
            if (t < p.steps) p.partial[(blockIdx.z * p.steps + t) * plane + index] = currents[t];
          }
        }
      }
    }
  }
  if (p.partial != nullptr) return;
  __syncthreads();
  for (std::int32_t i = thread * 16; i < Tile::rows * cols; i += Tile::threads * 16) {
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

// The group of T steps with the tile the plan chose.
template <int T, Tile tile>
int launch_conv_if_tile(const LayerParams& p, int splits, void* stream) {
  constexpr TileShape s = tile_shape(T, tile);
  const Grid grid{ceil_div(p.pixels, s.rows), static_cast<int>(ceil_div(p.out_channels, s.cols)), splits};
  return launch_kernel(conv_if_kernel<T, s.row_parts, s.cols, s.warps, s.stages, s.a_planes>, grid, s.warps * 32,
                       tile_shared_bytes(s), stream, p);
}

template <int T>
int launch_conv_if(const LayerParams& p, Tile tile, int splits, void* stream) {
  if (tile == Tile::wide) return launch_conv_if_tile<T, Tile::wide>(p, splits, stream);
  if (tile == Tile::small) return launch_conv_if_tile<T, Tile::small>(p, splits, stream);
  if constexpr (T > 1) return launch_conv_if_tile<T, Tile::counts>(p, splits, stream);
  return no_kernel;
}

}    // namespace qcfs::cuda
