// Spiking convolution as an integer matrix product, for machines with matrix or dot-product instructions (u8 x s8 ->
// s32) and for inputs that fire too often for event lists.
//
// clang-format off
//     1. expand: copy the input into one byte plane per step (0/1, or counts), with zero padding. After that, reading
//        under another kernel tap only means adding an offset. A strided convolution reads every stride-th row and
//        column, so the plane is rearranged by the remainder of row and column modulo the stride (space-to-depth). Each
//        pair of remainders is a phase, and output (r, c) meets tap (kh, kw) at
//
//            phase (kh*dh mod sh, kw*dw mod sw), position (r + kh*dh / sh) * plane_w + c + kw*dw / sw
//
//        Consecutive positions are consecutive rows of the left matrix, also across the end of an image row; what
//        falls into the padding is computed and thrown away. Without dilation, the taps of a kernel row that meet one
//        phase read neighbouring positions: their inputs are one run of bytes (TapRun), which wastes less of a block's
//        depth where channels are few.
//     2. fire_dense: multiply blocks of `rows` positions by `columns` packed columns, over all runs of taps, for each
//        step; then integrate, fire, reset.
//
//               columns: 16-bit weights  [ high digits of the panel | low digits of the panel ]
//                         8-bit weights  [ weights of the panel                               ]
//        position q   x
//        position q+1 x    one step's bytes [depth]  times  packed [depth, columns]  ->  int32 sums [rows, columns]
//        ..           x
//
//        Sums of a step wait in a small buffer until all steps are there; high * 256 + low is the current. Where a
//        panel's weights exceed the second-level cache, segments are cut into chunks, as in fire.h. A product of
//        another scale than the one before it begins a chunk, ahead of which the sums are multiplied.
// clang-format on
//
// The register block is Isa::DenseBlock (dense_vector.h, dense_tiles.h):
//
//     rows, columns, depth    positions and columns of a block; the weights of a run are padded to a multiple of depth
//     place(k, column)        the byte that holds input k of a column, in the packed weights of `depth` inputs
//     begin(), end()          around the blocks of a task
//     stay_awake()            between the neurons of `awake_rows` positions, for units that slow down when they rest
//     multiply(..)            one block of one step, of which the first `positions` and `used` columns matter; adds to
//                             the sums unless `first`
//     matrix_loop(rounds)     the inner instruction alone, to measure the machine's peak; returns its products of bytes
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

// `bytes` neighbouring masks (or counts, one plane each step) as one byte a step.
template <class Isa>
inline void expand_run(const std::uint8_t* x, std::int64_t bytes, bool mask, std::int64_t plane, std::int64_t steps,
                       std::uint8_t* out, std::int64_t step_bytes) {
  constexpr std::int64_t some = register_bytes<Isa>;
  for (std::int64_t k = 0; k < bytes; k += some) {
    const std::int64_t width = smaller(some, bytes - k);
    Bytes<Isa> m{};
    for (std::int64_t t = 0; t < steps; ++t) {
      if (!mask || t % 8 == 0) {
        const std::uint8_t* from = x + (mask ? t / 8 : t) * plane + k;
        m = width == some ? load<Bytes<Isa>>(from) : load_some<Bytes<Isa>>(from, width);
      }
      const Words<Isa> shifted = reinterpret_cast<const Words<Isa>&>(m) >> static_cast<int>(mask ? t % 8 : 0);
      const Words<Isa> bits = mask ? shifted & 0x0101 : shifted;
      std::uint8_t* to = out + t * step_bytes + k;
      if (width == some) {
        store(to, bits);
      } else {
        __builtin_memcpy(to, &bits, static_cast<std::size_t>(width));
      }
    }
  }
}

// Step 1: row `plane_row` of every phase, of one product and sample, at all steps.
template <class Isa>
void expand(const DenseLayer& layer, int product, std::int64_t sample, std::int64_t plane_row) {
  const ConvIf& a = *layer.a;
  assert(plane_row >= 0 && plane_row < layer.plane_h && sample >= layer.wave.sample0 && sample < layer.wave.sample1);
  const Product& p = a.products[product];
  const DenseProduct& d = layer.product[product];
  const std::int64_t channels = p.x.channels, steps = a.steps;
  const std::int64_t plane = a.batch * p.x.height * p.x.width * channels;
  const auto pad = [&](std::uint8_t* out, std::int64_t positions) {
    for (std::int64_t t = 0; t < steps; ++t) {
      __builtin_memset(out + t * d.step_bytes, 0, static_cast<std::size_t>(positions * channels));
    }
  };
  for (std::int64_t ph = 0; ph < d.phases_h; ++ph) {
    const std::int64_t r = (layer.wave.row0 + plane_row) * p.g.stride_h + ph - p.g.pad_h;
    for (std::int64_t pw = 0; pw < d.phases_w; ++pw) {
      std::uint8_t* out = d.plane + (sample - layer.wave.sample0) * d.sample_bytes +
                          (ph * d.phases_w + pw) * d.phase_bytes + plane_row * layer.plane_w * channels;
      if (r < 0 || r >= p.x.height) {
        pad(out, layer.plane_w);
        continue;
      }
      // Position j reads column j * stride - shift: inside the image from `begin` to `end`.
      const std::int64_t shift = p.g.pad_w - pw;
      const std::int64_t begin = smaller(layer.plane_w, shift > 0 ? ceil_div(shift, p.g.stride_w) : 0);
      const std::int64_t inside = p.x.width + shift > 0 ? ceil_div(p.x.width + shift, p.g.stride_w) : 0;
      const std::int64_t end = larger(begin, smaller(layer.plane_w, inside));
      pad(out, begin);
      pad(out + end * channels, layer.plane_w - end);
      const std::int64_t together = p.g.stride_w == 1 ? end - begin : 1;    // positions whose inputs are neighbours
      for (std::int64_t j = begin; j < end; j += together) {
        const std::int64_t c = j * p.g.stride_w - shift;
        const std::uint8_t* x = p.x.data + ((sample * p.x.height + r) * p.x.width + c) * channels;
        expand_run<Isa>(x, together * channels, p.x.coding == Coding::mask, plane, steps, out + j * channels,
                        d.step_bytes);
      }
    }
  }
}

// Packed weights of one product: [panels][runs of taps, blocks of depth][place(k, column)], panels `panel_bytes` apart.
template <class Isa, typename Weight>
void pack_columns(const Product& p, std::int64_t out_channels, std::int64_t panel_bytes, std::int8_t* out) {
  using Block = typename Isa::DenseBlock;
  constexpr int digits = static_cast<int>(sizeof(Weight));
  constexpr std::int64_t panel_channels = Block::columns / digits;
  const std::int64_t channels = p.x.channels;
  // The weights of one input, as input `within` of a block.
  const auto pack_input = [&](const Weight* row, std::int64_t present, std::int8_t* block, int within) {
    for (std::int64_t c = 0; c < present; ++c) {
      const int w = row[c];
      const int column = static_cast<int>(c);
      if (digits == 2) {
        const int low = static_cast<std::int8_t>(w & 0xff);
        block[Block::place(within, column)] = static_cast<std::int8_t>((w - low) / 256);
        block[Block::place(within, column + static_cast<int>(panel_channels))] = static_cast<std::int8_t>(low);
      } else {
        block[Block::place(within, column)] = static_cast<std::int8_t>(w);
      }
    }
  };
  for (std::int64_t panel = 0; panel * panel_channels < out_channels; ++panel) {
    const std::int64_t channel = panel * panel_channels;
    const std::int64_t present = smaller(panel_channels, out_channels - channel);
    std::int8_t* to = out + panel * panel_bytes;
    for (std::int64_t kh = 0; kh < p.g.kernel_h; ++kh) {
      for (std::int64_t i = 0; i < tap_runs(p.g); ++i) {
        const TapRun run = tap_run(p.g, i);
        const std::int64_t inputs = run.count * channels, bytes = round_up(inputs, Block::depth) * Block::columns;
        __builtin_memset(to, 0, static_cast<std::size_t>(bytes));
        for (std::int64_t k = 0; k < inputs; ++k) {
          const std::int64_t tap = kh * p.g.kernel_w + run.first + k / channels * run.apart;
          const Weight* row = static_cast<const Weight*>(p.weight) + (tap * channels + k % channels) * out_channels;
          const std::int64_t within = k % Block::depth;
          pack_input(row + channel, present, to + (k - within) * Block::columns, static_cast<int>(within));
        }
        to += bytes;
      }
    }
  }
}

template <class Isa>
void pack_dense(const Product& p, std::int64_t out_channels, std::int64_t panel_bytes, std::int8_t* out) {
  if (p.weight_bytes == 1) {
    pack_columns<Isa, std::int8_t>(p, out_channels, panel_bytes, out);
  } else {
    pack_columns<Isa, std::int16_t>(p, out_channels, panel_bytes, out);
  }
}

// Sums of one block and step.
template <class Isa>
constexpr std::int64_t block_sums = std::int64_t{Isa::DenseBlock::rows} * Isa::DenseBlock::columns;

// The output pixel at position q of a sample.
inline std::int64_t pixel_at(const DenseLayer& layer, std::int64_t sample, std::int64_t q) {
  const ConvIf& a = *layer.a;
  return (sample * a.out_h + layer.wave.row0 + q / layer.plane_w) * a.out_w + q % layer.plane_w;
}

// The neurons of one block of positions, from position q0 of a sample, in the first `vectors` vectors of the panel's
// channels; sums [T, rows, columns].
template <class Isa, int digits, int vectors, bool full>
void fire_positions(const DenseLayer& layer, std::int64_t panel, std::int64_t sample, std::int64_t q0,
                    const std::int32_t* sums) {
  using Block = typename Isa::DenseBlock;
  constexpr int lanes = Isa::lanes, low = Block::columns / digits;
  const ConvIf& a = *layer.a;
  const std::int64_t channel = panel * (Block::columns / digits);
  const std::int32_t scale = a.products[a.product_count - 1].scale;
  const bool whole_rows = layer.plane_w == a.out_w;    // then no position falls into padding
  const std::int64_t end = smaller(q0 + Block::rows, positions_of(layer));
  for (std::int64_t q = q0; q < end;) {
    const std::int64_t c = q % layer.plane_w, pixel = pixel_at(layer, sample, q);
    const std::int64_t pixels =
        smaller(whole_rows ? end - q : smaller(end - q, a.out_w - c), std::int64_t{Block::awake_rows});
    Block::stay_awake();
    const std::int32_t* first = sums + (q - q0) * Block::columns;
    // Captured by value: masks are bytes, and a store of bytes may change whatever a reference points to.
    const auto products = [first, scale](std::int64_t i, std::int64_t t, Int<Isa>(&current)[vectors]) {
      const std::int32_t* sum = first + i * Block::columns + t * block_sums<Isa>;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        current[j] = load<Int<Isa>>(sum + j * lanes);
        if (digits == 2)
          current[j] = wrapped_sum<Isa>(scaled<Isa>(current[j], 256), load<Int<Isa>>(sum + low + j * lanes));
        if (scale != 1) current[j] = scaled<Isa>(current[j], scale);
      }
    };
    run_pixels<Isa, vectors, full>(a, layer.neurons, channel, pixel, pixels, products);
    q += whole_rows || c + pixels < a.out_w ? pixels : layer.plane_w - c;
  }
}

using FirePositions = void (*)(const DenseLayer&, std::int64_t, std::int64_t, std::int64_t, const std::int32_t*);

// fire_positions for `width` channels: few of them leave vectors out, and whole vectors need no masks.
template <class Isa, int digits, int vectors = Isa::DenseBlock::columns / digits / Isa::lanes>
FirePositions fire_channels(std::int64_t width) {
  if constexpr (vectors % 2 == 0) {
    if (width <= vectors / 2 * Isa::lanes) return fire_channels<Isa, digits, vectors / 2>(width);
  }
  return width == vectors * Isa::lanes ? fire_positions<Isa, digits, vectors, true>
                                       : fire_positions<Isa, digits, vectors, false>;
}

// Whether a block holds any output, or only padding at the end of rows.
template <class Isa>
inline bool holds_output(const DenseLayer& layer, std::int64_t q0) {
  using Block = typename Isa::DenseBlock;
  const std::int64_t c = q0 % layer.plane_w;
  return c < layer.a->out_w || c + Block::rows > layer.plane_w;
}

template <class Isa>
std::size_t fire_dense_workspace(const DenseLayer& layer, std::int64_t blocks) {
  const std::int64_t kept = layer.chunks > 1 ? blocks : 1;
  return static_cast<std::size_t>(kept * layer.a->steps * block_sums<Isa>) * sizeof(std::int32_t);
}

// Step 2: the position blocks of one panel.
template <class Isa>
void fire_dense(const DenseLayer& layer, const DenseTile& tile, void* workspace) {
  using Block = typename Isa::DenseBlock;
  const ConvIf& a = *layer.a;
  const std::int64_t positions = positions_of(layer);
  const std::int64_t per_sample = ceil_div(positions, Block::rows);
  const std::int8_t* packed = layer.packed + tile.panel * layer.panel_bytes;
  const int digits = a.products[0].weight_bytes;
  const std::int64_t panel_channels = Block::columns / digits;
  const std::int64_t width = smaller(panel_channels, a.out_channels - tile.panel * panel_channels);
  const FirePositions fire = digits == 2 ? fire_channels<Isa, 2>(width) : fire_channels<Isa, 1>(width);
  const std::int64_t used = digits == 2 ? Block::columns : width;
  assert(tile.block0 < tile.block1 && tile.block1 <= samples_of(layer.wave) * per_sample);
  Block::begin();
  for (int c = 0; c < layer.chunks; ++c) {
    const Segment* segments = layer.segments + layer.chunk[c];
    const int count = layer.chunk[c + 1] - layer.chunk[c];
    for (std::int64_t block = tile.block0; block < tile.block1; ++block) {
      const std::int64_t sample = block / per_sample, q0 = block % per_sample * Block::rows;
      if (!holds_output<Isa>(layer, q0)) continue;
      std::int32_t* sums = static_cast<std::int32_t*>(workspace) +
                           (layer.chunks > 1 ? (block - tile.block0) * a.steps * block_sums<Isa> : 0);
      if (layer.factor[c] != 1) {
        for (std::int64_t i = 0; i < a.steps * block_sums<Isa>; i += Isa::lanes) {
          store(sums + i, scaled<Isa>(load<Int<Isa>>(sums + i), layer.factor[c]));
        }
      }
      if (c + 1 == layer.chunks) {
        const std::int64_t pixel = pixel_at(layer, layer.wave.sample0 + sample, q0);
        const std::int64_t left = a.batch * a.out_h * a.out_w - pixel;    // positions in padding have no pixel
        prefetch_state(a, tile.panel * panel_channels, width, pixel, smaller(left, Block::rows));
      }
      for (std::int64_t t = 0; t < a.steps; ++t) {
        Block::multiply(segments, count, sample, t, q0, positions - q0, used, packed, sums + t * block_sums<Isa>,
                        c == 0);
      }
      if (c + 1 < layer.chunks) continue;
      fire(layer, tile.panel, layer.wave.sample0 + sample, q0, sums);
    }
    for (int i = 0; i < count; ++i) packed += segments[i].blocks * Block::depth * Block::columns;
  }
  Block::end();
}

}    // namespace
}    // namespace qcfs::cpu
