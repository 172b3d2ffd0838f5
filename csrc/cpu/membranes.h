// Integrate, fire, reset: the last step of every spiking layer.
//
// The membranes of vectors * lanes output channels of one pixel stay in registers over all steps; each step adds one
// current, and every eighth writes a byte of mask to each channel.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// full: every lane holds a channel. Otherwise the last vectors are partial and need memcpy of a variable length, a
// library call before which the compiler spills all live accumulators.
template <class Isa, int vectors, bool full>
struct Membranes {
  static constexpr int lanes = Isa::lanes;

  const ConvIf& a;
  const Neurons& neurons;
  std::int64_t channel;    // first
  std::int64_t width;      // channels that exist, at most vectors * lanes
  std::int64_t index;      // of the first neuron in one plane of the output
  std::int64_t plane;      // bytes of one
  Int<Isa> v[vectors], bits[vectors];
  Int<Isa> spikes[vectors];    // of the first residual, masks of 8 steps

  inline Membranes(const ConvIf& conv, const Neurons& n, std::int64_t first, std::int64_t pixel)
      : a(conv),
        neurons(n),
        channel(first),
        width(smaller(conv.out_channels - first, vectors * lanes)),
        index(pixel * conv.out_channels + first),
        plane(conv.batch * conv.out_h * conv.out_w * conv.out_channels) {
    static_assert(vectors * lanes <= channel_padding, "the operands in Neurons are padded to whole vectors");
    assert(first >= 0 && first < conv.out_channels && (!full || width == vectors * lanes));
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) {
      v[j] = load<Int<Isa>>(neurons.threshold + channel + j * lanes) >> 1;
      bits[j] = Int<Isa>{};
      spikes[j] = Int<Isa>{};
    }
  }

  // How many of `width` channels are in vector j; not positive if none.
  inline std::int64_t channels_in(int j) const { return full ? lanes : smaller(lanes, width - j * lanes); }

  template <typename V, typename T>
  inline V row(const T* p, int j) const {
    const std::int64_t n = channels_in(j);
    if (n >= lanes) return load<V>(p + j * lanes);
    return n > 0 ? load_some<V>(p + j * lanes, n) : V{};
  }

  inline void add_residual(int i, std::int64_t t) {
    const Residual& r = a.residuals[i];
    const std::int32_t* amplitude = neurons.amplitude[i] + channel;
    if (r.coding == Coding::mask) {
      const std::int32_t bit = 1 << (t % 8);
      const bool kept = i == 0 && t % 8 != 0;
      const std::uint8_t* x = r.data + t / 8 * plane + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        const Int<Isa> s = kept ? spikes[j] : __builtin_convertvector((row<LaneBytes<Isa>>(x, j)), Int<Isa>);
        if (i == 0) spikes[j] = s;
        v[j] += ((s & bit) != 0) & load<Int<Isa>>(amplitude + j * lanes);
      }
    } else {
      const std::uint8_t* x = r.data + t * plane + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        const Int<Isa> counts = __builtin_convertvector((row<LaneBytes<Isa>>(x, j)), Int<Isa>);
        v[j] += counts * load<Int<Isa>>(amplitude + j * lanes);
      }
    }
  }

  inline void step(std::int64_t t, const Int<Isa> (&current)[vectors]) {
    const std::int32_t bit = 1 << (t % 8);
    for (int i = 0; i < a.residual_count; ++i) add_residual(i, t);
    if (a.current != nullptr) {
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) v[j] += row<Int<Isa>>(a.current + index, j);
    }
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const Int<Isa> n = load<Int<Isa>>(neurons.threshold + channel + j * lanes);
      v[j] += current[j] + load<Int<Isa>>(neurons.bias + channel + j * lanes);
      const Int<Isa> spike = v[j] >= n;
      v[j] -= spike & n;
      bits[j] |= spike & bit;
    }
    if (t % 8 == 7 || t + 1 == a.steps) {
      std::uint8_t* out = a.out + (t / 8) * plane + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        const LaneBytes<Isa> bytes = __builtin_convertvector(bits[j], LaneBytes<Isa>);
        const std::int64_t n = channels_in(j);
        if (n >= lanes) {
          store(out + j * lanes, bytes);
        } else if (n > 0) {
          __builtin_memcpy(out + j * lanes, &bytes, static_cast<std::size_t>(n));
        }
        bits[j] = Int<Isa>{};
      }
    }
  }
};

}    // namespace
}    // namespace qcfs::cpu
