// Pooling, counting, the readout and the quantisation of the image: small work, cut by rows.
#pragma once

#include <cassert>
#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// ------------------------------------------------------------------------- pooling and counting

// Sums, ORs or takes the largest of up to one register of channels over a window; step t of masks, or counts as they
// are.
template <class Isa>
inline Bytes<Isa> window(const Pool& a, const std::uint8_t* x, const std::int64_t* h, const std::int64_t* w,
                         std::int64_t width, bool masks, int t) {
  Words<Isa> sum{};
  for (std::int64_t r = h[0]; r < h[1]; ++r) {
    const std::uint8_t* p = x + (r * a.in_w + w[0]) * a.channels;
    for (std::int64_t c = w[0]; c < w[1]; ++c, p += a.channels) {
      const Words<Isa> v =
          width == register_bytes<Isa> ? load<Words<Isa>>(p) : (Words<Isa>)load_some<Bytes<Isa>>(p, width);
      if (a.pooling == Pooling::any) {
        sum |= v;
      } else if (a.pooling == Pooling::largest) {
        const Bytes<Isa> x = (Bytes<Isa>)v, before = (Bytes<Isa>)sum, above = (Bytes<Isa>)(x > before);
        sum = (Words<Isa>)((above & x) | (~above & before));
      } else if (masks) {
        sum = (Words<Isa>)((Bytes<Isa>)sum + (Bytes<Isa>)(v >> t & 0x0101));
      } else {
        sum = (Words<Isa>)((Bytes<Isa>)sum + (Bytes<Isa>)v);
      }
    }
  }
  return (Bytes<Isa>)sum;
}

// Rows are numbered over input planes, samples and output rows together; an input plane of masks gives up to eight
// planes of counts.
template <class Isa>
void pool(const Pool& a, std::int64_t row0, std::int64_t row1) {
  const std::int64_t C = a.channels, plane = a.batch * a.in_h * a.in_w * C;
  const std::int64_t out_plane = a.batch * a.out_h * a.out_w * C;
  const bool masks = a.coding == Coding::mask && a.pooling == Pooling::sum;
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t row = i % a.out_h, image = i / a.out_h;
    const std::int64_t in_plane = image / a.batch, sample = image % a.batch;
    const std::int64_t t0 = masks ? 8 * in_plane : in_plane;
    const int steps = masks ? static_cast<int>(smaller(8, a.steps - t0)) : 1;
    const std::int64_t* h = a.rows + 3 * row;
    const std::uint8_t* x = a.x + in_plane * plane + sample * a.in_h * a.in_w * C;
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t* w = a.cols + 3 * col;
      assert(a.multiple == 0 || a.multiple % (h[2] * w[2]) == 0);
      const std::uint8_t factor = a.multiple == 0 ? 1 : static_cast<std::uint8_t>(a.multiple / (h[2] * w[2]));
      std::uint8_t* out = a.out + t0 * out_plane + ((sample * a.out_h + row) * a.out_w + col) * C;
      for (std::int64_t c = 0; c < C; c += register_bytes<Isa>) {
        const std::int64_t width = smaller(register_bytes<Isa>, C - c);
        for (int t = 0; t < steps; ++t) {
          Bytes<Isa> sum = window<Isa>(a, x + c, h, w, width, masks, t);
          if (factor != 1) sum *= factor;
          __builtin_memcpy(out + t * out_plane + c, &sum, static_cast<std::size_t>(width));
        }
      }
    }
  }
}

inline void pool_counts(const PoolCounts& a, std::int64_t row0, std::int64_t row1) {
  const std::int64_t C = a.channels;
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t row = i % a.out_h, image = i / a.out_h;
    const std::int64_t* h = a.rows + 3 * row;
    const std::int32_t* x = a.x + image * a.in_h * a.in_w * C;
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t* w = a.cols + 3 * col;
      const std::int32_t factor = a.multiple == 0 ? 1 : static_cast<std::int32_t>(a.multiple / (h[2] * w[2]));
      std::int32_t* out = a.out + (i * a.out_w + col) * C;
      for (std::int64_t c = 0; c < C; ++c) out[c] = 0;
      for (std::int64_t r = h[0]; r < h[1]; ++r) {
        for (std::int64_t k = w[0]; k < w[1]; ++k) {
          const std::int32_t* p = x + (r * a.in_w + k) * C;
          for (std::int64_t c = 0; c < C; ++c) out[c] += p[c];
        }
      }
      for (std::int64_t c = 0; c < C; ++c) out[c] *= factor;
    }
  }
}

inline void count(const Count& a, std::int64_t element0, std::int64_t element1) {
  constexpr int block = 64;
  for (std::int64_t e0 = element0; e0 < element1; e0 += block) {
    const int width = static_cast<int>(smaller(block, element1 - e0));
    std::int32_t sum[block] = {};
    for (std::int64_t t = a.first; t < a.last; ++t) {
      if (a.coding == Coding::mask) {
        const std::uint8_t* x = a.x + (t / 8) * a.elements + e0;
        for (int k = 0; k < width; ++k) sum[k] += (x[k] >> (t % 8)) & 1;
      } else {
        const std::uint8_t* x = a.x + t * a.elements + e0;
        for (int k = 0; k < width; ++k) sum[k] += x[k];
      }
      if (a.prefix || t + 1 == a.last) {
        std::int32_t* out = a.out + (a.prefix ? (t - a.first) * a.elements : 0) + e0;
        for (int k = 0; k < width; ++k) out[k] = sum[k];
      }
    }
  }
}

// --------------------------------------------------------------------------------------- readout

inline void add_counts(const Readout& a, const ReadoutTerm& term, std::int64_t image, std::int64_t row,
                       std::int64_t col, double* acc) {
  const Geometry& g = term.g;
  const std::int64_t O = a.out_channels, C = term.channels;
  const std::int64_t group_in = C / g.groups, group_out = O / g.groups;
  for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= term.height) continue;
    for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const std::int64_t c = col * g.stride_w - g.pad_w + kw * g.dilation_w;
      if (c < 0 || c >= term.width) continue;
      const std::int32_t* x = term.counts + ((image * term.height + r) * term.width + c) * C;
      const std::int16_t* tap = term.weight + (kh * g.kernel_w + kw) * group_in * O;
      for (std::int64_t k = 0; k < C; ++k) {
        if (x[k] == 0) continue;
        const double value = x[k];
        const std::int16_t* w = tap + (k % group_in) * O;
        const std::int64_t first = k / group_in * group_out;
        for (std::int64_t o = first; o < first + group_out; ++o) acc[o] += w[o] * value;
      }
    }
  }
}

inline void readout(const Readout& a, std::int64_t row0, std::int64_t row1, double* workspace) {
  const std::int64_t O = a.out_channels;
  double* sum = workspace;
  double* acc = workspace + O;
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t row = i % a.out_h, image = i / a.out_h;
    const std::int64_t steps = a.images == a.samples ? a.steps : image / a.samples + 1;
    for (std::int64_t col = 0; col < a.out_w; ++col) {
      const std::int64_t index = (i * a.out_w + col) * O;
      for (std::int64_t o = 0; o < O; ++o) sum[o] = 0;
      for (int k = 0; k < a.term_count; ++k) {
        const ReadoutTerm& term = a.terms[k];
        if (term.weight == nullptr) {
          for (std::int64_t o = 0; o < O; ++o) acc[o] = term.counts[index + o];
        } else {
          for (std::int64_t o = 0; o < O; ++o) acc[o] = 0;
          add_counts(a, term, image, row, col, acc);
        }
        const double divisor = static_cast<double>(steps) * static_cast<double>(term.multiple);
        for (std::int64_t o = 0; o < O; ++o) sum[o] += acc[o] * term.gain[o] / divisor;
      }
      for (std::int64_t o = 0; o < O; ++o) a.out[index + o] = static_cast<float>(sum[o] + a.offset[o]);
    }
  }
}

// ----------------------------------------------------------------------------------- quantization

inline float transformed(const Quantize& a, const float* x, std::int64_t c) {
  const float scaled = x[0] * a.scale[c];    // float32 steps, as PyTorch would take them
  return scaled + a.shift[c];
}

// Magnitudes of floats order like their bits, NaN and infinity last.
inline std::int32_t largest(const Quantize& a, std::int64_t sample, std::int64_t row0, std::int64_t row1) {
  std::int32_t found = 0;
  for (std::int64_t c = 0; c < a.channels; ++c) {
    for (std::int64_t h = row0; h < row1; ++h) {
      const float* p = a.x + sample * a.stride_n + a.source[c] * a.stride_c + h * a.stride_h;
      for (std::int64_t w = 0; w < a.width; ++w) {
        const float z = transformed(a, p + w * a.stride_w, c);
        std::int32_t bits;
        __builtin_memcpy(&bits, &z, sizeof(bits));
        bits &= 0x7fffffff;
        found = bits > found ? bits : found;
      }
    }
  }
  return found;
}

inline void quantize(const Quantize& a, std::int64_t sample, std::int64_t row0, std::int64_t row1) {
  const double scale = __builtin_ldexp(1.0, -a.exponent[sample]);
  for (std::int64_t h = row0; h < row1; ++h) {
    std::int32_t* out = a.out + (sample * a.height + h) * a.width * a.channels;
    for (std::int64_t c = 0; c < a.channels; ++c) {
      const float* p = a.x + sample * a.stride_n + a.source[c] * a.stride_c + h * a.stride_h;
      for (std::int64_t w = 0; w < a.width; ++w) {
        const double z = static_cast<double>(transformed(a, p + w * a.stride_w, c)) * scale;
        out[w * a.channels + c] = to_grid(z, -a.largest, a.largest);
      }
    }
  }
}

}    // namespace
}    // namespace qcfs::cpu
