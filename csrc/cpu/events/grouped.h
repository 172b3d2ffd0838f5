// Layers with groups. Depthwise ones (one input and one output channel to a group) need no lists: a vector holds
// neighbouring channels, and every tap adds its weights where the mask has the bit. The others read the lists of
// list.h, unmerged, and plain weights: each event adds the weights to the outputs of its group.
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

// Adds what one product gives to one pixel at one step.
template <typename Weight>
void add_grouped(const EventLayer& layer, int product, std::int64_t sample, std::int64_t row, std::int64_t col,
                 std::int64_t t, std::uint32_t* acc) {
  const ConvIf& a = *layer.a;
  const Product& p = a.products[product];
  const Geometry& g = p.g;
  const EventLists& lists = layer.lists[product];
  const std::int64_t O = a.out_channels, blocks = lists.cut.blocks;
  const std::int64_t group_in = p.x.channels / g.groups, group_out = O / g.groups;
  assert(group_in * g.groups == p.x.channels && group_out * g.groups == O);
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    const std::int64_t region = (sample - layer.wave.sample0) * lists.in.rows + (r - lists.in.row0);
    const std::uint32_t* start = lists.start + (region * a.steps + t) * (p.x.width * blocks + 1);
    const std::uint16_t* position = lists.position + region * lists.capacity;
    const std::uint16_t* value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c < 0 || c >= p.x.width) continue;
      const Weight* tap = static_cast<const Weight*>(p.weight) + (kh * g.kernel_w + kw) * group_in * O;
      std::int64_t first_in = 0, first_out = 0;    // of the current group; channels ascend, so groups do
      for (std::int64_t b = 0; b < blocks; ++b) {
        for (std::uint32_t k = start[c * blocks + b]; k != start[c * blocks + b + 1]; ++k) {
          const std::int64_t channel = b * lists.cut.block_channels + position[k] / row_bytes;
          while (channel >= first_in + group_in) {
            first_in += group_in;
            first_out += group_out;
          }
          const Weight* w = tap + (channel - first_in) * O;
          const std::uint32_t x = static_cast<std::uint32_t>(p.scale) * (value == nullptr ? 1u : value[k]);
          for (std::int64_t o = first_out; o < first_out + group_out; ++o) {
            acc[o] += static_cast<std::uint32_t>(std::int32_t{w[o]}) * x;
          }
        }
      }
    }
  }
}

// Sums [T, O] are in memory, because an event adds to the outputs of its own group alone.
inline std::int64_t padded_channels(const ConvIf& a) { return round_up(a.out_channels, channel_padding); }

template <class Isa, typename Weight>
void fire_grouped_as(const EventLayer& layer, const RowSpan& span, std::uint32_t* sums) {
  constexpr int lanes = Isa::lanes;
  const ConvIf& a = *layer.a;
  const std::int64_t padded = padded_channels(a);
  for (std::int64_t row = span.row0; row < span.row1; ++row) {
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      __builtin_memset(sums, 0, static_cast<std::size_t>(a.steps * padded) * sizeof(*sums));
      for (std::int64_t t = 0; t < a.steps; ++t) {
        for (int i = 0; i < a.product_count; ++i) {
          add_grouped<Weight>(layer, i, span.sample, row, col, t, sums + t * padded);
        }
      }
      for (std::int64_t channel = 0; channel < a.out_channels; channel += lanes) {
        Membranes<Isa, 1, false> membranes(a, layer.neurons, channel, (span.sample * a.out_h + row) * a.out_w + col);
        membranes.run(
            [&](std::int64_t t, Int<Isa>(&current)[1]) { current[0] = load<Int<Isa>>(sums + t * padded + channel); });
      }
    }
  }
}

inline std::size_t fire_grouped_workspace(const ConvIf& a) {
  return static_cast<std::size_t>(a.steps * padded_channels(a)) * sizeof(std::uint32_t);
}

template <class Isa>
void fire_grouped(const EventLayer& layer, const RowSpan& span, void* workspace) {
  if (layer.a->products[0].weight_bytes == 1) {
    fire_grouped_as<Isa, std::int8_t>(layer, span, static_cast<std::uint32_t*>(workspace));
  } else {
    fire_grouped_as<Isa, std::int16_t>(layer, span, static_cast<std::uint32_t*>(workspace));
  }
}

// Adds what one product gives to `width` channels of one pixel at up to eight steps from t0.
template <class Isa, typename Weight>
inline void add_depthwise(const ConvIf& a, const Product& p, std::int64_t sample, std::int64_t row, std::int64_t col,
                          std::int64_t channel, std::int64_t width, std::int64_t t0, int steps, Int<Isa> (&acc)[8][1]) {
  const Geometry& g = p.g;
  const bool mask = p.x.coding == Coding::mask;
  const std::int64_t C = a.out_channels, plane = a.batch * p.x.height * p.x.width * C;
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c < 0 || c >= p.x.width) continue;
      const Weight* w = static_cast<const Weight*>(p.weight) + (kh * g.kernel_w + kw) * C + channel;
      const Int<Isa> weight = scaled<Isa>(widen<Isa>(w, width), p.scale);
      const std::uint8_t* x =
          p.x.data + ((sample * p.x.height + r) * p.x.width + c) * C + channel + (mask ? t0 / 8 : t0) * plane;
      if (mask) {
        const Int<Isa> m = widen<Isa>(x, width);
        for (int t = 0; t < steps; ++t) acc[t][0] += (((m >> t) & 1) != 0) & weight;
      } else {
        for (int t = 0; t < steps; ++t) {
          acc[t][0] += widen<Isa>(x + t * plane, width) * weight;
        }
      }
    }
  }
}

template <class Isa, typename Weight>
void fire_depthwise_as(const ConvIf& a, const Neurons& neurons, const RowSpan& span) {
  constexpr int lanes = Isa::lanes;
  for (std::int64_t row = span.row0; row < span.row1; ++row) {
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      for (std::int64_t channel = 0; channel < a.out_channels; channel += lanes) {
        const std::int64_t width = smaller(lanes, a.out_channels - channel);
        Membranes<Isa, 1, false> membranes(a, neurons, channel, (span.sample * a.out_h + row) * a.out_w + col);
        Int<Isa> acc[8][1];    // sums of eight steps from t0; a window fits
        std::int64_t t0 = -1;
        membranes.run([&](std::int64_t t, Int<Isa>(&current)[1]) {
          if (t / 8 * 8 != t0) {
            t0 = t / 8 * 8;
            const int steps = static_cast<int>(smaller(8, a.steps - t0));
            for (int i = 0; i < 8; ++i) acc[i][0] = Int<Isa>{};
            for (int i = 0; i < a.product_count; ++i) {
              add_depthwise<Isa, Weight>(a, a.products[i], span.sample, row, col, channel, width, t0, steps, acc);
            }
          }
          current[0] = acc[t % 8][0];
        });
      }
    }
  }
}

template <class Isa>
void fire_depthwise(const ConvIf& a, const Neurons& neurons, const RowSpan& span) {
  if (a.products[0].weight_bytes == 1) {
    fire_depthwise_as<Isa, std::int8_t>(a, neurons, span);
  } else {
    fire_depthwise_as<Isa, std::int16_t>(a, neurons, span);
  }
}

}    // namespace
}    // namespace qcfs::cpu
