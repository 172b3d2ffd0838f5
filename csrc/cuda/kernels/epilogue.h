// The end of a layer: from currents to mask bytes, in the modes of the contract.
//
//     integrate_and_fire   the plain neuron and sum mode: adds residuals, bias and the image's current, then for the
//                          launch's steps
//                              v += I[t]     s[t] = v >= n     v -= n * s[t]
//     end_neuron           any mode, one neuron. Offset and masked neurons run over the same currents again. A window
//                          is no longer than the first launch, so later launches only go on from what it left.
//     encode_current       the plain recursion on a current that is the same at every step, v[-1] = n/2
//     image_epilogue       the first layer, whose result is either the current itself or its encoding
//
// A thread ends `width` neighbouring channels of one pixel: of plain neurons 2, as an accumulator fragment has them,
// where every operand [.., O] may be accessed so (8 bytes of int32, 2 of masks), else 1. In the image's layer it is 4.
// Exact: integers.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"
#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/parameters.h"

namespace qcfs::cuda {

template <int width>
QCFS_DEVICE void load_values(std::int32_t (&to)[width], const std::int32_t* from) {
  static_assert(width == 1 || width == 2 || width == 4, "one access");
  if constexpr (width == 4) {
    const int4 v = *reinterpret_cast<const int4*>(from);
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  } else if constexpr (width == 2) {
    const int2 v = *reinterpret_cast<const int2*>(from);
    to[0] = v.x;
    to[1] = v.y;
  } else {
    to[0] = *from;
  }
}

template <int width>
QCFS_DEVICE void store_values(std::int32_t* to, const std::int32_t (&from)[width]) {
  static_assert(width == 1 || width == 2 || width == 4, "one access");
  if constexpr (width == 4) {
    *reinterpret_cast<int4*>(to) = int4{from[0], from[1], from[2], from[3]};
  } else if constexpr (width == 2) {
    *reinterpret_cast<int2*>(to) = int2{from[0], from[1]};
  } else {
    *to = from[0];
  }
}

// `width` bytes in a word, the first one lowest.
template <int width>
QCFS_DEVICE std::uint32_t load_bytes(const std::uint8_t* from) {
  if constexpr (width == 4) return *reinterpret_cast<const std::uint32_t*>(from);
  if constexpr (width == 2) return *reinterpret_cast<const std::uint16_t*>(from);
  return *from;
}

template <int width>
QCFS_DEVICE void store_bytes(std::uint8_t* to, std::uint32_t bytes) {
  if constexpr (width == 4) {
    *reinterpret_cast<std::uint32_t*>(to) = bytes;
  } else if constexpr (width == 2) {
    *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(bytes);
  } else {
    *to = static_cast<std::uint8_t>(bytes);
  }
}

// Adds an operand [.., O], `from` at the first of these neurons, to what they integrate: to `constant` where it is the
// same at every step, else, `step` values from one step to the next, to `currents`.
template <int T, int width>
QCFS_DEVICE void add_operand(const std::int32_t* from, std::int64_t step, std::int32_t steps,
                             std::int32_t (&constant)[width], std::int32_t (&currents)[T][width]) {
  std::int32_t value[width];
  if (step == 0) {
    load_values<width>(value, from);
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) constant[j] = wrapping_add(constant[j], value[j]);
    return;
  }
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    if (t >= steps) break;
    load_values<width>(value, from + t * step);
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) currents[t][j] = wrapping_add(currents[t][j], value[j]);
  }
}

// What is the same at every pixel of `width` neighbouring channels, the first one `o`.
template <int width>
struct Channels {
  std::int32_t n[width];       // thresholds
  std::int32_t bias[width];    // where it is the same at every step, else 0

  QCFS_DEVICE void load(const LayerParams& p, std::int32_t o) {
    load_values<width>(n, p.threshold + o);
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) bias[j] = 0;
    if (p.bias_step == 0) load_values<width>(bias, p.bias + o);
  }
};

// The bytes of the first residual's first plane, which a caller asks for early.
template <int width>
QCFS_DEVICE std::uint32_t first_residual(const LayerParams& p, std::int64_t index) {
  return p.residual_count > 0 ? load_bytes<width>(p.residuals[0].data + index) : 0;
}

// All that `width` neighbouring neurons integrate: at step t, currents[t] + constant. The first one is `index` =
// pixel * O + o; `residual` are the bytes of first_residual. `currents` hold the sums over the products; those of steps
// that the launch does not have are ignored.
template <int T, int width>
QCFS_DEVICE void add_sources(const LayerParams& p, const Channels<width>& channels, std::int64_t index, std::int32_t o,
                             std::uint32_t residual, std::int32_t (&constant)[width],
                             std::int32_t (&currents)[T][width]) {
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  QCFS_UNROLL
  for (int j = 0; j < width; ++j) constant[j] = channels.bias[j];
  if (p.bias_step != 0) add_operand<T, width>(p.bias + o, p.bias_step, p.steps, constant, currents);
  if (p.current != nullptr) add_operand<T, width>(p.current + index, p.current_step, p.steps, constant, currents);
  QCFS_ROLLED
  for (std::int32_t i = 0; i < p.residual_count; ++i) {
    const ResidualParams& r = p.residuals[i];
    std::int32_t amplitude[width];
    load_values<width>(amplitude, r.amplitude + o);
    std::uint32_t bytes = i == 0 ? residual : load_bytes<width>(r.data + index);
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      if (r.count && t > 0 && t < p.steps) bytes = load_bytes<width>(r.data + t * plane + index);
      QCFS_UNROLL
      for (int j = 0; j < width; ++j) {
        const std::uint32_t byte = bytes >> (8 * j) & 0xff;
        if (r.count) {
          currents[t][j] = wrapping_add(currents[t][j], amplitude[j] * static_cast<std::int32_t>(byte));
        } else if (byte >> t & 1) {
          currents[t][j] = wrapping_add(currents[t][j], amplitude[j]);
        }
      }
    }
  }
}

// The count of a neuron in sum mode: floor((current + n / 2) / n), from 0 to `levels`.
QCFS_DEVICE std::uint32_t count_spikes(std::int32_t current, std::int32_t n, std::int32_t levels) {
  const std::int32_t v = n / 2 + current;
  if (v < 0) return 0;
  const std::uint32_t count = static_cast<std::uint32_t>(v) / static_cast<std::uint32_t>(n);
  return count < static_cast<std::uint32_t>(levels) ? count : static_cast<std::uint32_t>(levels);
}

// Ends `width` neighbouring plain neurons, or neurons in sum mode, whose operands are those of add_sources. Returns
// their bytes, the first one lowest.
template <int T, int width>
QCFS_DEVICE std::uint32_t integrate_and_fire(const LayerParams& p, const Channels<width>& channels, std::int64_t index,
                                             std::int32_t o, std::uint32_t residual,
                                             std::int32_t (&currents)[T][width]) {
  const std::int32_t(&n)[width] = channels.n;
  std::int32_t constant[width], v[width];
  add_sources<T, width>(p, channels, index, o, residual, constant, currents);
  std::uint32_t bits = 0;
  if constexpr (T == 1) {
    if (p.mode == Mode::sum) {
      QCFS_UNROLL
      for (int j = 0; j < width; ++j) {
        bits |= count_spikes(currents[0][j] + constant[j] * p.levels, n[j], p.levels) << (8 * j);
      }
      return bits;
    }
  }
  if (p.state_in != nullptr) {
    load_values<width>(v, p.state_in + index);
  } else {
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) v[j] = n[j] / 2;
  }
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    if (t >= p.steps) break;
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) {
      const std::int32_t current = wrapping_add(currents[t][j], constant[j]);
      if (fire(v[j], current, n[j])) bits |= 1u << (8 * j + t);
    }
  }
  if (p.state_out != nullptr) store_values<width>(p.state_out + index, v);
  return bits;
}

// One neuron and all that it integrates in a launch, for the modes that run over the currents more than once or keep
// more than a membrane, and for membranes that are held within limits.
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
                                    std::int32_t (&currents)[T][1]) {
  Channels<1> channels;
  channels.load(p, o);
  const std::uint32_t residual = first_residual<1>(p, index);
  if (p.mode == Mode::sum || (p.mode == Mode::plain && !p.held)) {
    return static_cast<std::uint8_t>(integrate_and_fire<T, 1>(p, channels, index, o, residual, currents));
  }
  std::int32_t constant[1];
  add_sources<T, 1>(p, channels, index, o, residual, constant, currents);
  Integrator<T> neuron;
  neuron.n = channels.n[0];
  neuron.steps = p.steps;
  neuron.limit = p.held ? image_membrane * neuron.n : INT32_MAX;
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) neuron.current[t] = wrapping_add(currents[t][0], constant[0]);

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
  let_next_launch_begin();
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * epilogue_threads + threadIdx.x;
  if (index >= plane) return;
  std::int32_t acc[T][1];
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    acc[t][0] = 0;
    if (t < p.steps) {
      for (std::int32_t i = 0; i < p.slices; ++i)
        acc[t][0] = wrapping_add(acc[t][0], p.partial[(i * p.steps + t) * plane + index]);
    }
  }
  p.out[index] = end_neuron<T>(p, index, static_cast<std::int32_t>(index % p.out_channels), acc);
}

template <int T>
int launch_epilogue(const LayerParams& p, const Launch& launch) {
  const Grid grid{ceil_div(static_cast<std::int64_t>(p.pixels) * p.out_channels, epilogue_threads)};
  return launch_kernel(epilogue_kernel<T>, grid, epilogue_threads, 0, launch.stream, p,
                       LaunchOptions{1, has_clusters(launch.device)});
}

// All steps of `width` neurons on a constant current. `threshold` is that of the first neuron's channel; its mask byte
// of plane 0 goes to `out`, and planes lie `plane` bytes apart.
template <int width>
QCFS_DEVICE void encode_current(const std::int32_t (&current)[width], const std::int32_t* threshold, std::uint8_t* out,
                                std::int64_t plane, std::int64_t steps) {
  std::int32_t n[width], v[width];
  load_values<width>(n, threshold);
  QCFS_UNROLL
  for (int j = 0; j < width; ++j) v[j] = n[j] / 2;
  std::uint32_t bits = 0;
  for (std::int32_t t = 0; t < steps; ++t) {
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) {
      bits |= static_cast<std::uint32_t>(fire(v[j], current[j], n[j])) << (8 * j + t % 8);
    }
    if (t % 8 == 7 || t + 1 == steps) {
      store_bytes<width>(out + t / 8 * plane, bits);
      bits = 0;
    }
  }
}

// Ends `width` neighbouring channels, from `o` on, of one pixel of the first layer.
template <int width>
QCFS_DEVICE void image_epilogue(const AnalogConv& a, std::int64_t pixel, std::int64_t o,
                                const std::int32_t (&current)[width]) {
  const std::int64_t index = pixel * a.out_channels + o;
  if (a.steps == 0) {
    store_values<width>(a.out_current + index, current);
    return;
  }
  const std::int64_t plane = a.batch * a.out_h * a.out_w * a.out_channels;
  encode_current<width>(current, a.threshold + o, a.out_mask + index, plane, a.steps);
}

}    // namespace qcfs::cuda
