// Spiking convolution by table, for layers of few outputs. Lists of single spikes (events/fire.h) are merged for each
// pixel and added one row a spike; with 16 to 64 outputs a row is so short that this preparation takes the time. Here
// four inputs are looked up at once, and nothing is merged.
//
//     table   For each group of four inputs under the kernel, the sums of their weights for all sixteen patterns of
//             spikes: sixteen rows of all outputs, made when weights are packed.
//     list    For each column of the input and step, the rows of the groups that fired under one row of outputs:
//
//                 input rows          column  c     c+1    c+2
//                 under kernel row 0        ....   ....   ....    channels in fours, their spikes at step t a pattern
//                 ..                        .2..   ..1.   ....    of four bits; zeros are dropped
//                 under kernel row 2        ...8   ....   f1..
//                                             \       |     /
//                 list of step t            2, 8,     1,   f, 1   as byte offsets of rows
//                                           ^         ^    ^      start of each column
//
//             Rows lie as [kernel column][kernel row][group][pattern]. An entry holds the column of the image, so the
//             entries under neighbouring kernel columns are one part of the list, whatever the pixel: a pixel adds
//             table - (its first column) * (bytes of a column).
//     fire    Each pixel adds, for each step, one row for every entry to sums in registers; after the last product its
//             neurons integrate and fire.
//
// A row has 16-bit sums where those of all inputs fit, as 8-bit weights do up to about 256 inputs, else 32-bit ones.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "cpu/layout.h"
#include "cpu/membranes.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// The lists of one product under one row of outputs.
struct TableLists {
  std::uint8_t* stage;     // [W, groups of a column, filled up to a vector, 4]: the masks of eight steps
  std::uint32_t* start;    // [T, W + 1]: where a column begins in the list of a step
  std::int32_t* entry;     // [T, capacity]
  std::int64_t capacity;
};

template <class Isa>
constexpr std::int64_t staged_groups(const TableProduct& p) {
  return round_up(p.groups, Isa::lanes);
}

// Takes the memory of a task from `at`; returns its end.
template <class Isa>
inline char* place_table_lists(const TableLayer& layer, TableLists* lists, char* at) {
  const ConvIf& a = *layer.a;
  const auto take = [&](std::int64_t bytes) {
    char* const here = at;
    at += round_up(bytes, cache_line);
    return here;
  };
  for (int i = 0; i < a.product_count; ++i) {
    const TableProduct& p = layer.product[i];
    const std::int64_t width = a.products[i].x.width;
    TableLists l{};
    l.capacity = width * p.groups + Isa::lanes;
    l.stage = reinterpret_cast<std::uint8_t*>(take(width * staged_groups<Isa>(p) * 4));
    l.start = reinterpret_cast<std::uint32_t*>(take(a.steps * (width + 1) * 4));
    l.entry = reinterpret_cast<std::int32_t*>(take(a.steps * l.capacity * 4));
    if (lists != nullptr) lists[i] = l;
  }
  return at;
}

// Copies the masks of eight steps under one row of outputs; zeros where the image ends.
template <class Isa>
inline void stage_masks(const ConvIf& a, const Product& p, const TableProduct& t, std::int64_t plane,
                        std::int64_t sample, std::int64_t row, std::uint8_t* stage) {
  const std::int64_t C = p.x.channels, column = staged_groups<Isa>(t) * 4;
  __builtin_memset(stage, 0, static_cast<std::size_t>(p.x.width * column));
  const std::uint8_t* image = p.x.data + (plane * a.batch + sample) * p.x.height * p.x.width * C;
  for (std::int64_t kh = 0; kh < p.g.kernel_h; ++kh) {
    const std::int64_t r = row * p.g.stride_h - p.g.pad_h + kh * p.g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    const std::uint8_t* from = image + r * p.x.width * C;
    std::uint8_t* to = stage + kh * round_up(C, 4);
    for (std::int64_t c = 0; c < p.x.width; ++c, from += C, to += column) {
      if (C % 16 == 0) {
        for (std::int64_t k = 0; k < C; k += 16) __builtin_memcpy(to + k, from + k, 16);
      } else {
        for (std::int64_t k = 0; k < C; ++k) to[k] = from[k];
      }
    }
  }
}

// Lists the rows of the staged groups at one step of the eight.
template <class Isa>
inline void list_groups(const TableProduct& t, std::int64_t width, int step, const std::uint8_t* stage,
                        std::uint32_t* start, std::int32_t* entry) {
  constexpr int lanes = Isa::lanes;
  using Int = cpu::Int<Isa>;
  using Unsigned = cpu::Unsigned<Isa>;
  const std::int32_t row = static_cast<std::int32_t>(t.row_bytes), group = 16 * row;
  Int lane_offset{};
  for (int i = 0; i < lanes; ++i) lane_offset[i] = i * group;
  std::int32_t* out = entry;
  for (std::int64_t c = 0; c < width; ++c) {
    start[c] = static_cast<std::uint32_t>(out - entry);
    std::int32_t offset = static_cast<std::int32_t>(c * t.groups) * group;
    for (std::int64_t g = 0; g < t.groups; g += lanes, offset += lanes * group, stage += 4 * lanes) {
      // The bits of four bytes meet in the lowest four.
      Unsigned pattern = load<Unsigned>(stage) >> static_cast<std::uint32_t>(step) & 0x01010101;
      pattern |= pattern >> 7;
      pattern = (pattern | pattern >> 14) & 15;
      const Int fired = reinterpret_cast<const Int&>(pattern);
      out += Isa::compress(fired * row + (lane_offset + offset), fired, out);
    }
  }
  start[width] = static_cast<std::uint32_t>(out - entry);
}

template <class Isa>
void list_table_row(const ConvIf& a, const Product& p, const TableProduct& t, std::int64_t sample, std::int64_t row,
                    const TableLists& l) {
  for (std::int64_t step = 0; step < a.steps; ++step) {
    if (step % 8 == 0) stage_masks<Isa>(a, p, t, step / 8, sample, row, l.stage);
    list_groups<Isa>(t, p.x.width, static_cast<int>(step % 8), l.stage, l.start + step * (p.x.width + 1),
                     l.entry + step * l.capacity);
  }
}

// Sums of some pixels of one output row, [pixels, T, step].
struct TableSums {
  std::int32_t* data;
  std::int64_t step;    // channels, filled up to whole registers of 16-bit sums
};

// Sets the sums of output columns [col0, col1) to what a product gives, or adds it to them; of the channels that
// `registers` registers hold, of which the first is the row's `place`th.
template <class Isa, class Register, int registers>
void add_table_rows(const ConvIf& a, const Product& p, const TableProduct& t, const TableLists& l, std::int64_t col0,
                    std::int64_t col1, std::int64_t place, bool first, std::int32_t* sums, std::int64_t sum_step) {
  constexpr int lanes = Isa::lanes, vectors = sizeof(Register{}[0]) == 2 ? 2 : 1;    // of int32 to a register
  const std::int64_t steps = a.steps, width = p.x.width, capacity = l.capacity, column = t.groups * 16 * t.row_bytes;
  const std::int32_t scale = p.scale;
  const std::uintptr_t rows = reinterpret_cast<std::uintptr_t>(t.rows + place * register_bytes<Isa>);
  sums += place * vectors * lanes;
  for (std::int64_t col = col0; col < col1; ++col) {
    const std::int64_t from = col * p.g.stride_w - p.g.pad_w;
    const std::int64_t begin = larger(0, smaller(from, width)), end = smaller(from + p.g.kernel_w, width);
    const std::int64_t columns = larger(0, end - begin);
    const std::uintptr_t base = rows - static_cast<std::uintptr_t>(from * column);    // where an entry of 0 points
    const std::uint32_t* start = l.start + begin;
    const std::int32_t* entries = l.entry;
    for (std::int64_t step = 0; step < steps; ++step, start += width + 1, entries += capacity, sums += sum_step) {
      Register acc[registers];
      QCFS_UNROLL
      for (int j = 0; j < registers; ++j) acc[j] = Register{};
      for (const std::int32_t *e = entries + start[0], *const last = entries + start[columns]; e != last; ++e) {
        const char* row = reinterpret_cast<const char*>(base + static_cast<std::uintptr_t>(std::int64_t{*e}));
        QCFS_UNROLL
        for (int j = 0; j < registers; ++j) acc[j] += load<Register>(row + j * register_bytes<Isa>);
      }
      QCFS_UNROLL
      for (int j = 0; j < registers; ++j) {
        Int<Isa> sum[vectors];
        if constexpr (vectors == 2) {
          std::int16_t narrow[2 * lanes];
          store(narrow, acc[j]);
          sum[0] = widen<Isa>(narrow);
          sum[1] = widen<Isa>(narrow + lanes);
        } else {
          sum[0] = acc[j];
        }
        QCFS_UNROLL
        for (int i = 0; i < vectors; ++i) {
          std::int32_t* to = sums + (j * vectors + i) * lanes;
          if (scale != 1) sum[i] = scaled<Isa>(sum[i], scale);
          store(to, first ? sum[i] : wrapped_sum<Isa>(load<Int<Isa>>(to), sum[i]));
        }
      }
    }
  }
}

constexpr int max_table_registers = 8;    // sums that stay in registers

// Calls add_table_rows for all channels, up to max_table_registers registers at a time.
template <class Isa, class Register, int registers = max_table_registers>
inline void add_table(const ConvIf& a, const Product& p, const TableProduct& t, const TableLists& l, std::int64_t col0,
                      std::int64_t col1, std::int64_t place, bool first, const TableSums& sums) {
  const std::int64_t left = t.row_bytes / register_bytes<Isa> - place;
  if (left >= registers) {
    add_table_rows<Isa, Register, registers>(a, p, t, l, col0, col1, place, first, sums.data, sums.step);
    if (left > registers) add_table<Isa, Register>(a, p, t, l, col0, col1, place + registers, first, sums);
  } else if constexpr (registers > 1) {
    add_table<Isa, Register, registers - 1>(a, p, t, l, col0, col1, place, first, sums);
  }
}

// The neurons of output columns [col0, col1), from `channel` on as many as there are whole blocks of vectors; returns
// the next channel.
template <class Isa, int vectors, bool full>
inline std::int64_t fire_table_channels(const TableLayer& layer, std::int64_t channel, std::int64_t pixel,
                                        std::int64_t pixels, const TableSums& sums) {
  const ConvIf& a = *layer.a;
  for (; full ? a.out_channels - channel >= vectors * Isa::lanes : channel < a.out_channels;
       channel += vectors * Isa::lanes) {
    const std::int32_t* from = sums.data + channel;
    run_pixels<Isa, vectors, full>(
        a, layer.neurons, channel, pixel, pixels, [&](std::int64_t i, std::int64_t t, Int<Isa>(&current)[vectors]) {
          QCFS_UNROLL
          for (int j = 0; j < vectors; ++j)
            current[j] = load<Int<Isa>>(from + (i * a.steps + t) * sums.step + j * Isa::lanes);
        });
  }
  return channel;
}

constexpr std::int64_t max_table_sums = 4 << 10;    // sums of some pixels, half of the first-level cache

template <class Isa>
inline std::int64_t table_sum_step(const ConvIf& a) {
  return round_up(a.out_channels, 2 * Isa::lanes);
}

// Columns whose sums are made at a time.
template <class Isa>
inline std::int64_t table_columns(const ConvIf& a) {
  return smaller(a.out_w, larger(1, max_table_sums / (a.steps * table_sum_step<Isa>(a))));
}

template <class Isa>
std::size_t fire_table_workspace(const TableLayer& layer) {
  const ConvIf& a = *layer.a;
  const std::int64_t lists = place_table_lists<Isa>(layer, nullptr, nullptr) - static_cast<char*>(nullptr);
  return static_cast<std::size_t>(lists + table_columns<Isa>(a) * a.steps * table_sum_step<Isa>(a) * 4);
}

template <class Isa>
void fire_table(const TableLayer& layer, const RowSpan& span, void* workspace) {
  const ConvIf& a = *layer.a;
  TableLists lists[max_products];
  char* const end = place_table_lists<Isa>(layer, lists, static_cast<char*>(workspace));
  const TableSums sums{reinterpret_cast<std::int32_t*>(end), table_sum_step<Isa>(a)};
  const std::int64_t columns = table_columns<Isa>(a);
  for (std::int64_t row = span.row0; row < span.row1; ++row) {
    for (int i = 0; i < a.product_count; ++i) {
      list_table_row<Isa>(a, a.products[i], layer.product[i], span.sample, row, lists[i]);
    }
    for (std::int64_t col0 = 0; col0 < a.out_w; col0 += columns) {
      const std::int64_t col1 = smaller(a.out_w, col0 + columns);
      const std::int64_t pixel = (span.sample * a.out_h + row) * a.out_w + col0;
      prefetch_state(a, 0, a.out_channels, pixel, col1 - col0);
      for (int i = 0; i < a.product_count; ++i) {
        const TableProduct& t = layer.product[i];
        if (t.sum_bytes == 2) {
          add_table<Isa, Words<Isa>>(a, a.products[i], t, lists[i], col0, col1, 0, i == 0, sums);
        } else {
          add_table<Isa, Int<Isa>>(a, a.products[i], t, lists[i], col0, col1, 0, i == 0, sums);
        }
      }
      std::int64_t channel = fire_table_channels<Isa, 4, true>(layer, 0, pixel, col1 - col0, sums);
      channel = fire_table_channels<Isa, 2, true>(layer, channel, pixel, col1 - col0, sums);
      channel = fire_table_channels<Isa, 1, true>(layer, channel, pixel, col1 - col0, sums);
      fire_table_channels<Isa, 1, false>(layer, channel, pixel, col1 - col0, sums);
    }
  }
}

// The table of one product, its sums of type Sum: rows [kernel columns, kernel rows, groups, 16] of row_bytes.
template <typename Weight, typename Sum>
void pack_table_as(const Product& p, std::int64_t out_channels, std::int64_t row_bytes, char* rows) {
  const std::int64_t C = p.x.channels;
  const Weight* const weight = static_cast<const Weight*>(p.weight);
  for (std::int64_t kw = 0; kw < p.g.kernel_w; ++kw) {
    for (std::int64_t kh = 0; kh < p.g.kernel_h; ++kh) {
      const Weight* tap = weight + (kh * p.g.kernel_w + kw) * C * out_channels;
      for (std::int64_t c = 0; c < C; c += 4, rows += 16 * row_bytes) {
        __builtin_memset(rows, 0, static_cast<std::size_t>(16 * row_bytes));
        for (int pattern = 1; pattern < 16; ++pattern) {
          const int lowest = __builtin_ctz(static_cast<unsigned>(pattern)), rest = pattern & (pattern - 1);
          Sum* to = reinterpret_cast<Sum*>(rows + pattern * row_bytes);
          const Sum* from = reinterpret_cast<const Sum*>(rows + rest * row_bytes);
          const Weight* w = c + lowest < C ? tap + (c + lowest) * out_channels : nullptr;
          for (std::int64_t o = 0; o < out_channels; ++o) {
            to[o] = static_cast<Sum>(from[o] + (w == nullptr ? 0 : w[o]));
          }
        }
      }
    }
  }
}

void pack_table(const Product& p, std::int64_t out_channels, int sum_bytes, std::int64_t row_bytes, char* rows) {
  if (p.weight_bytes == 1 && sum_bytes == 2) pack_table_as<std::int8_t, std::int16_t>(p, out_channels, row_bytes, rows);
  if (p.weight_bytes == 1 && sum_bytes == 4) pack_table_as<std::int8_t, std::int32_t>(p, out_channels, row_bytes, rows);
  if (p.weight_bytes == 2 && sum_bytes == 2)
    pack_table_as<std::int16_t, std::int16_t>(p, out_channels, row_bytes, rows);
  if (p.weight_bytes == 2 && sum_bytes == 4)
    pack_table_as<std::int16_t, std::int32_t>(p, out_channels, row_bytes, rows);
}

}    // namespace
}    // namespace qcfs::cpu
