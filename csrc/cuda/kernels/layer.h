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
  std::int32_t quads;    // four neighbouring channels may be read and written together, in every operand of [.., O]
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

// Byte offset of a 16-byte chunk of a 64-byte row. Two rows fill the 128 bytes of all banks; the swizzle spreads the
// same chunk of 8 consecutive rows over all of them, as ldmatrix reads it.
QCFS_HD static inline std::int32_t chunk_offset(std::int32_t row, std::int32_t chunk) {
  return row * stage_bytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// Four neighbouring values: one 16-byte access (int32) or one of 4 bytes (uint8, little endian).
QCFS_DEVICE void load_quad(std::int32_t (&to)[4], const std::int32_t* from) {
  const int4 v = *reinterpret_cast<const int4*>(from);
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}
QCFS_DEVICE void store_quad(std::int32_t* to, const std::int32_t (&from)[4]) {
  *reinterpret_cast<int4*>(to) = int4{from[0], from[1], from[2], from[3]};
}

template <int width>
QCFS_DEVICE void load_values(std::int32_t (&to)[width], const std::int32_t* from) {
  if constexpr (width == 4) {
    load_quad(to, from);
  } else {
    to[0] = *from;
  }
}
template <int width>
QCFS_DEVICE void store_values(std::int32_t* to, const std::int32_t (&from)[width]) {
  if constexpr (width == 4) {
    store_quad(to, from);
  } else {
    *to = from[0];
  }
}
template <int width>
QCFS_DEVICE void store_bytes(std::uint8_t* to, std::uint32_t bytes) {
  if constexpr (width == 4) {
    *reinterpret_cast<std::uint32_t*>(to) = bytes;
  } else {
    *to = static_cast<std::uint8_t>(bytes);
  }
}
template <int width>
QCFS_DEVICE std::uint32_t load_bytes(const std::uint8_t* from) {
  if constexpr (width == 4) return *reinterpret_cast<const std::uint32_t*>(from);
  return *from;
}

// Adds what does not come from products to the currents of `width` neighbouring output neurons (1, or 4 where
// LayerParams::quads allows), the first of which is `index` = pixel * O + o; then integrates, fires and resets. Returns
// their mask bytes, the first one lowest. Currents past the group's steps are ignored.
template <int T, int width>
QCFS_DEVICE std::uint32_t integrate(const LayerParams& p, std::int64_t index, std::int32_t o,
                                    std::int32_t (&currents)[T][width]) {
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  std::int32_t constant[width], n[width], v[width];
  load_values<width>(constant, p.bias + o);
  load_values<width>(n, p.threshold + o);
  if (p.current != nullptr) {
    std::int32_t current[width];
    load_values<width>(current, p.current + index);
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) constant[j] += current[j];
  }
  QCFS_ROLLED
  for (std::int32_t i = 0; i < p.residual_count; ++i) {
    const ResidualParams& r = p.residuals[i];
    std::int32_t amplitude[width];
    load_values<width>(amplitude, r.amplitude + o);
    std::uint32_t bytes = load_bytes<width>(r.data + index);
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      if (r.count && t > 0 && t < p.steps) bytes = load_bytes<width>(r.data + t * plane + index);
      QCFS_UNROLL
      for (int j = 0; j < width; ++j) {
        const std::uint32_t byte = bytes >> (8 * j) & 0xff;
        currents[t][j] += amplitude[j] * static_cast<std::int32_t>(r.count ? byte : byte >> t & 1);
      }
    }
  }
  if (p.membrane_in != nullptr) {
    load_values<width>(v, p.membrane_in + index);
  } else {
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) v[j] = n[j] / 2;
  }
  std::uint32_t bits = 0;
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    if (t >= p.steps) break;
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) {
      bits |= static_cast<std::uint32_t>(fire(v[j], currents[t][j] + constant[j], n[j])) << (8 * j + t);
    }
  }
  if (p.membrane_out != nullptr) store_values<width>(p.membrane_out + index, v);
  return bits;
}

}    // namespace qcfs::cuda
