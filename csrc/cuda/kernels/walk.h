// Which stages of K a block runs over, and where a thread's copies for them come from.
//
//     Share        a block's part of K: all of it, or that of one split
//     Walk         through the share: for each digit of the weights, the products one after the other
//     CopyCursor   the addresses of a thread's next copies, kept in registers from stage to stage
//
// The loop around the products asks nothing but the cursor, by additions. A walk takes its next step, and a cursor is
// set anew, where a product or a digit begins.
#pragma once

#include <cstdint>

#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/parameters.h"
#include "cuda/kernels/tensor_layout.h"

namespace qcfs::cuda {

// A block's share of K, the same for every digit: `stages` of them, from stage `first_stage` of a product on.
struct Share {
  std::int32_t first_product, first_stage, stages;

  QCFS_DEVICE explicit Share(const LayerParams& p) {
    first_stage = static_cast<std::int32_t>(blockIdx.z) * p.split_stages;
    const std::int32_t remaining = p.stages - first_stage;
    stages = remaining < p.split_stages ? remaining : p.split_stages;
    for (first_product = 0;; ++first_product) {
      const ProductParams& q = p.products[first_product];
      const std::int32_t n = stages_of(q.kernel_h * q.kernel_w, q.channels);
      if (first_stage < n) return;
      first_stage -= n;
    }
  }
};

// A walk over the share: for each digit, the products one after the other. A segment is the part of one product, with
// one digit. The copies and the products walk alike, the copies ahead by up to `stages` - 1 stages.
struct Walk {
  std::int32_t digit, product, first_stage;
  std::int32_t left;    // stages of this segment that are still to come
  std::int32_t rest;    // stages of the segments that follow with the same digit

  QCFS_DEVICE Walk(const LayerParams& p, const Share& share) { begin(p, share, 0); }

  QCFS_DEVICE void next(const LayerParams& p, const Share& share) {
    if (rest > 0) {
      enter(p, product + 1, 0, rest);
    } else {
      begin(p, share, digit + 1);
    }
  }

 private:
  QCFS_DEVICE void begin(const LayerParams& p, const Share& share, std::int32_t next_digit) {
    digit = next_digit;
    enter(p, share.first_product, share.first_stage, share.stages);
  }

  QCFS_DEVICE void enter(const LayerParams& p, std::int32_t next_product, std::int32_t stage, std::int32_t stages) {
    product = next_product;
    first_stage = stage;
    const ProductParams& q = p.products[product];
    const std::int32_t n = stages_of(q.kernel_h * q.kernel_w, q.channels) - stage;
    left = n < stages ? n : stages;
    rest = stages - left;
  }
};

// Where a thread's next copies come from. A thread copies piece `column` = thread % 4 of each stage, for rows
// thread / 4, thread / 4 + threads / 4, .. of the mask tile and of the weight tile. The addresses are kept from stage
// to stage in registers, so advance() costs the loop around the products a few additions. enter() computes them anew.
template <int loads>
struct CopyCursor {
  static constexpr std::int32_t outside = 1 << 29;    // no row of pixels is as far, nor brought inside by it

  std::int32_t product = -1;
  std::int32_t piece, pieces;                  // the piece within the tap; pieces of a tap
  std::int32_t columns_left, rows_left;        // taps to come in this row of the kernel; rows of it
  std::int32_t kernel_w, step_x, step_y;       // dilations
  std::int32_t height, width;                  // of the input
  std::int32_t dy, dx;                         // of the tap, in pixels
  std::int64_t offset;                         // of tap and piece, in bytes
  std::int64_t to_next_column, to_next_row;    // what offset grows by
  std::intptr_t from[loads];                   // address of each row's pixel under tap (0, 0), inside the input or not
  std::int32_t y[loads], x[loads];             // its coordinates
  const std::int8_t* weight;

  QCFS_DEVICE void enter(const LayerParams& p, const Walk& at, std::int32_t first_pixel, std::int32_t first_channel,
                         std::int32_t threads) {
    const bool same_pixels = at.product == product;
    product = at.product;
    const ProductParams& q = p.products[product];
    const std::int32_t thread = threadIdx.x, column = thread % 4;
    const std::int32_t stages = stages_of(q.kernel_h * q.kernel_w, q.channels);
    pieces = pieces_per_tap(q.channels);
    const std::int32_t first_piece = at.first_stage * (stage_bytes / piece_bytes) + column, tap = first_piece / pieces;
    piece = first_piece % pieces;
    kernel_w = q.kernel_w;
    columns_left = kernel_w - tap % kernel_w;
    rows_left = q.kernel_h - tap / kernel_w;
    step_x = q.dilation_w;
    step_y = q.dilation_h;
    height = q.height;
    width = q.width;
    dx = tap % kernel_w * step_x;
    dy = rows_left > 0 ? tap / kernel_w * step_y : outside;
    offset = (static_cast<std::int64_t>(tap / kernel_w * step_y) * width + dx) * q.channels + piece * piece_bytes;
    to_next_column = static_cast<std::int64_t>(step_x) * q.channels - pieces * piece_bytes;
    to_next_row =
        (static_cast<std::int64_t>(step_y) * width - static_cast<std::int64_t>(kernel_w) * step_x) * q.channels;
    weight =
        static_cast<const std::int8_t*>(q.weight) + thread * piece_bytes +
        ((static_cast<std::int64_t>(at.digit) * stages + at.first_stage) * p.padded_out + first_channel) * stage_bytes;
    if (same_pixels) return;
    QCFS_UNROLL
    for (int i = 0; i < loads; ++i) {
      const std::int32_t pixel = first_pixel + thread / 4 + i * (threads / 4);
      const std::int32_t area = p.out_h * p.out_w;
      const bool exists = pixel < p.pixels;
      y[i] = exists ? pixel % area / p.out_w * q.stride_h - q.pad_h : -2 * outside;
      x[i] = pixel % p.out_w * q.stride_w - q.pad_w;
      const std::int64_t row = static_cast<std::int64_t>(pixel / area) * height + y[i];
      from[i] = reinterpret_cast<std::intptr_t>(q.x) + (exists ? (row * width + x[i]) * q.channels : 0);
    }
  }

  // To the next stage of the same segment; `weights` bytes lie between two stages of packed weights.
  QCFS_DEVICE void advance(std::uint32_t weights) {
    weight += weights;
    piece += stage_bytes / piece_bytes;
    offset += stage_bytes;
    while (piece >= pieces) {    // to the next tap
      piece -= pieces;
      dx += step_x;
      offset += to_next_column;
      if (--columns_left > 0) continue;
      columns_left = kernel_w;
      dx = 0;
      offset += to_next_row;
      dy = --rows_left > 0 ? dy + step_y : outside;
    }
  }
};

}    // namespace qcfs::cuda
