// What the native tests share: random spiking layers, their contract in plain loops over 64-bit integers, and the
// evidence that a test was not void.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/contract.h"

namespace layers {

using i64 = std::int64_t;

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

inline std::mt19937_64 generator;

inline i64 uniform(i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(generator); }
inline bool chance(double p) { return std::bernoulli_distribution(p)(generator); }
template <typename T>
T any_of(std::initializer_list<T> from) {
  return *(from.begin() + uniform(0, static_cast<i64>(from.size()) - 1));
}

inline i64 out_size(i64 n, i64 k, i64 s, i64 p, i64 d) { return (n + 2 * p - d * (k - 1) - 1) / s + 1; }
inline i64 planes_of(qcfs::Coding c, i64 T) { return c == qcfs::Coding::count ? T : (T + 7) / 8; }

// Element `index` of planes of `plane` elements each, at step t.
inline i64 value_of(const std::uint8_t* x, qcfs::Coding c, i64 plane, i64 index, i64 t) {
  return c == qcfs::Coding::count ? x[t * plane + index] : (x[t / 8 * plane + index] >> (t % 8)) & 1;
}

// Silent or saturated neurons agree whatever a kernel does, and >= differs from > only where a membrane meets its
// threshold.
struct Evidence {
  i64 steps = 0, spikes = 0, ties = 0;
  double rate() const { return static_cast<double>(spikes) / static_cast<double>(steps); }
};

// I[t] of every output neuron, [T, outputs]. Thresholds are not read.
inline std::vector<i64> currents_of(const qcfs::ConvIf& a) {
  const i64 O = a.out_channels, outputs = a.batch * a.out_h * a.out_w * O;
  std::vector<i64> currents;
  currents.reserve(static_cast<std::size_t>(a.steps * outputs));
  for (i64 t = 0; t < a.steps; ++t) {
    for (i64 index = 0; index < outputs; ++index) {
      const i64 o = index % O, ow = index / O % a.out_w, oh = index / O / a.out_w % a.out_h;
      const i64 n = index / O / a.out_w / a.out_h;
      i64 sum = a.bias[o] + (a.current != nullptr ? a.current[index] : 0);
      for (int i = 0; i < a.product_count; ++i) {
        const qcfs::Product& p = a.products[i];
        const qcfs::Geometry& g = p.g;
        const i64 per_group = p.x.channels / g.groups, first = o / (O / g.groups) * per_group;
        const i64 plane = a.batch * p.x.height * p.x.width * p.x.channels;
        for (i64 kh = 0; kh < g.kernel_h; ++kh) {
          for (i64 kw = 0; kw < g.kernel_w; ++kw) {
            const i64 y = oh * g.stride_h - g.pad_h + kh * g.dilation_h;
            const i64 x = ow * g.stride_w - g.pad_w + kw * g.dilation_w;
            if (y < 0 || y >= p.x.height || x < 0 || x >= p.x.width) continue;
            for (i64 c = 0; c < per_group; ++c) {
              const i64 at = ((kh * g.kernel_w + kw) * per_group + c) * O + o;
              const i64 w = p.weight_bytes == 1 ? 256 * static_cast<const std::int8_t*>(p.weight)[at]
                                                : static_cast<const std::int16_t*>(p.weight)[at];
              const i64 from = ((n * p.x.height + y) * p.x.width + x) * p.x.channels + first + c;
              sum += w * value_of(p.x.data, p.x.coding, plane, from, t);
            }
          }
        }
      }
      for (int i = 0; i < a.residual_count; ++i) {
        const qcfs::Residual& r = a.residuals[i];
        sum += r.amplitude[o] * value_of(r.data, r.coding, outputs, index, t);
      }
      currents.push_back(sum);
    }
  }
  return currents;
}

// The recursion on these currents; returns masks [ceil(T/8), outputs].
inline std::vector<std::uint8_t> masks_of(const qcfs::ConvIf& a, const std::vector<i64>& currents, Evidence& evidence) {
  const i64 outputs = a.batch * a.out_h * a.out_w * a.out_channels;
  std::vector<std::uint8_t> masks(static_cast<std::size_t>(planes_of(qcfs::Coding::mask, a.steps) * outputs));
  for (i64 index = 0; index < outputs; ++index) {
    const i64 n = a.threshold[index % a.out_channels];
    i64 v = n / 2;
    for (i64 t = 0; t < a.steps; ++t) {
      v += currents[static_cast<std::size_t>(t * outputs + index)];
      if (std::llabs(v) > std::numeric_limits<std::int32_t>::max()) fail("the test's own operands overflow");
      ++evidence.steps;
      evidence.ties += v == n;
      if (v < n) continue;
      v -= n;
      ++evidence.spikes;
      std::uint8_t& byte = masks[static_cast<std::size_t>(t / 8 * outputs + index)];
      byte = static_cast<std::uint8_t>(byte | 1 << (t % 8));
    }
  }
  return masks;
}

// Masks with a spike at this rate, or counts up to `max`.
template <typename Array>
void fill_spikes(const Array& x, qcfs::Coding c, double rate, i64 max) {
  for (i64 i = 0; i < x.count(); ++i) {
    unsigned byte = 0;
    if (c == qcfs::Coding::count) {
      byte = chance(rate) ? static_cast<unsigned>(uniform(1, max)) : 0;
    } else {
      // All bits, also those of steps past T: nothing may read them.
      for (int b = 0; b < 8; ++b) byte |= chance(rate) ? 1u << b : 0;
    }
    x[i] = static_cast<std::uint8_t>(byte);
  }
}

// A random layer and its output. The operands lie in arrays of the test's own kind: Array<T>(count, offset) holds
// `count` zeros and begins `offset` elements past an aligned address, where the kind has a choice.
template <template <typename> class Array>
struct RandomLayer {
  // 0 steps: any T.
  RandomLayer(i64 steps, Evidence& evidence) {
    a.steps = steps;
    if (steps == 0) a.steps = chance(0.3) ? uniform(1, 41) : any_of<i64>({1, 1, 2, 3, 4, 4, 5, 7, 8, 9, 12, 16, 17});
    a.batch = uniform(1, 3);
    a.out_channels = any_of(channels);
    const bool deep = chance(0.03);    // more inputs than one chunk of event rows takes
    const bool point = chance(0.2), linear = point && chance(0.6), grouped = !linear && !deep && chance(0.2);
    a.out_h = point ? 1 : uniform(1, deep ? 3 : 8);
    a.out_w = point ? 1 : uniform(1, deep ? 3 : 8);
    // Where everything is a multiple of 256, membranes meet their thresholds often.
    weight_bytes = chance(0.4) ? 1 : 2;
    unit = weight_bytes == 1 || chance(0.3) ? 256 : 1;
    extreme = chance(0.2);
    rate = any_of({0.1, 0.3, 0.6});
    a.product_count = any_of({0, 1, 1, 1, 1, 2, 3});
    for (int i = 0; i < a.product_count; ++i) add_product(linear, deep, grouped && chance(0.8));
    for (i64 i = uniform(a.product_count == 0, 2); i > 0; --i) {
      const qcfs::Coding coding = any_coding();
      const std::uint8_t* data = spikes(coding, outputs(), any_of<i64>({1, 4, 255}));
      residuals.push_back({data, coding, per_unit(a.out_channels, -2000, 4000)});
    }
    a.products = products.data();
    a.residuals = residuals.data();
    a.residual_count = static_cast<int>(residuals.size());
    if (chance(0.2)) a.current = per_unit(outputs(), -600, 3000);
    a.bias = per_unit(a.out_channels, -300, 600);
    const std::vector<i64> currents = currents_of(a);
    // Thresholds near the spread of the channel's currents, and for some neurons exactly met: n/2 + I[0] = n.
    const Array<std::int32_t>& threshold = words.emplace_back(a.out_channels);
    a.threshold = threshold.data();
    for (i64 o = 0; o < a.out_channels; ++o) {
      i64 spread = unit;
      for (i64 i = o; i < a.steps * outputs(); i += a.out_channels) {
        spread = std::max(spread, std::abs(currents[static_cast<std::size_t>(i)]));
      }
      i64 n = spread * any_of<i64>({1, 2, 4}) / 2;
      const i64 pixel = uniform(0, outputs() / a.out_channels - 1);
      const i64 first = currents[static_cast<std::size_t>(pixel * a.out_channels + o)];
      if (first > 0 && chance(0.5)) n = 2 * first;
      threshold[o] = static_cast<std::int32_t>(std::clamp(n / (2 * unit), i64{1}, (i64{1} << 28) / unit) * 2 * unit);
    }
    want = masks_of(a, currents, evidence);
  }

  // Fails where the masks `got` are not the layer's output.
  void check(const Array<std::uint8_t>& got, const std::string& kernel) const {
    for (i64 i = 0; i < got.count(); ++i) {
      const std::uint8_t expected = want[static_cast<std::size_t>(i)];
      if (got[i] == expected) continue;
      std::string shape = ": T=" + std::to_string(a.steps) + " N=" + std::to_string(a.batch) + " out " +
                          std::to_string(a.out_h) + "x" + std::to_string(a.out_w) + "x" +
                          std::to_string(a.out_channels);
      for (const qcfs::Product& p : products) {
        shape += ", kernel " + std::to_string(p.g.kernel_h) + "x" + std::to_string(p.g.kernel_w) +
                 " C=" + std::to_string(p.x.channels) + " groups " + std::to_string(p.g.groups) +
                 (p.x.coding == qcfs::Coding::count ? " counts, " : " masks, ") + std::to_string(8 * p.weight_bytes) +
                 " bits";
      }
      fail(kernel + shape + ": byte " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
           std::to_string(expected));
    }
  }

  i64 outputs() const { return a.batch * a.out_h * a.out_w * a.out_channels; }

  qcfs::ConvIf a{};    // all but `out`
  bool extreme;
  std::vector<qcfs::Product> products;
  std::vector<qcfs::Residual> residuals;
  std::vector<std::uint8_t> want;

 private:
  static constexpr std::initializer_list<i64> channels = {1,  2,  3,  4,  7,  8,  8,  9,  15, 16, 16, 17,
                                                          20, 31, 32, 32, 33, 48, 63, 64, 64, 65, 80, 129};

  static qcfs::Coding any_coding() { return chance(0.25) ? qcfs::Coding::count : qcfs::Coding::mask; }

  // The input size of an axis that gives `out`, with some padding where it fits.
  static i64 input_size(i64 out, i64 k, i64 s, i64 d, i64& pad) {
    const i64 need = (out - 1) * s + d * (k - 1) + 1;    // size + 2 * padding, at least
    pad = std::min(uniform(0, 2), (need - 1) / 2);
    return need - 2 * pad + uniform(0, s - 1);
  }

  const std::uint8_t* spikes(qcfs::Coding coding, i64 neurons, i64 max) {
    const i64 offset = chance(0.15) ? uniform(1, 8) : 0;    // misaligned views
    fill_spikes(bytes.emplace_back(planes_of(coding, a.steps) * neurons, offset), coding, rate, max);
    return bytes.back().data();
  }

  const std::int32_t* per_unit(i64 count, i64 low, i64 high) {
    const Array<std::int32_t>& x = words.emplace_back(count);
    for (i64 i = 0; i < count; ++i) x[i] = static_cast<std::int32_t>(uniform(low / unit, high / unit) * unit);
    return x.data();
  }

  void add_product(bool linear, bool deep, bool grouped) {
    qcfs::Geometry g{any_of<i64>({1, 1, 3, 3, 2, 5}),
                     any_of<i64>({1, 1, 3, 3, 2}),
                     uniform(1, 2),
                     uniform(1, 2),
                     0,
                     0,
                     any_of<i64>({1, 1, 1, 2}),
                     any_of<i64>({1, 1, 1, 2}),
                     1};
    i64 C = deep ? uniform(500, 1300) : any_of(channels);
    if (grouped) {
      g.groups = any_of<i64>({2, 3, 4, a.out_channels});
      if (a.out_channels % g.groups != 0) g.groups = a.out_channels;    // depthwise, or one channel a group
      C = g.groups * any_of<i64>({1, 1, 2});
    }
    if (linear) g.kernel_h = g.kernel_w = 1;
    const i64 height = linear ? 1 : input_size(a.out_h, g.kernel_h, g.stride_h, g.dilation_h, g.pad_h);
    const i64 width = linear ? 1 : input_size(a.out_w, g.kernel_w, g.stride_w, g.dilation_w, g.pad_w);
    // By the contract n/2 + T * max|I| < 2^31: products get half of that, n/2 an eighth, residuals less.
    const i64 inputs = g.kernel_h * g.kernel_w * (C / g.groups);
    const i64 largest = (i64{1} << 30) / (a.steps * a.product_count * inputs * unit);    // |weight| * input
    const qcfs::Coding coding = any_coding();
    const i64 value = coding == qcfs::Coding::mask ? 1 : std::clamp(any_of<i64>({1, 4, 64, 255}), i64{1}, largest);
    const i64 top = std::clamp(largest / value, i64{1}, i64{unit == 1 ? 32639 : 127});
    const i64 usual = top / any_of<i64>({8, 64}) + 1;
    const std::uint8_t* x = spikes(coding, a.batch * height * width * C, value);
    void* weight = bytes.emplace_back(inputs * a.out_channels * weight_bytes).data();
    for (i64 i = 0; i < inputs * a.out_channels; ++i) {
      const i64 w = extreme ? any_of({top, -top}) : uniform(-usual, usual);
      if (weight_bytes == 1) {
        static_cast<std::int8_t*>(weight)[i] = static_cast<std::int8_t>(w);
      } else {
        static_cast<std::int16_t*>(weight)[i] = static_cast<std::int16_t>(w * unit);
      }
    }
    products.push_back({{x, coding, height, width, C}, weight, weight_bytes, g});
  }

  int weight_bytes;
  i64 unit;    // of weights, amplitudes, biases, currents; half of the thresholds'
  double rate;
  std::deque<Array<std::uint8_t>> bytes;
  std::deque<Array<std::int32_t>> words;
};

}    // namespace layers
