// Spiking convolution, event-driven. QCFS networks fire at 5 to 20 % a step, so it pays to touch only the weights of
// inputs that fired:
//
//     1. list_events: for each input row and each step, the positions (column * channels + channel) that fired, once,
//        whatever the number of taps, outputs and output channels that read them;
//     2. fire_events: for each panel of 64 output channels (its weights stay in cache), each output pixel and each
//     step:
//        add one weight row per listed position under the kernel to accumulators in registers, then integrate,
//        fire, reset there. The taps of a kernel row are neighbours in the list and in the packed weights
//        [panel, KH, KW * C, 64], so a kernel row is one stretch of the list; the stretches of all kernel rows are
//        copied into one list, and adding its rows is one loop:
//
//        list of one row, one step    col 0 [3 17 40] col 1 [67 90] col 2 [130] col 3 [201 ..]
//                                            `-------- under the kernel --------'
//        weights of the kernel row    position 17:  [ w w w w ... 64 channels ... ]
//                                                     + + + +
//        registers                                  [ v v v v ]  -> compare -> bit t of one byte per neuron
//
// Where a panel's weights do not fit the second-level cache (7x7 images, linear layers) the taps are cut into chunks:
// all pixels of the tile take one chunk before the next, and their sums wait in memory.
//
// panel_place (where a channel sits in a packed row), block_vectors and half_block (how many vectors of channels one
// pass takes, and whether half of that is allowed) and the inner loop come from add_rows.h. An instruction set may
// bring a list_bytes of its own and define QCFS_OWN_LISTING.

// ---------------------------------------------------------------------------------- event lists

#if !defined(QCFS_OWN_LISTING)
struct PlaceTable {
  std::uint8_t place[256][8];
};

constexpr PlaceTable make_place_table() {
  PlaceTable t{};
  for (int mask = 0; mask < 256; ++mask) {
    int n = 0;
    for (int b = 0; b < 8; ++b) {
      if (mask >> b & 1) t.place[mask][n++] = static_cast<std::uint8_t>(b);
    }
  }
  return t;
}

constexpr PlaceTable place_table = make_place_table();

// Writes first + 64 * k for every k of [0, n) with x[k] & wanted, and those bytes where `value` is not null; returns
// the end. Writes up to 8 entries past it. Eight bytes at a time: a multiplication gathers their
// lowest bits, a table turns these into places, without a branch that depends on the spikes.
inline std::uint32_t* list_bytes(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted, std::uint32_t first,
                                 std::uint32_t* out, std::uint32_t* value) {
  for (std::int64_t k = 0; k < n; k += 8) {
    std::uint64_t word = 0;
    __builtin_memcpy(&word, x + k, static_cast<std::size_t>(smaller(8, n - k)));
    word &= 0x0101010101010101ull * wanted;
    const std::uint64_t low7 = 0x7f7f7f7f7f7f7f7full;
    const std::uint64_t set = (((word & low7) + low7) | word) >> 7 & 0x0101010101010101ull;
    const unsigned mask = static_cast<unsigned>(set * 0x0102040810204080ull >> 56);
    const std::uint8_t* place = place_table.place[mask];
    const std::uint32_t base = first + static_cast<std::uint32_t>(64 * k);
    QCFS_UNROLL
    for (int j = 0; j < 8; ++j) out[j] = base + 64u * place[j];
    const int found = __builtin_popcount(mask);
    if (value != nullptr) {
      for (int j = 0; j < found; ++j) value[j] = static_cast<std::uint8_t>(word >> (8 * place[j]));
      value += found;
    }
    out += found;
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

// Lists input row lists.in.row0 + row of one sample of the wave.
void list_events(const ConvIf& a, int product, const Wave& wave, const EventLists& lists, std::int64_t sample,
                 std::int64_t row) {
  const Product& p = a.products[product];
  const std::int64_t width = p.x.width, channels = p.x.channels, steps = a.steps;
  const std::int64_t region = (sample - wave.sample0) * lists.in.rows + row;
  std::uint32_t* start = lists.start + region * steps * (width + 1);
  std::uint32_t* const position = lists.position + region * lists.capacity;
  std::uint32_t* const value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
  const std::int64_t r = lists.in.row0 + row;
  if (!is_read(r, p.g.pad_h, p.g.stride_h, p.g.dilation_h, p.g.kernel_h)) {
    for (std::int64_t i = 0; i < steps * (width + 1); ++i) start[i] = 0;
    return;
  }
  const bool mask = p.x.coding == Coding::mask;
  const bool all_columns = p.g.stride_w == 1;
  const std::int64_t plane = a.batch * p.x.height * width * channels;
  const std::uint8_t* x = p.x.data + (sample * p.x.height + r) * width * channels;
  std::uint32_t* out = position;
  for (std::int64_t t = 0; t < steps; ++t) {
    const std::uint8_t* bytes = x + (mask ? t / 8 : t) * plane;
    const std::uint8_t wanted = mask ? static_cast<std::uint8_t>(1u << (t % 8)) : std::uint8_t{0xff};
    for (std::int64_t c = 0; c < width; ++c) {
      *start++ = static_cast<std::uint32_t>(out - position);
      if (!all_columns && !is_read(c, p.g.pad_w, p.g.stride_w, p.g.dilation_w, p.g.kernel_w)) continue;
      out = list_bytes(bytes + c * channels, channels, wanted, static_cast<std::uint32_t>(64 * c * channels), out,
                       value == nullptr ? nullptr : value + (out - position));
    }
    *start++ = static_cast<std::uint32_t>(out - position);
  }
}

// What one run of taps of an output pixel reads: positions [start[first], start[last]) of one list, step by step;
// `shift` turns a position into a row of the panel (times 64, modulo 2^32).
struct Reach {
  int product;
  std::uint32_t shift;
  const std::uint32_t* start;    // of step 0
  const std::uint32_t* position;
  const std::uint32_t* value;
  std::int64_t first, last;
};

// Fills `out` for taps [begin, end) of a pixel; returns how many of them touch the input.
inline int reach_of(const EventLayer& layer, int begin, int end, std::int64_t sample, std::int64_t row,
                    std::int64_t col, Reach* out) {
  int count = 0;
  for (int i = begin; i < end; ++i) {
    const Taps& s = layer.taps[i];
    const Product& p = layer.a->products[s.product];
    const EventLists& lists = layer.lists[s.product];
    const Geometry& g = p.g;
    const std::int64_t r = row * g.stride_h - g.pad_h + s.kh * g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    // Input column `first` is under tap kw; the taps that follow are neighbours, so dilated kernels come tap by tap.
    std::int64_t kw = s.kw0, first = col * g.stride_w - g.pad_w + kw * g.dilation_w, last = first + (s.kw1 - s.kw0);
    if (first < 0) {
      kw -= first;
      first = 0;
    }
    if (last > p.x.width) last = p.x.width;
    if (first >= last) continue;
    const std::int64_t region = (sample - layer.wave.sample0) * lists.in.rows + (r - lists.in.row0);
    Reach& reach = out[count++];
    reach.product = s.product;
    reach.shift = static_cast<std::uint32_t>((s.kh * g.kernel_w + kw - first) * p.x.channels * 64);
    reach.start = lists.start + region * layer.a->steps * (p.x.width + 1);
    reach.position = lists.position + region * lists.capacity;
    reach.value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
    reach.first = first;
    reach.last = last;
  }
  return count;
}

// Copies n entries, each plus `shift`; reads and writes up to a vector beyond them.
inline void append(std::uint32_t* to, const std::uint32_t* from, std::int64_t n, std::uint32_t shift) {
  std::int64_t k = 0;
  do {
    store(to + k, load<Unsigned>(from + k) + shift);
    store(to + k + lanes, load<Unsigned>(from + k + lanes) + shift);
    k += 2 * lanes;
  } while (k < n);
}

// --------------------------------------------------------------------------- spiking convolution

// Scratch of one task: the runs of taps of a pixel and one merged list.
struct EventScratch {
  Reach* reach;
  std::uint32_t* position;
  std::uint32_t* value;
  std::int32_t* sums;
};

// Channels [channel, channel + vectors * lanes) of one panel, at byte `place` of its rows.
template <typename Weight, int vectors>
void fire_block(const EventLayer& layer, const EventTile& tile, std::int64_t channel, std::int64_t place,
                const EventScratch& scratch) {
  const ConvIf& a = *layer.a;
  const int shift = sizeof(Weight) == 1 ? 8 : 0;
  for (int c = 0; c < layer.chunks; ++c) {
    const bool first = c == 0, last = c + 1 == layer.chunks;
    std::int32_t* sum = scratch.sums;
    for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
      for (std::int64_t col = 0; col < a.out_w; ++col) {
        Membranes<vectors> membranes(a, layer.neurons, channel, (tile.sample * a.out_h + row) * a.out_w + col);
        const int reaches = reach_of(layer, layer.chunk[c], layer.chunk[c + 1], tile.sample, row, col, scratch.reach);
        for (std::int64_t t = 0; t < a.steps; ++t) {
          Int acc[vectors];
          QCFS_UNROLL
          for (int j = 0; j < vectors; ++j) acc[j] = first ? Int{} : load<Int>(sum + j * lanes);
          for (int i = 0; i < reaches;) {
            // The runs of one product become one list, so that the inner loop is long and its end rare.
            const Product& p = a.products[scratch.reach[i].product];
            const std::int64_t rows = p.g.kernel_h * p.g.kernel_w * p.x.channels * panel_channels;
            Stretch s;
            s.rows = reinterpret_cast<std::uintptr_t>(p.packed) +
                     static_cast<std::uintptr_t>(tile.panel * rows * static_cast<std::int64_t>(sizeof(Weight)) + place);
            s.position = scratch.position;
            s.value = scratch.reach[i].value == nullptr ? nullptr : scratch.value;
            s.count = 0;
            const int product = scratch.reach[i].product;
            for (; i < reaches && scratch.reach[i].product == product; ++i) {
              const Reach& reach = scratch.reach[i];
              const std::uint32_t* start = reach.start + t * (p.x.width + 1);
              const std::int64_t begin = start[reach.first], n = start[reach.last] - begin;
              append(scratch.position + s.count, reach.position + begin, n, reach.shift);
              if (reach.value != nullptr) append(scratch.value + s.count, reach.value + begin, n, 0);
              s.count += n;
            }
            if (s.count > 0) add_rows(static_cast<const Weight*>(nullptr), s, acc);
          }
          if (last) {
            QCFS_UNROLL
            for (int j = 0; j < vectors; ++j) acc[j] <<= shift;
            membranes.step(t, acc);
          } else {
            QCFS_UNROLL
            for (int j = 0; j < vectors; ++j) store(sum + j * lanes, acc[j]);
          }
          if (layer.chunks > 1) sum += vectors * lanes;
        }
      }
    }
  }
}

template <typename Weight>
void fire_panel(const EventLayer& layer, const EventTile& tile, const EventScratch& scratch) {
  constexpr int vectors = block_vectors<Weight>;
  const std::int64_t channel0 = tile.panel * panel_channels;
  const std::int64_t end = smaller(layer.a->out_channels, channel0 + panel_channels);
  for (std::int64_t o = channel0; o < end; o += vectors * lanes) {
    const std::int64_t place = (o - channel0) * static_cast<std::int64_t>(sizeof(Weight));
    if constexpr (half_block<Weight>) {
      if (end - o <= vectors / 2 * lanes) {
        fire_block<Weight, vectors / 2>(layer, tile, o, place, scratch);
        continue;
      }
    }
    fire_block<Weight, vectors>(layer, tile, o, place, scratch);
  }
}

struct ScratchSizes {
  std::int64_t reach_bytes, list_bytes, sum_bytes;
};

inline ScratchSizes scratch_sizes(const EventLayer& layer, std::int64_t rows) {
  std::int64_t runs = 0, inputs = 0;
  for (int c = 0; c < layer.chunks; ++c) runs = larger(runs, layer.chunk[c + 1] - layer.chunk[c]);
  for (int i = 0; i < layer.a->product_count; ++i) {
    const Product& p = layer.a->products[i];
    inputs = larger(inputs, p.g.kernel_h * p.g.kernel_w * p.x.channels);
  }
  return {round_up(runs * static_cast<std::int64_t>(sizeof(Reach)), 64), round_up(4 * (inputs + 2 * lanes), 64),
          layer.chunks == 1 ? 0 : 4 * rows * layer.a->out_w * layer.a->steps * panel_channels};
}

std::size_t fire_events_workspace(const EventLayer& layer, std::int64_t rows) {
  const ScratchSizes s = scratch_sizes(layer, rows);
  return static_cast<std::size_t>(s.reach_bytes + 2 * s.list_bytes + s.sum_bytes);
}

void fire_events(const EventLayer& layer, const EventTile& tile, void* workspace) {
  const ScratchSizes s = scratch_sizes(layer, tile.row1 - tile.row0);
  char* space = static_cast<char*>(workspace);
  EventScratch scratch;
  scratch.reach = reinterpret_cast<Reach*>(space);
  scratch.position = reinterpret_cast<std::uint32_t*>(space + s.reach_bytes);
  scratch.value = reinterpret_cast<std::uint32_t*>(space + s.reach_bytes + s.list_bytes);
  scratch.sums = reinterpret_cast<std::int32_t*>(space + s.reach_bytes + 2 * s.list_bytes);
  if (layer.a->product_count > 0 && layer.a->products[0].weight_bytes == 1) {
    fire_panel<std::int8_t>(layer, tile, scratch);
  } else {
    fire_panel<std::int16_t>(layer, tile, scratch);
  }
}

template <typename Weight>
void pack_panels(const Product& p, std::int64_t out_channels, Weight* out) {
  const Weight* weight = static_cast<const Weight*>(p.weight);
  const std::int64_t rows = p.g.kernel_h * p.g.kernel_w * p.x.channels;
  for (std::int64_t first = 0; first < out_channels; first += panel_channels) {
    const std::int64_t width = smaller(panel_channels, out_channels - first);
    for (std::int64_t k = 0; k < rows; ++k, out += panel_channels) {
      const Weight* from = weight + k * out_channels + first;
      if (width < panel_channels) __builtin_memset(out, 0, panel_channels * sizeof(Weight));
      for (std::int64_t c = 0; c < width; ++c) out[panel_place<Weight>(static_cast<int>(c))] = from[c];
    }
  }
  __builtin_memset(out, 0, slack);
}

void pack_events(const Product& p, std::int64_t out_channels, void* out) {
  if (p.weight_bytes == 1) {
    pack_panels(p, out_channels, static_cast<std::int8_t*>(out));
  } else {
    pack_panels(p, out_channels, static_cast<std::int16_t*>(out));
  }
}

// ------------------------------------------------------------------------------------------ groups

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
        for (int i = 0; i < layer.chunk[1]; ++i) {
          const Taps& taps = layer.taps[i];
          const Product& p = a.products[taps.product];
          const Geometry& g = p.g;
          const EventLists& lists = layer.lists[taps.product];
          const std::int64_t group_in = p.x.channels / g.groups, group_out = O / g.groups;
          const std::int64_t r = row * g.stride_h - g.pad_h + taps.kh * g.dilation_h;
          const std::int64_t c = col * g.stride_w - g.pad_w + taps.kw0 * g.dilation_w;
          if (r < 0 || c < 0 || r >= p.x.height || c >= p.x.width) continue;
          const std::int64_t region = (tile.sample - layer.wave.sample0) * lists.in.rows + (r - lists.in.row0);
          const std::uint32_t* start = lists.start + (region * a.steps + t) * (p.x.width + 1);
          const std::uint32_t* position = lists.position + region * lists.capacity;
          const Weight* tap = static_cast<const Weight*>(p.weight) + (taps.kh * g.kernel_w + taps.kw0) * group_in * O;
          std::int64_t first_in = 0, first_out = 0;    // of the current group: positions ascend
          for (std::uint32_t k = start[c]; k != start[c + 1]; ++k) {
            const std::int64_t channel = position[k] / 64 - c * p.x.channels;
            while (channel >= first_in + group_in) {
              first_in += group_in;
              first_out += group_out;
            }
            const Weight* w = tap + (channel - first_in) * O;
            const std::int32_t x =
                lists.value == nullptr ? 1 : static_cast<std::int32_t>(lists.value[region * lists.capacity + k]);
            for (std::int64_t o = first_out; o < first_out + group_out; ++o) acc[o] += w[o] * x;
          }
        }
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
        Membranes<1> membranes(a, neurons, channel, (tile.sample * a.out_h + row) * a.out_w + col);
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
