// Vectors of `lanes` int32 and the last step of every layer. Included, like its neighbours, once for each instruction
// set inside that file's unnamed namespace; hence no include guard and no includes.

using Unsigned = std::uint32_t __attribute__((vector_size(4 * lanes)));
using Byte = std::uint8_t __attribute__((vector_size(lanes)));
using Narrow8 = std::int8_t __attribute__((vector_size(lanes)));
using Narrow16 = std::int16_t __attribute__((vector_size(2 * lanes)));

#if defined(__clang__)
#define QCFS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define QCFS_UNROLL _Pragma("GCC unroll 64")
#endif

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// Aligned or not; the first `count` elements, the rest zero.
template <typename V, typename T>
inline V load_some(const T* p, std::int64_t count) {
  V v{};
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(T));
  return v;
}

template <typename V, typename T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Weights as int32, the first `count` of a vector.
inline Int widen(const std::int8_t* w, std::int64_t count = lanes) {
  return __builtin_convertvector(count == lanes ? load<Narrow8>(w) : load_some<Narrow8>(w, count), Int);
}

inline Int widen(const std::int16_t* w, std::int64_t count = lanes) {
  return __builtin_convertvector(count == lanes ? load<Narrow16>(w) : load_some<Narrow16>(w, count), Int);
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// -------------------------------------------------------------------------- integrate, fire, reset
//
// The membranes of `vectors * lanes` output channels of one pixel, in registers over all steps; each step adds one
// current and every eighth writes a byte of mask.

// With `full` all vectors * lanes channels exist; else some may not, and rows are read and written in part, which costs
// calls in the middle of the registers' life.
template <int vectors, bool full>
struct Membranes {
  const ConvIf& a;
  const Neurons& neurons;
  std::int64_t channel;    // first
  std::int64_t width;      // channels that exist, at most vectors * lanes
  std::int64_t index;      // of the first neuron in one plane of the output
  std::int64_t plane;
  Int v[vectors], bits[vectors];
  Int spikes[vectors];    // of the first residual, masks of 8 steps

  inline Membranes(const ConvIf& conv, const Neurons& n, std::int64_t first, std::int64_t pixel)
      : a(conv),
        neurons(n),
        channel(first),
        width(smaller(conv.out_channels - first, vectors * lanes)),
        index(pixel * conv.out_channels + first),
        plane(conv.batch * conv.out_h * conv.out_w * conv.out_channels) {
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) {
      v[j] = load<Int>(neurons.threshold + channel + j * lanes) >> 1;
      bits[j] = Int{};
      spikes[j] = Int{};
    }
  }

  // Elements that vector j of a row of `width` channels holds.
  inline std::int64_t held(int j) const { return full ? lanes : smaller(lanes, width - j * lanes); }

  template <typename V, typename T>
  inline V row(const T* p, int j) const {
    const std::int64_t n = held(j);
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
        const Int s = kept ? spikes[j] : __builtin_convertvector((row<Byte>(x, j)), Int);
        if (i == 0) spikes[j] = s;
        v[j] += ((s & bit) != 0) & load<Int>(amplitude + j * lanes);
      }
    } else {
      const std::uint8_t* x = r.data + t * plane + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        v[j] += __builtin_convertvector((row<Byte>(x, j)), Int) * load<Int>(amplitude + j * lanes);
      }
    }
  }

  inline void step(std::int64_t t, const Int (&current)[vectors]) {
    const std::int32_t bit = 1 << (t % 8);
    for (int i = 0; i < a.residual_count; ++i) add_residual(i, t);
    if (a.current != nullptr) {
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) v[j] += row<Int>(a.current + index, j);
    }
    QCFS_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const Int n = load<Int>(neurons.threshold + channel + j * lanes);
      v[j] += current[j] + load<Int>(neurons.bias + channel + j * lanes);
      const Int spike = v[j] >= n;
      v[j] -= spike & n;
      bits[j] |= spike & bit;
    }
    if (t % 8 == 7 || t + 1 == a.steps) {
      std::uint8_t* out = a.out + (t / 8) * plane + index;
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        const Byte bytes = __builtin_convertvector(bits[j], Byte);
        const std::int64_t n = held(j);
        if (n >= lanes) {
          store(out + j * lanes, bytes);
        } else if (n > 0) {
          __builtin_memcpy(out + j * lanes, &bytes, static_cast<std::size_t>(n));
        }
        bits[j] = Int{};
      }
    }
  }
};
