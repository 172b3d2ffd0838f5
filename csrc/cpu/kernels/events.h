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

// ---------------------------------------------------------------------------------- event lists

#if !defined(QCFS_OWN_LISTING)
using Places = std::uint16_t __attribute__((vector_size(16)));

struct PlaceTable {
  std::uint16_t place[256][8];
};

constexpr PlaceTable make_place_table() {
  PlaceTable t{};
  for (int mask = 0; mask < 256; ++mask) {
    int n = 0;
    for (int b = 0; b < 8; ++b) {
      if (mask >> b & 1) t.place[mask][n++] = static_cast<std::uint16_t>(row_bytes * b);
    }
  }
  return t;
}

constexpr PlaceTable place_table = make_place_table();

#if !defined(QCFS_FIRED)
constexpr int fired_bytes = 8;

// Bit k says whether x[k] & wanted is not zero; a multiplication gathers the lowest bits of eight bytes.
inline std::uint32_t fired(const std::uint8_t* x, std::uint8_t wanted) {
  const std::uint64_t word = load<std::uint64_t>(x) & 0x0101010101010101ull * wanted;
  const std::uint64_t low7 = 0x7f7f7f7f7f7f7f7full;
  const std::uint64_t set = (((word & low7) + low7) | word) >> 7 & 0x0101010101010101ull;
  return static_cast<std::uint32_t>(set * 0x0102040810204080ull >> 56);
}
#endif

// Writes first + 64 * k for every k of [0, n) with x[k] & wanted, and those bytes where `value` is not null; returns
// the end. Writes up to 8 entries past it. A table turns eight bits into places, without a branch on the spikes.
inline std::uint16_t* list_bytes(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted, std::uint16_t first,
                                 std::uint16_t* out, std::uint16_t* value) {
  std::uint8_t rest[fired_bytes] = {};
  for (std::int64_t k = 0; k < n; k += fired_bytes) {
    const std::uint8_t* bytes = x + k;
    if (n - k < fired_bytes) {
      __builtin_memcpy(rest, bytes, static_cast<std::size_t>(n - k));
      bytes = rest;
    }
    std::uint32_t set = fired(bytes, wanted);
    for (int part = 0; part < fired_bytes; part += 8, set >>= 8) {
      const std::uint16_t* place = place_table.place[set & 0xff];
      store(out, load<Places>(place) + static_cast<std::uint16_t>(first + row_bytes * (k + part)));
      const int found = __builtin_popcount(set & 0xff);
      if (value != nullptr) {
        for (int j = 0; j < found; ++j) value[j] = bytes[part + place[j] / row_bytes];
        value += found;
      }
      out += found;
    }
  }
  return out;
}
#endif

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
void list_events(const ConvIf& a, int product, const Wave& wave, const EventLists& lists, std::int64_t sample,
                 std::int64_t row) {
  const Product& p = a.products[product];
  const std::int64_t width = p.x.width, channels = p.x.channels, steps = a.steps;
  const std::int64_t blocks = lists.cut.blocks, block = lists.cut.block_channels;
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
        const std::uint16_t first = static_cast<std::uint16_t>(lists.columns ? row_bytes * c * block : 0);
        out = list_bytes(bytes + c * channels + b * block, smaller(block, channels - b * block), wanted, first, out,
                         values);
        if (lists.alone) out = begin + fill_up(lists.cut, out - begin, begin, values);
      }
    }
    *start++ = static_cast<std::uint32_t>(out - position);
  }
}

// ---------------------------------------------------------------------------- lists of each output

// Cells of a chunk that follow each other in the list of one input row: one cell, or a run of columns.
struct Stretch {
  const std::uint32_t* start;    // of step 0 and column 0
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t column, columns;    // first column under output column 0, and how many
  std::int64_t place;              // of its first cell in the chunk, in cells
};

// The same under one output pixel, without padding.
struct Piece {
  const std::uint32_t* start;    // of step 0
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t columns;
  std::uint16_t shift;    // what turns a listed position into that of the chunk
};

// Finds the stretches of a chunk under one output row; returns how many there are.
inline int stretches_of(const EventLayer& layer, int product, std::int64_t chunk, std::int64_t sample, std::int64_t row,
                        Stretch* out) {
  const Product& p = layer.a->products[product];
  const EventLists& lists = layer.lists[product];
  const EventCut& cut = lists.cut;
  const Geometry& g = p.g;
  const std::int64_t begin = chunk * cut.cells, end = smaller(begin + cut.cells, g.kernel_h * g.kernel_w * cut.blocks);
  int count = 0;
  for (std::int64_t cell = begin, next; cell < end; cell = next) {
    const std::int64_t tap = cell / cut.blocks, kh = tap / g.kernel_w;
    next = lists.columns ? smaller(end, (kh + 1) * g.kernel_w) : cell + 1;
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    const std::int64_t region = (sample - layer.wave.sample0) * lists.in.rows + (r - lists.in.row0);
    Stretch& s = out[count++];
    s.start = lists.start + region * layer.a->steps * (p.x.width * cut.blocks + 1) + cell % cut.blocks;
    s.position = lists.position + region * lists.capacity;
    s.value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
    s.column = tap % g.kernel_w * g.dilation_w - g.pad_w;
    s.columns = lists.columns ? next - cell : 1;
    s.place = cell - begin;
  }
  return count;
}

// Finds the pieces under one output column; returns how many there are.
inline int pieces_of(const EventLists& lists, const Product& p, const Stretch* stretches, int count, std::int64_t col,
                     Piece* out) {
  int found = 0;
  for (int i = 0; i < count; ++i) {
    const Stretch& s = stretches[i];
    std::int64_t column = col * p.g.stride_w + s.column, columns = s.columns, place = s.place;
    if (column < 0) {
      columns += column;
      place -= column;
      column = 0;
    }
    columns = smaller(columns, p.x.width - column);
    if (columns <= 0) continue;
    if (lists.columns) place -= column;
    const std::uint16_t shift = static_cast<std::uint16_t>(row_bytes * lists.cut.block_channels * place);
    out[found++] = {s.start + column * lists.cut.blocks, s.position, s.value, columns, shift};
  }
  return found;
}

using Positions = std::uint16_t __attribute__((vector_size(4 * lanes)));

// Copies n entries, each plus `shift`; reads and writes up to two vectors beyond them.
inline void append(std::uint16_t* to, const std::uint16_t* from, std::int64_t n, std::uint16_t shift) {
  constexpr std::int64_t some = 2 * lanes;
  std::int64_t k = 0;
  do {
    store(to + k, load<Positions>(from + k) + shift);
    store(to + k + some, load<Positions>(from + k + some) + shift);
    k += 2 * some;
  } while (k < n);
}

inline std::int64_t most_cells(const EventLayer& layer) {
  std::int64_t cells = 1;
  for (int i = 0; i < layer.a->product_count; ++i) cells = larger(cells, layer.lists[i].cut.cells);
  return cells;
}

std::size_t merge_events_workspace(const EventLayer& layer) {
  return static_cast<std::size_t>(most_cells(layer)) * (sizeof(Stretch) + sizeof(Piece));
}

// Brings together what the pixels of one row of a tile read.
void merge_events(const EventLayer& layer, const EventTile& tile, std::int64_t row, const EventRow& out,
                  void* workspace) {
  const ConvIf& a = *layer.a;
  const std::int64_t steps = a.steps;
  EventRun* run = out.runs;
  std::uint16_t* to = out.position;
  Stretch* const stretches = static_cast<Stretch*>(workspace);
  Piece* const pieces = reinterpret_cast<Piece*>(stretches + most_cells(layer));
  for (int i = 0; i < a.product_count; ++i) {
    const EventLists& lists = layer.lists[i];
    for (std::int64_t chunk = 0; chunk < lists.cut.chunks; ++chunk) {
      const int under = stretches_of(layer, i, chunk, tile.sample, row, stretches);
      for (std::int64_t col = tile.col0; col < tile.col1; ++col) {
        const int count = pieces_of(lists, a.products[i], stretches, under, col, pieces);
        for (std::int64_t t = 0; t < steps; ++t, ++run) {
          const std::int64_t step = t * (a.products[i].x.width * lists.cut.blocks + 1);
          if (lists.alone) {
            *run = {};
            if (count == 0) continue;
            const std::uint32_t begin = pieces->start[step];
            run->position = pieces->position + begin;
            run->value = pieces->value == nullptr ? nullptr : pieces->value + begin;
            run->count = pieces->start[step + 1] - begin;
            continue;
          }
          std::uint16_t* value = lists.value == nullptr ? nullptr : out.value + (to - out.position);
          std::int64_t total = 0;
          for (int j = 0; j < count; ++j) {
            const std::uint32_t* start = pieces[j].start + step;
            const std::int64_t n = start[pieces[j].columns] - start[0];
            append(to + total, pieces[j].position + start[0], n, pieces[j].shift);
            if (value != nullptr) append(value + total, pieces[j].value + start[0], n, 0);
            total += n;
          }
          total = fill_up(lists.cut, total, to, value);
          *run = {to, value, total};
          to += total;
        }
      }
    }
  }
}

// --------------------------------------------------------------------------- spiking convolution

// Asks for the weights of the next chunk while this one is at work: all rows, a few at a time, or, where few pixels
// leave many rows out, those that the same pixel and step will add.
struct Ahead {
  const char* rows;            // null: none
  std::int64_t left, lines;    // to go; to ask for each time, 0: by position

  inline void some(const EventRun* next) {
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
void fire_chunk(const EventLayer& layer, const EventTile& tile, const EventRun* runs, std::int64_t chunk,
                std::int64_t channel, const char* rows, int most, Ahead ahead, std::int32_t* sums) {
  const ConvIf& a = *layer.a;
  const bool first = chunk == 0, last = chunk + 1 >= layer.chunks;
  const int shift = sizeof(Weight) == 1 ? 8 : 0;
  const std::int64_t next_pixel = first && last ? 0 : a.steps * vectors * lanes;
  const std::int64_t row_runs = (tile.col1 - tile.col0) * a.steps;
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    const EventRun* run = runs + ((row - tile.row0) * layer.chunks + chunk) * row_runs;
    for (std::int64_t col = tile.col0; col < tile.col1; ++col, sums += next_pixel) {
      std::int32_t* sum = sums;
      for (std::int64_t t = 0; t < a.steps; ++t, sum += vectors * lanes) {
        Int acc[vectors];
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) acc[j] = first ? Int{} : load<Int>(sum + j * lanes);
        if (layer.chunks > 0) {
          ahead.some(run + row_runs);
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
void fire_block(const EventLayer& layer, const EventTile& tile, const EventRun* runs, std::int64_t panel,
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
      const Ahead ahead{chunk + 1 < cut.chunks ? rows + bytes : nullptr, cut.rows, lines};
      fire_chunk<Weight, vectors, full>(layer, tile, runs, c, channel, rows, layer.lists[i].most, ahead, sums);
    }
  }
  if (layer.chunks == 0) fire_chunk<Weight, vectors, full>(layer, tile, runs, 0, channel, nullptr, 1, {}, sums);
}

template <typename Weight>
void fire_panel(const EventLayer& layer, const EventTile& tile, const EventRun* runs, std::int64_t panel,
                std::int32_t* sums) {
  constexpr int vectors = block_vectors<Weight>;
  constexpr std::int64_t channels = panel_channels(sizeof(Weight));
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
  return static_cast<std::size_t>(kept * layer.a->steps * padded_channels) * sizeof(std::int32_t);
}

void fire_events(const EventLayer& layer, const EventTile& tile, std::int64_t panel, const EventRun* runs,
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
  constexpr std::int64_t channels = panel_channels(sizeof(Weight));
  const Weight* weight = static_cast<const Weight*>(p.weight);
  const std::int64_t cells = p.g.kernel_h * p.g.kernel_w * cut.blocks;
  for (std::int64_t panel = 0; panel * channels < out_channels; ++panel) {
    const std::int64_t width = smaller(channels, out_channels - panel * channels);
    Weight* chunk = out + panel * cut.chunks * cut.rows * channels;
    __builtin_memset(chunk, 0, static_cast<std::size_t>(cut.chunks * cut.rows * row_bytes));
    for (std::int64_t cell = 0; cell < cells; ++cell) {
      const std::int64_t tap = cell / cut.blocks, k0 = cell % cut.blocks * cut.block_channels;
      const std::int64_t row = cell / cut.cells * cut.rows + cell % cut.cells * cut.block_channels;
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

// ------------------------------------------------------------------------------------------ groups

// Adds what one product gives to one pixel at one step.
template <typename Weight>
void add_grouped(const EventLayer& layer, int product, std::int64_t sample, std::int64_t row, std::int64_t col,
                 std::int64_t t, std::int32_t* acc) {
  const ConvIf& a = *layer.a;
  const Product& p = a.products[product];
  const Geometry& g = p.g;
  const EventLists& lists = layer.lists[product];
  const std::int64_t O = a.out_channels, blocks = lists.cut.blocks;
  const std::int64_t group_in = p.x.channels / g.groups, group_out = O / g.groups;
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
      std::int64_t first_in = 0, first_out = 0;    // of the current group: channels ascend
      for (std::int64_t b = 0; b < blocks; ++b) {
        for (std::uint32_t k = start[c * blocks + b]; k != start[c * blocks + b + 1]; ++k) {
          const std::int64_t channel = b * lists.cut.block_channels + position[k] / row_bytes;
          while (channel >= first_in + group_in) {
            first_in += group_in;
            first_out += group_out;
          }
          const Weight* w = tap + (channel - first_in) * O;
          const std::int32_t x = value == nullptr ? 1 : value[k];
          for (std::int64_t o = first_out; o < first_out + group_out; ++o) acc[o] += w[o] * x;
        }
      }
    }
  }
}

// Any groups: sums in memory, one row segment (the outputs of the input's group) per event, plain weights.
template <typename Weight>
void fire_grouped_as(const EventLayer& layer, const Tile& tile, std::int32_t* acc) {
  const ConvIf& a = *layer.a;
  const std::int64_t O = a.out_channels;
  const std::int64_t plane = a.batch * a.out_h * a.out_w * O;
  const std::int32_t scale = sizeof(Weight) == 1 ? 256 : 1;
  std::int32_t* v = acc + round_up(O, 16);
  std::uint8_t* bits = reinterpret_cast<std::uint8_t*>(v + round_up(O, 16));
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t pixel = (tile.sample * a.out_h + row) * a.out_w + col;
      for (std::int64_t o = 0; o < O; ++o) {
        v[o] = a.threshold[o] / 2;
        bits[o] = 0;
      }
      for (std::int64_t t = 0; t < a.steps; ++t) {
        for (std::int64_t o = 0; o < O; ++o) acc[o] = 0;
        for (int i = 0; i < a.product_count; ++i) add_grouped<Weight>(layer, i, tile.sample, row, col, t, acc);
        for (std::int64_t o = 0; o < O; ++o) acc[o] = acc[o] * scale + a.bias[o];
        for (int i = 0; i < a.residual_count; ++i) {
          const Residual& r = a.residuals[i];
          const bool mask = r.coding == Coding::mask;
          const std::uint8_t* x = r.data + (mask ? t / 8 : t) * plane + pixel * O;
          for (std::int64_t o = 0; o < O; ++o) acc[o] += r.amplitude[o] * (mask ? (x[o] >> (t % 8)) & 1 : x[o]);
        }
        if (a.current != nullptr) {
          for (std::int64_t o = 0; o < O; ++o) acc[o] += a.current[pixel * O + o];
        }
        for (std::int64_t o = 0; o < O; ++o) {
          bits[o] |= static_cast<std::uint8_t>(fire(v[o], acc[o], a.threshold[o]) << (t % 8));
        }
        if (t % 8 == 7 || t + 1 == a.steps) {
          std::uint8_t* out = a.out + (t / 8) * plane + pixel * O;
          for (std::int64_t o = 0; o < O; ++o) {
            out[o] = bits[o];
            bits[o] = 0;
          }
        }
      }
    }
  }
}

std::size_t fire_grouped_workspace(const ConvIf& a) {
  return 3 * static_cast<std::size_t>(round_up(a.out_channels, 16)) * sizeof(std::int32_t);
}

void fire_grouped(const EventLayer& layer, const Tile& tile, void* workspace) {
  if (layer.a->products[0].weight_bytes == 1) {
    fire_grouped_as<std::int8_t>(layer, tile, static_cast<std::int32_t*>(workspace));
  } else {
    fire_grouped_as<std::int16_t>(layer, tile, static_cast<std::int32_t*>(workspace));
  }
}

// Depthwise layers (one input and one output channel to a group) need no lists: a vector holds neighbouring channels
// and every tap adds its weights where the mask has the bit.
template <typename Weight>
void fire_depthwise_as(const ConvIf& a, const Neurons& neurons, const Tile& tile) {
  const int shift = sizeof(Weight) == 1 ? 8 : 0;
  const std::int64_t C = a.out_channels;
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      for (std::int64_t channel = 0; channel < C; channel += lanes) {
        const std::int64_t width = smaller(lanes, C - channel);
        Membranes<1, false> membranes(a, neurons, channel, (tile.sample * a.out_h + row) * a.out_w + col);
        for (std::int64_t t0 = 0; t0 < a.steps; t0 += 8) {
          const int steps = static_cast<int>(smaller(8, a.steps - t0));
          Int acc[8][1];
          for (int t = 0; t < 8; ++t) acc[t][0] = Int{};
          for (int i = 0; i < a.product_count; ++i) {
            const Product& p = a.products[i];
            const Geometry& g = p.g;
            const bool mask = p.x.coding == Coding::mask;
            const std::int64_t plane = a.batch * p.x.height * p.x.width * C;
            for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
              const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
              if (r < 0 || r >= p.x.height) continue;
              for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
                const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
                if (c < 0 || c >= p.x.width) continue;
                const Weight* w = static_cast<const Weight*>(p.weight) + (kh * g.kernel_w + kw) * C + channel;
                const Int weight = widen(w, width);
                const std::uint8_t* x = p.x.data + ((tile.sample * p.x.height + r) * p.x.width + c) * C + channel +
                                        (mask ? t0 / 8 : t0) * plane;
                if (mask) {
                  const Int m = __builtin_convertvector(load_some<Byte>(x, width), Int);
                  for (int t = 0; t < steps; ++t) acc[t][0] += (((m >> t) & 1) != 0) & weight;
                } else {
                  for (int t = 0; t < steps; ++t) {
                    acc[t][0] += __builtin_convertvector(load_some<Byte>(x + t * plane, width), Int) * weight;
                  }
                }
              }
            }
          }
          for (int t = 0; t < steps; ++t) {
            acc[t][0] <<= shift;
            membranes.step(t0 + t, acc[t]);
          }
        }
      }
    }
  }
}

void fire_depthwise(const ConvIf& a, const Neurons& neurons, const Tile& tile) {
  if (a.products[0].weight_bytes == 1) {
    fire_depthwise_as<std::int8_t>(a, neurons, tile);
  } else {
    fire_depthwise_as<std::int16_t>(a, neurons, tile);
  }
}
