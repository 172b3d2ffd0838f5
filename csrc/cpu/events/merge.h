// Step 2 of the event engine (fire.h): the merged lists of the output pixels, one a step and chunk.
//
// A chunk is consecutive K-blocks. Those of one kernel row read neighbouring columns of one input row; where positions
// span columns, their entries are one contiguous part of its list. So a merged list is a few spans of lists, one a
// kernel row (or one a K-block), each copied with a constant added to its positions: what moves an input from its
// place in the image row to its place in the chunk.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "cpu/events/list.h"
#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// What a chunk reads of the lists of one input row, under any pixel of an output row.
struct RowSpanOfLists {
  const std::uint32_t* start;    // of step 0 and column 0
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t column, columns;    // first column under output column 0, and how many
  std::int64_t k_block;            // of the first column, counted from the chunk's first
};

// The same under one output pixel, without padding.
struct PixelSpanOfLists {
  const std::uint32_t* start;    // of step 0
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t columns;
  std::uint16_t shift;    // turns a listed position into that of the chunk
};

// Finds the spans of a chunk under one output row; returns how many there are.
inline int spans_under_row(const EventLayer& layer, int product, std::int64_t chunk, std::int64_t sample,
                           std::int64_t row, RowSpanOfLists* out) {
  const Product& p = layer.a->products[product];
  const EventLists& lists = layer.lists[product];
  const EventCut& cut = lists.cut;
  const Geometry& g = p.g;
  const std::int64_t begin = chunk * cut.k_blocks;
  const std::int64_t end = smaller(begin + cut.k_blocks, g.kernel_h * g.kernel_w * cut.blocks);
  int count = 0;
  for (std::int64_t k_block = begin, next; k_block < end; k_block = next) {
    const std::int64_t tap = k_block / cut.blocks, kh = tap / g.kernel_w;
    next = lists.positions_span_columns ? smaller(end, (kh + 1) * g.kernel_w) : k_block + 1;
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    assert(r >= lists.in.row0 && r < lists.in.row0 + lists.in.rows);
    const std::int64_t region = (sample - layer.wave.sample0) * lists.in.rows + (r - lists.in.row0);
    RowSpanOfLists& s = out[count++];
    s.start = lists.start + region * layer.a->steps * (p.x.width * cut.blocks + 1) + k_block % cut.blocks;
    s.position = lists.position + region * lists.capacity;
    s.value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
    s.column = tap % g.kernel_w * g.dilation_w - g.pad_w;
    s.columns = lists.positions_span_columns ? next - k_block : 1;
    s.k_block = k_block - begin;
  }
  return count;
}

// Clips the spans to those under one output column; returns how many are left.
inline int spans_under_pixel(const EventLists& lists, const Product& p, const RowSpanOfLists* spans, int count,
                             std::int64_t col, PixelSpanOfLists* out) {
  int found = 0;
  for (int i = 0; i < count; ++i) {
    const RowSpanOfLists& s = spans[i];
    std::int64_t column = col * p.g.stride_w + s.column, columns = s.columns, k_block = s.k_block;
    if (column < 0) {
      columns += column;
      k_block -= column;
      column = 0;
    }
    columns = smaller(columns, p.x.width - column);
    if (columns <= 0) continue;
    if (lists.positions_span_columns) k_block -= column;
    const std::uint16_t shift = static_cast<std::uint16_t>(row_bytes * lists.cut.block_channels * k_block);
    out[found++] = {s.start + column * lists.cut.blocks, s.position, s.value, columns, shift};
  }
  return found;
}

// Copies n entries, each plus `shift`; reads and writes up to two vectors beyond them.
template <class Isa>
inline void append(std::uint16_t* to, const std::uint16_t* from, std::int64_t n, std::uint16_t shift) {
  constexpr std::int64_t entries = 2 * Isa::lanes;    // of a register
  static_assert(2 * entries <= list_slack, "a whole step may be read and written behind a list");
  std::int64_t k = 0;
  do {
    store(to + k, load<Words<Isa>>(from + k) + shift);
    store(to + k + entries, load<Words<Isa>>(from + k + entries) + shift);
    k += 2 * entries;
  } while (k < n);
}

inline std::int64_t max_k_blocks(const EventLayer& layer) {
  std::int64_t k_blocks = 1;
  for (int i = 0; i < layer.a->product_count; ++i) k_blocks = larger(k_blocks, layer.lists[i].cut.k_blocks);
  return k_blocks;
}

inline std::size_t merge_events_workspace(const EventLayer& layer) {
  return static_cast<std::size_t>(max_k_blocks(layer)) * (sizeof(RowSpanOfLists) + sizeof(PixelSpanOfLists));
}

// Merges what the pixels of one row of a tile read, product by product and chunk by chunk.
template <class Isa>
void merge_events(const EventLayer& layer, const EventTile& tile, std::int64_t row, const MergedRow& out,
                  void* workspace) {
  const ConvIf& a = *layer.a;
  const std::int64_t steps = a.steps;
  assert(row >= tile.row0 && row < tile.row1);
  MergedList* merged = out.lists;
  std::uint16_t* to = out.position;
  RowSpanOfLists* const row_spans = static_cast<RowSpanOfLists*>(workspace);
  PixelSpanOfLists* const spans = reinterpret_cast<PixelSpanOfLists*>(row_spans + max_k_blocks(layer));
  const MergedList* first[max_products];    // of each product
  for (int i = 0; i < a.product_count; ++i) {
    const EventLists& lists = layer.lists[i];
    first[i] = merged;
    if (lists.same_as != i) {
      const std::int64_t same = lists.cut.chunks * (tile.col1 - tile.col0) * steps;
      for (std::int64_t k = 0; k < same; ++k) *merged++ = first[lists.same_as][k];
      continue;
    }
    for (std::int64_t chunk = 0; chunk < lists.cut.chunks; ++chunk) {
      const int under_row = spans_under_row(layer, i, chunk, tile.sample, row, row_spans);
      for (std::int64_t col = tile.col0; col < tile.col1; ++col) {
        const int count = spans_under_pixel(lists, a.products[i], row_spans, under_row, col, spans);
        for (std::int64_t t = 0; t < steps; ++t, ++merged) {
          const std::int64_t step = t * (a.products[i].x.width * lists.cut.blocks + 1);
          if (lists.used_in_place) {
            // The row's list is filled up already (list_events); the merged list points into it.
            *merged = {};
            if (count == 0) continue;
            const std::uint32_t begin = spans->start[step];
            merged->position = spans->position + begin;
            merged->value = spans->value == nullptr ? nullptr : spans->value + begin;
            merged->count = spans->start[step + 1] - begin;
            continue;
          }
          std::uint16_t* value = lists.value == nullptr ? nullptr : out.value + (to - out.position);
          std::int64_t total = 0;
          for (int j = 0; j < count; ++j) {
            const std::uint32_t* start = spans[j].start + step;
            const std::int64_t n = start[spans[j].columns] - start[0];
            append<Isa>(to + total, spans[j].position + start[0], n, spans[j].shift);
            if (value != nullptr) append<Isa>(value + total, spans[j].value + start[0], n, 0);
            total += n;
          }
          total = fill_up(lists.cut, total, to, value);
          *merged = {to, value, total};
          to += total;
        }
      }
    }
  }
}

}    // namespace
}    // namespace qcfs::cpu
