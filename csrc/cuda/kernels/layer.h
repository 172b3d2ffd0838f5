// Operands of the spiking kernels as they travel in kernel parameters, the index maps of packed weights, and the
// end of every spiking layer: residuals, bias, the recursion over time.
//
// One launch covers a group of at most 8 steps, steps first_step .. first_step + steps - 1, first_step a multiple of 8:
// one mask plane. A layer of more steps is several launches that carry the int32 membrane, [N, OH, OW, O], in memory.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"
#include "cuda/cost_model.h"
#include "cuda/cuda.h"
#include "cuda/device.h"

namespace qcfs::cuda {

struct ProductParams {
  const std::uint8_t* x;    // plane of the group (masks) or of its first step (counts)
  const void* weight;       // packed (tensor cores) or [KH, KW, C/groups, O] (direct)
  std::int32_t height, width, channels;
  std::uint16_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::uint16_t groups;
  std::uint8_t count;         // coding
  std::uint8_t copy_bytes;    // widest copy that alignment allows: 16, 4 or 1
};

struct ResidualParams {
  const std::uint8_t* data;    // plane of the group or of its first step
  const std::int32_t* amplitude;
  std::int32_t count;
};

struct LayerParams {
  std::int32_t batch, out_h, out_w, out_channels, pixels;
  std::int32_t steps;    // of this group
  std::int32_t product_count, residual_count;
  std::int32_t digits;    // 2: int16 weights; 1: int8, worth 256 each
  std::int32_t stages;    // of K over all products, and per split
  std::int32_t split_stages;
  std::int32_t slices;        // finish kernel: partial sums to add
  std::int32_t padded_out;    // O rounded up as in packed weights
  std::int32_t wide_out;      // the output may be stored 16 bytes at a time
  const std::int32_t* current;
  const std::int32_t* bias;
  const std::int32_t* threshold;
  const std::int32_t* membrane_in;    // null: start at n / 2
  std::int32_t* membrane_out;         // null: not needed any more
  std::int32_t* partial;              // [slices, steps, pixels, O]; null when fused
  std::uint8_t* out;                  // plane of the group
  ResidualParams residuals[most_residuals];
  ProductParams products[most_products];
};
static_assert(sizeof(LayerParams) <= 4096, "kernel parameters of older GPUs");

// Packed weights, int8 [digits, stages, padded O, 64]: the K of a layer is cut into pieces of 16 channels of one tap
// (the last piece of a tap padded with zeros), 4 pieces to a stage, so that a block reads BN * 64 consecutive bytes a
// stage. Digit plane 0 is the high digit of w = 256 * d1 + d0, d0 in -128 .. 127.

QCFS_HD static inline std::int32_t pieces_per_tap(std::int64_t channels) {
  return static_cast<std::int32_t>((channels + piece_bytes - 1) / piece_bytes);
}

QCFS_HD static inline std::int32_t stages_of(std::int64_t taps, std::int64_t channels) {
  const std::int64_t per_stage = stage_bytes / piece_bytes;
  return static_cast<std::int32_t>((taps * pieces_per_tap(channels) + per_stage - 1) / per_stage);
}

constexpr std::int64_t padded_channels(std::int64_t out_channels) { return ceil_div(out_channels, 64) * 64; }

struct Tap {
  std::int32_t tap, channel;    // tap may lie past the last one, channel past C: zero then
};

// The weight row behind byte `k` (0 .. 63) of a stage.
QCFS_HD static inline Tap packed_source(std::int32_t stage, std::int32_t k, std::int32_t pieces) {
  const std::int32_t piece = stage * (stage_bytes / piece_bytes) + k / piece_bytes;
  return {piece / pieces, piece % pieces * piece_bytes + k % piece_bytes};
}

QCFS_HD static inline std::int8_t low_digit(std::int32_t w) { return static_cast<std::int8_t>(w & 0xff); }
QCFS_HD static inline std::int8_t high_digit(std::int32_t w) {
  return static_cast<std::int8_t>((w - low_digit(w)) >> 8);
}

// Adds what does not come from products to the currents of output neuron `index` = pixel * O + o, then integrates,
// fires and resets; returns the mask byte. Currents past the group's steps are ignored.
template <int T>
QCFS_DEVICE std::uint8_t integrate(const LayerParams& p, std::int64_t index, std::int32_t o,
                                   std::int32_t (&currents)[T]) {
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  std::int32_t constant = p.bias[o];
  if (p.current != nullptr) constant += p.current[index];
  for (std::int32_t i = 0; i < p.residual_count; ++i) {
    const ResidualParams& r = p.residuals[i];
    const std::int32_t amplitude = r.amplitude[o];
    if (r.count) {
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        if (t < p.steps) currents[t] += amplitude * r.data[t * plane + index];
      }
    } else {
      const std::int32_t mask = r.data[index];
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) currents[t] += (mask >> t) & 1 ? amplitude : 0;
    }
  }
  const std::int32_t n = p.threshold[o];
  std::int32_t v = p.membrane_in != nullptr ? p.membrane_in[index] : n / 2;
  std::int32_t bits = 0;
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    if (t < p.steps) bits |= fire(v, currents[t] + constant, n) << t;
  }
  if (p.membrane_out != nullptr) p.membrane_out[index] = v;
  return static_cast<std::uint8_t>(bits);
}

}    // namespace qcfs::cuda
