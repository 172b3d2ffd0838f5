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
      i64 sum = a.bias[t * a.bias_step + o] + (a.current != nullptr ? a.current[t * a.current_step + index] : 0);
      if (a.neuron.mode == qcfs::Mode::sum) sum *= a.neuron.levels;
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
              const i64 w = p.weight_bytes == 1 ? static_cast<const std::int8_t*>(p.weight)[at]
                                                : static_cast<const std::int16_t*>(p.weight)[at];
              const i64 from = ((n * p.x.height + y) * p.x.width + x) * p.x.channels + first + c;
              sum += p.scale * w * value_of(p.x.data, p.x.coding, plane, from, t);
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

// What a layer gives: mask or count bytes, and the state after the last step where it has one.
struct Answer {
  std::vector<std::uint8_t> out;
  std::vector<std::int32_t> state;
};

// One neuron of a layer, in its mode.
class OneNeuron {
 public:
  OneNeuron(const qcfs::ConvIf& a, i64 threshold, const std::vector<i64>& currents)
      : a_(a), n_(threshold), currents_(currents) {}

  // The spikes of the output, from membrane v on and, if signed, from `sent`; both are left as after the last step.
  std::vector<i64> fire(i64& v, i64& sent, Evidence& evidence) const {
    using qcfs::Mode;
    if (a_.neuron.mode == Mode::sum) {
      const i64 total = checked(currents_[0] + n_ / 2), levels = a_.neuron.levels;
      i64 count = 0;
      while (count < levels && total >= (count + 1) * n_) ++count;
      evidence.steps += levels;
      evidence.spikes += count;
      evidence.ties += total % n_ == 0;
      return {count};
    }
    bool silent = false;
    if (a_.neuron.mode == Mode::offset) {
      for (int i = 0; i < a_.neuron.iterations; ++i) v = shifted(v);
    } else if (a_.neuron.mode == Mode::masked) {
      silent = run(v, a_.neuron.window, nullptr).end <= 0;
    }
    Run r = run(v, a_.steps, a_.neuron.mode == Mode::with_sign ? &sent : nullptr);
    v = r.end;
    if (silent) std::fill(r.spikes.begin(), r.spikes.end(), 0);
    evidence.steps += a_.steps;
    for (const i64 s : r.spikes) evidence.spikes += s != 0;
    for (const i64 before : r.before) evidence.ties += before == n_;
    return r.spikes;
  }

 private:
  struct Run {
    std::vector<i64> spikes, before;    // membranes before their reset
    i64 end;
  };

  static i64 checked(i64 v) {
    if (std::llabs(v) > std::numeric_limits<std::int32_t>::max()) fail("the test's own operands overflow");
    return v;
  }

  i64 held(i64 v) const {
    const bool alone = a_.product_count == 0 && a_.residual_count == 0;
    return checked(alone ? std::clamp(v, -32 * n_, 32 * n_) : v);
  }

  Run run(i64 v, i64 steps, i64* sent) const {
    Run r{{}, {}, v};
    for (i64 t = 0; t < steps; ++t) {
      const i64 before = held(r.end + currents_[static_cast<std::size_t>(t)]);
      i64 s = before >= n_;
      if (sent != nullptr) {
        if (before < 0 && *sent > 0) s = -1;
        *sent += s;
      }
      r.before.push_back(before);
      r.spikes.push_back(s);
      r.end = before - n_ * s;
    }
    return r;
  }

  i64 shifted(i64 v0) const {
    const i64 window = a_.neuron.window;
    const Run r = run(v0, window, nullptr);
    std::vector<i64> fired, silent;
    for (std::size_t t = 0; t < r.spikes.size(); ++t) (r.spikes[t] ? fired : silent).push_back(r.before[t]);
    const i64 left = r.end - v0 + n_ / 2;
    if (left < 0 && !fired.empty()) {
      v0 -= std::max(n_, *std::min_element(fired.begin(), fired.end()) - n_ + 1);
    } else if (left >= n_ && !silent.empty()) {
      v0 += std::max(n_, n_ - *std::max_element(silent.begin(), silent.end()));
    }
    return held(v0);
  }

  const qcfs::ConvIf& a_;
  i64 n_;
  const std::vector<i64>& currents_;
};

// The layer on these currents, neuron by neuron.
inline Answer answer_of(const qcfs::ConvIf& a, const std::vector<i64>& currents, Evidence& evidence) {
  const i64 outputs = a.batch * a.out_h * a.out_w * a.out_channels;
  const bool sum = a.neuron.mode == qcfs::Mode::sum, with_sign = a.neuron.mode == qcfs::Mode::with_sign;
  const i64 planes = sum ? 1 : planes_of(qcfs::Coding::mask, a.steps);
  Answer answer;
  answer.out.resize(static_cast<std::size_t>((with_sign ? 2 : 1) * planes * outputs));
  if (a.state != nullptr) answer.state.resize(static_cast<std::size_t>((with_sign ? 2 : 1) * outputs));
  for (i64 index = 0; index < outputs; ++index) {
    std::vector<i64> own;
    for (i64 t = 0; t < a.steps; ++t) own.push_back(currents[static_cast<std::size_t>(t * outputs + index)]);
    const i64 n = a.threshold[index % a.out_channels];
    i64 v = a.state != nullptr ? a.state[index] : n / 2;
    i64 sent = a.state != nullptr && with_sign ? a.state[outputs + index] : 0;
    const std::vector<i64> spikes = OneNeuron(a, n, own).fire(v, sent, evidence);
    for (i64 t = 0; t < a.steps; ++t) {
      const i64 s = spikes[static_cast<std::size_t>(t)];
      const i64 plane = t / 8 + (s < 0 ? planes : 0);
      std::uint8_t& byte = answer.out[static_cast<std::size_t>(plane * outputs + index)];
      byte = static_cast<std::uint8_t>(sum ? s : byte | (s != 0) << (t % 8));
    }
    if (a.state == nullptr) continue;
    answer.state[static_cast<std::size_t>(index)] = static_cast<std::int32_t>(v);
    if (with_sign) answer.state[static_cast<std::size_t>(outputs + index)] = static_cast<std::int32_t>(sent);
  }
  return answer;
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

// A random layer of any mode and its output. The operands lie in arrays of the test's own kind: Array<T>(count, offset)
// holds `count` zeros and begins `offset` elements past an aligned address, where the kind has a choice.
template <template <typename> class Array>
struct RandomLayer {
  // 0 steps: any T.
  RandomLayer(i64 steps, Evidence& evidence) {
    using qcfs::Mode;
    a.steps = steps;
    if (steps == 0) a.steps = chance(0.3) ? uniform(1, 41) : any_of<i64>({1, 1, 2, 3, 4, 4, 5, 7, 8, 9, 12, 16, 17});
    a.neuron = {any_of({Mode::plain, Mode::plain, Mode::offset, Mode::masked, Mode::with_sign, Mode::sum}), 0, 0, 0};
    if (steps > 1 && a.neuron.mode == Mode::sum) a.neuron.mode = Mode::plain;
    if (a.neuron.mode == Mode::sum) {
      a.steps = 1;
      a.neuron.levels = any_of({1, 4, 15, 255});
    } else if (a.neuron.mode == Mode::offset || a.neuron.mode == Mode::masked) {
      a.neuron.window = static_cast<int>(std::min(a.steps, uniform(1, qcfs::max_window)));
      a.neuron.iterations = a.neuron.mode == Mode::offset ? any_of({1, 1, 2, 3}) : 1;
    }
    // Steps that bound the membranes: offset also looks ahead, and shifts by some thresholds.
    reach = a.steps + (a.neuron.mode == Mode::offset ? a.neuron.iterations * (a.neuron.window + 4) : 0);
    scaling = any_of({Scaling::usual, Scaling::usual, Scaling::signs, Scaling::digits});
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
    const bool alone = a.product_count == 0 && chance(0.4);    // a layer of the image alone
    for (i64 i = alone ? 0 : uniform(a.product_count == 0, 2); i > 0; --i) {
      const qcfs::Coding coding = any_coding();
      const std::uint8_t* data = spikes(coding, outputs(), any_of<i64>({1, 4, 255}));
      residuals.push_back({data, coding, per_unit(a.out_channels, -2000, 4000)});
    }
    a.products = products.data();
    a.residuals = residuals.data();
    a.residual_count = static_cast<int>(residuals.size());
    const bool current_by_step = chance(0.3), bias_by_step = chance(0.2);
    if (current_by_step) a.current_step = outputs();
    if (bias_by_step) a.bias_step = a.out_channels;
    if (alone || chance(0.2)) a.current = per_unit(outputs() * (current_by_step ? a.steps : 1), -600, 3000);
    a.bias = per_unit(a.out_channels * (bias_by_step ? a.steps : 1), -300, 600);
    const std::vector<i64> currents = currents_of(a);
    // Thresholds near the spread of the channel's currents, and for some neurons exactly met: n/2 + I[0] = n.
    const Array<std::int32_t>& threshold = words.emplace_back(a.out_channels);
    a.threshold = threshold.data();
    for (i64 o = 0; o < a.out_channels; ++o) {
      i64 spread = unit;
      for (i64 i = o; i < a.steps * outputs(); i += a.out_channels) {
        spread = std::max(spread, std::abs(currents[static_cast<std::size_t>(i)]));
      }
      i64 n = spread * any_of<i64>({1, 2, 4}) / (alone ? 8 : 2);    // alone, a membrane may reach its limit
      const i64 pixel = uniform(0, outputs() / a.out_channels - 1);
      const i64 first = currents[static_cast<std::size_t>(pixel * a.out_channels + o)];
      if (first > 0 && !alone && chance(0.5)) n = 2 * first;
      threshold[o] = static_cast<std::int32_t>(std::clamp(n / (2 * unit), i64{1}, (i64{1} << 28) / unit) * 2 * unit);
    }
    if ((a.neuron.mode == Mode::plain || a.neuron.mode == Mode::with_sign) && chance(0.3)) add_state();
    want = answer_of(a, currents, evidence);
  }

  i64 out_bytes() const { return static_cast<i64>(want.out.size()); }
  i64 state_words() const { return static_cast<i64>(want.state.size()); }

  // Fails where `got`, of out_bytes(), or `state`, of state_words(), are not the layer's.
  void check(const Array<std::uint8_t>& got, const Array<std::int32_t>& state, const std::string& kernel) const {
    compare(got, want.out, kernel, "byte ");
    compare(state, want.state, kernel, "state ");
  }

  i64 outputs() const { return a.batch * a.out_h * a.out_w * a.out_channels; }

  qcfs::ConvIf a{};    // all but `out` and `state_out`
  bool extreme;
  std::vector<qcfs::Product> products;
  std::vector<qcfs::Residual> residuals;
  Answer want;

 private:
  // Of the products: 256 or 1 as for weights of 8 or 16 bits alone; the same with signs; any, as of longer weights.
  enum class Scaling { usual, signs, digits };

  template <typename T>
  void compare(const Array<T>& got, const std::vector<T>& expected, const std::string& kernel, const char* what) const {
    for (i64 i = 0; i < got.count(); ++i) {
      if (got[i] == expected[static_cast<std::size_t>(i)]) continue;
      std::string shape = ": mode " + std::to_string(static_cast<int>(a.neuron.mode)) + " window " +
                          std::to_string(a.neuron.window) + " T=" + std::to_string(a.steps) +
                          " N=" + std::to_string(a.batch) + " out " + std::to_string(a.out_h) + "x" +
                          std::to_string(a.out_w) + "x" + std::to_string(a.out_channels);
      for (const qcfs::Product& p : products) {
        shape += ", kernel " + std::to_string(p.g.kernel_h) + "x" + std::to_string(p.g.kernel_w) +
                 " C=" + std::to_string(p.x.channels) + " groups " + std::to_string(p.g.groups) +
                 (p.x.coding == qcfs::Coding::count ? " counts, " : " masks, ") + std::to_string(8 * p.weight_bytes) +
                 " bits, scale " + std::to_string(p.scale);
      }
      fail(kernel + shape + ": " + what + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
           std::to_string(expected[static_cast<std::size_t>(i)]));
    }
  }

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

  // Membranes within a threshold, and a few spikes already sent.
  void add_state() {
    const i64 rows = a.neuron.mode == qcfs::Mode::with_sign ? 2 : 1;
    const Array<std::int32_t>& state = words.emplace_back(rows * outputs());
    for (i64 i = 0; i < state.count(); ++i) {
      const i64 n = a.threshold[i % a.out_channels];
      state[i] = static_cast<std::int32_t>(i < outputs() ? uniform(-2, 2) * n / 2 : uniform(0, 3));
    }
    a.state = state.data();
  }

  // The scale of the next product; `room` is the most that it may be.
  std::int32_t next_scale(i64 room) const {
    const std::int32_t sign = scaling != Scaling::usual && chance(0.5) ? -1 : 1;
    if (weight_bytes == 2 || scaling != Scaling::digits) return sign * (weight_bytes == 1 ? 256 : 1);
    i64 size = any_of<i64>({65536, 256, 1});
    if (!products.empty()) size = std::min<i64>(size, std::abs(products.back().scale));
    while (size > std::max(room, i64{1})) size /= 256;
    return sign * static_cast<std::int32_t>(size);
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
    const i64 room = (i64{1} << 30) / (reach * a.product_count * inputs);    // |scale * weight| * input
    const std::int32_t scale = next_scale(room);
    const i64 grid = weight_bytes == 1 ? 1 : unit;    // of weights
    const i64 largest = room / (std::abs(scale) * grid);
    const qcfs::Coding coding = any_coding();
    const i64 value = coding == qcfs::Coding::mask ? 1 : std::clamp(any_of<i64>({1, 4, 64, 255}), i64{1}, largest);
    const i64 top = std::clamp(largest / value, i64{1}, i64{weight_bytes == 2 && unit == 1 ? 32639 : 127});
    const i64 usual = top / any_of<i64>({8, 64}) + 1;
    const std::uint8_t* x = spikes(coding, a.batch * height * width * C, value);
    void* weight = bytes.emplace_back(inputs * a.out_channels * weight_bytes).data();
    for (i64 i = 0; i < inputs * a.out_channels; ++i) {
      const i64 w = extreme ? any_of({top, -top}) : uniform(-usual, usual);
      if (weight_bytes == 1) {
        static_cast<std::int8_t*>(weight)[i] = static_cast<std::int8_t>(w);
      } else {
        static_cast<std::int16_t*>(weight)[i] = static_cast<std::int16_t>(w * grid);
      }
    }
    products.push_back({{x, coding, height, width, C}, weight, weight_bytes, scale, g});
  }

  int weight_bytes;
  Scaling scaling;
  i64 reach;
  i64 unit;    // of weights, amplitudes, biases, currents; half of the thresholds'
  double rate;
  std::deque<Array<std::uint8_t>> bytes;
  std::deque<Array<std::int32_t>> words;
};

}    // namespace layers
