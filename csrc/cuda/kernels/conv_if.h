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
// Registers a thread: T * row_parts * BN / 2 accumulators (64 to 128), BN / 4 weight fragments, 4 to 8 masks, about 40
// addresses: under 255 without spills at 128 threads, two blocks an SM, so that one multiplies while the other ends.
// Shared memory: stages * (BM * planes + BN) * 64 bytes, 20 to 60 KiB (cost_model.h).
// Exact: integers modulo 2^32, and the contract keeps every final value inside 32 bits. So the bits are shifted down
// before the product, not the sums after it: a sum scaled by 2^t could leave 32 bits.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels/layer.h"

namespace qcfs::cuda {

// What one thread copies: piece `column` = thread % 4 of each stage, of rows thread / 4, thread / 4 + threads / 4, ..
// of the mask tile and likewise of the weight tile. Everything that a stage needs is kept ready, so that the loop
// around the products spends a few additions a row on addresses; enter() computes it anew at the start, at a new
// product and at the second digit.
template <int loads>
struct Cursor {
  std::int32_t product, left;    // stages of this product still to load
  std::int32_t kh, kw, piece, pieces;
  std::int32_t height, width, dy, dx;    // of the input; of the tap
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
    left = stages - first_stage;
    pieces = pieces_per_tap(q.channels);
    const std::int32_t all = first_stage * (stage_bytes / piece_bytes) + column;
    piece = all % pieces;
    kh = all / pieces / q.kernel_w;
    kw = all / pieces % q.kernel_w;
    height = q.height;
    width = q.width;
    seat(q);
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

  // Position of tap (kh, kw) and the piece.
  QCFS_DEVICE void seat(const ProductParams& q) {
    dy = kh * q.dilation_h;
    dx = kw * q.dilation_w;
    offset = (static_cast<std::int64_t>(dy) * width + dx) * q.channels + piece * piece_bytes;
  }

  // On by one stage of the same product.
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
    seat(q);
  }
};

// `any_width`: some input's rows are not multiples of 16 bytes, or not so aligned.
template <int T, int parts, int cols, int warps, int stages, int planes, bool any_width>
struct ConvTile {
  static constexpr int rows = 16 * parts * warps;
  static constexpr int threads = 32 * warps;
  static constexpr int a_bytes = rows * planes * stage_bytes;
  static constexpr int bytes = a_bytes + cols * stage_bytes;
  static constexpr int pairs = cols / 16;              // of 8-channel fragments
  static constexpr int loads = rows * 4 / threads;     // 16-byte pieces of a mask tile a thread
  static constexpr int turn = 8 * (T == 8 ? 1 : 2);    // channels that pass through shared memory at a time at the end
  static_assert(rows * 4 % threads == 0 && threads % 32 == 0 && cols % 16 == 0, "tile shape");

  // Queues the copies of one stage into `to`, the thread's own place in it (rows threads / 4 apart have one swizzle).
  QCFS_DEVICE static void load(const LayerParams& p, unsigned char* to, const Cursor<loads>& k) {
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
        for (std::int32_t t = 0; t < count; ++t)
          copy_piece(q, k, place + t * rows * stage_bytes, from + t * plane, valid);
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
  QCFS_DEVICE static void copy_piece(const ProductParams& q, const Cursor<loads>& k, unsigned char* to,
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

  // acc += tile, for all T steps. `a_lane` and `b_lane` are the lane's places for ldmatrix in the two halves of the
  // tile; the second 32 bytes of K lie, by the swizzle, where bit 5 of the offset is the other way round. `count`: the
  // tile holds one plane a step instead of bits.
  QCFS_DEVICE static void accumulate(const unsigned char* stage, std::int32_t a_lane, std::int32_t b_lane, bool count,
                                     std::int32_t steps, std::int32_t (&acc)[T][parts][2 * pairs][4]) {
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      std::uint32_t b[pairs][4];
      QCFS_UNROLL
      for (int j = 0; j < pairs; ++j)
        load_matrices(b[j], stage + a_bytes + j * 16 * stage_bytes + (b_lane ^ 32 * half));
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        const unsigned char* at = stage + i * 16 * stage_bytes + (a_lane ^ 32 * half);
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

#if defined(QCFS_GROUPS)
  // The same by asynchronous products of four warps: the weights stay in shared memory.
  QCFS_DEVICE static void accumulate_group(const unsigned char* stage, std::int32_t a_lane, bool count,
                                           std::int32_t steps, std::int32_t (&acc)[T][parts][2 * pairs][4]) {
    std::uint32_t a[2][parts][T][4];
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        const unsigned char* at = stage + i * 16 * stage_bytes + (a_lane ^ 32 * half);
        std::uint32_t m[4];
        if (!count) load_matrices(m, at);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          if (!count) {
            QCFS_UNROLL
            for (int r = 0; r < 4; ++r) a[half][i][t][r] = (m[r] >> t) & 0x01010101u;
          } else if (t < steps) {
            load_matrices(a[half][i][t], at + (planes > 1 ? t : 0) * rows * stage_bytes);
          } else {
            QCFS_UNROLL
            for (int r = 0; r < 4; ++r) a[half][i][t][r] = 0;
          }
        }
      }
    }
    group_begin();
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) multiply_group(acc[t][i], a[half][i][t], stage + a_bytes + 32 * half);
      }
    }
    group_end([&](auto&& change) {
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
    });
  }
#endif

  // Word of [T, 16, turn] in shared memory; rows of 16 channels are swizzled so that 16 lanes' pairs meet all banks.
  QCFS_DEVICE static std::int32_t turned(std::int32_t t, std::int32_t row, std::int32_t col) {
    return (t * 16 + row) * turn + (turn == 16 ? col ^ (row & 2) * 4 : col);
  }

  // The end of the layer for 16 rows x `turn` channels of a warp, whose currents lie in `own`, [T, 16, turn]: four
  // neighbouring channels a lane at a time. Fused, the mask bytes go to `tile` [rows, cols]; else partial sums to
  // memory.
  QCFS_DEVICE static void finish(const LayerParams& p, const std::int32_t* own, unsigned char* tile,
                                 std::int32_t first_pixel, std::int32_t first_channel) {
    const std::int32_t lane = threadIdx.x % 32;
    const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
    QCFS_ROLLED
    for (std::int32_t i = lane; i < 4 * turn; i += 32) {
      const std::int32_t row = i / (turn / 4), col = i % (turn / 4) * 4;
      const std::int32_t at = first_pixel + row, o = first_channel + col;
      if (at >= p.pixels || o >= p.out_channels) continue;
      const std::int64_t index = static_cast<std::int64_t>(at) * p.out_channels + o;
      if (p.quads) {
        std::int32_t currents[T][4];
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) load_quad(currents[t], own + turned(t, row, col));
        if (p.partial == nullptr) {
          const std::uint32_t bits = integrate<T, 4>(p, index, o, currents);
          *reinterpret_cast<std::uint32_t*>(tile + row * cols + col) = bits;
        } else {
          QCFS_UNROLL
          for (int t = 0; t < T; ++t) {
            if (t < p.steps) store_quad(p.partial + (blockIdx.z * p.steps + t) * plane + index, currents[t]);
          }
        }
        continue;
      }
      QCFS_ROLLED
      for (int j = 0; j < 4 && o + j < p.out_channels; ++j) {
        std::int32_t currents[T][1];
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) currents[t][0] = own[turned(t, row, col) + j];
        if (p.partial == nullptr) {
          tile[row * cols + col + j] = static_cast<unsigned char>(integrate<T, 1>(p, index + j, o + j, currents));
        } else {
          QCFS_UNROLL
          for (int t = 0; t < T; ++t) {
            if (t < p.steps) p.partial[(blockIdx.z * p.steps + t) * plane + index + j] = currents[t][0];
          }
        }
      }
    }
  }
};

template <int T, int parts, int cols, int warps, int stages, int planes, bool any_width>
__global__ void __launch_bounds__(32 * warps, resident) conv_if_kernel(const __grid_constant__ LayerParams p) {
  using Tile = ConvTile<T, parts, cols, warps, stages, planes, any_width>;
  constexpr bool any_counts = planes > 1 || T == 1;
  QCFS_SHARED(shared);
  const std::int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::int32_t first_pixel = static_cast<std::int32_t>(blockIdx.x) * Tile::rows;
  const std::int32_t first_channel = static_cast<std::int32_t>(blockIdx.y) * cols;

  // This split's stages, once a digit; loads run ahead of the products by stages - 1.
  const std::int32_t stage0 = static_cast<std::int32_t>(blockIdx.z) * p.split_stages;
  const std::int32_t remaining = p.stages - stage0;
  const std::int32_t once = remaining < p.split_stages ? remaining : p.split_stages;
  const std::int32_t total = once * p.digits;
  std::int32_t product0 = 0, first0 = stage0;    // the split begins with this stage of this product
  for (;; ++product0) {
    const ProductParams& q = p.products[product0];
    const std::int32_t n = stages_of(q.kernel_h * q.kernel_w, q.channels);
    if (first0 < n) break;
    first0 -= n;
  }
  Cursor<Tile::loads> k;
  k.product = -1;
  k.left = 0;
  std::int32_t loaded = 0;
  unsigned char* const place = shared + chunk_offset(thread / 4, thread % 4);
  auto load_next = [&](std::int32_t slot) {
    if (loaded < total) {
      if (k.left == 0 || loaded == once) {
        const bool begins = loaded == 0 || loaded == once;
        k.enter(p, begins ? product0 : k.product + 1, begins ? first0 : 0, loaded >= once ? 1 : 0, first_pixel,
                first_channel, Tile::threads);
      } else {
        k.advance(p);
      }
      --k.left;
      ++loaded;
      Tile::load(p, place + slot * Tile::bytes, k);
    }
    copies_commit();
  };
  QCFS_ROLLED
  for (std::int32_t s = 0; s < stages - 1; ++s) load_next(s);

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

  const std::int32_t a_lane = chunk_offset(16 * parts * warp + lane % 16, lane / 16);
  const std::int32_t b_lane = chunk_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  std::int32_t product = product0 - 1, product_left = 0;    // of the stage being multiplied; count layers only
  std::int32_t slot = 0;
  QCFS_ROLLED
  for (std::int32_t done = 0; done < total; ++done) {
    copies_wait<stages - 2>();
#if defined(QCFS_GROUPS)
    if (warps % 4 == 0) publish_shared();
#endif
    __syncthreads();    // everyone's copies have landed, and everyone has left the slot that is refilled next
    load_next(slot == 0 ? stages - 1 : slot - 1);
    if (done == once) for_each_accumulator([](std::int32_t& a) { a = shift_left(a, 8); });
    if (any_counts) {
      if (product_left == 0 || done == once) {
        product = done == once ? product0 : product + 1;
        const ProductParams& q = p.products[product];
        product_left = stages_of(q.kernel_h * q.kernel_w, q.channels) - (product == product0 ? first0 : 0);
      }
      --product_left;
    }
    const bool count = any_counts && p.products[product].count;
#if defined(QCFS_GROUPS)
    if constexpr (warps % 4 == 0) {
      Tile::accumulate_group(shared + slot * Tile::bytes, a_lane, count, p.steps, acc);
    } else
#endif
    {
      Tile::accumulate(shared + slot * Tile::bytes, a_lane, b_lane, count, p.steps, acc);
    }
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  if (p.digits == 1) for_each_accumulator([](std::int32_t& a) { a = shift_left(a, 8); });
  copies_wait<0>();
  __syncthreads();

  // Lane l holds, of each 16 x 8 fragment, rows l/4 and l/4 + 8 and channels 2*(l%4) and one more. They are turned, a
  // few channels at a time, through shared memory of the warp's own, so that a lane ends four neighbouring channels.
  unsigned char* tile = shared;    // [rows, cols] mask bytes
  constexpr int turn = Tile::turn;
  std::int32_t* own = reinterpret_cast<std::int32_t*>(shared + Tile::rows * cols) + warp * (T * 16 * turn);
  static_assert(Tile::rows * cols + warps * T * 16 * turn * 4 <= stages * Tile::bytes, "shared memory");
  QCFS_UNROLL
  for (int i = 0; i < parts; ++i) {
    const std::int32_t row = 16 * (parts * warp + i);
    QCFS_UNROLL
    for (int first = 0; first < cols; first += turn) {
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        QCFS_UNROLL
        for (int j = 0; j < turn / 8; ++j) {
          QCFS_UNROLL
          for (int r = 0; r < 4; r += 2) {
            const std::int32_t (&pair)[4] = acc[t][i][first / 8 + j];
            const std::int32_t at = Tile::turned(t, lane / 4 + r / 2 * 8, 8 * j + lane % 4 * 2);
            *reinterpret_cast<int2*>(own + at) = int2{pair[r], pair[r + 1]};
          }
        }
      }
      sync_warp();
      Tile::finish(p, own, tile + row * cols + first, first_pixel + row, first_channel + first);
      sync_warp();
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
template <int T, Tile tile, bool any_width>
int launch_conv_if_tile(const LayerParams& p, int splits, void* stream) {
  constexpr TileShape s = tile_shape(T, tile);
  const Grid grid{ceil_div(p.pixels, s.rows), static_cast<int>(ceil_div(p.out_channels, s.cols)), splits};
  return launch_kernel(conv_if_kernel<T, s.row_parts, s.cols, s.warps, s.stages, s.a_planes, any_width>, grid,
                       s.warps * 32, tile_shared_bytes(s), stream, p);
}

// Inputs that are not rows of whole, aligned 16-byte pieces have kernels of the two smaller tiles only.
template <int T>
int launch_conv_if(const LayerParams& p, Tile tile, int splits, void* stream) {
  bool any_width = false;
  for (std::int32_t i = 0; i < p.product_count; ++i) any_width |= p.products[i].copy_bytes != 16;
  if constexpr (T > 1) {
    if (tile == Tile::counts) return launch_conv_if_tile<T, Tile::counts, true>(p, splits, stream);
  }
  if (any_width) return launch_conv_if_tile<T, Tile::small, true>(p, splits, stream);
  if (tile == Tile::small) return launch_conv_if_tile<T, Tile::small, false>(p, splits, stream);
  return launch_conv_if_tile<T, Tile::wide, false>(p, splits, stream);
}

}    // namespace qcfs::cuda
