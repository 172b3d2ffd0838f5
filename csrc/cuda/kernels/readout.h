// The last layer: a linear map of spike counts, from integers back to floats.
//
//     out = sum over terms of  acc * gain[c] / (steps * multiple)  + offset[c]       acc = sum of w * count, int64
//
// each double operation rounded to nearest, never fused. Sums stay below 2^53 (contract), so the conversion of acc to
// double is exact.
//
// Layouts: counts int32 [images, H, W, C]; weights int16 [KH, KW, C/groups, O]; out float32 [images, OH, OW, O]. With
// running counts, image i holds the first i / samples + 1 steps.
//
// A block computes 32 channels of one output pixel. Its 8 rows of threads take every eighth input each, and their sums
// meet in 2 KiB of shared memory: a single sample still keeps many threads busy.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "cuda/cuda.h"
#include "cuda/device.h"

namespace qcfs::cuda {

constexpr int readout_channels = 32, readout_parts = 8;

struct ReadoutParams {
  std::int64_t images, samples, out_h, out_w, out_channels, steps;
  std::int32_t term_count;
  const double* offset;
  float* out;
  ReadoutTerm terms[max_launch_terms];
};
static_assert(sizeof(ReadoutParams) <= 4096, "kernel parameters of older GPUs");

__global__ void __launch_bounds__(readout_channels* readout_parts, 2)
    readout_kernel(const __grid_constant__ ReadoutParams p) {
  QCFS_SHARED(shared);
  wait_for_launch_before();
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
