// Spiking convolution, event-driven. QCFS networks fire at 5 to 20 % a step, so it pays to touch only the weights of
// inputs that fired:
//
//     1. list_events: for each input row and each step, the positions that fired, once, whatever the number of taps,
//        outputs and output channels that read them;
//     2. merge_events: for each output pixel and step, the positions under its kernel, once for all output channels.
//        Taps are cut into chunks (EventCut) of a few hundred inputs, and each chunk gets a list of its own, filled up
//        to a multiple of four with the position of a row of zeros;
//     3. fire_events: for each panel of 32 or 64 output channels, each chunk (its rows of 64 bytes stay in the
//        first-level cache), each output pixel and each step: add one weight row per position to accumulators in
//        registers. Sums wait in memory between chunks; after the last, integrate, fire, reset.
//
//        list of one row, one step    col 0 [3 17 40] col 1 [67 90] col 2 [130] col 3 [201 ..]
//                                            `------- under a kernel row -------'
//        merged, all kernel rows      [17 40 67 90 130 | 19 44 .. | 8 51 .. zeros]
//        packed rows of a chunk       position 17:  [ w w w w ...  64 bytes ]
//                                                     + + + +
//        registers                                  [ v v v v ]  -> compare -> bit t of one byte per neuron
//
// A position is the byte offset of a row in its chunk, modulo 2^16: the same list serves every tap, which adds an
// offset of its own. What limits step 3 is loading one row of 64 bytes per position; so weights must be near, and the
// lists short.
//
// panel_place (where a channel sits in a packed row), block_vectors (how many vectors of channels one pass takes) and
// the inner loop come from add_rows.h. An instruction set may bring a list_bytes of its own and define
// QCFS_OWN_LISTING, or only `fired` and QCFS_FIRED.

// Asks for the weights of the next chunk while this one is at work: all rows, a few at a time, or, where few pixels
// leave many rows out, those that the same pixel and step will add.
struct Prefetch {
  const char* rows;            // null: none
  std::int64_t left, lines;    // to go; to ask for each time, 0: by position

  inline void some(const MergedList* next) {
    if (rows == nullptr) return;
    if (lines == 0) {
      for (std::int64_t k = 0; k < next->count; ++k) __builtin_prefetch(rows + next->position[k], 0, 2);
    }
    for (std::int64_t i = 0; i < lines && left > 0; ++i, --left, rows += row_bytes) __builtin_prefetch(rows, 0, 2);
  }
};

// Adds what one chunk gives to the sums of a tile's pixels [rows, columns, T, vectors * lanes], which begin with the
// first chunk; after the last the pixel's neurons integrate and fire. With one chunk all pixels share one place.
template <typename Weight, int vectors, bool full>
void fire_chunk(const EventLayer& layer, const EventTile& tile, const MergedList* runs, std::int64_t chunk,
                std::int64_t channel, const char* rows, int most, Prefetch prefetch, std::int32_t* sums) {
  const ConvIf& a = *layer.a;
  const bool first = chunk == 0, last = chunk + 1 >= layer.chunks;
  const int shift = sizeof(Weight) == 1 ? 8 : 0;
  const std::int64_t next_pixel = first && last ? 0 : a.steps * vectors * lanes;
  const std::int64_t row_runs = (tile.col1 - tile.col0) * a.steps;
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    const MergedList* run = runs + ((row - tile.row0) * layer.chunks + chunk) * row_runs;
    for (std::int64_t col = tile.col0; col < tile.col1; ++col, sums += next_pixel) {
      std::int32_t* sum = sums;
      for (std::int64_t t = 0; t < a.steps; ++t, sum += vectors * lanes) {
        Int acc[vectors];
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) acc[j] = first ? Int{} : load<Int>(sum + j * lanes);
        if (layer.chunks > 0) {
          prefetch.some(run + row_runs);
          add_rows(static_cast<const Weight*>(nullptr), rows, *run++, most, acc);
        }
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) store(sum + j * lanes, acc[j]);
      }
      if (!last) continue;
      Membranes<vectors, full> membranes(a, layer.neurons, channel, (tile.sample * a.out_h + row) * a.out_w + col);
      sum = sums;
      for (std::int64_t t = 0; t < a.steps; ++t, sum += vectors * lanes) {
        Int current[vectors];
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) current[j] = load<Int>(sum + j * lanes) << shift;
        membranes.step(t, current);
      }
    }
  }
}

// Channels [channel, channel + vectors * lanes) of one panel, at byte `place` of its rows.
template <typename Weight, int vectors, bool full>
void fire_block(const EventLayer& layer, const EventTile& tile, const MergedList* runs, std::int64_t panel,
                std::int64_t channel, std::int64_t place, std::int32_t* sums) {
  const ConvIf& a = *layer.a;
  const std::int64_t times = (tile.row1 - tile.row0) * (tile.col1 - tile.col0) * a.steps;
  std::int64_t c = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const EventCut& cut = layer.lists[i].cut;
    const std::int64_t bytes = cut.rows * row_bytes;
    const char* rows = static_cast<const char*>(a.products[i].packed) + panel * cut.chunks * bytes + place;
    for (std::int64_t chunk = 0; chunk < cut.chunks; ++chunk, ++c, rows += bytes) {
      const std::int64_t lines = times < 24 ? 0 : (cut.rows + times - 1) / times;
      const Prefetch prefetch{chunk + 1 < cut.chunks ? rows + bytes : nullptr, cut.rows, lines};
      fire_chunk<Weight, vectors, full>(layer, tile, runs, c, channel, rows, layer.lists[i].largest_input, prefetch, sums);
    }
  }
  if (layer.chunks == 0) fire_chunk<Weight, vectors, full>(layer, tile, runs, 0, channel, nullptr, 1, {}, sums);
}

template <typename Weight>
void fire_panel(const EventLayer& layer, const EventTile& tile, const MergedList* runs, std::int64_t panel,
                std::int32_t* sums) {
  constexpr int vectors = block_vectors<Weight>;
  constexpr std::int64_t channels = event_panel_channels(sizeof(Weight));
  const std::int64_t channel0 = panel * channels;
  const std::int64_t end = smaller(layer.a->out_channels, channel0 + channels);
  for (std::int64_t o = channel0; o < end; o += vectors * lanes) {
    const std::int64_t place = (o - channel0) * static_cast<std::int64_t>(sizeof(Weight));
    if (layer.a->out_channels - o >= vectors * lanes) {
      fire_block<Weight, vectors, true>(layer, tile, runs, panel, o, place, sums);
    } else {
      fire_block<Weight, vectors, false>(layer, tile, runs, panel, o, place, sums);
    }
  }
}

std::size_t fire_events_workspace(const EventLayer& layer, std::int64_t pixels) {
  const std::int64_t kept = layer.chunks > 1 ? pixels : 1;
  return static_cast<std::size_t>(kept * layer.a->steps * channel_padding) * sizeof(std::int32_t);
}

void fire_events(const EventLayer& layer, const EventTile& tile, std::int64_t panel, const MergedList* runs,
                 void* workspace) {
  std::int32_t* sums = static_cast<std::int32_t*>(workspace);
  if (layer.a->product_count > 0 && layer.a->products[0].weight_bytes == 1) {
    fire_panel<std::int8_t>(layer, tile, runs, panel, sums);
  } else {
    fire_panel<std::int16_t>(layer, tile, runs, panel, sums);
  }
}

template <typename Weight>
void pack_panels(const Product& p, std::int64_t out_channels, const EventCut& cut, Weight* out) {
  constexpr std::int64_t channels = event_panel_channels(sizeof(Weight));
  const Weight* weight = static_cast<const Weight*>(p.weight);
  const std::int64_t cells = p.g.kernel_h * p.g.kernel_w * cut.blocks;
  for (std::int64_t panel = 0; panel * channels < out_channels; ++panel) {
    const std::int64_t width = smaller(channels, out_channels - panel * channels);
    Weight* chunk = out + panel * cut.chunks * cut.rows * channels;
    __builtin_memset(chunk, 0, static_cast<std::size_t>(cut.chunks * cut.rows * row_bytes));
    for (std::int64_t cell = 0; cell < cells; ++cell) {
      const std::int64_t tap = cell / cut.blocks, k0 = cell % cut.blocks * cut.block_channels;
      const std::int64_t row = cell / cut.k_blocks * cut.rows + cell % cut.k_blocks * cut.block_channels;
      for (std::int64_t k = k0; k < smaller(p.x.channels, k0 + cut.block_channels); ++k) {
        const Weight* from = weight + (tap * p.x.channels + k) * out_channels + panel * channels;
        Weight* to = chunk + (row + k - k0) * channels;
        for (std::int64_t c = 0; c < width; ++c) to[panel_place<Weight>(static_cast<int>(c))] = from[c];
      }
    }
  }
}

void pack_events(const Product& p, std::int64_t out_channels, const EventCut& cut, void* out) {
  if (p.weight_bytes == 1) {
    pack_panels(p, out_channels, cut, static_cast<std::int8_t*>(out));
  } else {
    pack_panels(p, out_channels, cut, static_cast<std::int16_t*>(out));
  }
}
