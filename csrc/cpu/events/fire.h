// Spiking convolution, event-driven. QCFS networks fire at 5 to 20 % a step, so it pays to touch only the weights of
// inputs that fired:
//
//     1. list_events (list.h): for each input row and each step, the positions that fired, once, whatever the number of
//        taps, outputs and output channels that read them;
//     2. merge_events (merge.h): for each output pixel and step, the positions under its kernel, once for all output
//        channels. Each chunk gets a merged list of its own, filled up to a multiple of four with the position of a row
//        of zeros;
//     3. fire_events (here): for each panel of 32 or 64 output channels, each chunk (its rows of 64 bytes stay in the
//        first-level cache), each output pixel and each step: add one weight row per position to accumulators in
//        registers. Sums wait in memory between chunks; after the last, integrate, fire, reset.
//
// An example: a 3x3 kernel, padding 1, 8 input channels, so nine K-blocks of 8 inputs, one chunk of 72 weight rows and
// one of zeros. Of an image row of width 4, these inputs fire at step t:
//
//     column, channel    0,3    1,0    1,5    2,7
//     weight row           3      8     13     23     8 * column + channel: as under a kernel that begins at column 0
//     position           192    512    832   1472     64 bytes a row
//     start                0      1      3      4      4     of columns 0 to 3, and the end
//
// The output pixel at column 2 reads columns 1 to 3: entries 1 to 4, which are positions 512, 832, 1472. If the image
// row is under kernel row 1, column 1 meets tap 3, whose rows begin at 3 * 8 = 24; in the list column 1 began at row 8.
// So the merge adds (24 - 8) * 64 = 1024, and step 3 adds the weights of the rows at 1536, 1856 and 2496 (rows 24, 29,
// 39):
//
//        merged list, all kernel rows    [.. 1536 1856 2496 .. 4608]      4608: row 72, zeros
//        packed rows of the chunk         1536:  [ w w w w ...  64 bytes ]
//                                                  + + + +
//        registers                               [ v v v v ]  -> compare -> bit t of one byte per neuron
//
// In a wide image row positions pass 2^16. They wrap, and wrap back when the merge adds its shift, because a chunk has
// at most 961 rows. What limits step 3 is loading one row of 64 bytes per position; so weights must be near, and the
// lists short.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "cpu/events/add_rows.h"
#include "cpu/layout.h"
#include "cpu/membranes.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// With fewer (pixel, step) pairs in a tile most weight rows of a chunk stay unused. Tuned on a 4.4 GHz Zen 5.
constexpr std::int64_t min_pairs_to_prefetch_all = 24;

// Prefetches the next chunk's weights into the second-level cache. With many pixels per tile nearly all rows will be
// used, so all are prefetched, `lines` per call. With few, only those in the next chunk's list are (lines == 0).
struct Prefetch {
  const char* rows;            // null: none
  std::int64_t left, lines;    // to go; per call

  inline void some(const MergedList* next) {
    if (rows == nullptr) return;
    if (lines == 0) {
      for (std::int64_t k = 0; k < next->count; ++k) __builtin_prefetch(rows + next->position[k], 0, 2);
    }
    for (std::int64_t i = 0; i < lines && left > 0; ++i, --left, rows += row_bytes) __builtin_prefetch(rows, 0, 2);
  }
};

// Adds what one chunk gives to the sums of a tile's pixels [rows, columns, T, vectors * lanes], which begin with the
// first chunk and are multiplied by `factor` before any other; after the last the pixel's neurons integrate and fire.
// With one chunk all pixels share one place.
template <class Isa, typename Weight, int vectors, bool full>
void fire_chunk(const EventLayer& layer, const EventTile& tile, const MergedList* lists, std::int64_t chunk,
                std::int64_t channel, const char* rows, int largest_input, std::int32_t factor, Prefetch prefetch,
                std::int32_t* sums) {
  constexpr int lanes = Isa::lanes;
  static_assert(vectors * lanes <= event_panel_channels(sizeof(Weight)), "a pass takes channels of one panel");
  const ConvIf& a = *layer.a;
  const bool first = chunk == 0, last = chunk + 1 >= layer.chunks;
  const std::int32_t scale = layer.chunks > 0 ? a.products[a.product_count - 1].scale : 1;
  const std::int64_t next_pixel = first && last ? 0 : a.steps * vectors * lanes;
  const std::int64_t row_lists = (tile.col1 - tile.col0) * a.steps;
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    const MergedList* list = lists + ((row - tile.row0) * layer.chunks + chunk) * row_lists;
    for (std::int64_t col = tile.col0; col < tile.col1; ++col, sums += next_pixel) {
      std::int32_t* sum = sums;
      for (std::int64_t t = 0; t < a.steps; ++t, sum += vectors * lanes) {
        Int<Isa> acc[vectors];
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) acc[j] = first || factor != 1 ? Int<Isa>{} : load<Int<Isa>>(sum + j * lanes);
        if (layer.chunks > 0) {
          prefetch.some(list + row_lists);
          add_rows<Isa, Weight>(rows, *list++, largest_input, acc);
        }
        if (factor != 1) {
          QCFS_UNROLL
          for (int j = 0; j < vectors; ++j) {
            acc[j] = wrapped_sum<Isa>(acc[j], scaled<Isa>(load<Int<Isa>>(sum + j * lanes), factor));
          }
        }
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) store(sum + j * lanes, acc[j]);
      }
      if (!last) continue;
      const std::int64_t pixel = (tile.sample * a.out_h + row) * a.out_w + col;
      run_pixels<Isa, vectors, full>(a, layer.neurons, channel, pixel, 1,
                                     [&](std::int64_t, std::int64_t t, Int<Isa>(&current)[vectors]) {
                                       QCFS_UNROLL
                                       for (int j = 0; j < vectors; ++j) {
                                         const Int<Isa> total = load<Int<Isa>>(sums + (t * vectors + j) * lanes);
                                         current[j] = scale == 1 ? total : scaled<Isa>(total, scale);
                                       }
                                     });
    }
  }
}

// Channels [channel, channel + vectors * lanes) of one panel, at byte `place` of its rows.
template <class Isa, typename Weight, int vectors, bool full>
void fire_block(const EventLayer& layer, const EventTile& tile, const MergedList* lists, std::int64_t panel,
                std::int64_t channel, std::int64_t place, std::int32_t* sums) {
  const ConvIf& a = *layer.a;
  assert(channel < a.out_channels && tile.row0 < tile.row1 && tile.col0 < tile.col1);
  const std::int64_t pairs = (tile.row1 - tile.row0) * (tile.col1 - tile.col0) * a.steps;
  std::int64_t c = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const EventCut& cut = layer.lists[i].cut;
    const std::int64_t bytes = cut.rows * row_bytes;
    const char* rows = static_cast<const char*>(a.products[i].packed) + panel * cut.chunks * bytes + place;
    for (std::int64_t chunk = 0; chunk < cut.chunks; ++chunk, ++c, rows += bytes) {
      const std::int64_t lines = pairs < min_pairs_to_prefetch_all ? 0 : ceil_div(cut.rows, pairs);
      const Prefetch prefetch{chunk + 1 < cut.chunks ? rows + bytes : nullptr, cut.rows, lines};
      const std::int32_t factor = chunk == 0 && i > 0 ? a.products[i - 1].scale / a.products[i].scale : 1;
      fire_chunk<Isa, Weight, vectors, full>(layer, tile, lists, c, channel, rows, layer.lists[i].largest_input, factor,
                                             prefetch, sums);
    }
  }
  if (layer.chunks == 0)
    fire_chunk<Isa, Weight, vectors, full>(layer, tile, lists, 0, channel, nullptr, 1, 1, {}, sums);
}

template <class Isa, typename Weight>
void fire_panel(const EventLayer& layer, const EventTile& tile, const MergedList* lists, std::int64_t panel,
                std::int32_t* sums) {
  constexpr int lanes = Isa::lanes;
  constexpr int vectors = block_vectors<Isa, Weight>;
  constexpr std::int64_t channels = event_panel_channels(sizeof(Weight));
  const std::int64_t channel0 = panel * channels;
  const std::int64_t end = smaller(layer.a->out_channels, channel0 + channels);
  for (std::int64_t o = channel0; o < end; o += vectors * lanes) {
    const std::int64_t place = (o - channel0) * static_cast<std::int64_t>(sizeof(Weight));
    if (layer.a->out_channels - o >= vectors * lanes) {
      fire_block<Isa, Weight, vectors, true>(layer, tile, lists, panel, o, place, sums);
    } else {
      fire_block<Isa, Weight, vectors, false>(layer, tile, lists, panel, o, place, sums);
    }
  }
}

inline std::size_t fire_events_workspace(const EventLayer& layer, std::int64_t pixels) {
  const std::int64_t kept = layer.chunks > 1 ? pixels : 1;
  return static_cast<std::size_t>(kept * layer.a->steps * event_panel_channels(1)) * sizeof(std::int32_t);
}

template <class Isa>
void fire_events(const EventLayer& layer, const EventTile& tile, std::int64_t panel, const MergedList* lists,
                 void* workspace) {
  std::int32_t* sums = static_cast<std::int32_t*>(workspace);
  if (layer.a->product_count > 0 && layer.a->products[0].weight_bytes == 1) {
    fire_panel<Isa, std::int8_t>(layer, tile, lists, panel, sums);
  } else {
    fire_panel<Isa, std::int16_t>(layer, tile, lists, panel, sums);
  }
}

// Packed weights of one product: [panels, chunks, rows, channels of a panel].
template <class Isa, typename Weight>
void pack_panels(const Product& p, std::int64_t out_channels, const EventCut& cut, Weight* out) {
  constexpr std::int64_t channels = event_panel_channels(sizeof(Weight));
  const Weight* weight = static_cast<const Weight*>(p.weight);
  const std::int64_t k_blocks = p.g.kernel_h * p.g.kernel_w * cut.blocks;
  for (std::int64_t panel = 0; panel * channels < out_channels; ++panel) {
    const std::int64_t width = smaller(channels, out_channels - panel * channels);
    Weight* chunk = out + panel * cut.chunks * cut.rows * channels;
    __builtin_memset(chunk, 0, static_cast<std::size_t>(cut.chunks * cut.rows * row_bytes));
    for (std::int64_t k_block = 0; k_block < k_blocks; ++k_block) {
      const std::int64_t tap = k_block / cut.blocks, k0 = k_block % cut.blocks * cut.block_channels;
      const std::int64_t row = k_block / cut.k_blocks * cut.rows + k_block % cut.k_blocks * cut.block_channels;
      for (std::int64_t k = k0; k < smaller(p.x.channels, k0 + cut.block_channels); ++k) {
        const Weight* from = weight + (tap * p.x.channels + k) * out_channels + panel * channels;
        Weight* to = chunk + (row + k - k0) * channels;
        for (std::int64_t c = 0; c < width; ++c) to[panel_place<Isa, Weight>(static_cast<int>(c))] = from[c];
      }
    }
  }
}

template <class Isa>
void pack_events(const Product& p, std::int64_t out_channels, const EventCut& cut, void* out) {
  if (p.weight_bytes == 1) {
    pack_panels<Isa>(p, out_channels, cut, static_cast<std::int8_t*>(out));
  } else {
    pack_panels<Isa>(p, out_channels, cut, static_cast<std::int16_t*>(out));
  }
}

}    // namespace
}    // namespace qcfs::cpu
