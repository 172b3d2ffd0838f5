// Operands of the spiking kernels as they travel in kernel parameters.
//
// One launch covers at most 8 time steps: bits 0 .. 7 of one mask plane. A layer of more steps is several launches, and
// what neurons carry on, int32 [1 or 2, N, OH, OW, O], waits in memory between them: the membranes and, of signed
// neurons, the sum of their spikes so far, of masked ones whether they may fire.
#pragma once

#include <cstdint>

#include "core/neuron.h"
#include "cuda/cuda.h"
#include "cuda/device.h"

namespace qcfs::cuda {

// Of a launch whose kernel calls wait_for_launch_before().
inline LaunchOptions after_launch_before(const Launch& launch) { return {1, launch.device.dependent, 0}; }

struct ProductParams {
  const std::uint8_t* x;    // the launch's mask plane, or its first count plane
  const void* weight;       // packed (tensor cores) or [KH, KW, C/groups, O] (direct)
  std::int32_t height, width, channels;
  std::uint16_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::uint16_t groups;
  std::uint8_t count : 1;       // x holds count planes, not masks
  std::uint8_t negative : 1;    // the scale is +-256^exponent
  std::uint8_t exponent : 2;
  std::uint8_t copy_bytes;    // widest copy that alignment allows: 16, 4 or 1
};

struct ResidualParams {
  const std::uint8_t* data;    // the launch's mask plane, or its first count plane
  const std::int32_t* amplitude;
  std::int32_t count;
};

struct LayerParams {
  std::int32_t batch, out_h, out_w, out_channels;
  std::int32_t pixels;    // batch * out_h * out_w
  std::int32_t steps;     // of this launch
  std::int32_t product_count, residual_count;
  std::int32_t digits;          // base-256 digits of a weight; 2: int16; 1: int8
  std::int32_t stages;          // pipeline stages of K over all products, for one digit
  std::int32_t split_stages;    // of them, those of one split
  std::int32_t slices;          // partial sums of an output that the epilogue kernel adds
  std::int32_t padded_out;      // O rounded up as in packed weights
  std::int32_t wide_out;        // the output may be stored 16 bytes at a time
  std::int32_t simple;          // fire_pair (epilogue.h) ends the layer
  std::int32_t cluster;         // blocks that share a tile, each with a share of K; 1: K is not split so
  Mode mode;
  std::int32_t window, iterations, levels;    // as in Neuron
  std::int32_t held;                          // membranes stay within +-image_membrane thresholds
  const std::int32_t* current;                // of the launch's first step
  std::int64_t current_step;
  const std::int32_t* bias;
  std::int64_t bias_step;
  const std::int32_t* threshold;
  const std::int32_t* state_in;    // null: membranes begin at n / 2
  std::int32_t* state_out;         // null: nothing goes on from the last step
  std::int32_t* partial;           // [slices, steps, pixels, O]; null when fused
  std::uint8_t* out;               // the launch's mask plane, or the counts of sum mode
  std::uint8_t* negative;          // the mask plane of negative spikes; signed
  ResidualParams residuals[max_launch_residuals];
  ProductParams products[max_launch_products];
};
static_assert(sizeof(LayerParams) <= 4096, "kernel parameters of older GPUs");

// What sums in units of `from`'s scale are multiplied by to be in units of `to`'s, times 256^more. Scales do not grow
// from product to product, so this is an integer.
QCFS_HD static inline std::int32_t scale_ratio(const ProductParams& from, const ProductParams& to, int more) {
  const std::int32_t sign = from.negative != to.negative ? -1 : 1;
  return sign * (1 << (8 * (from.exponent - to.exponent + more)));
}

// The scale itself.
QCFS_HD static inline std::int32_t scale_of(const ProductParams& q) {
  return (q.negative ? -1 : 1) * (1 << (8 * q.exponent));
}

}    // namespace qcfs::cuda
