// Everything around the layers: weight packing, pooling, counting, quantisation of the image. All of it is
// bound by memory: a thread has one output position and, where operands are bytes, 4 neighbouring channels.
//
//     pool         window sums of bits or counts -> counts [T, N, OH, OW, C]; the OR of masks; the largest of counts
//     pool_counts  window sums of int32 [images, H, W, C]
//     count        bits or counts summed over steps first .. last-1 -> int32 [1 or last - first, n]
//     quantize     float32 [N, C, H, W], any strides -> int32 NHWC, x = q * 2^e, e per sample
//
// Exact: integers, and for quantize float32 steps rounded to nearest (never fused) and powers of two.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/tensor_layout.h"

namespace qcfs::cuda {

constexpr int elementwise_threads = 256, elementwise_warps = elementwise_threads / 32;

QCFS_DEVICE std::int64_t global_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * elementwise_threads + threadIdx.x;
}

template <typename Params>
int launch_elements(void (*kernel)(Params), std::int64_t elements, void* stream, const Params& params,
                    LaunchOptions options = {}) {
  return launch_kernel(kernel, Grid{ceil_div(elements, elementwise_threads)}, elementwise_threads, 0, stream, params,
                       options);
}

// A launch that does nothing, to stand between two that must not overlap.
struct Empty {};
__global__ void empty_kernel(const __grid_constant__ Empty) {}

// A row of bytes cut into quads: four neighbouring bytes, the last quad perhaps fewer. A thread reads a quad into one
// word and writes it from one: in one access where every row is aligned to 4, else byte by byte.
struct ByteRow {
  std::int64_t quads;
  std::int64_t width;
  bool aligned;
};

inline ByteRow byte_row(std::int64_t width, const void* a, const void* b) {
  const bool aligned = (reinterpret_cast<std::uintptr_t>(a) | reinterpret_cast<std::uintptr_t>(b)) % 4 == 0;
  return {ceil_div(width, 4), width, width % 4 == 0 && aligned};
}

// `p` is byte `first` of its row.
QCFS_DEVICE std::uint32_t load_quad(const std::uint8_t* p, const ByteRow& row, std::int64_t first) {
  if (row.aligned) return load_bytes<4>(p);
  std::uint32_t word = 0;
  for (int j = 0; j < 4 && first + j < row.width; ++j) word |= static_cast<std::uint32_t>(p[j]) << (8 * j);
  return word;
}

QCFS_DEVICE void store_quad(std::uint8_t* p, const ByteRow& row, std::int64_t first, std::uint32_t word) {
  if (row.aligned) {
    store_bytes<4>(p, word);
  } else {
    for (int j = 0; j < 4 && first + j < row.width; ++j) p[j] = static_cast<std::uint8_t>(word >> (8 * j));
  }
}

// ------------------------------------------------------------------------------------------ packing

struct PackParams {
  const void* weight;    // [taps, C, O]
  std::int8_t* packed;
  std::int32_t taps, channels, out_channels, padded_out, stages, digits, piece;
};

__global__ void pack_kernel(const __grid_constant__ PackParams p) {
  const std::int64_t index = global_thread();
  const std::int64_t plane = static_cast<std::int64_t>(p.stages) * p.padded_out * stage_bytes;
  if (index >= plane) return;
  const std::int32_t k = static_cast<std::int32_t>(index % stage_bytes);
  const std::int32_t o = static_cast<std::int32_t>(index / stage_bytes % p.padded_out);
  const std::int32_t stage = static_cast<std::int32_t>(index / stage_bytes / p.padded_out);
  const Source from = packed_source(stage, k, p.channels, p.piece);
  const bool exists = from.tap < p.taps && from.channel < p.channels && o < p.out_channels;
  const std::int64_t at =
      exists ? (static_cast<std::int64_t>(from.tap) * p.channels + from.channel) * p.out_channels + o : 0;
  if (p.digits == 2) {
    const std::int32_t w = exists ? static_cast<const std::int16_t*>(p.weight)[at] : 0;
    p.packed[index] = high_digit(w);
    p.packed[plane + index] = low_digit(w);
  } else {
    p.packed[index] = exists ? static_cast<const std::int8_t*>(p.weight)[at] : static_cast<std::int8_t>(0);
  }
}

// ----------------------------------------------------------------------------------------- counting

struct CountParams {
  Count a;
  ByteRow row;
};

__global__ void count_kernel(const __grid_constant__ CountParams p) {
  wait_for_launch_before();
  const std::int64_t quad = global_thread(), n = p.a.elements;
  if (quad >= p.row.quads) return;
  std::uint32_t sum[4] = {0, 0, 0, 0}, word = 0;
  for (std::int64_t t = p.a.first; t < p.a.last; ++t) {
    const bool mask = p.a.coding == Coding::mask;
    if (!mask || t % 8 == 0 || t == p.a.first)
      word = load_quad(p.a.x + (mask ? t / 8 : t) * n + 4 * quad, p.row, 4 * quad);
    const std::uint32_t step = mask ? word >> (t % 8) & 0x01010101u : word;
    QCFS_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += step >> (8 * j) & 0xff;
    if (!p.a.prefix && t + 1 != p.a.last) continue;
    std::int32_t* out = p.a.out + (p.a.prefix ? (t - p.a.first) * n : 0) + 4 * quad;
    QCFS_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (4 * quad + j < n) out[j] = static_cast<std::int32_t>(sum[j]);
    }
  }
}

// ------------------------------------------------------------------------------------------ pooling

struct PoolParams {
  Pool a;
  ByteRow channels;
  std::int64_t planes;    // outputs are numbered over input planes, samples, rows, columns, quads of channels
};

QCFS_DEVICE std::uint32_t larger_bytes(std::uint32_t a, std::uint32_t b) {
  std::uint32_t word = 0;
  QCFS_UNROLL
  for (int shift = 0; shift < 32; shift += 8) {
    const std::uint32_t x = a >> shift & 0xff, y = b >> shift & 0xff;
    word |= (x > y ? x : y) << shift;
  }
  return word;
}

// One thread has four channels of one output position and all the steps of an input plane. Sums stay below 256
// (contract), so four of them are added in one word.
__global__ void pool_kernel(const __grid_constant__ PoolParams p) {
  wait_for_launch_before();
  const Pool& a = p.a;
  std::int64_t index = global_thread();
  if (index >= p.planes * a.batch * a.out_h * a.out_w * p.channels.quads) return;
  const std::int64_t first = index % p.channels.quads * 4;
  index /= p.channels.quads;
  const std::int64_t col = index % a.out_w, line = index / a.out_w, row = line % a.out_h;
  const std::int64_t sample = line / a.out_h % a.batch, plane = line / a.out_h / a.batch;
  const bool bits = a.coding == Coding::mask && a.pooling == Pooling::sum;
  const std::int32_t steps = bits ? static_cast<std::int32_t>(a.steps - 8 * plane < 8 ? a.steps - 8 * plane : 8) : 1;
  const std::int64_t *h = a.rows + 3 * row, *w = a.cols + 3 * col;
  const std::uint8_t* x = a.x + (plane * a.batch + sample) * a.in_h * a.in_w * a.channels + first;
  std::uint32_t sum[8] = {};
  for (std::int64_t r = h[0]; r < h[1]; ++r) {
    for (std::int64_t c = w[0]; c < w[1]; ++c) {
      const std::uint32_t word = load_quad(x + (r * a.in_w + c) * a.channels, p.channels, first);
      if (bits) {
        QCFS_UNROLL
        for (int t = 0; t < 8; ++t) sum[t] += word >> t & 0x01010101u;
      } else if (a.pooling == Pooling::largest) {
        sum[0] = larger_bytes(sum[0], word);
      } else {
        sum[0] = a.pooling == Pooling::any ? sum[0] | word : sum[0] + word;
      }
    }
  }
  const auto factor = static_cast<std::uint32_t>(a.multiple == 0 ? 1 : a.multiple / (h[2] * w[2]));
  const std::int64_t out_plane = a.batch * a.out_h * a.out_w * a.channels;
  std::uint8_t* out =
      a.out + (bits ? 8 * plane : plane) * out_plane + ((sample * a.out_h + row) * a.out_w + col) * a.channels + first;
  QCFS_UNROLL
  for (int t = 0; t < 8; ++t) {
    if (t < steps) store_quad(out + t * out_plane, p.channels, first, sum[t] * factor);
  }
}

__global__ void pool_counts_kernel(const __grid_constant__ PoolCounts p) {
  wait_for_launch_before();
  std::int64_t index = global_thread();
  if (index >= p.images * p.out_h * p.out_w * p.channels) return;
  std::int32_t* out = p.out + index;
  const std::int64_t channel = index % p.channels;
  index /= p.channels;
  const std::int64_t col = index % p.out_w, row = index / p.out_w % p.out_h, image = index / p.out_w / p.out_h;
  const std::int64_t *h = p.rows + 3 * row, *w = p.cols + 3 * col;
  const std::int32_t* x = p.x + image * p.in_h * p.in_w * p.channels + channel;
  std::int32_t sum = 0;
  for (std::int64_t r = h[0]; r < h[1]; ++r) {
    for (std::int64_t c = w[0]; c < w[1]; ++c) sum += x[(r * p.in_w + c) * p.channels];
  }
  *out = sum * (p.multiple == 0 ? 1 : static_cast<std::int32_t>(p.multiple / (h[2] * w[2])));
}

// ------------------------------------------------------------------------------------- quantization

struct QuantizeParams {
  Quantize a;
  int size;                  // bits of a pixel without the sign: a.largest = 2^size - 1
  std::uint32_t* largest;    // [batch + 1]: bits of the largest |x'| of each sample (floats >= 0 order as their bits
                             // do), then the flag for NaN and infinity
};

constexpr std::uint32_t infinity_bits = 0x7f800000;    // NaNs lie above it

// One thread has all channels of one pixel; blocks do not cross samples.
struct ImagePixel {
  std::int64_t sample, pixel;
  const float* x;    // channel 0
  bool exists;
};

QCFS_DEVICE ImagePixel image_pixel(const Quantize& a) {
  const std::int64_t pixels = a.height * a.width;
  const std::int64_t blocks = (pixels + elementwise_threads - 1) / elementwise_threads;    // of a sample
  const std::int64_t sample = blockIdx.x / blocks;
  const std::int64_t pixel = blockIdx.x % blocks * elementwise_threads + threadIdx.x;
  const float* x = a.x + sample * a.stride_n + pixel / a.width * a.stride_h + pixel % a.width * a.stride_w;
  return {sample, pixel, x, pixel < pixels};
}

QCFS_DEVICE float transformed(const Quantize& a, const ImagePixel& i, std::int64_t channel) {
  return add_rn(mul_rn(i.x[a.source[channel] * a.stride_c], a.scale[channel]), a.shift[channel]);
}

// Atomics on one address are executed one after the other, so a block issues one.
__global__ void largest_kernel(const __grid_constant__ QuantizeParams p) {
  QCFS_SHARED(shared);
  std::uint32_t* const of_warps = reinterpret_cast<std::uint32_t*>(shared);
  const ImagePixel i = image_pixel(p.a);
  std::uint32_t largest = 0;
  for (std::int64_t c = 0; i.exists && c < p.a.channels; ++c) {
    const std::uint32_t size = bits_of(transformed(p.a, i, c)) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < elementwise_warps; ++w) largest = of_warps[w] > largest ? of_warps[w] : largest;
  atomicMax(p.largest + i.sample, largest);
}

__global__ void quantize_kernel(const __grid_constant__ QuantizeParams p) {
  wait_for_launch_before();
  const ImagePixel i = image_pixel(p.a);
  if (!i.exists) return;
  std::int32_t* out = p.a.out + (i.sample * p.a.height * p.a.width + i.pixel) * p.a.channels;
  const std::uint32_t bits = p.largest[i.sample];
  const bool finite = bits < infinity_bits;
  int e = 0;
  if (finite && bits != 0) {
    // largest = f * 2^e with f in [1/2, 1), and a.largest = (1 - 2^-size) * 2^size.
    const double f = frexp(static_cast<double>(float_of(bits)), &e);
    e -= f <= static_cast<double>(p.a.largest) / (p.a.largest + 1) ? p.size : p.size - 1;
  }
  const double unit = ldexp(1.0, -e);
  for (std::int64_t c = 0; c < p.a.channels; ++c) {
    out[c] = finite ? static_cast<std::int32_t>(rint(mul_rn(static_cast<double>(transformed(p.a, i, c)), unit))) : 0;
  }
  if (i.pixel != 0) return;
  p.a.exponent[i.sample] = e;
  if (!finite) p.largest[p.a.batch] = 1;
}

}    // namespace qcfs::cuda
