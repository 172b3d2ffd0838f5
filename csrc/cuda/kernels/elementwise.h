// Everything around the spiking layers: weight packing, encoding, pooling, counting, quantisation of the image. All of
// it is bound by memory: a thread handles one output position and, where bytes are involved, 4 neighbouring channels.
//
//     encode       v[-1] = n/2; v += current; s = v >= n; v -= n*s     current int32 [P, C] -> masks [ceil(T/8), P, C]
//     pool         window sums of bits or counts -> counts [T, N, OH, OW, C]; with `any` the OR of masks
//     pool_counts  window sums of int32 [images, H, W, C]
//     count        bits or counts summed over T -> int32 [1 or T, n]
//     quantize     float32 [N, C, H, W], any strides -> int16 NHWC, x = q * 2^e, e per sample
//
// Exact: integers, and for quantize float32 steps rounded to nearest (never fused) and powers of two.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels/layer.h"

namespace qcfs::cuda {

constexpr int elementwise_threads = 256;

QCFS_DEVICE std::int64_t global_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * elementwise_threads + threadIdx.x;
}

template <typename Params>
int launch_elements(void (*kernel)(Params), std::int64_t elements, void* stream, const Params& params) {
  return launch_kernel(kernel, Grid{ceil_div(elements, elementwise_threads)}, elementwise_threads, 0, stream, params);
}

// Up to four bytes at a time: one access when everything is a multiple of four, else byte by byte.
struct Quad {
  std::int64_t count;    // quads in a row of `width` bytes
  std::int64_t width;
  bool whole;
};

inline Quad quads(std::int64_t width, const void* a, const void* b) {
  const bool aligned = (reinterpret_cast<std::uintptr_t>(a) | reinterpret_cast<std::uintptr_t>(b)) % 4 == 0;
  return {ceil_div(width, 4), width, width % 4 == 0 && aligned};
}

QCFS_DEVICE std::uint32_t load_quad(const std::uint8_t* p, const Quad& q, std::int64_t first) {
  if (q.whole) return *reinterpret_cast<const std::uint32_t*>(p);
  std::uint32_t word = 0;
  for (int j = 0; j < 4 && first + j < q.width; ++j) word |= static_cast<std::uint32_t>(p[j]) << (8 * j);
  return word;
}

QCFS_DEVICE void store_quad(std::uint8_t* p, const Quad& q, std::int64_t first, std::uint32_t word) {
  if (q.whole) {
    *reinterpret_cast<std::uint32_t*>(p) = word;
  } else {
    for (int j = 0; j < 4 && first + j < q.width; ++j) p[j] = static_cast<std::uint8_t>(word >> (8 * j));
  }
}

// ------------------------------------------------------------------------------------------ packing

struct PackParams {
  const void* weight;    // [taps, C, O]
  std::int8_t* packed;
  std::int32_t taps, channels, out_channels, padded_out, stages, digits;
};

static __global__ void pack_kernel(const __grid_constant__ PackParams p) {
  const std::int64_t index = global_thread();
  const std::int64_t plane = static_cast<std::int64_t>(p.stages) * p.padded_out * stage_bytes;
  if (index >= plane) return;
  const std::int32_t k = static_cast<std::int32_t>(index % stage_bytes);
  const std::int32_t o = static_cast<std::int32_t>(index / stage_bytes % p.padded_out);
  const std::int32_t stage = static_cast<std::int32_t>(index / stage_bytes / p.padded_out);
  const Tap from = packed_source(stage, k, pieces_per_tap(p.channels));
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

// ------------------------------------------------------------------------------- encoding, counting

static __global__ void encode_kernel(const __grid_constant__ Encode p) {
  const std::int64_t index = global_thread();
  const std::int64_t plane = p.pixels * p.channels;
  if (index >= plane) return;
  const std::int32_t z = p.current[index], n = p.threshold[index % p.channels];
  std::int32_t v = n / 2, bits = 0;
  for (std::int64_t t = 0; t < p.steps; ++t) {
    bits |= fire(v, z, n) << (t % 8);
    if (t % 8 == 7 || t + 1 == p.steps) {
      p.out[t / 8 * plane + index] = static_cast<std::uint8_t>(bits);
      bits = 0;
    }
  }
}

struct CountParams {
  Count a;
  Quad quad;
};

static __global__ void count_kernel(const __grid_constant__ CountParams p) {
  const std::int64_t quad = global_thread(), n = p.a.elements;
  if (quad >= p.quad.count) return;
  std::uint32_t sum[4] = {0, 0, 0, 0}, word = 0;
  for (std::int64_t t = 0; t < p.a.steps; ++t) {
    const bool mask = p.a.coding == Coding::mask;
    if (!mask || t % 8 == 0) word = load_quad(p.a.x + (mask ? t / 8 : t) * n + 4 * quad, p.quad, 4 * quad);
    const std::uint32_t step = mask ? word >> (t % 8) & 0x01010101u : word;
    QCFS_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += step >> (8 * j) & 0xff;
    if (!p.a.prefix && t + 1 != p.a.steps) continue;
    std::int32_t* out = p.a.out + (p.a.prefix ? t * n : 0) + 4 * quad;
    QCFS_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (4 * quad + j < n) out[j] = static_cast<std::int32_t>(sum[j]);
    }
  }
}

// ------------------------------------------------------------------------------------------ pooling

struct PoolParams {
  Pool a;
  Quad quad;
  std::int64_t planes;    // outputs are numbered over planes, samples, rows, columns, quads of channels
};

static __global__ void pool_kernel(const __grid_constant__ PoolParams p) {
  const Pool& a = p.a;
  std::int64_t index = global_thread();
  if (index >= p.planes * a.batch * a.out_h * a.out_w * p.quad.count) return;
  const std::int64_t first = index % p.quad.count * 4;
  index /= p.quad.count;
  const std::int64_t output = index * a.channels + first;    // within all planes
  const std::int64_t col = index % a.out_w;
  index /= a.out_w;
  const std::int64_t row = index % a.out_h;
  index /= a.out_h;
  const std::int64_t sample = index % a.batch, t = index / a.batch;
  const bool bits = a.coding == Coding::mask && !a.any;
  const std::int64_t *h = a.rows + 3 * row, *w = a.cols + 3 * col;
  const std::uint8_t* x = a.x + ((bits ? t / 8 : t) * a.batch + sample) * a.in_h * a.in_w * a.channels + first;
  std::uint32_t sum[4] = {0, 0, 0, 0}, any = 0;
  for (std::int64_t r = h[0]; r < h[1]; ++r) {
    for (std::int64_t c = w[0]; c < w[1]; ++c) {
      std::uint32_t word = load_quad(x + (r * a.in_w + c) * a.channels, p.quad, first);
      if (a.any) {
        any |= word;
        continue;
      }
      if (bits) word = word >> (t % 8) & 0x01010101u;
      QCFS_UNROLL
      for (int j = 0; j < 4; ++j) sum[j] += word >> (8 * j) & 0xff;
    }
  }
  if (!a.any) {
    const auto factor = static_cast<std::uint32_t>(a.multiple == 0 ? 1 : a.multiple / (h[2] * w[2]));
    QCFS_UNROLL
    for (int j = 0; j < 4; ++j) any |= (sum[j] * factor & 0xff) << (8 * j);
  }
  store_quad(a.out + output, p.quad, first, any);
}

static __global__ void pool_counts_kernel(const __grid_constant__ PoolCounts p) {
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
  std::uint32_t* most;    // [batch]: bits of the largest |x'|, which order as the values do; [batch] itself: the flag
};

constexpr std::uint32_t infinity_bits = 0x7f800000;    // NaNs lie above it

struct ImagePoint {
  std::int64_t sample, row, col, channel;
};

QCFS_DEVICE ImagePoint image_point(const Quantize& a, std::int64_t index) {
  return {index / a.channels / a.width / a.height, index / a.channels / a.width % a.height,
          index / a.channels % a.width, index % a.channels};
}

QCFS_DEVICE float transformed(const Quantize& a, const ImagePoint& i) {
  const float x =
      a.x[i.sample * a.stride_n + a.source[i.channel] * a.stride_c + i.row * a.stride_h + i.col * a.stride_w];
  return add_rn(mul_rn(x, a.scale[i.channel]), a.shift[i.channel]);
}

static __global__ void largest_kernel(const __grid_constant__ QuantizeParams p) {
  const std::int64_t index = global_thread();
  if (index >= p.a.batch * p.a.height * p.a.width * p.a.channels) return;
  const ImagePoint i = image_point(p.a, index);
  const std::uint32_t size = bits_of(transformed(p.a, i)) & 0x7fffffffu;
  // Most values lie below the largest so far: read before the atomic, which would serialise them all.
  if (size > *const_cast<const volatile std::uint32_t*>(p.most + i.sample)) atomicMax(p.most + i.sample, size);
}

static __global__ void quantize_kernel(const __grid_constant__ QuantizeParams p) {
  const std::int64_t index = global_thread();
  const std::int64_t image = p.a.height * p.a.width * p.a.channels;
  if (index >= p.a.batch * image) return;
  const ImagePoint i = image_point(p.a, index);
  const std::uint32_t bits = p.most[i.sample];
  int e = 0;
  if (bits >= infinity_bits) {
    p.a.out[index] = 0;
    if (index % image == 0) p.most[p.a.batch] = 1;
  } else {
    const double most = float_of(bits);
    if (most > 0) {
      frexp(div_rn(most, 32767.0), &e);    // in (2^(e-1), 2^e]: frexp gives [1/2, 1), so a power of two needs one less
      if (most <= ldexp(32767.0, e - 1)) --e;
    }
    p.a.out[index] = static_cast<std::int16_t>(rint(mul_rn(static_cast<double>(transformed(p.a, i)), ldexp(1.0, -e))));
  }
  if (index % image == 0) p.a.exponent[i.sample] = e;
}

}    // namespace qcfs::cuda
