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
// Operands: q int32 [N, H, W, C]; weights packed as in tensor_layout.h as if K were the channels of one tap: int8
// [2, stages, O rounded up to 64, 64]; result as in the contract, T in the bits of the mask bytes.
//
// A block computes 32 pixels x 64 channels, each of its four warps 16 x 32 of them. An image has few channels, so a tap
// is no whole 16-byte piece, which an asynchronous copy could take. Instead a thread gathers four neighbouring k of
// four pixels, splits them into digits and stores a word of each digit.
//
//           64 of K                       64 channels                shared memory, 28 KiB: two of each, one filled
//         +----------+                  +-------------+              while the other is multiplied; one barrier a stage
//     32  | q2: s8   |                  | w1: s8      |
//     px  +----------+                  +-------------+              registers: 64 accumulators, 12 gathered words,
//         | q1: u8   |                  | w0: s8      |              16 addresses; three blocks share an SM
//         +----------+                  +-------------+
//         | q0: u8   |
//         +----------+
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/tensor_layout.h"

namespace qcfs::cuda {

constexpr int image_rows = 32, image_cols = 64, image_warp_cols = 32, image_tensor_threads = 128;
constexpr int image_pixel_plane = image_rows * stage_bytes, image_weight_plane = image_cols * stage_bytes;    // a digit
constexpr int image_stage = 3 * image_pixel_plane + 2 * image_weight_plane;
constexpr std::int64_t max_image_k = 32000;

struct ImageTensorParams {
  AnalogConv a;
  const std::int8_t* packed;
  std::int32_t stages, k, padded_out, quads;
};

__global__ void __launch_bounds__(image_tensor_threads)
    image_tensor_kernel(const __grid_constant__ ImageTensorParams p) {
  QCFS_SHARED(shared);
  const AnalogConv& a = p.a;
  const std::int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::int32_t H = static_cast<std::int32_t>(a.in_h), W = static_cast<std::int32_t>(a.in_w);
  const std::int32_t C = static_cast<std::int32_t>(a.in_channels), O = static_cast<std::int32_t>(a.out_channels);
  const std::int32_t out_w = static_cast<std::int32_t>(a.out_w), area = static_cast<std::int32_t>(a.out_h) * out_w;
  const std::int32_t pixels = static_cast<std::int32_t>(a.batch) * area;
  const std::int32_t first_pixel = static_cast<std::int32_t>(blockIdx.x) * image_rows;
  const std::int32_t first_channel = static_cast<std::int32_t>(blockIdx.y) * image_cols;

  // Thread i gathers k = 4 * (i % 16) .. + 3 of a stage for rows i / 16, i / 16 + 16, ..
  constexpr int row_step = image_tensor_threads / 16, gathered = image_rows / row_step;
  const std::int32_t quad = thread % 16, first_row = thread / 16;
  std::int32_t y[gathered], x[gathered];    // under tap (0, 0)
  std::int64_t from[gathered];              // offset of that pixel
  QCFS_UNROLL
  for (int i = 0; i < gathered; ++i) {
    const std::int32_t at = first_pixel + first_row + row_step * i;
    const bool exists = at < pixels;
    y[i] = exists ? at % area / out_w * static_cast<std::int32_t>(a.g.stride_h) - static_cast<std::int32_t>(a.g.pad_h)
                  : -(1 << 30);
    x[i] = at % out_w * static_cast<std::int32_t>(a.g.stride_w) - static_cast<std::int32_t>(a.g.pad_w);
    from[i] = exists ? ((static_cast<std::int64_t>(at / area) * H + y[i]) * W + x[i]) * C : 0;
  }

  const std::int32_t warp_row = warp % 2 * 16, warp_col = warp / 2 * image_warp_cols;
  std::int32_t acc[4][image_warp_cols / 8][4] = {};    // of 256^i
  const std::int32_t a_lane = chunk_offset(warp_row + lane % 16, lane / 16);
  const std::int32_t b_lane = chunk_offset(warp_col + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  QCFS_ROLLED
  for (std::int32_t stage = 0; stage < p.stages; ++stage) {
    unsigned char* const tiles = shared + stage % 2 * image_stage;
    unsigned char* const weights = tiles + 3 * image_pixel_plane;
    QCFS_UNROLL
    for (int i = 0; i < 2 * image_weight_plane / 16; i += image_tensor_threads) {
      const std::int32_t piece = i + thread, digit = piece / (image_weight_plane / 16),
                         row = piece % (image_weight_plane / 16) / 4;
      const std::int64_t at =
          (static_cast<std::int64_t>(digit) * p.stages + stage) * p.padded_out + first_channel + row;
      copy16(weights + digit * image_weight_plane + chunk_offset(row, piece % 4),
             p.packed + at * stage_bytes + piece % 4 * 16, true);
    }
    copies_commit();
    std::uint32_t digits[3][gathered] = {};    // q2, q1, q0
    QCFS_UNROLL
    for (int j = 0; j < 4; ++j) {
      const std::int32_t k = stage * stage_bytes + 4 * quad + j, tap = k / C;
      const std::int32_t kernel_w = static_cast<std::int32_t>(a.g.kernel_w);
      const std::int32_t dy = tap / kernel_w * static_cast<std::int32_t>(a.g.dilation_h);
      const std::int32_t dx = tap % kernel_w * static_cast<std::int32_t>(a.g.dilation_w);
      // Within an image this fits (analog()); a tap that does not exist may wrap, and is not read.
      const std::int32_t line = wrapping_add(wrapping_multiply(dy, W), dx);
      const std::int32_t offset = wrapping_add(wrapping_multiply(line, C), k % C);
      QCFS_UNROLL
      for (int i = 0; i < gathered; ++i) {
        const bool valid = k < p.k && static_cast<std::uint32_t>(y[i] + dy) < static_cast<std::uint32_t>(H) &&
                           static_cast<std::uint32_t>(x[i] + dx) < static_cast<std::uint32_t>(W);
        const std::uint32_t q = valid ? static_cast<std::uint32_t>(a.x[from[i] + offset]) : 0u;
        QCFS_UNROLL
        for (int d = 0; d < 3; ++d) digits[d][i] |= (q >> (16 - 8 * d) & 0xff) << (8 * j);
      }
    }
    QCFS_UNROLL
    for (int i = 0; i < gathered; ++i) {
      unsigned char* to = tiles + chunk_offset(first_row + row_step * i, quad / 4) + quad % 4 * 4;
      QCFS_UNROLL
      for (int d = 0; d < 3; ++d) *reinterpret_cast<std::uint32_t*>(to + d * image_pixel_plane) = digits[d][i];
    }
    copies_wait<0>();
    __syncthreads();    // this stage is there; and everyone has left the other buffer, which is filled next
    QCFS_UNROLL
    for (int half = 0; half < 2; ++half) {
      std::uint32_t q2[4], q1[4], q0[4];
      load_matrices(q2, tiles + (a_lane ^ 32 * half));
      load_matrices(q1, tiles + image_pixel_plane + (a_lane ^ 32 * half));
      load_matrices(q0, tiles + 2 * image_pixel_plane + (a_lane ^ 32 * half));
      QCFS_UNROLL
      for (int j = 0; j < image_warp_cols / 16; ++j) {
        std::uint32_t w1[4], w0[4];
        const unsigned char* at = weights + j * 16 * stage_bytes + (b_lane ^ 32 * half);
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
  }
  __syncthreads();

  // Epilogue. In a 16 x 8 accumulator fragment lane l holds rows l/4 and l/4 + 8, channels 2*(l%4) and 2*(l%4) + 1. The
  // currents are transposed through 1 KiB of the warp's own, 16 channels at a time, so that each lane ends four
  // neighbouring channels.
  std::int32_t* currents = reinterpret_cast<std::int32_t*>(shared) + warp * 256;
  double power[2];
  QCFS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const std::int32_t at = first_pixel + warp_row + lane / 4 + 8 * r;
    power[r] = ldexp(1.0, a.exponent[at < pixels ? at / area : 0]);
  }
  QCFS_UNROLL
  for (int first = 0; first < image_warp_cols; first += 16) {
    QCFS_UNROLL
    for (int j = 0; j < 2; ++j) {
      QCFS_UNROLL
      for (int c = 0; c < 2; ++c) {
        const std::int32_t col = 8 * j + lane % 4 * 2 + c, o = first_channel + warp_col + first + col;
        if (o >= O) continue;
        const double gain = a.gain[o], offset = a.offset[o];
        QCFS_UNROLL
        for (int r = 0; r < 2; ++r) {
          std::int64_t sum = 0;
          QCFS_UNROLL
          for (int d = 3; d >= 0; --d) sum = sum * 256 + acc[d][first / 8 + j][2 * r + c];
          const double z = add_rn(mul_rn(static_cast<double>(sum), mul_rn(gain, power[r])), offset);
          currents[(lane / 4 + 8 * r) * 16 + col] = to_grid(z, a.low[o], a.high[o]);
        }
      }
    }
    sync_warp();
    QCFS_ROLLED
    for (std::int32_t i = lane; i < 64; i += 32) {
      const std::int32_t row = i / 4, col = i % 4 * 4;
      const std::int32_t at = first_pixel + warp_row + row, o = first_channel + warp_col + first + col;
      if (at >= pixels || o >= O) continue;
      if (p.quads) {
        std::int32_t current[4];
        load_values<4>(current, currents + row * 16 + col);
        image_epilogue<4>(a, at, o, current);
      } else {
        QCFS_ROLLED
        for (int j = 0; j < 4 && o + j < O; ++j) {
          const std::int32_t current[1] = {currents[row * 16 + col + j]};
          image_epilogue<1>(a, at, o + j, current);
        }
      }
    }
    sync_warp();
  }
}

}    // namespace qcfs::cuda
