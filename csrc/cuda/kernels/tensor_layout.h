// Where the operands of the tensor cores lie: packed weights in global memory, tiles in shared memory.
//
// K, the dimension that a product sums over, is cut into pieces of 16 channels of one filter tap, of 4 in the first
// layer (the last piece of a tap is padded with zeros). 64 bytes of K are a stage of the copy pipeline.
//
// Packed weights are int8 [digits, stages, O rounded up to 64, 64], so a block of N output channels reads N * 64
// consecutive bytes a stage. Digit plane 0 is the high digit of w = 256 * d1 + d0, d0 in -128 .. 127.
#pragma once

#include <cstdint>

#include "core/neuron.h"
#include "cuda/cost_model.h"

namespace qcfs::cuda {

constexpr int image_piece = 4;    // channels of a piece of the first layer

QCFS_HD static inline std::int32_t pieces_per_tap(std::int64_t channels, int piece = piece_bytes) {
  return static_cast<std::int32_t>((channels + piece - 1) / piece);
}

QCFS_HD static inline std::int32_t stages_of(std::int64_t taps, std::int64_t channels, int piece = piece_bytes) {
  const std::int64_t per_stage = stage_bytes / piece;
  return static_cast<std::int32_t>((taps * pieces_per_tap(channels, piece) + per_stage - 1) / per_stage);
}

constexpr std::int64_t padded_channels(std::int64_t out_channels) { return ceil_div(out_channels, 64) * 64; }

// The tap and input channel of byte `k` (0 .. 63) of a stage. Padding has a tap or a channel that does not exist.
struct Source {
  std::int32_t tap, channel;
};
QCFS_HD static inline Source packed_source(std::int32_t stage, std::int32_t k, std::int32_t channels, int piece) {
  const std::int32_t index = stage * (stage_bytes / piece) + k / piece, pieces = pieces_per_tap(channels, piece);
  return {index / pieces, index % pieces * piece + k % piece};
}

QCFS_HD static inline std::int8_t low_digit(std::int32_t w) { return static_cast<std::int8_t>(w & 0xff); }
QCFS_HD static inline std::int8_t high_digit(std::int32_t w) {
  return static_cast<std::int8_t>((w - low_digit(w)) >> 8);
}

// Byte offset of a 16-byte chunk in a shared-memory tile of 64-byte rows. Two rows fill all 32 banks (128 bytes), and
// ldmatrix reads the same chunk of 8 consecutive rows. The swizzle (XOR with bits of the row) spreads those 8 chunks
// over all banks, so the read has no bank conflict.
QCFS_HD static inline std::int32_t chunk_offset(std::int32_t row, std::int32_t chunk) {
  return row * stage_bytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

}    // namespace qcfs::cuda
