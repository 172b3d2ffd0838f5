// The end of a layer: from currents to mask bytes.
//
//     integrate_and_fire   a spiking layer: adds residuals, bias and constant current, then for the launch's steps
//                              v += I[t]     s[t] = v >= n     v -= n * s[t]
//     encode_current       the same recursion on a current that is the same at every step, v[-1] = n/2
//     image_epilogue       the first layer, whose result is either the current itself or its encoding
//
// A thread ends `width` neighbouring channels of one pixel: 4 where every operand [.., O] may be accessed so (one
// 16-byte access of int32, one 4-byte access of masks), else 1. Exact: integers.
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
  static_assert(width == 1 || width == 4, "one access");
  if constexpr (width == 4) {
    const int4 v = *reinterpret_cast<const int4*>(from);
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  } else {
    to[0] = *from;
  }
}

template <int width>
QCFS_DEVICE void store_values(std::int32_t* to, const std::int32_t (&from)[width]) {
  static_assert(width == 1 || width == 4, "one access");
  if constexpr (width == 4) {
    *reinterpret_cast<int4*>(to) = int4{from[0], from[1], from[2], from[3]};
  } else {
    *to = from[0];
  }
}

// `width` bytes in a word, the first one lowest.
template <int width>
QCFS_DEVICE std::uint32_t load_bytes(const std::uint8_t* from) {
  if constexpr (width == 4) return *reinterpret_cast<const std::uint32_t*>(from);
  return *from;
}

template <int width>
QCFS_DEVICE void store_bytes(std::uint8_t* to, std::uint32_t bytes) {
  if constexpr (width == 4) {
    *reinterpret_cast<std::uint32_t*>(to) = bytes;
  } else {
    *to = static_cast<std::uint8_t>(bytes);
  }
}

// Ends `width` neighbouring output neurons, the first of which is `index` = pixel * O + o. `currents` hold the sums
// over the products; those of steps that the launch does not have are ignored. Returns the mask bytes, the first one
// lowest.
template <int T, int width>
QCFS_DEVICE std::uint32_t integrate_and_fire(const LayerParams& p, std::int64_t index, std::int32_t o,
                                             std::int32_t (&currents)[T][width]) {
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  std::int32_t constant[width], n[width], v[width];
  load_values<width>(constant, p.bias + o);
  load_values<width>(n, p.threshold + o);
  if (p.current != nullptr) {
    std::int32_t current[width];
    load_values<width>(current, p.current + index);
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) constant[j] += current[j];
  }
  QCFS_ROLLED
  for (std::int32_t i = 0; i < p.residual_count; ++i) {
    const ResidualParams& r = p.residuals[i];
    std::int32_t amplitude[width];
    load_values<width>(amplitude, r.amplitude + o);
    std::uint32_t bytes = load_bytes<width>(r.data + index);
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      if (r.count && t > 0 && t < p.steps) bytes = load_bytes<width>(r.data + t * plane + index);
      QCFS_UNROLL
      for (int j = 0; j < width; ++j) {
        const std::uint32_t byte = bytes >> (8 * j) & 0xff;
        currents[t][j] += amplitude[j] * static_cast<std::int32_t>(r.count ? byte : byte >> t & 1);
      }
    }
  }
  if (p.membrane_in != nullptr) {
    load_values<width>(v, p.membrane_in + index);
  } else {
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) v[j] = n[j] / 2;
  }
  std::uint32_t bits = 0;
  QCFS_UNROLL
  for (int t = 0; t < T; ++t) {
    if (t >= p.steps) break;
    QCFS_UNROLL
    for (int j = 0; j < width; ++j) {
      bits |= static_cast<std::uint32_t>(fire(v[j], currents[t][j] + constant[j], n[j])) << (8 * j + t);
    }
  }
  if (p.membrane_out != nullptr) store_values<width>(p.membrane_out + index, v);
  return bits;
}

constexpr int epilogue_threads = 128;

// The epilogue as a kernel of its own, one thread a neuron: adds the partial sums of a split K (none in a layer without
// products), then ends the layer.
template <int T>
__global__ void __launch_bounds__(epilogue_threads, 4) epilogue_kernel(const __grid_constant__ LayerParams p) {
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
  const std::int32_t o = static_cast<std::int32_t>(index % p.out_channels);
  p.out[index] = static_cast<std::uint8_t>(integrate_and_fire<T, 1>(p, index, o, acc));
}

template <int T>
int launch_epilogue(const LayerParams& p, void* stream) {
  const Grid grid{ceil_div(static_cast<std::int64_t>(p.pixels) * p.out_channels, epilogue_threads)};
  return launch_kernel(epilogue_kernel<T>, grid, epilogue_threads, 0, stream, p);
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
