// The two ends of a network, where floats meet the grid: the convolution of the image and the readout of spike counts.
//
//     analog    acc = sum w * q             exact, 64-bit integers
//               z   = acc * (gain[c] * 2^e[n]) + offset[c]      double, each operation rounded to nearest, never fused
//               I   = clamp(rint(z), low[c], high[c])           halves to even
//               then either I itself, or v[-1] = n/2; v += I; s[t] = v >= n; v -= n*s[t]  for t = 0 .. T-1
//     readout   out = sum over terms of (sum w * count) * gain[c] / (steps * multiple)  + offset[c]     likewise
//
// Layouts: image int16 [N, H, W, C]; counts int32 [images, H, W, C]; weights int16 [KH, KW, C/groups, O]; T is in the
// bits of the result's mask bytes [ceil(T/8), N, OH, OW, O], or the leading part of `images`.
//
//              O channels: 4 neighbours a thread                readout block: 32 channels x 8 parts of K,
//            +----+----+----+                                   joined through 2 KiB of shared memory
//     4 px   | 4x4| 4x4| .. |   one 64-bit accumulator
//     a row  +----+----+----+   a product, one step of K        analog: 32 accumulator registers, no shared memory
//
// The kernel of the image here serves grouped layers and those of few outputs; image.h has the one for tensor cores.
// Sums stay below 2^53 (contract), so their conversion to double is exact too.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels/layer.h"

namespace qcfs::cuda {

constexpr int analog_pixels = 4, analog_channels = 4, analog_threads = 128;

struct AnalogParams {
  AnalogConv a;
  std::int64_t col_blocks, channel_blocks;
};

// Ends `width` neighbouring channels (1, or 4 where they may be written together) of one pixel from `o` on.
template <int width>
QCFS_DEVICE void encode_point(const AnalogConv& a, std::int64_t pixel, std::int64_t o,
                              const std::int32_t (&current)[width]) {
  const std::int64_t index = pixel * a.out_channels + o;
  if (a.steps == 0) {
    store_values<width>(a.out_current + index, current);
    return;
  }
  const std::int64_t plane = a.batch * a.out_h * a.out_w * a.out_channels;
  std::int32_t n[width], v[width];
  load_values<width>(n, a.threshold + o);
  QCFS_UNROLL
  for (int j = 0; j < width; ++j) v[j] = n[j] / 2;
  std::uint32_t bits = 0;
  for (std::int32_t t = 0; t < a.steps; ++t) {
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) {
      bits |= static_cast<std::uint32_t>(fire(v[j], current[j], n[j])) << (8 * j + t % 8);
    }
    if (t % 8 == 7 || t + 1 == a.steps) {
      store_bytes<width>(a.out_mask + t / 8 * plane + index, bits);
      bits = 0;
    }
  }
}

// Channels of a thread lie in one group: a group's outputs are cut into blocks of four, the last one narrower.
static __global__ void __launch_bounds__(analog_threads) analog_kernel(const __grid_constant__ AnalogParams p) {
  const AnalogConv& a = p.a;
  const Geometry& g = a.g;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * analog_threads + threadIdx.x;
  if (index >= a.batch * a.out_h * p.col_blocks * p.channel_blocks) return;
  const std::int64_t group_in = a.in_channels / g.groups, group_out = a.out_channels / g.groups;
  const std::int64_t blocks = p.channel_blocks / g.groups;    // of a group
  const std::int64_t block = index % p.channel_blocks, group = block / blocks;
  const std::int64_t o = group * group_out + block % blocks * analog_channels;
  const std::int64_t end = (group + 1) * group_out;
  const std::int64_t col = index / p.channel_blocks % p.col_blocks * analog_pixels;
  const std::int64_t line = index / p.channel_blocks / p.col_blocks;    // sample and row
  const std::int64_t row = line % a.out_h, sample = line / a.out_h;
  std::int64_t acc[analog_pixels][analog_channels] = {};
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t y = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (y < 0 || y >= a.in_h) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t x0 = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      const std::int16_t* from = a.x + ((sample * a.in_h + y) * a.in_w + x0) * a.in_channels + group * group_in;
      const std::int16_t* weight = a.weight + (kh * g.kernel_w + kw) * group_in * a.out_channels + o;
      bool inside[analog_pixels];
      QCFS_UNROLL
      for (int i = 0; i < analog_pixels; ++i) {
        const std::int64_t x = x0 + i * g.stride_w;
        inside[i] = col + i < a.out_w && x >= 0 && x < a.in_w;
      }
      for (std::int64_t k = 0; k < group_in; ++k, weight += a.out_channels) {
        std::int32_t w[analog_channels], q[analog_pixels];
        QCFS_UNROLL
        for (int j = 0; j < analog_channels; ++j) w[j] = o + j < end ? weight[j] : 0;
        QCFS_UNROLL
        for (int i = 0; i < analog_pixels; ++i) q[i] = inside[i] ? from[i * g.stride_w * a.in_channels + k] : 0;
        QCFS_UNROLL
        for (int i = 0; i < analog_pixels; ++i) {
          QCFS_UNROLL
          for (int j = 0; j < analog_channels; ++j) acc[i][j] += static_cast<std::int64_t>(q[i]) * w[j];
        }
      }
    }
  }
  QCFS_UNROLL
  for (int j = 0; j < analog_channels; ++j) {
    if (o + j >= end) continue;
    const double scale = ldexp(a.gain[o + j], a.exponent[sample]);
    QCFS_UNROLL
    for (int i = 0; i < analog_pixels; ++i) {
      if (col + i >= a.out_w) continue;
      const double z = add_rn(mul_rn(static_cast<double>(acc[i][j]), scale), a.offset[o + j]);
      const std::int32_t current[1] = {to_grid(z, a.low[o + j], a.high[o + j])};
      encode_point<1>(a, line * a.out_w + col + i, o + j, current);
    }
  }
}

constexpr int readout_channels = 32, readout_parts = 8;

struct ReadoutParams {
  std::int64_t images, samples, out_h, out_w, out_channels, steps;
  std::int32_t term_count;
  const double* offset;
  float* out;
  ReadoutTerm terms[most_terms];
};
static_assert(sizeof(ReadoutParams) <= 4096, "kernel parameters of older GPUs");

static __global__ void __launch_bounds__(readout_channels* readout_parts, 2)
    readout_kernel(const __grid_constant__ ReadoutParams p) {
  QCFS_SHARED(shared);
  std::int64_t* partial = reinterpret_cast<std::int64_t*>(shared);
  const std::int32_t lane = threadIdx.x % readout_channels, part = threadIdx.x / readout_channels;
  const std::int64_t O = p.out_channels, pixel = blockIdx.x;
  const std::int64_t o = static_cast<std::int64_t>(blockIdx.y) * readout_channels + lane;
  const std::int64_t col = pixel % p.out_w, row = pixel / p.out_w % p.out_h, image = pixel / p.out_w / p.out_h;
  const std::int64_t steps = p.images == p.samples ? p.steps : image / p.samples + 1;
  double sum = 0;
  for (std::int32_t i = 0; i < p.term_count; ++i) {
    const ReadoutTerm& term = p.terms[i];
    std::int64_t acc = 0;
    if (o < O && term.weight == nullptr) {
      if (part == 0) acc = term.counts[pixel * O + o];
    } else if (o < O) {
      const Geometry& g = term.g;
      const std::int64_t group_in = term.channels / g.groups;
      const std::int64_t first = o / (O / g.groups) * group_in;
      for (std::int64_t tap = 0; tap < g.kernel_h * g.kernel_w; ++tap) {
        const std::int64_t y = row * g.stride_h - g.pad_h + tap / g.kernel_w * g.dilation_h;
        const std::int64_t x = col * g.stride_w - g.pad_w + tap % g.kernel_w * g.dilation_w;
        if (y < 0 || y >= term.height || x < 0 || x >= term.width) continue;
        const std::int32_t* counts = term.counts + ((image * term.height + y) * term.width + x) * term.channels + first;
        const std::int16_t* weight = term.weight + tap * group_in * O + o;
        for (std::int64_t k = part; k < group_in; k += readout_parts) {
          acc += static_cast<std::int64_t>(weight[k * O]) * counts[k];
        }
      }
    }
    partial[threadIdx.x] = acc;
    __syncthreads();
    if (part == 0 && o < O) {
      for (int j = 1; j < readout_parts; ++j) acc += partial[j * readout_channels + lane];
      const double divisor = mul_rn(static_cast<double>(steps), static_cast<double>(term.multiple));
      sum = add_rn(sum, div_rn(mul_rn(static_cast<double>(acc), term.gain[o]), divisor));
    }
    __syncthreads();
  }
  if (part == 0 && o < O) p.out[pixel * O + o] = static_cast<float>(add_rn(sum, p.offset[o]));
}

}    // namespace qcfs::cuda
