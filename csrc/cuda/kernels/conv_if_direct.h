// Spiking convolution without tensor cores: grouped and depthwise layers, layers with few inputs, and the sum of
// partial products of a split K. One thread owns one output neuron and its T accumulators (T <= 8 registers);
// neighbouring threads own neighbouring channels, so weights, masks of a depthwise layer and outputs are read and
// written coalesced, and the masks of an ungrouped layer are broadcast.
//
//     thread (pixel, o):   for tap, for channel of o's group:  w = weight[tap, channel, o]
//                                                              acc[t] += bit t of mask * w     t = 0 .. T-1
//                          then the same end as conv_if.h: residuals, integrate, fire, soft reset, one byte
//
// Operands as in conv_if.h, but weights int16 or int8 [KH, KW, C/groups, O] as in the contract. Exact: 32-bit integers.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/parameters.h"

namespace qcfs::cuda {

template <int T>
__global__ void __launch_bounds__(128, 4) conv_if_direct_kernel(const __grid_constant__ LayerParams p) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (index >= static_cast<std::int64_t>(p.pixels) * p.out_channels) return;
  const std::int32_t o = static_cast<std::int32_t>(index % p.out_channels);
  const std::int32_t pixel = static_cast<std::int32_t>(index / p.out_channels);
  const std::int32_t col = pixel % p.out_w, row = pixel / p.out_w % p.out_h, sample = pixel / (p.out_w * p.out_h);
  std::int32_t acc[T][1];
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) acc[t][0] = 0;
  for (std::int32_t i = 0; i < p.product_count; ++i) {
    const ProductParams& q = p.products[i];
    const std::int32_t inputs = q.channels / q.groups;
    const std::int32_t first = o / (p.out_channels / q.groups) * inputs;
    const std::int64_t plane = static_cast<std::int64_t>(p.batch) * q.height * q.width * q.channels;
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
                                               : static_cast<const std::int8_t*>(q.weight)[at] * 256;
          if (q.count) {
            QCFS_UNROLL
            for (int t = 0; t < T; ++t) {
              if (t < p.steps) acc[t][0] += w * from[t * plane + c];
            }
          } else {
            const std::int32_t mask = from[c];
            QCFS_UNROLL
            for (int t = 0; t < T; ++t) acc[t][0] += (mask >> t) & 1 ? w : 0;
          }
        }
      }
    }
  }
  p.out[index] = static_cast<std::uint8_t>(integrate_and_fire<T, 1>(p, index, o, acc));
}

// Adds the slices of a split K (none for a layer without products) and ends the layer.
template <int T>
__global__ void __launch_bounds__(128, 4) epilogue_kernel(const __grid_constant__ LayerParams p) {
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (index >= plane) return;
  std::int32_t acc[T][1];
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    acc[t][0] = 0;
    if (t < p.steps) {
      for (std::int32_t i = 0; i < p.slices; ++i)
        acc[t][0] = wrapping_add(acc[t][0], p.partial[(i * p.steps + t) * plane + index]);
    }
  }
  const std::int32_t o = static_cast<std::int32_t>(index % p.out_channels);
  p.out[index] = static_cast<std::uint8_t>(integrate_and_fire<T, 1>(p, index, o, acc));
}

template <int T>
int launch_direct(const LayerParams& p, void* stream) {
  const Grid grid{ceil_div(static_cast<std::int64_t>(p.pixels) * p.out_channels, 128)};
  return launch_kernel(conv_if_direct_kernel<T>, grid, 128, 0, stream, p);
}

template <int T>
int launch_epilogue(const LayerParams& p, void* stream) {
  const Grid grid{ceil_div(static_cast<std::int64_t>(p.pixels) * p.out_channels, 128)};
  return launch_kernel(epilogue_kernel<T>, grid, 128, 0, stream, p);
}

}    // namespace qcfs::cuda
