// Spiking convolution and linear layer without tensor cores: grouped and depthwise layers, and layers with few inputs
// or outputs, where padding to the tensor cores' tiles would be most of the work.
//
// One thread owns one output neuron and its T <= 8 accumulators, in registers:
//
//     thread (pixel, o):   for tap, for channel of o's group:  w = weight[tap, channel, o]
//                                                              acc[t] += bit t of mask * w     t = 0 .. T-1
//                          then the epilogue: residuals, integrate, fire, soft reset, one mask byte
//
// Neighbouring threads own neighbouring channels. So weights, outputs and the masks of a depthwise layer are read and
// written coalesced, and all threads of a pixel read the same masks of an ungrouped layer.
//
// Operands as in conv_if_tensor.h, but weights int16 or int8 [KH, KW, C/groups, O] as in the contract. Exact: 32-bit
// integers.
#pragma once

#include <cstdint>

#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/parameters.h"

namespace qcfs::cuda {

constexpr int direct_threads = 128;

template <int T>
__global__ void __launch_bounds__(direct_threads, 4) conv_if_direct_kernel(const __grid_constant__ LayerParams p) {
  wait_for_launch_before();
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * direct_threads + threadIdx.x;
  if (index >= static_cast<std::int64_t>(p.pixels) * p.out_channels) return;
  const std::int32_t o = static_cast<std::int32_t>(index % p.out_channels);
  const std::int32_t pixel = static_cast<std::int32_t>(index / p.out_channels);
  const std::int32_t col = pixel % p.out_w, row = pixel / p.out_w % p.out_h, sample = pixel / (p.out_w * p.out_h);
  std::int32_t acc[T];
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) acc[t] = 0;
  const auto multiply_sums = [&](std::int32_t factor) {
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) acc[t] = wrapping_multiply(acc[t], factor);
  };
  for (std::int32_t i = 0; i < p.product_count; ++i) {
    const ProductParams& q = p.products[i];
    const std::int32_t inputs = q.channels / q.groups;
    const std::int32_t first = o / (p.out_channels / q.groups) * inputs;
    const std::int64_t plane = static_cast<std::int64_t>(p.batch) * q.height * q.width * q.channels;
    multiply_sums(i > 0 ? scale_ratio(p.products[i - 1], q, 0) : 1);
    for (std::int32_t kh = 0; kh < q.kernel_h; ++kh) {
      const std::int32_t y = row * q.stride_h - q.pad_h + kh * q.dilation_h;
      if (y < 0 || y >= q.height) continue;
      for (std::int32_t kw = 0; kw < q.kernel_w; ++kw) {
        const std::int32_t x = col * q.stride_w - q.pad_w + kw * q.dilation_w;
        if (x < 0 || x >= q.width) continue;
        const std::uint8_t* from =
            q.x + ((static_cast<std::int64_t>(sample) * q.height + y) * q.width + x) * q.channels + first;
        std::int64_t at = static_cast<std::int64_t>(kh * q.kernel_w + kw) * inputs * p.out_channels + o;
        for (std::int32_t c = 0; c < inputs; ++c, at += p.out_channels) {
          const std::int32_t w = p.digits == 2 ? static_cast<const std::int16_t*>(q.weight)[at]
                                               : static_cast<const std::int8_t*>(q.weight)[at];
          if (q.count) {
            QCFS_UNROLL
            for (int t = 0; t < T; ++t) {
              if (t < p.steps) acc[t] = wrapping_add(acc[t], w * from[t * plane + c]);
            }
          } else {
            const std::int32_t mask = from[c];
            QCFS_UNROLL
            for (int t = 0; t < T; ++t) acc[t] = wrapping_add(acc[t], (mask >> t) & 1 ? w : 0);
          }
        }
      }
    }
  }
  multiply_sums(scale_of(p.products[p.product_count - 1]));
  p.out[index] = end_neuron<T>(p, index, o, acc);
}

template <int T>
int launch_direct(const LayerParams& p, const Launch& launch) {
  const Grid grid{ceil_div(static_cast<std::int64_t>(p.pixels) * p.out_channels, direct_threads)};
  return launch_kernel(conv_if_direct_kernel<T>, grid, direct_threads, 0, launch.stream, p,
                       after_launch_before(launch));
}

}    // namespace qcfs::cuda
