// The end of a layer: from currents to mask bytes, in the modes of the contract.
//
//     fire_pair        two neighbouring channels of a simple layer: plain neurons, or counts in sum mode, on products,
//                      a bias and at most one residual
//                          v += I[t]     s[t] = v >= n     v -= n * s[t]
//     end_neuron       any neuron, with any operands. Offset and masked neurons run over the same currents again. A
//                      window is no longer than the first launch, so later launches only go on from what it left.
//
// Nearly all layers are simple. Theirs are four instructions for a step of a neuron, six with a residual. Exact:
// integers.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"
#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/parameters.h"

namespace qcfs::cuda {

// One access for `width` neighbouring values, of 2 or 4.
QCFS_DEVICE void load_values(std::int32_t (&to)[2], const std::int32_t* from) {
  const int2 v = *reinterpret_cast<const int2*>(from);
  to[0] = v.x;
  to[1] = v.y;
}

template <int width>
QCFS_DEVICE void store_values(std::int32_t* to, const std::int32_t (&from)[width]) {
  static_assert(width == 2 || width == 4, "one access");
  if constexpr (width == 4) {
    *reinterpret_cast<int4*>(to) = int4{from[0], from[1], from[2], from[3]};
  } else {
    *reinterpret_cast<int2*>(to) = int2{from[0], from[1]};
  }
}

// `width` bytes in a word, the first one lowest.
template <int width>
QCFS_DEVICE std::uint32_t load_bytes(const std::uint8_t* from) {
  static_assert(width == 2 || width == 4, "one access");
  if constexpr (width == 4) return *reinterpret_cast<const std::uint32_t*>(from);
  return *reinterpret_cast<const std::uint16_t*>(from);
}

template <int width>
QCFS_DEVICE void store_bytes(std::uint8_t* to, std::uint32_t bytes) {
  static_assert(width == 2 || width == 4, "one access");
  if constexpr (width == 4) {
    *reinterpret_cast<std::uint32_t*>(to) = bytes;
  } else {
    *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(bytes);
  }
}

// The count of a neuron in sum mode: floor((current + n / 2) / n), from 0 to `levels`.
QCFS_DEVICE std::uint32_t count_spikes(std::int32_t current, std::int32_t n, std::int32_t levels) {
  const std::int32_t v = n / 2 + current;
  if (v < 0) return 0;
  const std::uint32_t count = static_cast<std::uint32_t>(v) / static_cast<std::uint32_t>(n);
  return count < static_cast<std::uint32_t>(levels) ? count : static_cast<std::uint32_t>(levels);
}

// What a simple layer has for two neighbouring channels at every pixel, the first one `o`.
struct ChannelPair {
  std::int32_t n[2], bias[2], amplitude[2];    // threshold; amplitude of the residual

  QCFS_DEVICE ChannelPair(const LayerParams& p, std::int32_t o) {
    load_values(n, p.threshold + o);
    load_values(bias, p.bias + o);
    amplitude[0] = amplitude[1] = 0;
    if (p.residual_count > 0) load_values(amplitude, p.residuals[0].amplitude + o);
  }
};

// Ends both neurons, the first of which is `index` = pixel * O + o. `residual` are their two bytes of it, the first one
// low. Returns their bytes likewise. `has_state`: membranes come from a launch before, or go on to another.
template <int T, bool has_residual, bool has_state>
QCFS_DEVICE std::uint32_t fire_pair(const LayerParams& p, const ChannelPair& c, std::int64_t index,
                                    std::uint32_t residual, const std::int32_t (&currents)[T][2]) {
  std::uint32_t bits = 0;
  if constexpr (T == 1) {
    if (p.mode == Mode::sum) {
      QCFS_UNROLL
      for (int k = 0; k < 2; ++k) {
        std::int32_t current = wrapping_add(currents[0][k], c.bias[k] * p.levels);
        if (has_residual) {
          current = wrapping_add(current, c.amplitude[k] * static_cast<std::int32_t>(residual >> 8 * k & 0xff));
        }
        bits |= count_spikes(current, c.n[k], p.levels) << 8 * k;
      }
      return bits;
    }
  }
  std::int32_t v[2] = {c.n[0] / 2, c.n[1] / 2};
  if (has_state && p.state_in != nullptr) load_values(v, p.state_in + index);
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    QCFS_UNROLL
    for (int k = 0; k < 2; ++k) {
      const std::uint32_t bit = 1u << (8 * k + t);
      v[k] = wrapping_add(v[k], wrapping_add(currents[t][k], c.bias[k]));
      if (has_residual) add_where(v[k], c.amplitude[k], residual, bit);
      fire_into(bits, bit, v[k], c.n[k]);
    }
  }
  if (has_state && p.state_out != nullptr) store_values<2>(p.state_out + index, v);
  return bits & ((1u << p.steps) - 1) * 0x101u;    // nothing of steps that the launch does not have
}

// Adds an operand [.., O], `from` at this neuron, `step` values from one step to the next.
template <int T>
QCFS_DEVICE void add_operand(const std::int32_t* from, std::int64_t step, std::int32_t steps,
                             std::int32_t (&currents)[T]) {
  std::int32_t value = *from;
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    if (step != 0 && t > 0 && t < steps) value = from[t * step];
    currents[t] = wrapping_add(currents[t], value);
  }
}

// All that a neuron integrates beside the products, whose sums `currents` hold; those of steps that the launch does not
// have are ignored. `index` = pixel * O + o. In sum mode everything that is the same at every step counts `levels`
// times.
template <int T>
QCFS_DEVICE void add_sources(const LayerParams& p, std::int64_t index, std::int32_t o, std::int32_t (&currents)[T]) {
  if (T == 1 && p.mode == Mode::sum) {
    const std::int32_t constant = p.current == nullptr ? p.bias[o] : p.bias[o] + p.current[index];
    currents[0] = wrapping_add(currents[0], constant * p.levels);
  } else {
    add_operand<T>(p.bias + o, p.bias_step, p.steps, currents);
    if (p.current != nullptr) add_operand<T>(p.current + index, p.current_step, p.steps, currents);
  }
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  QCFS_ROLLED
  for (std::int32_t i = 0; i < p.residual_count; ++i) {
    const ResidualParams& r = p.residuals[i];
    const std::int32_t amplitude = r.amplitude[o];
    std::uint32_t byte = r.data[index];
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      if (r.count && t > 0 && t < p.steps) byte = r.data[t * plane + index];
      const std::int32_t spikes = static_cast<std::int32_t>(r.count ? byte : byte >> t & 1);
      currents[t] = wrapping_add(currents[t], amplitude * spikes);
    }
  }
}

// One neuron and all that it integrates in a launch.
template <int T>
struct Integrator {
  std::int32_t n;
  std::int32_t steps;
  std::int32_t limit;    // of the membrane, on both sides
  std::int32_t current[T];

  QCFS_DEVICE std::int32_t hold(std::int32_t v) const { return v > limit ? limit : v < -limit ? -limit : v; }

  // Plain steps from v, the first `count` of them; see(membrane before reset, spike). Returns the bits of the spikes.
  template <typename See>
  QCFS_DEVICE std::uint32_t run(std::int32_t& v, std::int32_t count, See&& see) const {
    std::uint32_t bits = 0;
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      if (t >= count) break;
      const std::int32_t before = hold(v + current[t]);
      v = before;
      const std::int32_t spike = fire(v, 0, n);
      see(before, spike);
      bits |= static_cast<std::uint32_t>(spike) << t;
    }
    return bits;
  }
  QCFS_DEVICE std::uint32_t run(std::int32_t& v, std::int32_t count) const {
    return run(v, count, [](std::int32_t, std::int32_t) {});
  }

  // Offset: the initial potential that mends what a first run from v0 gets wrong.
  QCFS_DEVICE std::int32_t shifted(std::int32_t v0, std::int32_t window) const {
    std::int32_t v = v0, spikes = 0, least = INT32_MAX, largest = INT32_MIN;
    run(v, window, [&](std::int32_t before, std::int32_t spike) {
      spikes += spike;
      if (spike && before < least) least = before;
      if (!spike && before > largest) largest = before;
    });
    const std::int32_t left = v - v0 + n / 2;
    if (left < 0 && spikes > 0) {
      const std::int32_t fewer = least - n + 1;
      return hold(v0 - (fewer > n ? fewer : n));
    }
    if (left >= n && spikes < window) {
      const std::int32_t more = n - largest;
      return hold(v0 + (more > n ? more : n));
    }
    return v0;
  }

  // Signed: the bits of the positive spikes, and those of the negative ones 8 bits higher.
  QCFS_DEVICE std::uint32_t run_with_sign(std::int32_t& v, std::int32_t& sent) const {
    std::uint32_t bits = 0;
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      if (t >= steps) break;
      v = hold(v + current[t]);
      const std::int32_t down = v < 0 && sent > 0, up = fire(v, 0, n);
      v += down ? n : 0;
      sent += up - down;
      bits |= static_cast<std::uint32_t>(up | down << 8) << t;
    }
    return bits;
  }
};

// Ends one neuron in any mode; operands as in add_sources. Returns its byte of `out`.
template <int T>
QCFS_DEVICE std::uint8_t end_neuron(const LayerParams& p, std::int64_t index, std::int32_t o,
                                    std::int32_t (&currents)[T]) {
  add_sources<T>(p, index, o, currents);
  Integrator<T> neuron;
  neuron.n = p.threshold[o];
  if (T == 1 && p.mode == Mode::sum) {
    return static_cast<std::uint8_t>(count_spikes(currents[0], neuron.n, p.levels));
  }
  neuron.steps = p.steps;
  neuron.limit = p.held ? image_membrane * neuron.n : INT32_MAX;
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) neuron.current[t] = currents[t];

  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  const bool first = p.state_in == nullptr;
  std::int32_t v = first ? neuron.n / 2 : p.state_in[index];
  std::int32_t more = 0;    // `sent` of signed neurons; whether masked ones may fire
  if (!first && (p.mode == Mode::with_sign || p.mode == Mode::masked)) more = p.state_in[plane + index];
  if (first && p.mode == Mode::offset) {
    QCFS_ROLLED
    for (std::int32_t i = 0; i < p.iterations; ++i) v = neuron.shifted(v, p.window);
  }
  if (first && p.mode == Mode::masked) {
    std::int32_t end = v;
    neuron.run(end, p.window);
    more = end > 0;
  }
  std::uint32_t bits = 0;
  if (p.mode == Mode::with_sign) {
    bits = neuron.run_with_sign(v, more);
    p.negative[index] = static_cast<std::uint8_t>(bits >> 8);
  } else {
    bits = neuron.run(v, p.steps);
    if (p.mode == Mode::masked && more == 0) bits = 0;
  }
  if (p.state_out != nullptr) {
    p.state_out[index] = v;
    if (p.mode == Mode::with_sign || p.mode == Mode::masked) p.state_out[plane + index] = more;
  }
  return static_cast<std::uint8_t>(bits);
}

constexpr int epilogue_threads = 128;

// The epilogue as a kernel of its own, one thread a neuron: adds the partial sums of a split K (none in a layer without
// products), then ends the layer.
template <int T>
__global__ void __launch_bounds__(epilogue_threads, 4) epilogue_kernel(const __grid_constant__ LayerParams p) {
  wait_for_launch_before();
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * epilogue_threads + threadIdx.x;
  if (index >= plane) return;
  std::int32_t acc[T];
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    acc[t] = 0;
    if (t < p.steps) {
      for (std::int32_t i = 0; i < p.slices; ++i)
        acc[t] = wrapping_add(acc[t], p.partial[(i * p.steps + t) * plane + index]);
    }
  }
  p.out[index] = end_neuron<T>(p, index, static_cast<std::int32_t>(index % p.out_channels), acc);
}

template <int T>
int launch_epilogue(const LayerParams& p, const Launch& launch) {
  const Grid grid{ceil_div(static_cast<std::int64_t>(p.pixels) * p.out_channels, epilogue_threads)};
  return launch_kernel(epilogue_kernel<T>, grid, epilogue_threads, 0, launch.stream, p, after_launch_before(launch));
}

}    // namespace qcfs::cuda
