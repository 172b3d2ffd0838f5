// Convolution of the image without tensor cores, then the neuron's steps: a first layer that is grouped, or has too few
// inputs or outputs for image_tensor.h.
//
//     acc = sum_k w[k] * q[k]        k over taps and channels; 16 and 24 bits, summed in 64
//     z   = acc * (gain[c] * 2^e[n]) + offset[c]      double, each operation rounded to nearest, never fused
//     I   = clamp(rint(z), low[c], high[c])           halves to even
//     then I itself, or  v[-1] = n/2; v += I; s[t] = v >= n; v -= n * s[t]  for t = 0 .. T-1
//
// Layouts: q int32 [N, H, W, C]; weights int16 [KH, KW, C/groups, O]; T sits in the bits of the resulting mask bytes
// [ceil(T/8), N, OH, OW, O].
//
//              O channels: 4 neighbours a thread
//            +----+----+----+
//     4 px   | 4x4| 4x4| .. |   one 64-bit accumulator an output (32 registers), one step of K at a time,
//     a row  +----+----+----+   no shared memory
//
// Exact: sums stay below 2^53 (contract), so their conversion to double is exact too.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "cuda/device.h"
#include "cuda/kernels/image_epilogue.h"

namespace qcfs::cuda {

constexpr int direct_pixels = 4, direct_channels = 4, image_direct_threads = 128;

struct ImageDirectParams {
  AnalogConv a;
  std::int64_t col_blocks, channel_blocks;
};

// Channels of a thread lie in one group: a group's outputs are cut into blocks of four, the last one narrower.
__global__ void __launch_bounds__(image_direct_threads)
    image_direct_kernel(const __grid_constant__ ImageDirectParams p) {
  wait_for_launch_before();
  const AnalogConv& a = p.a;
  const Geometry& g = a.g;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * image_direct_threads + threadIdx.x;
  if (index >= a.batch * a.out_h * p.col_blocks * p.channel_blocks) return;
  const std::int64_t group_in = a.in_channels / g.groups, group_out = a.out_channels / g.groups;
  const std::int64_t blocks = p.channel_blocks / g.groups;    // of a group
  const std::int64_t block = index % p.channel_blocks, group = block / blocks;
  const std::int64_t o = group * group_out + block % blocks * direct_channels;
  const std::int64_t end = (group + 1) * group_out;
  const std::int64_t col = index / p.channel_blocks % p.col_blocks * direct_pixels;
  const std::int64_t line = index / p.channel_blocks / p.col_blocks;    // sample and row
  const std::int64_t row = line % a.out_h, sample = line / a.out_h;
  std::int64_t acc[direct_pixels][direct_channels] = {};
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t y = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (y < 0 || y >= a.in_h) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t x0 = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      const std::int32_t* from = a.x + ((sample * a.in_h + y) * a.in_w + x0) * a.in_channels + group * group_in;
      const std::int16_t* weight = a.weight + (kh * g.kernel_w + kw) * group_in * a.out_channels + o;
      bool inside[direct_pixels];
      QCFS_UNROLL
      for (int i = 0; i < direct_pixels; ++i) {
        const std::int64_t x = x0 + i * g.stride_w;
        inside[i] = col + i < a.out_w && x >= 0 && x < a.in_w;
      }
      for (std::int64_t k = 0; k < group_in; ++k, weight += a.out_channels) {
        std::int32_t w[direct_channels], q[direct_pixels];
        QCFS_UNROLL
        for (int j = 0; j < direct_channels; ++j) w[j] = o + j < end ? weight[j] : 0;
        QCFS_UNROLL
        for (int i = 0; i < direct_pixels; ++i) q[i] = inside[i] ? from[i * g.stride_w * a.in_channels + k] : 0;
        QCFS_UNROLL
        for (int i = 0; i < direct_pixels; ++i) {
          QCFS_UNROLL
          for (int j = 0; j < direct_channels; ++j) acc[i][j] += static_cast<std::int64_t>(q[i]) * w[j];
        }
      }
    }
  }
  const ImageChannels channels =
      image_channels(a, static_cast<std::int32_t>(o), static_cast<std::int32_t>(end - o), false);
  const double power = ldexp(1.0, a.exponent[sample]);
  QCFS_UNROLL
  for (int i = 0; i < direct_pixels; ++i) {
    if (col + i < a.out_w) end_image(a, channels, line * a.out_w + col + i, acc[i], power);
  }
}

}    // namespace qcfs::cuda
