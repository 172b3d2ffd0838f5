// Convolution of the analog image: exact integer sums of 16-bit pixels times 16-bit weights, then the constant-current
// neuron. Products are 31 bits wide, so a pixel is split into two signed base-256 digits, x = 256 * high + low; a
// multiply-add of pairs (s16 x s16 -> s32) sums each digit over up to 510 inputs below 2^31. Per row of output pixels:
//
//     split       the kernel's input rows, with their padding      [kernel rows][high, low][columns * C]   int16
//     multiply    pixels x digits, times packed weights            [blocks][kernel rows][pairs][columns][2]
//                 of every kernel row; its kernel_w * C inputs are neighbours in the split row, read in place
//                 (an odd one out is multiplied by zero)            int32 sums
//     finish      (256 * high + low) * gain + offset in double -> grid -> spikes of all steps
//
// Kernels dilated in width get rows in which the inputs of each output pixel were made neighbours. More than 510 inputs
// go in stretches of 510, whose sums are added up in double, exact below 2^53. Grouped layers take a plain loop.
//
// The including file defines analog_vectors and dot2 (sums of products of int16 pairs).

constexpr int analog_columns = analog_vectors * lanes;
constexpr int analog_pixels = 3;             // of one register block, two digits each
constexpr int analog_stretch = 255;          // pairs of inputs
constexpr std::int64_t analog_batch = 12;    // pixels whose sums wait for the last step

struct AnalogSizes {
  std::int64_t inputs, pairs;    // of one kernel row
  std::int64_t padded_out;       // output channels, to whole blocks
  std::int64_t step;             // from one output pixel to the next in a split row
  std::int64_t length;           // of a split row
};

inline AnalogSizes analog_sizes(const AnalogConv& a) {
  const Geometry& g = a.g;
  AnalogSizes s;
  s.inputs = g.kernel_w * (a.in_channels / g.groups);
  s.pairs = (s.inputs + 1) / 2;
  s.padded_out = round_up(a.out_channels, analog_columns);
  s.step = g.dilation_w == 1 ? g.stride_w * a.in_channels : 2 * s.pairs;
  s.length = round_up((round_up(a.out_w, analog_pixels) - 1) * s.step + 2 * s.pairs, 32);
  return s;
}

std::size_t pack_analog_bytes(const AnalogConv& a) {
  const AnalogSizes s = analog_sizes(a);
  return a.g.groups > 1 ? 64 : static_cast<std::size_t>(s.padded_out * a.g.kernel_h * s.pairs * 4 + slack);
}

void pack_analog(const AnalogConv& a, void* out) {
  if (a.g.groups > 1) return;
  const AnalogSizes s = analog_sizes(a);
  std::int16_t* to = static_cast<std::int16_t*>(out);
  __builtin_memset(to, 0, pack_analog_bytes(a));
  for (std::int64_t block = 0; block < s.padded_out; block += analog_columns) {
    for (std::int64_t kh = 0; kh < a.g.kernel_h; ++kh) {
      for (std::int64_t k = 0; k < s.inputs; ++k) {
        const std::int64_t pair = (block * a.g.kernel_h + kh * analog_columns) * s.pairs + k / 2 * analog_columns;
        std::int16_t* row = to + pair * 2 + k % 2;
        for (std::int64_t c = 0; c < smaller(analog_columns, a.out_channels - block); ++c) {
          row[2 * c] = a.weight[(kh * s.inputs + k) * a.out_channels + block + c];
        }
      }
    }
  }
}

// Splits what output row `row` reads under kernel row kh: digits at `out` (high) and out + length (low).
inline void split_row(const AnalogConv& a, const AnalogSizes& s, std::int64_t sample, std::int64_t row, std::int64_t kh,
                      std::int16_t* out) {
  const Geometry& g = a.g;
  const std::int64_t C = a.in_channels, r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
  std::int16_t* high = out;
  std::int16_t* low = out + s.length;
  __builtin_memset(out, 0, static_cast<std::size_t>(2 * s.length) * sizeof(*out));
  if (r < 0 || r >= a.in_h) return;
  const std::int16_t* from = a.x + (sample * a.in_h + r) * a.in_w * C;
  const auto split = [&](std::int64_t to, const std::int16_t* x, std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int16_t v = x[k];
      low[to + k] = static_cast<std::int8_t>(v & 0xff);
      high[to + k] = static_cast<std::int16_t>((v >> 8) + ((v >> 7) & 1));
    }
  };
  if (g.dilation_w == 1) {
    const std::int64_t first = g.pad_w * C;
    split(first, from, larger(0, smaller(a.in_w * C, s.length - first)));
    return;
  }
  for (std::int64_t col = 0; col < a.out_w; ++col) {
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c >= 0 && c < a.in_w) split(col * s.step + kw * C, from + c * C, C);
    }
  }
}

// Sums of `analog_pixels` pixels and one block of columns over some kernel rows, of each `pairs` pairs, two digits:
// [pixel][high, low][columns].
inline void multiply_digits(const std::int16_t* x, const AnalogSizes& s, const std::int16_t* w, std::int64_t rows,
                            std::int64_t pairs, std::int32_t* out) {
  Int acc[2 * analog_pixels][analog_vectors];
  QCFS_UNROLL
  for (int i = 0; i < 2 * analog_pixels; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < analog_vectors; ++j) acc[i][j] = Int{};
  }
  for (std::int64_t kh = 0; kh < rows; ++kh, x += 2 * s.length) {
    const std::int16_t* weights = w + kh * s.pairs * 2 * analog_columns;
    for (std::int64_t k = 0; k < pairs; ++k, weights += 2 * analog_columns) {
      Int weight[analog_vectors];
      QCFS_UNROLL
      for (int j = 0; j < analog_vectors; ++j) weight[j] = load<Int>(weights + 2 * j * lanes);
      QCFS_UNROLL
      for (int i = 0; i < 2 * analog_pixels; ++i) {
        const Int pair = Int{} + load<std::int32_t>(x + i / 2 * s.step + i % 2 * s.length + 2 * k);
        QCFS_UNROLL
        for (int j = 0; j < analog_vectors; ++j) acc[i][j] = dot2(acc[i][j], pair, weight[j]);
      }
    }
  }
  QCFS_UNROLL
  for (int i = 0; i < 2 * analog_pixels; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < analog_vectors; ++j) store(out + i * analog_columns + j * lanes, acc[i][j]);
  }
}

// Sums of one pixel block in double, over stretches that int32 holds: whole kernel rows, or pieces of a long one.
inline void sum_pixels(const AnalogConv& a, const AnalogSizes& s, const std::int16_t* x, const std::int16_t* w,
                       std::int64_t count, std::int64_t stride, double* sum) {
  const std::int64_t rows = larger(1, analog_stretch / s.pairs);
  for (std::int64_t kh = 0; kh < a.g.kernel_h; kh += rows) {
    for (std::int64_t k = 0; k < s.pairs; k += analog_stretch) {
      std::int32_t part[2 * analog_pixels * analog_columns];
      multiply_digits(x + 2 * kh * s.length + 2 * k, s, w + 2 * (kh * s.pairs + k) * analog_columns,
                      smaller(rows, a.g.kernel_h - kh), smaller(analog_stretch, s.pairs - k), part);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t* high = part + 2 * i * analog_columns;
        const std::int32_t* low = high + analog_columns;
        double* to = sum + i * stride;
        if (kh + k == 0) {
          for (int c = 0; c < analog_columns; ++c) to[c] = 256.0 * high[c] + low[c];
        } else {
          for (int c = 0; c < analog_columns; ++c) to[c] += 256.0 * high[c] + low[c];
        }
      }
    }
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
                                  round_up(4 * analog_batch * a.out_channels, 64) + 4 * a.g.kernel_h * s.length +
                                  slack);
}

void analog(const AnalogConv& a, const RowSpan& tile, const void* packed, void* workspace) {
  const AnalogSizes s = analog_sizes(a);
  const std::int64_t O = a.out_channels;
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
    for (std::int64_t kh = 0; a.g.groups == 1 && kh < a.g.kernel_h; ++kh) {
      split_row(a, s, tile.sample, row, kh, digits + 2 * kh * s.length);
    }
    for (std::int64_t col0 = 0; col0 < a.out_w; col0 += analog_batch) {
      const std::int64_t count = smaller(analog_batch, a.out_w - col0);
      if (a.g.groups > 1) {
        for (std::int64_t i = 0; i < count; ++i) {
          for (std::int64_t c = 0; c < O; ++c) {
            sum[i * s.padded_out + c] = static_cast<double>(sum_of(a, tile.sample, row, col0 + i, c));
          }
        }
      } else {
        for (std::int64_t block = 0; block < s.padded_out; block += analog_columns) {
          const std::int16_t* w = static_cast<const std::int16_t*>(packed) + 2 * block * a.g.kernel_h * s.pairs;
          for (std::int64_t i = 0; i < count; i += analog_pixels) {
            sum_pixels(a, s, digits + (col0 + i) * s.step, w, smaller(analog_pixels, count - i), s.padded_out,
                       sum + i * s.padded_out + block);
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
