// Integrate, fire, reset: the last step of every spiking layer, in every mode of the neuron (contract.h).
//
// The membranes of vectors * lanes output channels of one pixel stay in registers over all steps; each step adds one
// current, and every eighth writes a byte of mask to each channel. Offset and masked neurons first run over the steps
// of their window, on the same currents: an engine gives the sums of a step as often as it is asked.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/contract.h"
#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// A sum of products, times its scale. Modulo 2^32: the total fits, its parts alone may not.
template <class Isa>
inline Int<Isa> scaled(Int<Isa> sum, std::int32_t scale) {
  Unsigned<Isa> x = reinterpret_cast<const Unsigned<Isa>&>(sum);
  x = scale == 256 ? x << 8 : x * static_cast<std::uint32_t>(scale);    // a shift is faster
  return reinterpret_cast<const Int<Isa>&>(x);
}

template <class Isa>
inline Int<Isa> wrapped_sum(Int<Isa> a, Int<Isa> b) {
  const Unsigned<Isa> x = reinterpret_cast<const Unsigned<Isa>&>(a) + reinterpret_cast<const Unsigned<Isa>&>(b);
  return reinterpret_cast<const Int<Isa>&>(x);
}

template <class Isa>
inline Int<Isa> select(Int<Isa> mask, Int<Isa> yes, Int<Isa> no) {
  return mask ? yes : no;
}

// a + b where `mask` is set, else a: one instruction where registers of masks exist, which are on vectors of 16 lanes.
template <class Isa>
inline Int<Isa> add_where(Int<Isa> mask, Int<Isa> a, Int<Isa> b) {
  return Isa::lanes == 16 ? select<Isa>(mask, a + b, a) : a + (mask & b);
}

// What offset neurons keep of a first run: the least and the largest membrane before reset, less the threshold, as
// integers without sign. Those of steps that fired begin at 0, all others lie above them: so the least is of a step
// that fired if any did, the largest of one that did not.
template <class Isa>
struct FirstRun {
  Unsigned<Isa> least = ~Unsigned<Isa>{}, largest{};

  inline void see(Int<Isa> above_threshold) {
    const Unsigned<Isa> u = reinterpret_cast<const Unsigned<Isa>&>(above_threshold);
    least = u < least ? u : least;
    largest = u > largest ? u : largest;
  }

  // The initial potential that mends it, of a run from v0 with threshold n that ends `residual` above v0 - n / 2.
  inline Int<Isa> mended(Int<Isa> v0, Int<Isa> residual, Int<Isa> n) const {
    const Int<Isa> fired = reinterpret_cast<const Int<Isa>&>(least),
                   silent = reinterpret_cast<const Int<Isa>&>(largest);
    const Int<Isa> many = (residual < 0) & (fired >= 0), few = (residual >= n) & (silent < 0);
    const Int<Isa> fewer = fired + 1, more = -silent;
    return v0 - (many & select<Isa>(fewer > n, fewer, n)) + (few & select<Isa>(more > n, more, n));
  }
};

// The first `present` elements, at most a vector's, the rest zero; not positive if there are none.
template <typename V, typename T>
inline V load_present(const T* p, std::int64_t present) {
  if (present * static_cast<std::int64_t>(sizeof(T)) >= static_cast<std::int64_t>(sizeof(V))) return load<V>(p);
  return present > 0 ? load_some<V>(p, present) : V{};
}

template <typename V, typename T>
inline void store_present(T* p, V value, std::int64_t present) {
  if (present * static_cast<std::int64_t>(sizeof(T)) >= static_cast<std::int64_t>(sizeof(V))) return store(p, value);
  if (present > 0) __builtin_memcpy(p, &value, static_cast<std::size_t>(present) * sizeof(T));
}

// full: every lane holds a channel. Otherwise the last vectors are partial and need memcpy of a variable length, a
// library call before which the compiler spills all live accumulators.
template <class Isa, int vectors, bool full>
struct Membranes {
  static constexpr int lanes = Isa::lanes;
  using Vector = Int<Isa>;
  using Vectors = Vector[vectors];

  const ConvIf& a;
  const Neurons& neurons;
  std::int64_t channel;    // first
  std::int64_t width;      // channels that exist, at most vectors * lanes
  std::int64_t index;      // of the first neuron in one plane of the output
  std::int64_t plane;      // neurons of one
  bool held;               // within image_membrane thresholds
  Vectors v;
  Vectors residual_bytes;    // of the first residual, masks of 8 steps

  inline Membranes(const ConvIf& conv, const Neurons& n, std::int64_t first, std::int64_t pixel)
      : a(conv),
        neurons(n),
        channel(first),
        width(smaller(conv.out_channels - first, vectors * lanes)),
        index(pixel * conv.out_channels + first),
        plane(conv.batch * conv.out_h * conv.out_w * conv.out_channels),
        held(image_alone(conv)) {
    static_assert(vectors * lanes <= channel_padding, "the operands in Neurons are padded to whole vectors");
    assert(first >= 0 && first < conv.out_channels && (!full || width == vectors * lanes));
  }

  // All steps of these neurons. products(t, sums) sets the sums of step t over the layer's products.
  template <typename Products>
  inline void run(const Products& products) {
    if (a.state == nullptr) {
      start();
    } else {
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) v[j] = row<Vector>(a.state + index, j);
    }
    if (a.neuron.mode != Mode::plain) {
      run_other(products);
    } else {
      fire(products);
    }
    if (a.state_out != nullptr) {
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) store_row(a.state_out + index, j, v[j]);
    }
  }

 private:
  // How many of `width` channels are in vector j; not positive if none.
  inline std::int64_t channels_in(int j) const { return full ? lanes : smaller(lanes, width - j * lanes); }

  template <typename V, typename T>
  inline V row(const T* p, int j) const {
    return load_present<V>(p + j * lanes, channels_in(j));
  }

  inline Vector bytes(const std::uint8_t* p, int j) const {
    const std::int64_t n = channels_in(j);
    return n > 0 ? widen<Isa>(p + j * lanes, n) : Vector{};
  }

  template <typename V, typename T>
  inline void store_row(T* p, int j, V value) const {
    store_present(p + j * lanes, value, channels_in(j));
  }

  inline Vector threshold(int j) const { return load<Vector>(neurons.threshold + channel + j * lanes); }

  inline void start() {
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) v[j] = threshold(j) >> 1;
  }

  inline void add_residual(int i, std::int64_t t, Vectors& current) {
    const Residual& r = a.residuals[i];
    const std::int32_t* amplitude = neurons.amplitude[i] + channel;
    if (r.coding == Coding::mask) {
      const std::int32_t bit = 1 << (t % 8);
      const bool kept = i == 0 && t % 8 != 0;
      const std::uint8_t* x = r.data + t / 8 * plane + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        const Vector s = kept ? residual_bytes[j] : bytes(x, j);
        if (i == 0) residual_bytes[j] = s;
        current[j] += ((s & bit) != 0) & load<Vector>(amplitude + j * lanes);
      }
    } else {
      const std::uint8_t* x = r.data + t * plane + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        const Vector counts = bytes(x, j);
        current[j] += counts * load<Vector>(amplitude + j * lanes);
      }
    }
  }

  // All that step t integrates. Totals (sum mode) hold bias and the image's current once for each level.
  template <bool totals = false, typename Products>
  __attribute__((always_inline)) inline void integrate(const Products& products, std::int64_t t, Vectors& current) {
    products(t, current);
    for (int i = 0; i < a.residual_count; ++i) add_residual(i, t, current);
    const std::int32_t levels = totals ? a.neuron.levels : 1;
    if (a.current != nullptr) {
      const std::int32_t* image = a.current + t * a.current_step + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) current[j] += row<Vector>(image, j) * levels;
    }
    const std::int32_t* bias = neurons.bias + t * neurons.bias_step + channel;
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) current[j] += load<Vector>(bias + j * lanes) * levels;
  }

  // A layer of the image alone holds its membranes within a number of thresholds.
  inline void hold(Vectors& membranes) const {
    if (!held) return;
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const Vector limit = threshold(j) * image_membrane;
      membranes[j] = select<Isa>(membranes[j] > limit, limit, membranes[j]);
      membranes[j] = select<Isa>(membranes[j] < -limit, -limit, membranes[j]);
    }
  }

  inline void store_bytes(std::uint8_t* out, const Vectors& values) const {
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const std::int64_t n = channels_in(j);
      if (n > 0) cpu::store_bytes<Isa>(out + index + j * lanes, values[j], n);
    }
  }

  // The plain neuron over all steps, from v. `keep`, where given, masks its spikes.
  template <typename Products>
  __attribute__((always_inline)) inline void fire(const Products& products, const Vectors* keep = nullptr) {
    const std::int64_t steps = a.steps;
    Vectors bits{};
    for (std::int64_t t = 0; t < steps; ++t) {
      Vectors current;
      integrate(products, t, current);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) v[j] += current[j];
      hold(v);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        const Vector n = threshold(j), spike = v[j] >= n;
        v[j] -= spike & n;
        bits[j] |= spike & (1 << (t % 8));
      }
      if (t % 8 != 7 && t + 1 != steps) continue;
      for (int j = 0; keep != nullptr && j < vectors; ++j) bits[j] &= (*keep)[j];
      store_bytes(a.out + t / 8 * plane, bits);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) bits[j] = Vector{};
    }
  }

  template <typename Products>
  __attribute__((noinline)) void run_other(const Products& products) {
    switch (a.neuron.mode) {
      case Mode::plain:
        break;
      case Mode::offset:
        for (int i = 0; i < a.neuron.iterations; ++i) shift(products);
        fire(products);
        break;
      case Mode::masked: {
        for (std::int64_t t = 0; t < a.neuron.window; ++t) first_step(products, t, [](int, Vector) {});
        Vectors keep;
        for (int j = 0; j < vectors; ++j) keep[j] = v[j] > 0;
        start();
        fire(products, &keep);
        break;
      }
      case Mode::with_sign:
        fire_with_sign(products);
        break;
      case Mode::sum:
        count(products);
        break;
    }
  }

  // A step of a first run; of vector j see(j, membranes before reset less the threshold).
  template <typename Products, typename See>
  inline void first_step(const Products& products, std::int64_t t, const See& see) {
    Vectors current;
    integrate(products, t, current);
    for (int j = 0; j < vectors; ++j) v[j] += current[j];
    hold(v);
    for (int j = 0; j < vectors; ++j) {
      const Vector above = v[j] - threshold(j);
      see(j, above);
      v[j] = select<Isa>(above >= 0, above, v[j]);
    }
  }

  // Offset: from the first run to the initial potential that mends it.
  template <typename Products>
  inline void shift(const Products& products) {
    Vectors v0;
    FirstRun<Isa> run[vectors];
    for (int j = 0; j < vectors; ++j) v0[j] = v[j];
    for (std::int64_t t = 0; t < a.neuron.window; ++t) {
      first_step(products, t, [&](int j, Vector above) { run[j].see(above); });
    }
    for (int j = 0; j < vectors; ++j) {
      const Vector n = threshold(j);
      v[j] = run[j].mended(v0[j], v[j] - v0[j] + (n >> 1), n);
    }
    hold(v);
  }

  template <typename Products>
  inline void fire_with_sign(const Products& products) {
    Vectors sent{}, bits{}, negative{};
    for (int j = 0; a.state != nullptr && j < vectors; ++j) sent[j] = row<Vector>(a.state + plane + index, j);
    const std::int64_t planes = ceil_div(a.steps, 8);
    for (std::int64_t t = 0; t < a.steps; ++t) {
      Vectors current;
      integrate(products, t, current);
      for (int j = 0; j < vectors; ++j) v[j] += current[j];
      hold(v);
      for (int j = 0; j < vectors; ++j) {
        const Vector n = threshold(j), up = v[j] >= n, down = (v[j] < 0) & (sent[j] > 0);
        v[j] += (down & n) - (up & n);
        sent[j] += down - up;
        bits[j] |= up & (1 << (t % 8));
        negative[j] |= down & (1 << (t % 8));
      }
      if (t % 8 != 7 && t + 1 != a.steps) continue;
      store_bytes(a.out + t / 8 * plane, bits);
      store_bytes(a.out + (planes + t / 8) * plane, negative);
      for (int j = 0; j < vectors; ++j) bits[j] = negative[j] = Vector{};
    }
    for (int j = 0; a.state_out != nullptr && j < vectors; ++j) store_row(a.state_out + plane + index, j, sent[j]);
  }

  // Sum: as many spikes as there are thresholds in the membrane, one after the other.
  template <typename Products>
  inline void count(const Products& products) {
    Vectors current, counts{};
    integrate<true>(products, 0, current);
    for (int j = 0; j < vectors; ++j) v[j] += current[j];
    for (int k = 0; k < a.neuron.levels; ++k) {
      for (int j = 0; j < vectors; ++j) {
        const Vector n = threshold(j), spike = v[j] >= n;
        v[j] -= spike & n;
        counts[j] -= spike;
      }
    }
    store_bytes(a.out, counts);
  }
};

// Most layers: neurons that integrate products, a bias and at most one residual of masks, and are plain, or offset by
// one iteration. Plain ones may go on from a state; others start from n / 2.
static inline bool is_simple(const ConvIf& a) {
  const bool stateful = a.state != nullptr || a.state_out != nullptr;
  const bool offset = a.neuron.mode == Mode::offset && a.neuron.iterations == 1 && !stateful;
  return (a.neuron.mode == Mode::plain || offset) && a.residual_count <= 1 &&
         (a.residual_count == 0 || a.residuals[0].coding == Coding::mask) && a.current == nullptr && a.bias_step == 0 &&
         !image_alone(a);
}

enum class Simple { plain, stateful, offset };

// Their neurons, as Membranes would run them one pixel at a time; here what all pixels share stays in registers.
template <class Isa, int vectors, bool full, bool residual, Simple kind, typename Products>
inline void run_simple(const ConvIf& a, const Neurons& neurons, std::int64_t channel, std::int64_t pixel,
                       std::int64_t pixels, const Products& products) {
  constexpr int lanes = Isa::lanes;
  constexpr bool offset = kind == Simple::offset, stateful = kind == Simple::stateful;
  using Vectors = Int<Isa>[vectors];
  const std::int64_t steps = a.steps, channels = a.out_channels, width = channels - channel;
  const std::int64_t plane = a.batch * a.out_h * a.out_w * channels;
  const std::int64_t window = offset ? a.neuron.window : 0;
  const auto present = [&](int j) { return full ? lanes : smaller(lanes, larger(0, width - j * lanes)); };
  Vectors n, bias, amplitude;
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) {
    n[j] = load<Int<Isa>>(neurons.threshold + channel + j * lanes);
    bias[j] = load<Int<Isa>>(neurons.bias + channel + j * lanes);
    if (residual) amplitude[j] = load<Int<Isa>>(neurons.amplitude[0] + channel + j * lanes);
  }
  for (std::int64_t i = 0; i < pixels; ++i) {
    const std::int64_t index = (pixel + i) * channels + channel;
    Vectors v, other;
    Vectors kept[max_window];    // what the steps of the window integrate: the second run takes it from here
    const auto read_residual = [&](std::int64_t t) {
      QCFS_UNROLL
      for (int j = 0; residual && j < vectors; ++j) {
        const std::uint8_t* in = a.residuals[0].data + t / 8 * plane + index + j * lanes;
        other[j] = present(j) > 0 ? widen<Isa>(in, present(j)) : Int<Isa>{};
      }
    };
    const auto integrate = [&](std::int64_t t, Int<Isa> bit) __attribute__((always_inline)) {
      Vectors current;
      products(i, t, current);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        current[j] += bias[j];
        if (residual) current[j] = add_where<Isa>((other[j] & bit) != 0, current[j], amplitude[j]);
        if (offset && t < window) kept[t][j] = current[j];
        v[j] += current[j];
      }
    };
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) {
      v[j] = n[j] >> 1;
      if (stateful && a.state != nullptr) v[j] = load_present<Int<Isa>>(a.state + index + j * lanes, present(j));
    }
    if (offset) {    // v less the threshold in the first run
      FirstRun<Isa> run[vectors];
      Int<Isa> bit = Int<Isa>{} + 1;
      read_residual(0);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) v[j] -= n[j];
      for (std::int64_t t = 0; t < window; ++t, bit += bit) {
        integrate(t, bit);
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) {
          run[j].see(v[j]);
          v[j] = add_where<Isa>(v[j] >= 0, v[j], -n[j]);
        }
      }
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) v[j] = run[j].mended(n[j] >> 1, v[j] + n[j], n[j]);
    }
    for (std::int64_t t = 0; t < steps;) {
      read_residual(t);
      std::uint8_t* masks = a.out + t / 8 * plane + index;
      Vectors bits = {};
      Int<Isa> bit = Int<Isa>{} + 1;
      for (const std::int64_t end = smaller(steps, t + 8); t < end; ++t, bit += bit) {
        const bool known = offset && t < window;
        if (!known) integrate(t, bit);
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) {
          if (known) v[j] += kept[t][j];
          const Int<Isa> spike = v[j] >= n[j];
          v[j] = add_where<Isa>(spike, v[j], -n[j]);
          bits[j] = add_where<Isa>(spike, bits[j], bit);
        }
      }
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        if (present(j) > 0) store_bytes<Isa>(masks + j * lanes, bits[j], present(j));
      }
    }
    if (stateful && a.state_out != nullptr) {
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) store_present(a.state_out + index + j * lanes, v[j], present(j));
    }
  }
}

// Asks for the membranes that a stream keeps, ahead of the products: they lie in memory, and what is between two of
// them is too much for the processor to see what comes.
inline void prefetch_state(const ConvIf& a, std::int64_t channel, std::int64_t channels, std::int64_t pixel,
                           std::int64_t pixels) {
  if (a.state_out == nullptr) return;
  constexpr std::int64_t line = cache_line / static_cast<std::int64_t>(sizeof(std::int32_t));
  for (std::int64_t i = pixel; i < pixel + pixels; ++i) {
    for (std::int64_t c = channel; c < channel + channels; c += line) {
      __builtin_prefetch(a.state_out + i * a.out_channels + c, 1);
    }
  }
}

// The neurons of `pixels` neighbouring pixels, from `pixel`. products(i, t, sums) sets those of step t of the i-th.
template <class Isa, int vectors, bool full, typename Products>
inline void run_pixels(const ConvIf& a, const Neurons& neurons, std::int64_t channel, std::int64_t pixel,
                       std::int64_t pixels, const Products& products) {
  if (is_simple(a)) {
    const auto run = [&](auto kind) {
      constexpr Simple k = decltype(kind)::value;
      const auto run_kind = a.residual_count > 0 ? run_simple<Isa, vectors, full, true, k, Products>
                                                 : run_simple<Isa, vectors, full, false, k, Products>;
      run_kind(a, neurons, channel, pixel, pixels, products);
    };
    if (a.neuron.mode == Mode::offset) return run(std::integral_constant<Simple, Simple::offset>{});
    if (a.state != nullptr || a.state_out != nullptr) return run(std::integral_constant<Simple, Simple::stateful>{});
    return run(std::integral_constant<Simple, Simple::plain>{});
  }
  for (std::int64_t i = 0; i < pixels; ++i) {
    Membranes<Isa, vectors, full> membranes(a, neurons, channel, pixel + i);
    membranes.run([&](std::int64_t t, Int<Isa>(&current)[vectors]) { products(i, t, current); });
  }
}

}    // namespace
}    // namespace qcfs::cpu
