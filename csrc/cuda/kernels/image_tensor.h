// Convolution of the image on tensor cores, then the neuron's steps: the first layer of most networks.
//
//     acc = sum_k w[k] * q[k]        k over taps and channels; w has 16 bits, q 24; exact
//     z   = acc * (gain[c] * 2^e[n]) + offset[c]      double, each operation rounded to nearest, never fused
//     I   = clamp(rint(z), low[c], high[c]);   then I itself, or v[-1] = n/2; v += I; s[t] = v >= n; v -= n * s[t]
//
// Both factors are base-256 digits: w = 256 * w1 + w0 with w0, w1 in -128 .. 127, and q = 65536 * q2 + 256 * q1 + q0
// with q0, q1 in 0 .. 255 and q2 in -128 .. 127. Six int8 products give acc, in four 32-bit accumulators an output:
//
//     acc = 2^24 * sum w1 q2  +  2^16 * sum (w1 q1 + w0 q2)  +  2^8 * sum (w1 q0 + w0 q1)  +  sum w0 q0
//
// None of the four can reach 2^31 while K <= 32000 (max_image_k): the largest sum, of w1 q0 + w0 q1, stays within
// 32000 * 2 * 128 * 255. The currents do not depend on t, so this runs once for all steps.
//
// Operands: q int32 [N, H, W, C]; weights packed as in tensor_layout.h, in pieces of four channels; result as in the
// contract, T in the bits of the mask bytes.
//
// A block computes 32 pixels x 64 channels, each of its four warps 16 x 32 of them. An image has few channels, so a tap
// is no whole 16-byte piece, which an asynchronous copy could take. K is therefore cut into pieces of four channels of
// a tap, most often all there are. A thread gathers four pieces of one pixel, each at one address under one condition,
// and splits them into digits, 16 bytes of each.
//
//           64 of K                       64 channels                shared memory, 28 KiB: two of each, one filled
//         +----------+                  +-------------+              while the other is multiplied; one barrier a stage
//     32  | q2: s8   |                  | w1: s8      |
//     px  +----------+                  +-------------+              registers: 64 accumulators, 16 gathered values,
//         | q1: u8   |                  | w0: s8      |              on their way while the stage before is multiplied;
//         +----------+                  +-------------+              four blocks share an SM
//         | q0: u8   |
//         +----------+
//
// Which piece is which tap is the same for all pixels. The block works it out for eight stages at once, a piece a
// thread, and keeps it in another 2 KiB.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/image_epilogue.h"
#include "cuda/kernels/tensor_layout.h"

namespace qcfs::cuda {

constexpr int image_rows = 32, image_cols = 64, image_warp_cols = 32, image_tensor_threads = 128;
constexpr int image_pixel_plane = image_rows * stage_bytes, image_weight_plane = image_cols * stage_bytes;    // a digit
constexpr int image_stage = 3 * image_pixel_plane + 2 * image_weight_plane;
constexpr int image_stage_pieces = stage_bytes / image_piece, image_known_stages = 8;
constexpr int image_shared = 2 * image_stage + image_rows * 8 + image_known_stages * image_stage_pieces * 16;
constexpr std::int64_t max_image_k = 32000;

struct ImageTensorParams {
  AnalogConv a;
  const std::int8_t* packed;
  std::int64_t weight_plane;    // bytes of a digit of the weights
  std::int32_t half_stages, pieces_per_tap, padded_out;
  std::int32_t aligned;    // four neighbouring channels are stored at once
};

// A piece of K: how many of its channels exist (4 and more: all), its tap's distance in x and y from tap (0, 0), and
// the distance of both in q, in bytes, which analog() keeps within 32 bits.
QCFS_DEVICE uint4 image_piece_at(const AnalogConv& a, std::uint32_t index, std::uint32_t pieces_per_tap) {
  const std::uint32_t C = static_cast<std::uint32_t>(a.in_channels), W = static_cast<std::uint32_t>(a.in_w);
  const std::uint32_t kernel_h = static_cast<std::uint32_t>(a.g.kernel_h);
  const std::uint32_t kernel_w = static_cast<std::uint32_t>(a.g.kernel_w);
  const std::uint32_t tap = index / pieces_per_tap, channel = index % pieces_per_tap * image_piece;
  if (tap >= kernel_h * kernel_w) return uint4{0, 0, 0, 0};
  const std::uint32_t dx = tap % kernel_w * static_cast<std::uint32_t>(a.g.dilation_w);
  const std::uint32_t dy = tap / kernel_w * static_cast<std::uint32_t>(a.g.dilation_h);
  return uint4{C - channel, dx, dy, ((dy * W + dx) * C + channel) * 4};
}

__global__ void __launch_bounds__(image_tensor_threads)
    image_tensor_kernel(const __grid_constant__ ImageTensorParams p) {
  QCFS_SHARED(shared);
  const SharedAddress tiles = in_register(shared_address(shared));
  const AnalogConv& a = p.a;
  const std::uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::uint32_t out_w = static_cast<std::uint32_t>(a.out_w), area = static_cast<std::uint32_t>(a.out_h) * out_w;
  const std::int32_t pixels = static_cast<std::int32_t>(a.batch) * static_cast<std::int32_t>(area);
  const std::int32_t O = static_cast<std::int32_t>(a.out_channels);
  const std::int32_t first_pixel = static_cast<std::int32_t>(blockIdx.x) * image_rows;
  const std::int32_t first_channel = static_cast<std::int32_t>(blockIdx.y) * image_cols;

  // A warp gathers 16 bytes of each stage, four pieces; a lane those of one pixel.
  static_assert(image_rows == 32 && image_tensor_threads / 32 * 4 == image_stage_pieces, "a pixel a lane");
  static_assert(image_known_stages * image_stage_pieces == image_tensor_threads, "a piece a thread");
  const bool exists = first_pixel + static_cast<std::int32_t>(lane) < pixels;
  const std::uint32_t at = exists ? first_pixel + lane : 0, sample = at / area, row = at % area / out_w;
  // Its first tap, modulo 2^32: what lies before the image is far beyond it.
  const std::uint32_t x = at % out_w * static_cast<std::uint32_t>(a.g.stride_w) - static_cast<std::uint32_t>(a.g.pad_w);
  const std::uint32_t y = row * static_cast<std::uint32_t>(a.g.stride_h) - static_cast<std::uint32_t>(a.g.pad_h);
  const std::uint32_t H = exists ? static_cast<std::uint32_t>(a.in_h) : 0, W = static_cast<std::uint32_t>(a.in_w);
  const std::int64_t first = (sample * a.in_h + static_cast<std::int32_t>(y)) * a.in_w + static_cast<std::int32_t>(x);
  const std::uint8_t* const origin = reinterpret_cast<const std::uint8_t*>(a.x + first * a.in_channels);
  double* const powers = reinterpret_cast<double*>(shared + 2 * image_stage);    // of the pixels' samples

  uint4* const pieces = reinterpret_cast<uint4*>(shared + 2 * image_stage + image_rows * 8);
  const auto find_pieces = [&](std::uint32_t stage) {
    pieces[thread] = image_piece_at(a, stage * image_stage_pieces + thread, p.pieces_per_tap);
    __syncthreads();
  };
  std::uint32_t gathered[4][image_piece];
  const auto gather = [&](std::uint32_t stage) {
    QCFS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint4 piece = pieces[stage % image_known_stages * image_stage_pieces + 4 * warp + i];
      const std::uint32_t channels = x + piece.y < W && y + piece.z < H ? piece.x : 0;
      const std::uint32_t* const from = reinterpret_cast<const std::uint32_t*>(origin + piece.w);
      QCFS_UNROLL
      for (std::uint32_t c = 0; c < image_piece; ++c) gathered[i][c] = c < channels ? from[c] : 0;
    }
  };
  const auto store_digits = [&](unsigned char* to) {
    std::uint32_t digits[3][4];    // q2, q1, q0 of each piece
    QCFS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t* q = gathered[i];
      const std::uint32_t low01 = pick_bytes(q[0], q[1], 0x5140), low23 = pick_bytes(q[2], q[3], 0x5140);
      digits[0][i] = pick_bytes(pick_bytes(q[0], q[1], 0x62), pick_bytes(q[2], q[3], 0x62), 0x5410);
      digits[1][i] = pick_bytes(low01, low23, 0x7632);
      digits[2][i] = pick_bytes(low01, low23, 0x5410);
    }
    QCFS_UNROLL
    for (int d = 0; d < 3; ++d) {
      *reinterpret_cast<uint4*>(to + d * image_pixel_plane) =
          uint4{digits[d][0], digits[d][1], digits[d][2], digits[d][3]};
    }
  };

  const std::int8_t* from = p.packed + static_cast<std::int64_t>(first_channel) * stage_bytes + thread * 16;
  const auto copy_weights = [&](SharedAddress to) {
    QCFS_UNROLL
    for (int d = 0; d < 2; ++d) {
      QCFS_UNROLL
      for (int half = 0; half < image_weight_plane; half += image_tensor_threads * 16) {
        copy16(to + d * image_weight_plane + half, from + d * p.weight_plane + half, true);
      }
    }
    copies_commit();
    from += p.padded_out * stage_bytes;
  };

  const std::int32_t warp_row = warp % 2 * 16, warp_col = warp / 2 * image_warp_cols;
  std::int32_t acc[4][image_warp_cols / 8][4] = {};    // of 256^i
  // Where in shared memory a thread puts its digits and its weights, and finds its operands. Row 8 * j + 2 * i + c of a
  // warp's weights is that of its channel 8 * i + 2 * j + c: the accumulators of a lane, columns 2 * (lane % 4) and the
  // next of each fragment j, are thus eight neighbouring channels.
  constexpr std::int32_t weights = 3 * image_pixel_plane;
  const std::uint32_t channel = thread / 4;
  const std::int32_t weight_row = channel % 8 / 2 * 8 + channel / 8 * 2 + channel % 2;
  std::int32_t digits_at = chunk_offset(lane, warp), copies_at = weights + chunk_offset(weight_row, thread % 4);
  std::int32_t a_at = chunk_offset(warp_row + lane % 16, lane / 16);
  std::int32_t b_at = weights + chunk_offset(warp_col + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  std::int32_t to_other = image_stage;    // from a stage's buffer to the other one
  copy_weights(tiles + copies_at);        // packed, so not by the launch before (pack_weight)
  find_pieces(0);
  wait_for_launch_before();
  if (warp == 0) powers[lane] = ldexp(1.0, a.exponent[sample]);
  gather(0);
  std::int32_t stage = 0;
  QCFS_ROLLED
  do {
    store_digits(shared + digits_at);
    copies_wait<0>();
    __syncthreads();    // this stage is there; and everyone has left the other buffer, which is filled next
    digits_at += to_other;
    copies_at += to_other;
    if (2 * stage + 2 < p.half_stages) {
      copy_weights(tiles + copies_at);
      if ((stage + 1) % image_known_stages == 0) find_pieces(stage + 1);
      gather(stage + 1);
    }
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (2 * stage + half == p.half_stages) break;    // the rest is padding
      std::uint32_t q2[4], q1[4], q0[4];
      const SharedAddress pixel_at = tiles + (a_at ^ 32 * half);
      load_matrices(q2, pixel_at);
      load_matrices(q1, pixel_at + image_pixel_plane);
      load_matrices(q0, pixel_at + 2 * image_pixel_plane);
      QCFS_UNROLL
      for (int j = 0; j < image_warp_cols / 16; ++j) {
        std::uint32_t w1[4], w0[4];
        const SharedAddress at = tiles + (b_at ^ 32 * half) + j * 16 * stage_bytes;
        load_matrices(w1, at);
        load_matrices(w0, at + image_weight_plane);
        QCFS_UNROLL
        for (int h = 0; h < 2; ++h) {
          multiply_signed(acc[3][2 * j + h], q2, w1[2 * h], w1[2 * h + 1]);
          multiply(acc[2][2 * j + h], q1, w1[2 * h], w1[2 * h + 1]);
          multiply_signed(acc[2][2 * j + h], q2, w0[2 * h], w0[2 * h + 1]);
          multiply(acc[1][2 * j + h], q0, w1[2 * h], w1[2 * h + 1]);
          multiply(acc[1][2 * j + h], q1, w0[2 * h], w0[2 * h + 1]);
          multiply(acc[0][2 * j + h], q0, w0[2 * h], w0[2 * h + 1]);
        }
      }
    }
    a_at += to_other;
    b_at += to_other;
    to_other = -to_other;
  } while (2 * ++stage < p.half_stages);

  // Epilogue. In a 16 x 8 accumulator fragment lane l holds rows l/4 and l/4 + 8, columns 2*(l%4) and 2*(l%4) + 1.
  std::int32_t pixel[2];
  double power[2];
  QCFS_UNROLL
  for (int r = 0; r < 2; ++r) {
    pixel[r] = first_pixel + warp_row + lane / 4 + 8 * r;
    power[r] = powers[warp_row + lane / 4 + 8 * r];
  }
  QCFS_UNROLL
  for (int quad = 0; quad < 2; ++quad) {
    const std::int32_t o = first_channel + warp_col + lane % 4 * 8 + quad * 4;
    if (o >= O) continue;
    const ImageChannels channels = image_channels(a, o, O - o, p.aligned);
    QCFS_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (pixel[r] >= pixels) continue;
      std::int64_t sum[4] = {};
      QCFS_UNROLL
      for (int c = 0; c < 4; ++c) {
        QCFS_UNROLL
        for (int d = 0; d < 4; ++d) sum[c] += std::int64_t{acc[d][2 * quad + c / 2][2 * r + c % 2]} * (1 << (8 * d));
      }
      end_image(a, channels, pixel[r], sum, power[r]);
    }
  }
}

}    // namespace qcfs::cuda
