// Operands of the spiking kernels as they travel in kernel parameters.
//
// One launch covers at most 8 time steps: bits 0 .. 7 of one mask plane. A layer of more steps is several launches, and
// the int32 membranes, [N, OH, OW, O], wait in memory between them.
#pragma once

#include <cstdint>

#include "cuda/cuda.h"

namespace qcfs::cuda {

struct ProductParams {
  const std::uint8_t* x;    // the launch's mask plane, or its first count plane
  const void* weight;       // packed (tensor cores) or [KH, KW, C/groups, O] (direct)
  std::int32_t height, width, channels;
  std::uint16_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::uint16_t groups;
  std::uint8_t count;         // x holds count planes, not masks
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
  std::int32_t digits;          // base-256 digits of a weight; 2: int16; 1: int8, whose unit is 256
  std::int32_t stages;          // pipeline stages of K over all products, for one digit
  std::int32_t split_stages;    // of them, those of one split
  std::int32_t slices;          // partial sums of an output that the epilogue kernel adds
  std::int32_t padded_out;      // O rounded up as in packed weights
  std::int32_t wide_out;        // the output may be stored 16 bytes at a time
  std::int32_t quads;           // in every operand [.., O], four neighbouring channels may be accessed at once
  const std::int32_t* current;
  const std::int32_t* bias;
  const std::int32_t* threshold;
  const std::int32_t* membrane_in;    // null: the membranes start at n / 2
  std::int32_t* membrane_out;         // null: no launch follows
  std::int32_t* partial;              // [slices, steps, pixels, O]; null when fused
  std::uint8_t* out;                  // the launch's mask plane
  ResidualParams residuals[max_launch_residuals];
  ProductParams products[max_launch_products];
};
static_assert(sizeof(LayerParams) <= 4096, "kernel parameters of older GPUs");

}    // namespace qcfs::cuda
