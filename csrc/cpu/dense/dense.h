// Spiking convolution as an integer matrix product, for machines with matrix or dot-product instructions (u8 x s8 ->
// s32) and for inputs that fire too often for event lists.
//
//     1. expand: every input row becomes bytes 0/1 (or counts) for each step, padded with zeros, so that a tap is a
//     mere
//        offset. A strided convolution reads every stride-th row and column, so rows and columns are sorted by
//        their remainder (phase) and each phase is a grid of its own; output (r, c) and tap (kh, kw) meet at
//
//            phase (kh*dh mod sh, kw*dw mod sw), position (r + kh*dh / sh) * plane_w + c + kw*dw / sw
//
//        Consecutive positions are consecutive rows of the left matrix, also across the end of an image row; what
//        falls into the padding is computed and thrown away.
//     2. fire_dense: blocks of `rows` positions times `columns` packed columns, over all taps and channels, for each
//     step;
//        then integrate, fire, reset.
//
//               columns: 16-bit weights  [ high digits of CB channels | low digits of CB channels ]
//                         8-bit weights  [ CB channels                                           ]
//        position q   x
//        position q+1 x    one step's bytes [depth]  times  packed [depth, columns]  ->  int32 sums [rows, columns]
//        ..           x
//
//        Sums of a step wait in a small buffer until all steps are there; high * 256 + low is the current. Where a
//        column block's weights exceed the second-level cache, segments are cut into chunks as in events.h.
//
// The including file defines dense_rows, dense_columns, dense_depth, dense_place (the byte of a packed block that holds
// input k of a column) and multiply (one block of one step, of which
// `rows` positions matter; adds to the sums unless `first`).

using Wide = std::uint8_t __attribute__((vector_size(4 * lanes)));
using WidePairs = std::uint16_t __attribute__((vector_size(4 * lanes)));

void expand(const DenseLayer& layer, int product, std::int64_t sample, std::int64_t plane_row) {
  const ConvIf& a = *layer.a;
  const Product& p = a.products[product];
  const DenseProduct& d = layer.product[product];
  const std::int64_t channels = p.x.channels, steps = a.steps;
  const std::int64_t plane = a.batch * p.x.height * p.x.width * channels;
  const bool mask = p.x.coding == Coding::mask;
  const std::int64_t phases_h = d.sample_bytes / d.phase_bytes / d.phases_w;
  for (std::int64_t ph = 0; ph < phases_h; ++ph) {
    const std::int64_t r = (layer.wave.row0 + plane_row) * p.g.stride_h + ph - p.g.pad_h;
    for (std::int64_t pw = 0; pw < d.phases_w; ++pw) {
      std::uint8_t* out = d.plane + (sample - layer.wave.sample0) * d.sample_bytes +
                          (ph * d.phases_w + pw) * d.phase_bytes + plane_row * layer.plane_w * d.depth;
      for (std::int64_t j = 0; j < layer.plane_w; ++j, out += d.depth) {
        const std::int64_t c = j * p.g.stride_w + pw - p.g.pad_w;
        if (r < 0 || r >= p.x.height || c < 0 || c >= p.x.width) {
          for (std::int64_t t = 0; t < steps; ++t) {
            __builtin_memset(out + t * d.step_bytes, 0, static_cast<std::size_t>(d.depth));
          }
          continue;
        }
        const std::uint8_t* x = p.x.data + ((sample * p.x.height + r) * p.x.width + c) * channels;
        for (std::int64_t k = 0; k < d.depth; k += static_cast<std::int64_t>(sizeof(Wide))) {
          const std::int64_t in = smaller(static_cast<std::int64_t>(sizeof(Wide)), channels - k);
          const std::int64_t width = smaller(static_cast<std::int64_t>(sizeof(Wide)), d.depth - k);
          Wide m{};
          for (std::int64_t t = 0; t < steps; ++t) {
            if (!mask || t % 8 == 0) {
              const std::uint8_t* bytes = x + (mask ? t / 8 : t) * plane + k;
              m = in >= static_cast<std::int64_t>(sizeof(Wide)) ? load<Wide>(bytes)
                                                                : load_some<Wide>(bytes, larger(in, 0));
            }
            const WidePairs shifted = reinterpret_cast<const WidePairs&>(m) >> static_cast<int>(mask ? t % 8 : 0);
            const WidePairs bits = mask ? shifted & 0x0101 : shifted;
            std::uint8_t* to = out + t * d.step_bytes + k;
            if (width == static_cast<std::int64_t>(sizeof(Wide))) {
              store(to, bits);
            } else {
              __builtin_memcpy(to, &bits, static_cast<std::size_t>(width));
            }
          }
        }
      }
    }
  }
}

template <typename Weight>
void pack_columns(const Product& p, std::int64_t out_channels, std::int64_t block_bytes, std::int8_t* out) {
  constexpr int digits = static_cast<int>(sizeof(Weight));
  constexpr std::int64_t block_channels = dense_columns / digits;
  const Weight* weight = static_cast<const Weight*>(p.weight);
  const std::int64_t channels = p.x.channels, depth = round_up(channels, dense_depth);
  const std::int64_t taps = p.g.kernel_h * p.g.kernel_w;
  for (std::int64_t block = 0; block * block_channels < out_channels; ++block) {
    std::int8_t* to = out + block * block_bytes;
    __builtin_memset(to, 0, static_cast<std::size_t>(taps * depth * dense_columns));
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      for (std::int64_t k = 0; k < channels; ++k) {
        const Weight* row = weight + (tap * channels + k) * out_channels + block * block_channels;
        std::int8_t* cell = to + (tap * depth + k / dense_depth * dense_depth) * dense_columns;
        const int within = static_cast<int>(k % dense_depth);
        for (std::int64_t c = 0; c < smaller(block_channels, out_channels - block * block_channels); ++c) {
          const int w = row[c];
          const int column = static_cast<int>(c);
          if (digits == 2) {
            const int low = static_cast<std::int8_t>(w & 0xff);
            cell[dense_place(within, column)] = static_cast<std::int8_t>((w - low) / 256);
            cell[dense_place(within, column + static_cast<int>(block_channels))] = static_cast<std::int8_t>(low);
          } else {
            cell[dense_place(within, column)] = static_cast<std::int8_t>(w);
          }
        }
      }
    }
  }
}

void pack_dense(const Product& p, std::int64_t out_channels, std::int64_t block_bytes, std::int8_t* out) {
  if (p.weight_bytes == 1) {
    pack_columns<std::int8_t>(p, out_channels, block_bytes, out);
  } else {
    pack_columns<std::int16_t>(p, out_channels, block_bytes, out);
  }
}

constexpr std::int64_t dense_block = dense_rows * dense_columns;    // sums of one block and step

template <int digits, bool full>
void fire_positions(const DenseLayer& layer, std::int64_t panel, std::int64_t sample, std::int64_t q0,
                    const std::int32_t* sums) {
  constexpr int vectors = dense_columns / digits / lanes;
  const ConvIf& a = *layer.a;
  const std::int64_t channel = panel * (dense_columns / digits);
  for (std::int64_t i = 0; i < dense_rows; ++i, sums += dense_columns) {
    const std::int64_t r = (q0 + i) / layer.plane_w, c = (q0 + i) % layer.plane_w;
    if (r >= layer.wave.row1 - layer.wave.row0 || c >= a.out_w) continue;
    const std::int64_t pixel = (sample * a.out_h + layer.wave.row0 + r) * a.out_w + c;
    Membranes<vectors, full> membranes(a, layer.neurons, channel, pixel);
    for (std::int64_t t = 0; t < a.steps; ++t) {
      const std::int32_t* sum = sums + t * dense_block;
      Int current[vectors];
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        // Modulo 2^32: the total fits, its high digits alone may not.
        Unsigned total = load<Unsigned>(sum + j * lanes) << 8;
        if (digits == 2) total += load<Unsigned>(sum + (vectors + j) * lanes);
        current[j] = reinterpret_cast<const Int&>(total);
      }
      membranes.step(t, current);
    }
  }
}

// Positions from the first output of a sample to the last.
inline std::int64_t positions_of(const DenseLayer& layer) {
  return (layer.wave.row1 - layer.wave.row0 - 1) * layer.plane_w + layer.a->out_w;
}

// Whether a block holds any output, or only padding at the end of rows.
inline bool holds_output(const DenseLayer& layer, std::int64_t q0) {
  const std::int64_t c = q0 % layer.plane_w;
  return c < layer.a->out_w || c + dense_rows > layer.plane_w;
}

std::size_t fire_dense_workspace(const DenseLayer& layer, std::int64_t blocks) {
  const std::int64_t kept = layer.chunks > 1 ? blocks : 1;
  return static_cast<std::size_t>(kept * layer.a->steps * dense_block) * sizeof(std::int32_t);
}

void fire_dense(const DenseLayer& layer, const DenseTile& tile, void* workspace) {
  const ConvIf& a = *layer.a;
  const std::int64_t positions = positions_of(layer);
  const std::int64_t per_sample = (positions + dense_rows - 1) / dense_rows;
  const std::int8_t* packed = layer.packed + tile.panel * layer.panel_bytes;
  const int digits = a.products[0].weight_bytes;
  const bool full = (tile.panel + 1) * (dense_columns / digits) <= a.out_channels;
  const auto fire = digits == 2 ? full ? fire_positions<2, true> : fire_positions<2, false>
                    : full      ? fire_positions<1, true>
                                : fire_positions<1, false>;
  begin_multiply();
  for (int c = 0; c < layer.chunks; ++c) {
    const Segment* segments = layer.segments + layer.chunk[c];
    const int count = layer.chunk[c + 1] - layer.chunk[c];
    for (std::int64_t block = tile.block0; block < tile.block1; ++block) {
      const std::int64_t sample = block / per_sample, q0 = block % per_sample * dense_rows;
      if (!holds_output(layer, q0)) continue;
      std::int32_t* sums = static_cast<std::int32_t*>(workspace) +
                           (layer.chunks > 1 ? (block - tile.block0) * a.steps * dense_block : 0);
      for (std::int64_t t = 0; t < a.steps; ++t) {
        multiply(segments, count, sample, t, q0, positions - q0, packed, sums + t * dense_block, c == 0);
      }
      if (c + 1 < layer.chunks) continue;
      fire(layer, tile.panel, layer.wave.sample0 + sample, q0, sums);
    }
    for (int i = 0; i < count; ++i) packed += segments[i].blocks * dense_depth * dense_columns;
  }
  end_multiply();
}

constexpr DenseShape dense_shape = {dense_rows, dense_columns, dense_depth, max_dense_input};
