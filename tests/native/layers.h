// What the native tests share: random draws, the contract of a spiking layer in plain loops over 64-bit integers, and
// the evidence that a test was not void.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

}    // namespace layers
