// Convolution of the analog image: exact integer sums of 16-bit pixels times 16-bit weights, then the constant-current
// neuron. Products are 31 bits wide, so a pixel is split into two signed base-256 digits, x = 256 * high + low; a
// multiply-add of pairs (s16 x s16 -> s32) sums each digit over up to 510 inputs below 2^31. Per row of output pixels:
//
//     split       the kernel's input rows, with their padding      [kernel rows][high, low][columns * C]   int16
//     multiply    pixels x digits, times packed weights            [panels][kernel rows][pairs][columns][2]
//                 of every kernel row; its kernel_w * C inputs are neighbours in the split row, read in place
//                 (an odd one out is multiplied by zero)            int32 sums
//     finish      (256 * high + low) * gain + offset in double -> grid -> spikes of all steps
//
// Kernels dilated in width get rows in which the inputs of each output pixel were made neighbours. More than 510 inputs
// go in parts of 510, whose sums are added up in double, exact below 2^53. Grouped layers take a plain loop.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"
#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// Output channels of a panel.
template <class Isa>
constexpr int analog_columns = Isa::analog_vectors * Isa::lanes;

constexpr int analog_pixels = 3;               // of one register block, two digits each
constexpr int max_analog_pairs = 255;          // of inputs, whose sum int32 holds
constexpr std::int64_t waiting_pixels = 12;    // pixels whose sums wait for the last step together

struct AnalogSizes {
  std::int64_t inputs, pairs;    // of one kernel row
  std::int64_t padded_out;       // output channels, to whole blocks
  std::int64_t step;             // from one output pixel to the next in a split row
  std::int64_t length;           // of a split row
};

template <class Isa>
inline AnalogSizes analog_sizes(const AnalogConv& a) {
  const Geometry& g = a.g;
  AnalogSizes s;
  s.inputs = g.kernel_w * (a.in_channels / g.groups);
  s.pairs = (s.inputs + 1) / 2;
  s.padded_out = round_up(a.out_channels, analog_columns<Isa>);
  s.step = g.dilation_w == 1 ? g.stride_w * a.in_channels : 2 * s.pairs;
  s.length = round_up((round_up(a.out_w, analog_pixels) - 1) * s.step + 2 * s.pairs, 32);
  return s;
}

template <class Isa>
std::size_t pack_analog_bytes(const AnalogConv& a) {
  const AnalogSizes s = analog_sizes<Isa>(a);
  return a.g.groups > 1 ? 64 : static_cast<std::size_t>(s.padded_out * a.g.kernel_h * s.pairs * 4 + slack);
}

template <class Isa>
void pack_analog(const AnalogConv& a, void* out) {
  if (a.g.groups > 1) return;
  const AnalogSizes s = analog_sizes<Isa>(a);
  std::int16_t* to = static_cast<std::int16_t*>(out);
  __builtin_memset(to, 0, pack_analog_bytes<Isa>(a));
  for (std::int64_t channel0 = 0; channel0 < s.padded_out; channel0 += analog_columns<Isa>) {
    for (std::int64_t kh = 0; kh < a.g.kernel_h; ++kh) {
      for (std::int64_t k = 0; k < s.inputs; ++k) {
        const std::int64_t pair =
            (channel0 * a.g.kernel_h + kh * analog_columns<Isa>)*s.pairs + k / 2 * analog_columns<Isa>;
        std::int16_t* row = to + pair * 2 + k % 2;
        for (std::int64_t c = 0; c < smaller(analog_columns<Isa>, a.out_channels - channel0); ++c) {
          row[2 * c] = a.weight[(kh * s.inputs + k) * a.out_channels + channel0 + c];
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

// Sums of `analog_pixels` pixels and one panel over some kernel rows, of each `pairs` pairs, two digits:
// [pixel][high, low][columns].
template <class Isa>
inline void multiply_digits(const std::int16_t* x, const AnalogSizes& s, const std::int16_t* w, std::int64_t rows,
                            std::int64_t pairs, std::int32_t* out) {
  constexpr int lanes = Isa::lanes;
  Int<Isa> acc[2 * analog_pixels][Isa::analog_vectors];
  QCFS_UNROLL
  for (int i = 0; i < 2 * analog_pixels; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < Isa::analog_vectors; ++j) acc[i][j] = Int<Isa>{};
  }
  for (std::int64_t kh = 0; kh < rows; ++kh, x += 2 * s.length) {
    const std::int16_t* weights = w + kh * s.pairs * 2 * analog_columns<Isa>;
    for (std::int64_t k = 0; k < pairs; ++k, weights += 2 * analog_columns<Isa>) {
      Int<Isa> weight[Isa::analog_vectors];
      QCFS_UNROLL
      for (int j = 0; j < Isa::analog_vectors; ++j) weight[j] = load<Int<Isa>>(weights + 2 * j * lanes);
      QCFS_UNROLL
      for (int i = 0; i < 2 * analog_pixels; ++i) {
        const Int<Isa> pair = Int<Isa>{} + load<std::int32_t>(x + i / 2 * s.step + i % 2 * s.length + 2 * k);
        QCFS_UNROLL
        for (int j = 0; j < Isa::analog_vectors; ++j) acc[i][j] = Isa::dot2(acc[i][j], pair, weight[j]);
      }
    }
  }
  QCFS_UNROLL
  for (int i = 0; i < 2 * analog_pixels; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < Isa::analog_vectors; ++j) store(out + i * analog_columns<Isa> + j * lanes, acc[i][j]);
  }
}

// Sums of one pixel block in double, in parts whose sums int32 holds: whole kernel rows, or parts of a long one.
template <class Isa>
inline void sum_pixels(const AnalogConv& a, const AnalogSizes& s, const std::int16_t* x, const std::int16_t* w,
                       std::int64_t count, std::int64_t stride, double* sum) {
  const std::int64_t rows = larger(1, max_analog_pairs / s.pairs);
  for (std::int64_t kh = 0; kh < a.g.kernel_h; kh += rows) {
    for (std::int64_t k = 0; k < s.pairs; k += max_analog_pairs) {
      std::int32_t part[2 * analog_pixels * analog_columns<Isa>];
      multiply_digits<Isa>(x + 2 * kh * s.length + 2 * k, s, w + 2 * (kh * s.pairs + k) * analog_columns<Isa>,
                           smaller(rows, a.g.kernel_h - kh), smaller(max_analog_pairs, s.pairs - k), part);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t* high = part + 2 * i * analog_columns<Isa>;
        const std::int32_t* low = high + analog_columns<Isa>;
        double* to = sum + i * stride;
        if (kh + k == 0) {
          for (int c = 0; c < analog_columns<Isa>; ++c) to[c] = 256.0 * high[c] + low[c];
        } else {
          for (int c = 0; c < analog_columns<Isa>; ++c) to[c] += 256.0 * high[c] + low[c];
        }
      }
    }
  }
}

template <class Isa>
void encode_pixels(std::int64_t pixels, std::int64_t pixel0, std::int64_t pixel1, std::int64_t channels,
                   std::int64_t steps, const std::int32_t* current, const std::int32_t* threshold, std::uint8_t* out) {
  constexpr int lanes = Isa::lanes;
  const std::int64_t plane = pixels * channels;
  for (std::int64_t pixel = pixel0; pixel < pixel1; ++pixel) {
    for (std::int64_t c0 = 0; c0 < channels; c0 += lanes) {
      const std::int64_t width = smaller(lanes, channels - c0);
      const std::int32_t* z = current + (pixel - pixel0) * channels + c0;
      const Int<Isa> input = width == lanes ? load<Int<Isa>>(z) : load_some<Int<Isa>>(z, width);
      const Int<Isa> n = width == lanes ? load<Int<Isa>>(threshold + c0) : load_some<Int<Isa>>(threshold + c0, width);
      Int<Isa> v = n >> 1, bits{};
      for (std::int64_t t = 0; t < steps; ++t) {
        v += input;
        const Int<Isa> spike = v >= n;
        v -= spike & n;
        bits |= spike & (1 << (t % 8));
        if (t % 8 == 7 || t + 1 == steps) {
          const LaneBytes<Isa> bytes = __builtin_convertvector(bits, LaneBytes<Isa>);
          std::uint8_t* to = out + (t / 8) * plane + pixel * channels + c0;
          if (width == lanes) {
            store(to, bytes);
          } else {
            __builtin_memcpy(to, &bytes, static_cast<std::size_t>(width));
          }
          bits = Int<Isa>{};
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

// Where a task's arrays begin in its workspace, in bytes.
struct AnalogPlaces {
  std::int64_t sum, current, digits, end;
};

inline AnalogPlaces analog_places(const AnalogConv& a, const AnalogSizes& s) {
  AnalogPlaces at;
  at.sum = round_up(8 * a.out_channels, cache_line);    // behind the gains, double [O]
  at.current = at.sum + waiting_pixels * round_up(8 * s.padded_out, cache_line);
  at.digits = at.current + round_up(4 * waiting_pixels * a.out_channels, cache_line);
  at.end = at.digits + 4 * a.g.kernel_h * s.length + slack;
  return at;
}

template <class Isa>
std::size_t analog_workspace(const AnalogConv& a) {
  return static_cast<std::size_t>(analog_places(a, analog_sizes<Isa>(a)).end);
}

template <class Isa>
void analog(const AnalogConv& a, const RowSpan& span, const void* packed, void* workspace) {
  assert(packed != nullptr && reinterpret_cast<std::uintptr_t>(workspace) % cache_line == 0);
  const AnalogSizes s = analog_sizes<Isa>(a);
  const AnalogPlaces at = analog_places(a, s);
  const std::int64_t O = a.out_channels;
  char* space = static_cast<char*>(workspace);
  double* gain = reinterpret_cast<double*>(space);                                // [O]
  double* sum = reinterpret_cast<double*>(space + at.sum);                        // [waiting_pixels, padded_out]
  std::int32_t* current = reinterpret_cast<std::int32_t*>(space + at.current);    // [waiting_pixels, O]
  std::int16_t* digits = reinterpret_cast<std::int16_t*>(space + at.digits);      // [kernel rows, 2, length]
  const std::int64_t pixels = a.batch * a.out_h * a.out_w;
  for (std::int64_t c = 0; c < O; ++c) gain[c] = __builtin_ldexp(a.gain[c], a.exponent[span.sample]);
  for (std::int64_t row = span.row0; row < span.row1; ++row) {
    for (std::int64_t kh = 0; a.g.groups == 1 && kh < a.g.kernel_h; ++kh) {
      split_row(a, s, span.sample, row, kh, digits + 2 * kh * s.length);
    }
    for (std::int64_t col0 = 0; col0 < a.out_w; col0 += waiting_pixels) {
      const std::int64_t count = smaller(waiting_pixels, a.out_w - col0);
      if (a.g.groups > 1) {
        for (std::int64_t i = 0; i < count; ++i) {
          for (std::int64_t c = 0; c < O; ++c) {
            sum[i * s.padded_out + c] = static_cast<double>(sum_of(a, span.sample, row, col0 + i, c));
          }
        }
      } else {
        for (std::int64_t channel0 = 0; channel0 < s.padded_out; channel0 += analog_columns<Isa>) {
          const std::int16_t* w = static_cast<const std::int16_t*>(packed) + 2 * channel0 * a.g.kernel_h * s.pairs;
          for (std::int64_t i = 0; i < count; i += analog_pixels) {
            sum_pixels<Isa>(a, s, digits + (col0 + i) * s.step, w, smaller(analog_pixels, count - i), s.padded_out,
                            sum + i * s.padded_out + channel0);
          }
        }
      }
      const std::int64_t pixel0 = (span.sample * a.out_h + row) * a.out_w + col0;
      std::int32_t* z = a.steps > 0 ? current : a.out_current + pixel0 * O;
      for (std::int64_t i = 0; i < count; ++i) {
        const double* from = sum + i * s.padded_out;
        for (std::int64_t c = 0; c < O; ++c) {
          z[i * O + c] = to_grid(from[c] * gain[c] + a.offset[c], a.low[c], a.high[c]);
        }
      }
      if (a.steps > 0) encode_pixels<Isa>(pixels, pixel0, pixel0 + count, O, a.steps, z, a.threshold, a.out_mask);
    }
  }
}

template <class Isa>
void encode(const Encode& a, std::int64_t pixel0, std::int64_t pixel1) {
  encode_pixels<Isa>(a.pixels, pixel0, pixel1, a.channels, a.steps, a.current + pixel0 * a.channels, a.threshold,
                     a.out);
}

}    // namespace
}    // namespace qcfs::cpu
