// The CPU algorithms, written once over vectors of `lanes` int32 and included by one file for each
// instruction set, inside that file's unnamed namespace (hence no include guard and no includes).
// The including file defines: lanes, block_vectors, Int, Real (half as many doubles), widen(const int16_t*),
// widen(const int8_t*), multiply_add(Real, double, Real) and pairs; with pairs = true also add_pair and settle.
//
// Spiking convolution, event-driven. QCFS networks fire at 5 to 15 % a step, so it pays to touch only
// the weights of inputs that fired:
//
//     1. for each input row of the tile and each step, list the positions (column * channels + channel) that
//        fired, once, whatever the number of taps, outputs and output channels that read them;
//     2. for each block of output channels (its weight panel stays in cache), each output pixel and each step:
//        add one weight row per listed position under each kernel row to accumulators in registers, then
//        integrate, fire, reset there. The taps of a kernel row are neighbours in the list and in the weights
//        [KH, KW * C, O], so a kernel row is one loop over one stretch of the list:
//
//        list of one row, one step    col 0 [3 17 40] col 1 [67 90] col 2 [130] col 3 [201 ..]
//                                            `-------- under the kernel --------'
//        weights of the kernel row    position 17:  [ w w w w ... block_vectors * lanes ... ]
//                                                     + + + +
//        registers                                  [ v v v v ]  -> compare -> bit t of one byte per neuron
//
// The membrane lives in registers for all T steps; only the mask bytes reach memory. Blocks at the end
// of the channel range overlap their predecessor instead of running past the row; a layer narrower than
// one vector, or one with groups, accumulates in memory instead.

using Byte = std::uint8_t __attribute__((vector_size(lanes)));
constexpr int real_lanes = lanes / 2;

#if defined(__clang__)
#define QCFS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define QCFS_UNROLL _Pragma("GCC unroll 16")
#endif

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------------------------- event lists

struct Events {
  std::int64_t row0, row1;    // input rows covered
  std::uint32_t* start;       // [rows, T, W] and one more: where a column's positions begin
  std::uint32_t* position;    // column * channels + channel, ascending within a row and step
  std::uint8_t* value;        // count planes only
};

inline void input_rows(const Product& p, std::int64_t row0, std::int64_t row1, std::int64_t& in0, std::int64_t& in1) {
  in0 = larger(0, row0 * p.g.stride_h - p.g.pad_h);
  in1 = smaller(p.x.height, (row1 - 1) * p.g.stride_h - p.g.pad_h + (p.g.kernel_h - 1) * p.g.dilation_h + 1);
  if (in1 < in0) in1 = in0;
}

inline std::int64_t most_input_rows(const Product& p, std::int64_t rows) {
  return smaller(p.x.height, (rows - 1) * p.g.stride_h + (p.g.kernel_h - 1) * p.g.dilation_h + 1);
}

inline std::size_t events_bytes(const Product& p, std::int64_t rows, std::int64_t steps) {
  const std::int64_t lists = most_input_rows(p, rows) * p.x.width * steps;
  const std::int64_t events = lists * p.x.channels;
  return static_cast<std::size_t>(round_up((lists + 1) * 4, 64) + round_up(events * 4, 64) +
                                  (p.x.coding == Coding::count ? round_up(events, 64) : 0));
}

// Whether any tap of any output reads this input coordinate (strided 1x1 shortcuts skip most).
inline bool is_read(std::int64_t i, std::int64_t pad, std::int64_t stride, std::int64_t dilation, std::int64_t kernel) {
  for (std::int64_t k = 0; k < kernel; ++k) {
    if ((i + pad - k * dilation) % stride == 0) return true;
  }
  return false;
}

inline char* list_events(const Product& p, std::int64_t batch, std::int64_t sample, std::int64_t row0,
                         std::int64_t row1, std::int64_t steps, char* workspace, Events& e) {
  input_rows(p, row0, row1, e.row0, e.row1);
  const std::int64_t width = p.x.width, channels = p.x.channels;
  const std::int64_t lists = (e.row1 - e.row0) * width * steps;
  e.start = reinterpret_cast<std::uint32_t*>(workspace);
  workspace += round_up((lists + 1) * 4, 64);
  e.position = reinterpret_cast<std::uint32_t*>(workspace);
  workspace += round_up(lists * channels * 4, 64);
  e.value = nullptr;
  if (p.x.coding == Coding::count) {
    e.value = reinterpret_cast<std::uint8_t*>(workspace);
    workspace += round_up(lists * channels, 64);
  }
  const bool mask = p.x.coding == Coding::mask;
  const std::int64_t plane = batch * p.x.height * width * channels;
  std::uint32_t n = 0;
  std::uint32_t* start = e.start;
  for (std::int64_t r = e.row0; r < e.row1; ++r) {
    const bool row_read = is_read(r, p.g.pad_h, p.g.stride_h, p.g.dilation_h, p.g.kernel_h);
    const std::uint8_t* row = p.x.data + (sample * p.x.height + r) * width * channels;
    for (std::int64_t t = 0; t < steps; ++t) {
      const std::uint8_t* bytes = row + (mask ? t / 8 : t) * plane;
      const std::uint64_t wanted = 0x0101010101010101ull * (mask ? 1u << (t % 8) : 0xffu);
      for (std::int64_t c = 0; c < width; ++c) {
        *start++ = n;
        if (!row_read || !is_read(c, p.g.pad_w, p.g.stride_w, p.g.dilation_w, p.g.kernel_w)) continue;
        std::int64_t k = c * channels;
        const std::int64_t end = k + channels;
        for (; k + 8 <= end; k += 8) {
          std::uint64_t word = load<std::uint64_t>(bytes + k) & wanted;
          while (word != 0) {
            const int byte = __builtin_ctzll(word) >> 3;
            e.position[n] = static_cast<std::uint32_t>(k + byte);
            if (!mask) e.value[n] = bytes[k + byte];
            ++n;
            word &= ~(0xffull << (8 * byte));
          }
        }
        for (; k < end; ++k) {
          const std::uint8_t x = bytes[k] & static_cast<std::uint8_t>(wanted);
          if (x == 0) continue;
          e.position[n] = static_cast<std::uint32_t>(k);
          if (!mask) e.value[n] = x;
          ++n;
        }
      }
    }
  }
  *start = n;
  return workspace;
}

// --------------------------------------------------------------------------- spiking convolution

// A stretch of the event list and the weights it selects: position k reads row k - origin of `rows`.
template <typename Weight>
struct Stretch {
  const Weight* rows;
  std::uint32_t origin, begin, end;
};

// Calls visit(stretch) for what output pixel (row, col) reads at step t: one stretch per kernel row, or, with
// `each_tap` or a dilated kernel, one per tap.
template <typename Weight, typename Visit>
inline void for_each_stretch(const Product& p, const Events& e, std::int64_t out_channels, std::int64_t row,
                             std::int64_t col, std::int64_t steps, std::int64_t t, bool each_tap, Visit visit) {
  const Geometry& g = p.g;
  const std::int64_t channels = p.x.channels;
  const std::int64_t tap_size = channels / g.groups * out_channels;
  const std::int64_t left = col * g.stride_w - g.pad_w;
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    const std::uint32_t* start = e.start + ((r - e.row0) * steps + t) * p.x.width;
    const Weight* weight = static_cast<const Weight*>(p.weight) + kh * g.kernel_w * tap_size;
    if (!each_tap && g.dilation_w == 1) {
      const std::int64_t first = larger(0, left), last = smaller(p.x.width, left + g.kernel_w);
      if (first >= last) continue;
      visit(Stretch<Weight>{weight + (first - left) * tap_size, static_cast<std::uint32_t>(first * channels),
                            start[first], start[last]});
      continue;
    }
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = left + kw * g.dilation_w;
      if (c < 0 || c >= p.x.width) continue;
      visit(Stretch<Weight>{weight + kw * tap_size, static_cast<std::uint32_t>(c * channels), start[c], start[c + 1]});
    }
  }
}

// Adds one weight row per event, times its count. 16-bit rows go two at a time where the instruction set has a
// multiply-add of pairs: the words of two rows are interleaved and multiplied by (value, value), which takes half the
// instructions of widening each row. The sums then sit in an interleaved order until settle().
template <typename Weight, int vectors>
inline void add_rows(const Stretch<Weight>& s, std::int64_t row_size, const Events& e, Int (&acc)[vectors]) {
  if constexpr (pairs && sizeof(Weight) == 2 && vectors % 2 == 0) {
    for (std::uint32_t k = s.begin; k < s.end; k += 2) {
      const bool both = k + 1 < s.end;
      const Weight* w0 = s.rows + (e.position[k] - s.origin) * row_size;
      const Weight* w1 = both ? s.rows + (e.position[k + 1] - s.origin) * row_size : w0;
      const std::int32_t value0 = e.value == nullptr ? 1 : e.value[k];
      const std::int32_t value1 = !both ? 0 : e.value == nullptr ? 1 : e.value[k + 1];
      const Int values = Int{} + (value0 | value1 << 16);
      QCFS_UNROLL
      for (int j = 0; j < vectors; j += 2) add_pair(w0 + j * lanes, w1 + j * lanes, values, acc[j], acc[j + 1]);
    }
  } else if (e.value == nullptr) {
    for (std::uint32_t k = s.begin; k != s.end; ++k) {
      const Weight* w = s.rows + (e.position[k] - s.origin) * row_size;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen(w + j * lanes);
    }
  } else {
    for (std::uint32_t k = s.begin; k != s.end; ++k) {
      const Weight* w = s.rows + (e.position[k] - s.origin) * row_size;
      const std::int32_t value = e.value[k];
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen(w + j * lanes) * value;
    }
  }
}

template <typename Weight, int vectors>
inline void settle_rows(Int (&acc)[vectors]) {
  if constexpr (pairs && sizeof(Weight) == 2 && vectors % 2 == 0) {
    QCFS_UNROLL
    for (int j = 0; j < vectors; j += 2) settle(acc[j], acc[j + 1]);
  }
}

inline std::int32_t residual_value(const Residual& r, std::int64_t plane, std::int64_t index, std::int64_t t) {
  return r.coding == Coding::mask ? (r.data[(t / 8) * plane + index] >> (t % 8)) & 1 : r.data[t * plane + index];
}

// Output channels [channel, channel + vectors * lanes) of all pixels of the tile; the first `skip` of them
// belong to the block before and are not stored.
template <typename Weight, int vectors>
void fire_block(const ConvIf& a, const Tile& tile, const Events* events, std::int64_t channel, std::int64_t skip) {
  const std::int64_t O = a.out_channels;
  const std::int64_t plane = a.batch * a.out_h * a.out_w * O;
  const int shift = sizeof(Weight) == 1 ? 8 : 0;
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t index = ((tile.sample * a.out_h + row) * a.out_w + col) * O + channel;
      Int v[vectors], bits[vectors];
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        v[j] = load<Int>(a.threshold + channel + j * lanes) >> 1;
        bits[j] = Int{};
      }
      for (std::int64_t t = 0; t < a.steps; ++t) {
        Int acc[vectors];
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) acc[j] = Int{};
        for (int i = 0; i < a.product_count; ++i) {
          for_each_stretch<Weight>(a.products[i], events[i], O, row, col, a.steps, t, false,
                                   [&](Stretch<Weight> stretch) {
                                     stretch.rows += channel;
                                     add_rows<Weight, vectors>(stretch, O, events[i], acc);
                                   });
        }
        settle_rows<Weight, vectors>(acc);
        for (int i = 0; i < a.residual_count; ++i) {
          const Residual& r = a.residuals[i];
          const std::uint8_t* x = r.data + (r.coding == Coding::mask ? t / 8 : t) * plane + index;
          QCFS_UNROLL
          for (int j = 0; j < vectors; ++j) {
            Int s = __builtin_convertvector(load<Byte>(x + j * lanes), Int);
            if (r.coding == Coding::mask) s = (s >> static_cast<int>(t % 8)) & 1;
            v[j] += s * load<Int>(r.amplitude + channel + j * lanes);
          }
        }
        if (a.current != nullptr) {
          QCFS_UNROLL
          for (int j = 0; j < vectors; ++j) v[j] += load<Int>(a.current + index + j * lanes);
        }
        const std::int32_t bit = 1 << (t % 8);
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) {
          const Int n = load<Int>(a.threshold + channel + j * lanes);
          v[j] += (acc[j] << shift) + load<Int>(a.bias + channel + j * lanes);
          const Int spike = v[j] >= n;
          v[j] -= spike & n;
          bits[j] |= spike & bit;
        }
        if (t % 8 == 7 || t + 1 == a.steps) {
          std::uint8_t* out = a.out + (t / 8) * plane + index;
          if (skip == 0) {
            QCFS_UNROLL
            for (int j = 0; j < vectors; ++j) store(out + j * lanes, __builtin_convertvector(bits[j], Byte));
          } else {
            std::uint8_t all[vectors * lanes];
            for (int j = 0; j < vectors; ++j) store(all + j * lanes, __builtin_convertvector(bits[j], Byte));
            for (std::int64_t o = skip; o < vectors * lanes; ++o) out[o] = all[o];
          }
          QCFS_UNROLL
          for (int j = 0; j < vectors; ++j) bits[j] = Int{};
        }
      }
    }
  }
}

// Any groups and any width: accumulators in memory, one row segment (the outputs of the input's group) per event.
template <typename Weight>
void fire_in_memory(const ConvIf& a, const Tile& tile, const Events* events, std::int32_t* acc) {
  const std::int64_t O = a.out_channels;
  const std::int64_t plane = a.batch * a.out_h * a.out_w * O;
  const std::int64_t c0 = tile.channel0, c1 = tile.channel1;
  const std::int32_t scale = sizeof(Weight) == 1 ? 256 : 1;
  std::int32_t* v = acc + round_up(O, 16);
  std::uint8_t* bits = reinterpret_cast<std::uint8_t*>(v + round_up(O, 16));
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t pixel = (tile.sample * a.out_h + row) * a.out_w + col;
      for (std::int64_t o = c0; o < c1; ++o) {
        v[o] = a.threshold[o] / 2;
        bits[o] = 0;
      }
      for (std::int64_t t = 0; t < a.steps; ++t) {
        for (std::int64_t o = c0; o < c1; ++o) acc[o] = 0;
        for (int i = 0; i < a.product_count; ++i) {
          const Product& p = a.products[i];
          const Events& e = events[i];
          const std::int64_t group_in = p.x.channels / p.g.groups, group_out = O / p.g.groups;
          for_each_stretch<Weight>(p, e, O, row, col, a.steps, t, true, [&](const Stretch<Weight>& stretch) {
            std::int64_t first_in = 0, first_out = 0;    // of the current group: positions ascend
            for (std::uint32_t k = stretch.begin; k != stretch.end; ++k) {
              const std::int64_t channel = e.position[k] - stretch.origin;
              while (channel >= first_in + group_in) {
                first_in += group_in;
                first_out += group_out;
              }
              const std::int64_t lo = larger(first_out, c0), hi = smaller(first_out + group_out, c1);
              const Weight* w = stretch.rows + (channel - first_in) * O;
              const std::int32_t value = e.value == nullptr ? 1 : e.value[k];
              for (std::int64_t o = lo; o < hi; ++o) acc[o] += w[o] * value;
            }
          });
        }
        for (std::int64_t o = c0; o < c1; ++o) acc[o] = acc[o] * scale + a.bias[o];
        for (int i = 0; i < a.residual_count; ++i) {
          const Residual& r = a.residuals[i];
          for (std::int64_t o = c0; o < c1; ++o) acc[o] += r.amplitude[o] * residual_value(r, plane, pixel * O + o, t);
        }
        if (a.current != nullptr) {
          for (std::int64_t o = c0; o < c1; ++o) acc[o] += a.current[pixel * O + o];
        }
        for (std::int64_t o = c0; o < c1; ++o) {
          bits[o] |= static_cast<std::uint8_t>(fire(v[o], acc[o], a.threshold[o]) << (t % 8));
        }
        if (t % 8 == 7 || t + 1 == a.steps) {
          std::uint8_t* out = a.out + (t / 8) * plane + pixel * O;
          for (std::int64_t o = c0; o < c1; ++o) {
            out[o] = bits[o];
            bits[o] = 0;
          }
        }
      }
    }
  }
}

template <typename Weight>
void fire_tile(const ConvIf& a, const Tile& tile, const Events* events, void* scratch) {
  bool grouped = false;
  for (int i = 0; i < a.product_count; ++i) grouped |= a.products[i].g.groups != 1;
  std::int64_t o = tile.channel0;
  const std::int64_t end = tile.channel1;
  if (grouped || end - o < lanes) {
    fire_in_memory<Weight>(a, tile, events, static_cast<std::int32_t*>(scratch));
    return;
  }
  for (; end - o >= block_vectors * lanes; o += block_vectors * lanes) {
    fire_block<Weight, block_vectors>(a, tile, events, o, 0);
  }
  if (end - o >= block_vectors / 2 * lanes) {
    fire_block<Weight, block_vectors / 2>(a, tile, events, o, 0);
    o += block_vectors / 2 * lanes;
  }
  for (; end - o >= 2 * lanes; o += 2 * lanes) fire_block<Weight, 2>(a, tile, events, o, 0);
  for (; end - o >= lanes; o += lanes) fire_block<Weight, 1>(a, tile, events, o, 0);
  if (o < end) fire_block<Weight, 1>(a, tile, events, end - lanes, lanes - (end - o));
}

constexpr int most_products = 64;

std::size_t conv_if_workspace(const ConvIf& a, std::int64_t rows) {
  std::size_t bytes = 3 * static_cast<std::size_t>(round_up(a.out_channels, 16)) * sizeof(std::int32_t);
  for (int i = 0; i < a.product_count; ++i) bytes += events_bytes(a.products[i], rows, a.steps);
  return bytes;
}

void conv_if(const ConvIf& a, const Tile& tile, void* workspace) {
  Events events[most_products];
  char* scratch = static_cast<char*>(workspace);
  for (int i = 0; i < a.product_count; ++i) {
    scratch = list_events(a.products[i], a.batch, tile.sample, tile.row0, tile.row1, a.steps, scratch, events[i]);
  }
  if (a.product_count > 0 && a.products[0].weight_bytes == 1) {
    fire_tile<std::int8_t>(a, tile, events, scratch);
  } else {
    fire_tile<std::int16_t>(a, tile, events, scratch);
  }
}

// ---------------------------------------------------------------------------- analog convolution
//
// The sums are integers below 2^53, so double accumulators are exact in any order, fused or not, and
// the widest multiply-add of the machine does the work.

template <int vectors>
inline void multiply_rows(const AnalogConv& a, const double* weight, std::int64_t sample, std::int64_t row,
                          std::int64_t col, std::int64_t channel, double* out) {
  const Geometry& g = a.g;
  Real acc[vectors];
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) acc[j] = Real{};
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= a.in_h) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c < 0 || c >= a.in_w) continue;
      const std::int16_t* x = a.x + ((sample * a.in_h + r) * a.in_w + c) * a.in_channels;
      const double* w = weight + (kh * g.kernel_w + kw) * a.in_channels * a.out_channels + channel;
      for (std::int64_t k = 0; k < a.in_channels; ++k, w += a.out_channels) {
        const double q = x[k];
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) acc[j] = multiply_add(load<Real>(w + j * real_lanes), q, acc[j]);
      }
    }
  }
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) store(out + j * real_lanes, acc[j]);
}

inline void multiply_one(const AnalogConv& a, const double* weight, std::int64_t sample, std::int64_t row,
                         std::int64_t col, std::int64_t channel, double* out) {
  const Geometry& g = a.g;
  const std::int64_t group_in = a.in_channels / g.groups, group_out = a.out_channels / g.groups;
  const std::int64_t first = channel / group_out * group_in;
  double acc = 0;
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= a.in_h) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c < 0 || c >= a.in_w) continue;
      const std::int16_t* x = a.x + ((sample * a.in_h + r) * a.in_w + c) * a.in_channels + first;
      const double* w = weight + (kh * g.kernel_w + kw) * group_in * a.out_channels + channel;
      for (std::int64_t k = 0; k < group_in; ++k) acc += x[k] * w[k * a.out_channels];
    }
  }
  *out = acc;
}

void encode_pixels(std::int64_t pixels, std::int64_t pixel0, std::int64_t pixel1, std::int64_t channels,
                   std::int64_t steps, const std::int32_t* current, const std::int32_t* threshold, std::uint8_t* out) {
  const std::int64_t plane = pixels * channels;
  constexpr int block = 64;    // neurons whose membranes stay in L1 or registers
  for (std::int64_t pixel = pixel0; pixel < pixel1; ++pixel) {
    for (std::int64_t c0 = 0; c0 < channels; c0 += block) {
      const int width = static_cast<int>(smaller(block, channels - c0));
      const std::int32_t* z = current + (pixel - pixel0) * channels + c0;
      const std::int32_t* n = threshold + c0;
      std::int32_t v[block], bits[block];
      for (int c = 0; c < width; ++c) {
        v[c] = n[c] / 2;
        bits[c] = 0;
      }
      for (std::int64_t t = 0; t < steps; ++t) {
        for (int c = 0; c < width; ++c) bits[c] |= fire(v[c], z[c], n[c]) << (t % 8);
        if (t % 8 == 7 || t + 1 == steps) {
          std::uint8_t* bytes = out + (t / 8) * plane + pixel * channels + c0;
          for (int c = 0; c < width; ++c) {
            bytes[c] = static_cast<std::uint8_t>(bits[c]);
            bits[c] = 0;
          }
        }
      }
    }
  }
}

std::size_t analog_workspace(const AnalogConv& a) {
  return static_cast<std::size_t>(2 * round_up(a.out_channels * 8, 64) + a.out_w * a.out_channels * 4);
}

void analog(const AnalogConv& a, const Tile& tile, const double* weight, void* workspace) {
  const std::int64_t O = a.out_channels;
  double* acc = static_cast<double*>(workspace);
  double* gain = acc + round_up(O, 8);
  std::int32_t* row_current = reinterpret_cast<std::int32_t*>(gain + round_up(O, 8));
  const std::int64_t pixels = a.batch * a.out_h * a.out_w;
  for (std::int64_t c = 0; c < O; ++c) gain[c] = __builtin_ldexp(a.gain[c], a.exponent[tile.sample]);
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    const std::int64_t pixel0 = (tile.sample * a.out_h + row) * a.out_w;
    std::int32_t* current = a.steps > 0 ? row_current : a.out_current + pixel0 * O;
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      std::int64_t o = 0;
      if (a.g.groups == 1) {
        for (; O - o >= 8 * real_lanes; o += 8 * real_lanes)
          multiply_rows<8>(a, weight, tile.sample, row, col, o, acc + o);
        for (; O - o >= 4 * real_lanes; o += 4 * real_lanes)
          multiply_rows<4>(a, weight, tile.sample, row, col, o, acc + o);
        for (; O - o >= real_lanes; o += real_lanes) multiply_rows<1>(a, weight, tile.sample, row, col, o, acc + o);
      }
      for (; o < O; ++o) multiply_one(a, weight, tile.sample, row, col, o, acc + o);
      for (std::int64_t c = 0; c < O; ++c) {
        current[col * O + c] = to_grid(acc[c] * gain[c] + a.offset[c], a.low[c], a.high[c]);
      }
    }
    if (a.steps > 0) encode_pixels(pixels, pixel0, pixel0 + a.out_w, O, a.steps, current, a.threshold, a.out_mask);
  }
}

void encode(const Encode& a, std::int64_t pixel0, std::int64_t pixel1) {
  encode_pixels(a.pixels, pixel0, pixel1, a.channels, a.steps, a.current + pixel0 * a.channels, a.threshold, a.out);
}

// ------------------------------------------------------------------------- pooling and counting

// Rows are numbered over planes, samples and output rows together.
void pool(const Pool& a, std::int64_t plane_row0, std::int64_t plane_row1) {
  const std::int64_t C = a.channels, plane = a.batch * a.in_h * a.in_w * C;
  constexpr int block = 64;
  for (std::int64_t i = plane_row0; i < plane_row1; ++i) {
    const std::int64_t row = i % a.out_h, image = i / a.out_h;
    const std::int64_t t = image / a.batch, sample = image % a.batch;
    const bool counts_of_masks = a.coding == Coding::mask && !a.any;
    const std::int64_t in_plane = counts_of_masks ? t / 8 : t;
    const std::int64_t* h = a.rows + 3 * row;
    const std::uint8_t* x = a.x + in_plane * plane + sample * a.in_h * a.in_w * C;
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t* w = a.cols + 3 * col;
      const std::int32_t factor = a.multiple == 0 ? 1 : static_cast<std::int32_t>(a.multiple / (h[2] * w[2]));
      std::uint8_t* out = a.out + (i * a.out_w + col) * C;
      for (std::int64_t c0 = 0; c0 < C; c0 += block) {
        const int width = static_cast<int>(smaller(block, C - c0));
        std::uint32_t sum[block] = {};
        for (std::int64_t r = h[0]; r < h[1]; ++r) {
          for (std::int64_t c = w[0]; c < w[1]; ++c) {
            const std::uint8_t* p = x + (r * a.in_w + c) * C + c0;
            if (a.any) {
              for (int k = 0; k < width; ++k) sum[k] |= p[k];
            } else if (counts_of_masks) {
              for (int k = 0; k < width; ++k) sum[k] += (p[k] >> (t % 8)) & 1u;
            } else {
              for (int k = 0; k < width; ++k) sum[k] += p[k];
            }
          }
        }
        for (int k = 0; k < width; ++k)
          out[c0 + k] = static_cast<std::uint8_t>(sum[k] * static_cast<std::uint32_t>(factor));
      }
    }
  }
}

void pool_counts(const PoolCounts& a, std::int64_t row0, std::int64_t row1) {
  const std::int64_t C = a.channels;
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t row = i % a.out_h, image = i / a.out_h;
    const std::int64_t* h = a.rows + 3 * row;
    const std::int32_t* x = a.x + image * a.in_h * a.in_w * C;
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t* w = a.cols + 3 * col;
      const std::int32_t factor = a.multiple == 0 ? 1 : static_cast<std::int32_t>(a.multiple / (h[2] * w[2]));
      std::int32_t* out = a.out + (i * a.out_w + col) * C;
      for (std::int64_t c = 0; c < C; ++c) out[c] = 0;
      for (std::int64_t r = h[0]; r < h[1]; ++r) {
        for (std::int64_t k = w[0]; k < w[1]; ++k) {
          const std::int32_t* p = x + (r * a.in_w + k) * C;
          for (std::int64_t c = 0; c < C; ++c) out[c] += p[c];
        }
      }
      for (std::int64_t c = 0; c < C; ++c) out[c] *= factor;
    }
  }
}

void count(const Count& a, std::int64_t element0, std::int64_t element1) {
  constexpr int block = 64;
  for (std::int64_t e0 = element0; e0 < element1; e0 += block) {
    const int width = static_cast<int>(smaller(block, element1 - e0));
    std::int32_t sum[block] = {};
    for (std::int64_t t = 0; t < a.steps; ++t) {
      if (a.coding == Coding::mask) {
        const std::uint8_t* x = a.x + (t / 8) * a.elements + e0;
        for (int k = 0; k < width; ++k) sum[k] += (x[k] >> (t % 8)) & 1;
      } else {
        const std::uint8_t* x = a.x + t * a.elements + e0;
        for (int k = 0; k < width; ++k) sum[k] += x[k];
      }
      if (a.prefix || t + 1 == a.steps) {
        std::int32_t* out = a.out + (a.prefix ? t * a.elements : 0) + e0;
        for (int k = 0; k < width; ++k) out[k] = sum[k];
      }
    }
  }
}

// --------------------------------------------------------------------------------------- readout

void add_counts(const Readout& a, const ReadoutTerm& term, std::int64_t image, std::int64_t row, std::int64_t col,
                double* acc) {
  const Geometry& g = term.g;
  const std::int64_t O = a.out_channels, C = term.channels;
  const std::int64_t group_in = C / g.groups, group_out = O / g.groups;
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= term.height) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c < 0 || c >= term.width) continue;
      const std::int32_t* x = term.counts + ((image * term.height + r) * term.width + c) * C;
      const std::int16_t* tap = term.weight + (kh * g.kernel_w + kw) * group_in * O;
      for (std::int64_t k = 0; k < C; ++k) {
        if (x[k] == 0) continue;
        const double value = x[k];
        const std::int16_t* w = tap + (k % group_in) * O;
        const std::int64_t first = k / group_in * group_out;
        for (std::int64_t o = first; o < first + group_out; ++o) acc[o] += w[o] * value;
      }
    }
  }
}

void readout(const Readout& a, std::int64_t row0, std::int64_t row1, double* workspace) {
  const std::int64_t O = a.out_channels;
  double* sum = workspace;
  double* acc = workspace + O;
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t row = i % a.out_h, image = i / a.out_h;
    const std::int64_t steps = a.images == a.samples ? a.steps : image / a.samples + 1;
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t index = (i * a.out_w + col) * O;
      for (std::int64_t o = 0; o < O; ++o) sum[o] = 0;
      for (int k = 0; k < a.term_count; ++k) {
        const ReadoutTerm& term = a.terms[k];
        if (term.weight == nullptr) {
          for (std::int64_t o = 0; o < O; ++o) acc[o] = term.counts[index + o];
        } else {
          for (std::int64_t o = 0; o < O; ++o) acc[o] = 0;
          add_counts(a, term, image, row, col, acc);
        }
        const double divisor = static_cast<double>(steps) * static_cast<double>(term.multiple);
        for (std::int64_t o = 0; o < O; ++o) sum[o] += acc[o] * term.gain[o] / divisor;
      }
      for (std::int64_t o = 0; o < O; ++o) a.out[index + o] = static_cast<float>(sum[o] + a.offset[o]);
    }
  }
}

// ----------------------------------------------------------------------------------- quantization

inline double transformed(const Quantize& a, const float* x, std::int64_t c) {
  const float scaled = x[0] * a.scale[c];    // float32 steps, as PyTorch would take them
  return static_cast<double>(scaled + a.shift[c]);
}

bool quantize(const Quantize& a, std::int64_t sample) {
  const float* x = a.x + sample * a.stride_n;
  double most = 0;
  bool finite = true;
  for (std::int64_t c = 0; c < a.channels; ++c) {
    for (std::int64_t h = 0; h < a.height; ++h) {
      const float* p = x + a.source[c] * a.stride_c + h * a.stride_h;
      for (std::int64_t w = 0; w < a.width; ++w) {
        const double z = __builtin_fabs(transformed(a, p + w * a.stride_w, c));
        finite &= z <= 3.4028234663852886e38;    // false for NaN too
        most = z > most ? z : most;
      }
    }
  }
  if (!finite) return false;
  int e = 0;
  if (most > 0) {
    __builtin_frexp(most / 32767.0, &e);    // in (2^(e-1), 2^e]: frexp gives [1/2, 1), so a power of two needs one less
    if (most <= __builtin_ldexp(32767.0, e - 1)) --e;
  }
  a.exponent[sample] = e;
  const double scale = __builtin_ldexp(1.0, -e);
  std::int16_t* out = a.out + sample * a.height * a.width * a.channels;
  for (std::int64_t h = 0; h < a.height; ++h) {
    for (std::int64_t w = 0; w < a.width; ++w) {
      for (std::int64_t c = 0; c < a.channels; ++c) {
        const float* p = x + a.source[c] * a.stride_c + h * a.stride_h + w * a.stride_w;
        *out++ = static_cast<std::int16_t>(__builtin_rint(transformed(a, p, c) * scale));
      }
    }
  }
  return true;
}

constexpr KernelSet make_kernel_set(const char* name, std::uint32_t isa) {
  return {name,   isa,  conv_if_workspace, conv_if, analog_workspace, analog,
          encode, pool, pool_counts,       count,   readout,          quantize};
}
