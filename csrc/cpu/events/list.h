// Step 1 of the event engine (fire.h): the inputs of each image row that fired, step by step.
//
// Reads masks or counts [planes, N, H, W, C], row by row; writes for each row and step t
//
//     start     [W * blocks + 1]   the entry at which each column's block of channels begins; the last is the end
//     position  row_bytes * channel of the block, plus row_bytes * column * channels if positions span columns
//     value     the inputs themselves, for counts
#pragma once

#include <cassert>
#include <cstdint>

#include "core/contract.h"
#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// Whether any tap of any output reads this input coordinate (strided 1x1 shortcuts skip most).
inline bool is_read(std::int64_t i, std::int64_t pad, std::int64_t stride, std::int64_t dilation, std::int64_t kernel) {
  for (std::int64_t k = 0; k < kernel; ++k) {
    if ((i + pad - k * dilation) % stride == 0) return true;
  }
  return false;
}

// Fills a list of n entries up to a multiple of four with the position of the chunk's row of zeros; returns its length.
inline std::int64_t fill_up(const EventCut& cut, std::int64_t n, std::uint16_t* position, std::uint16_t* value) {
  for (std::int64_t k = n; k < n + 4; ++k) position[k] = static_cast<std::uint16_t>(row_bytes * (cut.rows - 1));
  for (std::int64_t k = n; value != nullptr && k < n + 4; ++k) value[k] = 0;
  return (n + 3) / 4 * 4;
}

// Lists input row lists.in.row0 + row of one sample of the wave.
template <class Isa>
void list_events(const ConvIf& a, int product, const Wave& wave, const EventLists& lists, std::int64_t sample,
                 std::int64_t row) {
  const Product& p = a.products[product];
  const std::int64_t width = p.x.width, channels = p.x.channels, steps = a.steps;
  const std::int64_t blocks = lists.cut.blocks, block = lists.cut.block_channels;
  assert(row >= 0 && row < lists.in.rows && sample >= wave.sample0 && sample < wave.sample1);
  const std::int64_t region = (sample - wave.sample0) * lists.in.rows + row;
  std::uint32_t* start = lists.start + region * steps * (width * blocks + 1);
  std::uint16_t* const position = lists.position + region * lists.capacity;
  std::uint16_t* const value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
  const std::int64_t r = lists.in.row0 + row;
  if (!is_read(r, p.g.pad_h, p.g.stride_h, p.g.dilation_h, p.g.kernel_h)) {
    for (std::int64_t i = 0; i < steps * (width * blocks + 1); ++i) start[i] = 0;
    return;
  }
  const bool mask = p.x.coding == Coding::mask;
  const bool all_columns = p.g.stride_w == 1;
  const std::int64_t plane = a.batch * p.x.height * width * channels;
  const std::uint8_t* x = p.x.data + (sample * p.x.height + r) * width * channels;
  std::uint16_t* out = position;
  for (std::int64_t t = 0; t < steps; ++t) {
    const std::uint8_t* bytes = x + (mask ? t / 8 : t) * plane;
    const std::uint8_t wanted = mask ? static_cast<std::uint8_t>(1u << (t % 8)) : std::uint8_t{0xff};
    for (std::int64_t c = 0; c < width; ++c) {
      const bool read = all_columns || is_read(c, p.g.pad_w, p.g.stride_w, p.g.dilation_w, p.g.kernel_w);
      for (std::int64_t b = 0; b < blocks; ++b) {
        *start++ = static_cast<std::uint32_t>(out - position);
        if (!read) continue;
        std::uint16_t* const begin = out;
        std::uint16_t* const values = value == nullptr ? nullptr : value + (out - position);
        const std::uint16_t first =
            static_cast<std::uint16_t>(lists.positions_span_columns ? row_bytes * c * block : 0);
        out = Isa::list_bytes(bytes + c * channels + b * block, smaller(block, channels - b * block), wanted, first,
                              out, values);
        if (lists.used_in_place) out = begin + fill_up(lists.cut, out - begin, begin, values);
      }
    }
    *start++ = static_cast<std::uint32_t>(out - position);
  }
  assert(out - position + list_slack <= lists.capacity);
}

}    // namespace
}    // namespace qcfs::cpu
