// Convolution of the analog image: exact integer sums of 16-bit pixels times 16-bit weights, then the constant-current
// neuron. Products are 31 bits wide, so a pixel is split into two signed base-256 digits, x = 256 * high + low; a
// multiply-add of pairs (s16 x s16 -> s32) sums each digit over up to 512 inputs below 2^31:
//
//     gather      rows of inputs under the kernel, per output pixel   [pixels][high, low][K]   int16, K even
//     multiply    pixels x digits, times packed weights [blocks][K / 2][columns][2]           int32 sums
//     finish      (256 * high + low) * gain + offset in double -> grid -> spikes of all steps
//
// Longer K goes in stretches of 512 whose sums are added up in double, exact below 2^53. Grouped layers take a plain
// loop.
//
// The including file defines analog_vectors and dot2 (sums of products of int16 pairs).

constexpr int analog_columns = analog_vectors * lanes;
constexpr int analog_pixels = 3;             // of one register block, two digits each
constexpr int analog_stretch = 256;          // pairs of inputs
constexpr std::int64_t analog_batch = 12;    // pixels gathered at a time

struct AnalogSizes {
  std::int64_t inputs, pairs, padded_out;    // per output: inputs, pairs of inputs; output channels padded to blocks
};

inline AnalogSizes analog_sizes(const AnalogConv& a) {
  const std::int64_t inputs = a.g.kernel_h * a.g.kernel_w * (a.in_channels / a.g.groups);
  return {inputs, (inputs + 1) / 2, round_up(a.out_channels, analog_columns)};
}

std::size_t pack_analog_bytes(const AnalogConv& a) {
  const AnalogSizes s = analog_sizes(a);
  return a.g.groups > 1 ? 64 : static_cast<std::size_t>(s.padded_out * s.pairs * 4 + slack);
}

void pack_analog(const AnalogConv& a, void* out) {
  if (a.g.groups > 1) return;
  const AnalogSizes s = analog_sizes(a);
  std::int16_t* to = static_cast<std::int16_t*>(out);
  __builtin_memset(to, 0, pack_analog_bytes(a));
  for (std::int64_t block = 0; block < s.padded_out; block += analog_columns) {
    for (std::int64_t k = 0; k < s.inputs; ++k) {
      std::int16_t* row = to + (block * s.pairs + k / 2 * analog_columns) * 2 + k % 2;
      for (std::int64_t c = 0; c < smaller(analog_columns, a.out_channels - block); ++c) {
        row[2 * c] = a.weight[k * a.out_channels + block + c];
      }
    }
  }
}

// Gathers the inputs of one output pixel as two rows of digits, each 2 * pairs long.
inline void gather(const AnalogConv& a, const AnalogSizes& s, std::int64_t sample, std::int64_t row, std::int64_t col,
                   std::int16_t* out) {
  const Geometry& g = a.g;
  const std::int64_t length = 2 * s.pairs, C = a.in_channels;
  std::int16_t* x = out;
  if (s.inputs % 2 != 0) x[s.inputs] = 0;
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh, x += g.kernel_w * C) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    const std::int64_t left = col * g.stride_w - g.pad_w;
    const std::int16_t* from = a.x + ((sample * a.in_h + r) * a.in_w + left) * C;
    const bool inside = r >= 0 && r < a.in_h;
    if (inside && g.dilation_w == 1 && left >= 0 && left + g.kernel_w <= a.in_w) {
      __builtin_memcpy(x, from, static_cast<std::size_t>(g.kernel_w * C) * sizeof(*x));
      continue;
    }
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = left + kw * g.dilation_w;
      if (inside && c >= 0 && c < a.in_w) {
        const std::int16_t* pixel = a.x + ((sample * a.in_h + r) * a.in_w + c) * C;
        __builtin_memcpy(x + kw * C, pixel, static_cast<std::size_t>(C) * sizeof(*x));
      } else {
        __builtin_memset(x + kw * C, 0, static_cast<std::size_t>(C) * sizeof(*x));
      }
    }
  }
  std::int16_t* high = out;
  std::int16_t* low = out + length;
  for (std::int64_t k = 0; k < length; ++k) {
    const std::int16_t v = high[k];
    low[k] = static_cast<std::int8_t>(v & 0xff);
    high[k] = static_cast<std::int16_t>((v >> 8) + ((v >> 7) & 1));
  }
}

// Sums of `analog_pixels` pixels (rows of digits `length` apart) and one block of columns: [pixel][high, low][columns].
inline void multiply_digits(const std::int16_t* x, std::int64_t length, const std::int16_t* w, std::int64_t pairs,
                            std::int32_t* out) {
  constexpr int rows = 2 * analog_pixels;
  Int acc[rows][analog_vectors];
  QCFS_UNROLL
  for (int i = 0; i < rows; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < analog_vectors; ++j) acc[i][j] = Int{};
  }
  for (std::int64_t k = 0; k < pairs; ++k, w += 2 * analog_columns) {
    Int weight[analog_vectors];
    QCFS_UNROLL
    for (int j = 0; j < analog_vectors; ++j) weight[j] = load<Int>(w + 2 * j * lanes);
    QCFS_UNROLL
    for (int i = 0; i < rows; ++i) {
      std::int32_t two;
      __builtin_memcpy(&two, x + i * length + 2 * k, 4);
      const Int pair = Int{} + two;
      QCFS_UNROLL
      for (int j = 0; j < analog_vectors; ++j) acc[i][j] = dot2(acc[i][j], pair, weight[j]);
    }
  }
  QCFS_UNROLL
  for (int i = 0; i < rows; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < analog_vectors; ++j) store(out + i * analog_columns + j * lanes, acc[i][j]);
  }
}

void encode_pixels(std::int64_t pixels, std::int64_t pixel0, std::int64_t pixel1, std::int64_t channels,
                   std::int64_t steps, const std::int32_t* current, const std::int32_t* threshold, std::uint8_t* out) {
  const std::int64_t plane = pixels * channels;
  for (std::int64_t pixel = pixel0; pixel < pixel1; ++pixel) {
    for (std::int64_t c0 = 0; c0 < channels; c0 += lanes) {
      const std::int64_t width = smaller(lanes, channels - c0);
      const std::int32_t* z = current + (pixel - pixel0) * channels + c0;
      const Int input = width == lanes ? load<Int>(z) : load_some<Int>(z, width);
      const Int n = width == lanes ? load<Int>(threshold + c0) : load_some<Int>(threshold + c0, width);
      Int v = n >> 1, bits{};
      for (std::int64_t t = 0; t < steps; ++t) {
        v += input;
        const Int spike = v >= n;
        v -= spike & n;
        bits |= spike & (1 << (t % 8));
        if (t % 8 == 7 || t + 1 == steps) {
          const Byte bytes = __builtin_convertvector(bits, Byte);
          std::uint8_t* to = out + (t / 8) * plane + pixel * channels + c0;
          if (width == lanes) {
            store(to, bytes);
          } else {
            __builtin_memcpy(to, &bytes, static_cast<std::size_t>(width));
          }
          bits = Int{};
        }
      }
    }
  }
}

// Grouped layers: the sum of one output.
inline std::int64_t sum_of(const AnalogConv& a, std::int64_t sample, std::int64_t row, std::int64_t col,
                           std::int64_t channel) {
  const Geometry& g = a.g;
  const std::int64_t group_in = a.in_channels / g.groups, group_out = a.out_channels / g.groups;
  const std::int64_t first = channel / group_out * group_in;
  std::int64_t acc = 0;
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= a.in_h) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c < 0 || c >= a.in_w) continue;
      const std::int16_t* x = a.x + ((sample * a.in_h + r) * a.in_w + c) * a.in_channels + first;
      const std::int16_t* w = a.weight + (kh * g.kernel_w + kw) * group_in * a.out_channels + channel;
      for (std::int64_t k = 0; k < group_in; ++k) acc += std::int64_t{x[k]} * w[k * a.out_channels];
    }
  }
  return acc;
}

std::size_t analog_workspace(const AnalogConv& a) {
  const AnalogSizes s = analog_sizes(a);
  return static_cast<std::size_t>(round_up(8 * a.out_channels, 64) + analog_batch * round_up(8 * s.padded_out, 64) +
                                  round_up(4 * analog_batch * a.out_channels, 64) + 8 * analog_batch * s.pairs + slack);
}

void analog(const AnalogConv& a, const Tile& tile, const void* packed, void* workspace) {
  const AnalogSizes s = analog_sizes(a);
  const std::int64_t O = a.out_channels, length = 2 * s.pairs;
  char* space = static_cast<char*>(workspace);
  double* gain = reinterpret_cast<double*>(space);
  double* sum = reinterpret_cast<double*>(space + round_up(8 * O, 64));
  std::int32_t* current =
      reinterpret_cast<std::int32_t*>(reinterpret_cast<char*>(sum) + analog_batch * round_up(8 * s.padded_out, 64));
  std::int16_t* digits =
      reinterpret_cast<std::int16_t*>(reinterpret_cast<char*>(current) + round_up(4 * analog_batch * O, 64));
  const std::int64_t pixels = a.batch * a.out_h * a.out_w;
  for (std::int64_t c = 0; c < O; ++c) gain[c] = __builtin_ldexp(a.gain[c], a.exponent[tile.sample]);
  for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
    for (std::int64_t col0 = 0; col0 < a.out_w; col0 += analog_batch) {
      const std::int64_t count = smaller(analog_batch, a.out_w - col0);
      if (a.g.groups > 1) {
        for (std::int64_t i = 0; i < count; ++i) {
          for (std::int64_t c = 0; c < O; ++c) {
            sum[i * s.padded_out + c] = static_cast<double>(sum_of(a, tile.sample, row, col0 + i, c));
          }
        }
      } else {
        for (std::int64_t i = 0; i < count; ++i) gather(a, s, tile.sample, row, col0 + i, digits + 2 * i * length);
        for (std::int64_t block = 0; block < s.padded_out; block += analog_columns) {
          const std::int16_t* w = static_cast<const std::int16_t*>(packed) + 2 * block * s.pairs;
          for (std::int64_t i = 0; i < count; i += analog_pixels) {
            for (std::int64_t k = 0; k < s.pairs; k += analog_stretch) {
              // The last block may take pixels beyond `count`: their digits are old and their sums are not kept.
              std::int32_t part[2 * analog_pixels * analog_columns];
              multiply_digits(digits + 2 * i * length + 2 * k, length, w + 2 * k * analog_columns,
                              smaller(analog_stretch, s.pairs - k), part);
              for (std::int64_t j = i; j < smaller(i + analog_pixels, count); ++j) {
                const std::int32_t* high = part + 2 * (j - i) * analog_columns;
                const std::int32_t* low = high + analog_columns;
                double* to = sum + j * s.padded_out + block;
                if (k == 0) {
                  for (int c = 0; c < analog_columns; ++c) to[c] = 256.0 * high[c] + low[c];
                } else {
                  for (int c = 0; c < analog_columns; ++c) to[c] += 256.0 * high[c] + low[c];
                }
              }
            }
          }
        }
      }
      const std::int64_t pixel0 = (tile.sample * a.out_h + row) * a.out_w + col0;
      std::int32_t* z = a.steps > 0 ? current : a.out_current + pixel0 * O;
      for (std::int64_t i = 0; i < count; ++i) {
        const double* from = sum + i * s.padded_out;
        for (std::int64_t c = 0; c < O; ++c) {
          z[i * O + c] = to_grid(from[c] * gain[c] + a.offset[c], a.low[c], a.high[c]);
        }
      }
      if (a.steps > 0) encode_pixels(pixels, pixel0, pixel0 + count, O, a.steps, z, a.threshold, a.out_mask);
    }
  }
}

void encode(const Encode& a, std::int64_t pixel0, std::int64_t pixel1) {
  encode_pixels(a.pixels, pixel0, pixel1, a.channels, a.steps, a.current + pixel0 * a.channels, a.threshold, a.out);
}
