// The native API of qcfs_fast: plain pointers and sizes, no torch, no Python.
//
// One spiking layer, per output neuron, for t = 0 .. T-1, all in 32-bit integers:
//
//     I[t] = scale * sum over products p, taps, inputs k of  w_p[k] * x_p[k, t]
//            + sum over residuals r of  amplitude_r[c] * x_r[t]
//            + current + bias[c]
//     v[-1] = n[c] / 2        v = v + I[t]
//     s[t]  = v >= n[c]       v = v - n[c] * s[t]          (soft reset, at most one spike a step)
//
// with scale = 1 for int16 weights and 256 for int8 weights, so both widths share one unit grid.
// Whoever builds the operands guarantees n/2 + T * max|I| < 2^31: nothing here can overflow, so the
// order of the additions is free and every implementation returns the same bytes.
//
// Layouts (C order):
//     spike masks   uint8 [ceil(T/8), N, H, W, C]   bit t%8 of plane t/8 is the spike at step t
//     count planes  uint8 [T, N, H, W, C]           small integers per step (sums over a pooling window)
//     weights       int16 or int8 [KH, KW, C/groups, O]   one row holds all outputs of one input
//     analog input  int16 [N, H, W, C] with one binary exponent per sample: x = q * 2^e
//
// Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking
// Neural Networks", ICLR 2022, section 4 (quantization clip-floor-shift) and its IF neuron.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qcfs {

enum class Status : int { ok = 0, out_of_memory, not_finite, too_many_sources };

// Sources of one spiking layer, at most.
constexpr int max_products = 64;
constexpr int max_residuals = 64;

enum class Coding : int { mask = 0, count = 1 };

// A spike tensor [planes, N, H, W, C], dense. Consecutive planes lie N*H*W*C bytes apart; N is ConvIf::batch.
struct Spikes {
  const std::uint8_t* data;
  Coding coding;
  std::int64_t height, width, channels;
};

struct Geometry {
  std::int64_t kernel_h, kernel_w;
  std::int64_t stride_h, stride_w;
  std::int64_t pad_h, pad_w;
  std::int64_t dilation_h, dilation_w;
  std::int64_t groups;
};

struct Product {
  Spikes x;
  const void* weight;    // [KH, KW, C/groups, O]
  int weight_bytes;      // 1: int8, worth 256 units a step; 2: int16
  Geometry g;
  const void* packed = nullptr;    // the weights repacked for the engine that will run (cpu.h), or null
};

struct Residual {
  const std::uint8_t* data;    // [planes, N, OH, OW, O]
  Coding coding;
  const std::int32_t* amplitude;    // [O]
};

struct ConvIf {
  std::int64_t batch, out_h, out_w, out_channels, steps;
  const Product* products;
  int product_count;
  const Residual* residuals;
  int residual_count;
  const std::int32_t* current;      // [N, OH, OW, O] or null: the same at every step
  const std::int32_t* bias;         // [O]
  const std::int32_t* threshold;    // [O], even
  std::uint8_t* out;                // masks [ceil(T/8), N, OH, OW, O]
};

// Convolution of the analog input: current = clamp(rint(acc * (gain[c] * 2^e[n]) + offset[c]), low[c], high[c])
// with acc = sum w*q exact and the rest in IEEE double without contraction. With `steps` > 0 the
// integrate-and-fire recursion on that constant current follows and `out_mask` is written,
// otherwise `out_current`.
struct AnalogConv {
  std::int64_t batch, in_h, in_w, in_channels, out_h, out_w, out_channels, steps;
  const std::int16_t* x;           // [N, H, W, C]
  const std::int32_t* exponent;    // [N]
  const std::int16_t* weight;      // [KH, KW, C/groups, O]
  Geometry g;
  const double* gain;               // [O]
  const double* offset;             // [O]
  const std::int32_t* low;          // [O]
  const std::int32_t* high;         // [O]
  const std::int32_t* threshold;    // [O]; used when steps > 0
  std::uint8_t* out_mask;           // [ceil(T/8), N, OH, OW, O]
  std::int32_t* out_current;        // [N, OH, OW, O]
  const void* packed = nullptr;     // CPU only: the weights repacked for its kernels (cpu.h)
};

// Constant current -> masks: the recursion above with I[t] = current.
struct Encode {
  std::int64_t pixels, channels, steps;
  const std::int32_t* current;      // [pixels, C]
  const std::int32_t* threshold;    // [C]
  std::uint8_t* out;                // [ceil(T/8), pixels, C]
};

// Window sums. Output row i covers input rows [rows[3i], rows[3i+1]) and divides by rows[3i+2];
// columns alike. value = sum * (multiple / (row divisor * column divisor)); multiple = 0 takes the bare
// sum. With `any` set the planes are masks and the result is their OR (max pooling of spikes).
struct Pool {
  std::int64_t batch, in_h, in_w, channels, out_h, out_w, steps;
  Coding coding;
  bool any;
  const std::int64_t* rows;    // [out_h, 3]
  const std::int64_t* cols;    // [out_w, 3]
  std::int64_t multiple;
  const std::uint8_t* x;
  std::uint8_t* out;    // counts [T, N, OH, OW, C] or, with `any`, masks
};

struct PoolCounts {
  std::int64_t images, in_h, in_w, channels, out_h, out_w;
  const std::int64_t* rows;
  const std::int64_t* cols;
  std::int64_t multiple;
  const std::int32_t* x;    // [images, H, W, C]
  std::int32_t* out;        // [images, OH, OW, C]
};

// Spikes -> spikes counted over time: [1, n] totals or, with `prefix`, [T, n] running counts.
struct Count {
  std::int64_t elements, steps;
  Coding coding;
  bool prefix;
  const std::uint8_t* x;
  std::int32_t* out;
};

// Last layer, linear, on counts: out = sum over terms of (sum over taps and inputs of w * count) * gain[c] / divisor
// + offset[c], in double, with divisor = steps * multiple.
struct ReadoutTerm {
  const std::int32_t* counts;    // [images, H, W, C]
  std::int64_t height, width, channels;
  const std::int16_t* weight;    // [KH, KW, C/groups, O], or null: identity (H, W, C are those of the output)
  Geometry g;
  const double* gain;       // [O]
  std::int64_t multiple;    // divisor of the pool before it
};

struct Readout {
  std::int64_t images, samples, out_h, out_w, out_channels;
  std::int64_t steps;    // image i belongs to step: images == samples ? steps : i / samples + 1
  const ReadoutTerm* terms;
  int term_count;
  const double* offset;    // [O]
  float* out;              // [images, OH, OW, O]
};

// float32 [N, C, H, W] (any strides) -> int16 NHWC and exponents; x' = x * scale[c] + shift[c], channel c
// of the result reads channel source[c] of x. The exponent is the smallest e with max|x'| <= 32767 * 2^e.
struct Quantize {
  std::int64_t batch, height, width, channels;
  const float* x;
  std::int64_t stride_n, stride_c, stride_h, stride_w;
  const std::int64_t* source;    // [C]
  const float* scale;            // [C]
  const float* shift;            // [C]
  std::int16_t* out;             // [N, H, W, C]
  std::int32_t* exponent;        // [N]
};

}    // namespace qcfs
