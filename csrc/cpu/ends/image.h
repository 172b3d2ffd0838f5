// Convolution of the analog image: exact integer sums of 24-bit pixels times 16-bit weights, then the constant-current
// neuron. Products are 38 bits wide, so a pixel is split into two signed digits of 12 bits, x = 4096 * high + low; a
// multiply-add of pairs (s16 x s16 -> s32) sums each digit over as many kernel rows as the weights allow: digits are
// at most 2048, so any inputs whose weights have magnitudes that add up to less than 2^20. Per row of output pixels:
//
//     split       the kernel's input rows, with their padding      [kernel rows][high, low][columns * C]   int16
//     multiply    pixels x digits, times packed weights            [panels][kernel rows][pairs][columns][2]
//                 of every kernel row; its kernel_w * C inputs are neighbours in the split row, read in place
//                 (an odd one out is multiplied by zero)            int32 sums
//     finish      (4096 * high + low) * gain + offset in double -> grid -> spikes of all steps
//
// Kernels dilated in width get rows in which the inputs of each output pixel were made neighbours. More kernel rows, or
// more than 30 inputs where one row alone is too much, go in parts, whose sums are added up in double, exact below
// 2^53. Grouped layers take a plain loop.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"
#include "cpu/layout.h"
#include "cpu/membranes.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// Output channels of a panel.
template <class Isa>
constexpr int analog_columns = Isa::analog_vectors * Isa::lanes;

constexpr int analog_pixels = 3;    // of one register block, two digits each
constexpr int digit_bits = 12;
constexpr int max_analog_pairs = 15;           // of inputs, whose sum int32 holds for any weights
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
  return a.g.groups > 1 ? 64 : static_cast<std::size_t>(cache_line + s.padded_out * a.g.kernel_h * s.pairs * 4 + slack);
}

// Kernel rows whose sums int32 holds, wherever they begin: 0 if not even one. The packed weights begin with it.
inline std::int64_t kernel_rows_of_a_part(const AnalogConv& a, std::int64_t inputs) {
  constexpr std::int64_t limit = std::int64_t{1} << (31 - (digit_bits - 1));
  std::int64_t rows = a.g.kernel_h;
  for (std::int64_t c = 0; c < a.out_channels; ++c) {
    for (std::int64_t first = 0; first < a.g.kernel_h; ++first) {
      std::int64_t sum = 0;
      for (std::int64_t k = first * inputs; k < a.g.kernel_h * inputs; ++k) {
        const std::int64_t w = a.weight[k * a.out_channels + c];
        sum += w < 0 ? -w : w;
        if (sum >= limit) {
          rows = smaller(rows, k / inputs - first);
          break;
        }
      }
    }
  }
  return rows;
}

template <class Isa>
void pack_analog(const AnalogConv& a, void* out) {
  if (a.g.groups > 1) return;
  const AnalogSizes s = analog_sizes<Isa>(a);
  __builtin_memset(out, 0, pack_analog_bytes<Isa>(a));
  *static_cast<std::int64_t*>(out) = kernel_rows_of_a_part(a, s.inputs);
  std::int16_t* to = reinterpret_cast<std::int16_t*>(static_cast<char*>(out) + cache_line);
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
  const std::int32_t* from = a.x + (sample * a.in_h + r) * a.in_w * C;
  const auto split = [&](std::int64_t to, const std::int32_t* x, std::int64_t count) {
    constexpr std::int32_t half = 1 << (digit_bits - 1);
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int32_t v = x[k] + half;
      low[to + k] = static_cast<std::int16_t>((v & (2 * half - 1)) - half);
      high[to + k] = static_cast<std::int16_t>(v >> digit_bits);
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
inline void sum_pixels(const AnalogConv& a, const AnalogSizes& s, std::int64_t rows_of_a_part, const std::int16_t* x,
                       const std::int16_t* w, std::int64_t count, std::int64_t stride, double* sum) {
  const std::int64_t rows = larger(1, rows_of_a_part);
  const std::int64_t pairs_of_a_part = rows_of_a_part > 0 ? s.pairs : max_analog_pairs;
  for (std::int64_t kh = 0; kh < a.g.kernel_h; kh += rows) {
    for (std::int64_t k = 0; k < s.pairs; k += pairs_of_a_part) {
      std::int32_t part[2 * analog_pixels * analog_columns<Isa>];
      multiply_digits<Isa>(x + 2 * kh * s.length + 2 * k, s, w + 2 * (kh * s.pairs + k) * analog_columns<Isa>,
                           smaller(rows, a.g.kernel_h - kh), smaller(pairs_of_a_part, s.pairs - k), part);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t* high = part + 2 * i * analog_columns<Isa>;
        const std::int32_t* low = high + analog_columns<Isa>;
        double* to = sum + i * stride;
        constexpr double base = 1 << digit_bits;
        if (kh + k == 0) {
          for (int c = 0; c < analog_columns<Isa>; ++c) to[c] = base * high[c] + low[c];
        } else {
          for (int c = 0; c < analog_columns<Isa>; ++c) to[c] += base * high[c] + low[c];
        }
      }
    }
  }
}

// The neurons of channels [channel, channel + vectors * lanes) of one pixel, on a current that stays the same.
template <class Isa, int vectors, bool full>
inline void fire_pixel(const ConvIf& end, const Neurons& neurons, std::int64_t pixel, std::int64_t channel,
                       const std::int32_t* current) {
  constexpr int lanes = Isa::lanes;
  Int<Isa> image[vectors];
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) {
    const std::int32_t* from = current + channel + j * lanes;
    image[j] = full ? load<Int<Isa>>(from) : load_some<Int<Isa>>(from, smaller(lanes, end.out_channels - channel));
  }
  Membranes<Isa, vectors, full> membranes(end, neurons, channel, pixel);
  membranes.held = false;    // a current of 0 .. n takes no membrane out of 32 bits
  membranes.run([&](std::int64_t, Int<Isa>(&to)[vectors]) {
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) to[j] = image[j];
  });
}

template <class Isa>
inline void fire_pixels(const ConvIf& end, const Neurons& neurons, std::int64_t pixel, std::int64_t count,
                        const std::int32_t* current) {
  constexpr int lanes = Isa::lanes;
  const std::int64_t O = end.out_channels;
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t channel = 0;
    for (; O - channel >= 4 * lanes; channel += 4 * lanes) {
      fire_pixel<Isa, 4, true>(end, neurons, pixel + i, channel, current + i * O);
    }
    for (; channel < O; channel += lanes) {
      fire_pixel<Isa, 1, false>(end, neurons, pixel + i, channel, current + i * O);
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
      const std::int32_t* x = a.x + ((sample * a.in_h + r) * a.in_w + c) * a.in_channels + first;
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
void analog(const AnalogConv& a, const ConvIf& end, const Neurons& neurons, const RowSpan& span, void* workspace) {
  const char* packed = static_cast<const char*>(a.packed);
  assert(packed != nullptr && reinterpret_cast<std::uintptr_t>(workspace) % cache_line == 0);
  const AnalogSizes s = analog_sizes<Isa>(a);
  const AnalogPlaces at = analog_places(a, s);
  const std::int64_t O = a.out_channels;
  char* space = static_cast<char*>(workspace);
  double* gain = reinterpret_cast<double*>(space);                                // [O]
  double* sum = reinterpret_cast<double*>(space + at.sum);                        // [waiting_pixels, padded_out]
  std::int32_t* current = reinterpret_cast<std::int32_t*>(space + at.current);    // [waiting_pixels, O]
  std::int16_t* digits = reinterpret_cast<std::int16_t*>(space + at.digits);      // [kernel rows, 2, length]
  const std::int64_t rows_of_a_part = a.g.groups > 1 ? 0 : *reinterpret_cast<const std::int64_t*>(packed);
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
          const std::int16_t* w =
              reinterpret_cast<const std::int16_t*>(packed + cache_line) + 2 * channel0 * a.g.kernel_h * s.pairs;
          for (std::int64_t i = 0; i < count; i += analog_pixels) {
            sum_pixels<Isa>(a, s, rows_of_a_part, digits + (col0 + i) * s.step, w, smaller(analog_pixels, count - i),
                            s.padded_out, sum + i * s.padded_out + channel0);
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
      if (a.steps > 0) fire_pixels<Isa>(end, neurons, pixel0, count, z);
    }
  }
}

}    // namespace
}    // namespace qcfs::cpu
