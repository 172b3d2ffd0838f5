// The end of the first layer, for both of its kernels: from the exact sum of an output to its current, and to the
// current's encoding where that is asked for.
//
//     z = acc * (gain[c] * 2^e[n]) + offset[c]      double, each operation rounded to nearest, never fused
//     I = clamp(rint(z), low[c], high[c])           halves to even
//     v[-1] = n/2;  v += I;  s[t] = v >= n;  v -= n * s[t]
//
// A thread ends four neighbouring channels, the last of a layer perhaps fewer. It stores them in one access where that
// is aligned, else one by one.
#pragma once

#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"
#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"

namespace qcfs::cuda {

struct ImageChannels {
  std::int32_t first;
  std::int32_t count;    // 1 .. 4; the others repeat the last one, and are not stored
  bool aligned;          // to a quad in the result
  double gain[4], offset[4];
  std::int32_t low[4], high[4], threshold[4];
};

QCFS_DEVICE ImageChannels image_channels(const AnalogConv& a, std::int32_t first, std::int32_t count, bool aligned) {
  ImageChannels c;
  c.first = first;
  c.count = count < 4 ? count : 4;
  c.aligned = aligned;
  const std::int32_t* const threshold = a.steps > 0 ? a.threshold : a.high;    // without steps none is used
  QCFS_UNROLL
  for (int j = 0; j < 4; ++j) {
    const std::int32_t o = first + (j < c.count ? j : c.count - 1);
    c.gain[j] = a.gain[o];
    c.offset[j] = a.offset[o];
    c.low[j] = a.low[o];
    c.high[j] = a.high[o];
    c.threshold[j] = threshold[o];
  }
  return c;
}

// Rounding and clamping commute, as the limits are whole, and what is beyond int32 is beyond them too. Clamping
// integers takes the fewest double operations: some GPUs do two of these a cycle.
QCFS_DEVICE std::int32_t image_current(std::int64_t acc, double scale, double offset, std::int32_t low,
                                       std::int32_t high) {
  const std::int32_t current = round_to_int(add_rn(mul_rn(static_cast<double>(acc), scale), offset));
  const std::int32_t raised = current < low ? low : current;
  return raised > high ? high : raised;
}

// One pixel, whose sample has this power of two.
QCFS_DEVICE void end_image(const AnalogConv& a, const ImageChannels& c, std::int64_t pixel,
                           const std::int64_t (&acc)[4], double power) {
  std::int32_t current[4], v[4];
  QCFS_UNROLL
  for (int j = 0; j < 4; ++j) {
    current[j] = image_current(acc[j], mul_rn(c.gain[j], power), c.offset[j], c.low[j], c.high[j]);
    v[j] = c.threshold[j] / 2;
  }
  const std::int64_t index = pixel * a.out_channels + c.first;
  if (a.steps == 0) {
    if (c.aligned) {
      store_values<4>(a.out_current + index, current);
    } else {
      QCFS_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (j < c.count) a.out_current[index + j] = current[j];
      }
    }
    return;
  }
  const std::int64_t plane = a.batch * a.out_h * a.out_w * a.out_channels;
  std::uint8_t* out = a.out_mask + index;
  QCFS_ROLLED
  for (std::int32_t left = static_cast<std::int32_t>(a.steps); left > 0; left -= 8, out += plane) {
    const std::int32_t steps = left < 8 ? left : 8;
    std::uint32_t bits = 0;    // a step enters at the top of each byte
    QCFS_ROLLED
    for (std::int32_t t = 0; t < steps; ++t) {
      bits >>= 1;
      QCFS_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (fire(v[j], current[j], c.threshold[j])) bits |= 0x80u << (8 * j);
      }
    }
    bits >>= 8 - steps;
    if (c.aligned) {
      store_bytes<4>(out, bits);
    } else {
      QCFS_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (j < c.count) out[j] = static_cast<std::uint8_t>(bits >> (8 * j));
      }
    }
  }
}

}    // namespace qcfs::cuda
