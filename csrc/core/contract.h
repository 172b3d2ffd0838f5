// The native API of qcfs_fast: plain pointers and sizes, no torch, no Python.
//
// One spiking layer, per output neuron, for t = 0 .. T-1, all in 32-bit integers:
//
//     I[t] = sum over products p of scale_p * (sum over taps, inputs k of  w_p[k] * x_p[k, t])
//            + sum over residuals r of  amplitude_r[c] * x_r[t]
//            + current[t] + bias[t, c]
//
//     plain    v = n / 2             at each step   v += I[t]     s[t] = v >= n     v -= n * s[t]      (soft reset)
//
// with n the neuron's threshold, even. The other modes differ in what follows once the currents are known:
//
//     offset   Run the plain neuron over the first `window` steps, from v0 (at first n / 2), and keep:
//                  count   its spikes            A   the least v, before reset, of a step that fired
//                  r = v_end - v0 + n / 2        B   the largest v of a step that did not
//              r < 0 and count > 0          ->  v0 -= max(n, A - n + 1)     one spike too many
//              r >= n and count < window    ->  v0 += max(n, n - B)         one too few
//              and again, `iterations` times in all. The plain run from v0 gives the output.
//     masked   Run the plain neuron over the first `window` steps. If it ends at v <= 0 the neuron is silent at all
//              steps, else the output is that of the plain run.
//     signed   s = +1 if v >= n; -1 if v < 0 and `sent` > 0, the sum of its spikes so far; v -= n * s
//     sum      One step, whose inputs are totals over time, and `levels`:
//              I = products + residuals + levels * (current + bias); the output is the count
//              clip(floor((I + n / 2) / n), 0, levels), which `levels` plain steps give if all of I arrives at the
//              first.
//
// A layer without products and residuals integrates the image's current alone, |current| <= 31 n with n <= 2^25. It
// keeps v, v0 too, within +-32 n: after every addition of a current, and v0 after every shift. Totals (sum) are not
// held.
//
// Scales are +-1, +-256 or +-65536, the largest first. 8-bit weights of scale 256 share one unit grid with 16-bit ones;
// three products of 8-bit digits, scales 65536, 256, 1, are one of 24-bit weights; the negative spikes of a signed
// neuron are a product of the same weights with the opposite scale. Of one layer all weights have one width, and 16-bit
// weights scales of one size.
//
// Whoever builds the operands guarantees that no membrane leaves 32 bits (qcfs_fast/operators/limits.py), so the
// order of the additions is free and every implementation returns the same bytes. Partial sums may wrap: scaled parts
// are added modulo 2^32.
//
// Layouts (C order):
//     spike masks   uint8 [ceil(T/8), N, H, W, C]   bit t%8 of plane t/8 is the spike at step t
//     count planes  uint8 [T, N, H, W, C]           small integers per step (sums over a pooling window)
//     weights       int16 or int8 [KH, KW, C/groups, O]   one row holds all outputs of one input
//     analog input  int32 [N, H, W, C], at most 24 bits with the sign, one binary exponent per sample: x = q * 2^e
//
// Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking
// Neural Networks", ICLR 2022, section 4 (quantization clip-floor-shift) and its IF neuron. Offset: Hao et al.,
// "Bridging the Gap between ANNs and SNNs by Calibrating Offset Spikes", ICLR 2023. Masked: Hao et al., "Reducing
// ANN-SNN Conversion Error through Residual Membrane Potential", AAAI 2023.
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
  int weight_bytes;      // 1: int8; 2: int16
  std::int32_t scale;
  Geometry g;
  const void* packed = nullptr;    // the weights repacked for the engine that will run (cpu.h), or null
};

struct Residual {
  const std::uint8_t* data;    // [planes, N, OH, OW, O]
  Coding coding;
  const std::int32_t* amplitude;    // [O]
};

enum class Mode : int { plain = 0, offset, masked, with_sign, sum };

// The limits of a layer of the image alone, in thresholds (above).
constexpr std::int32_t image_membrane = 32;
// Steps of a window, at most.
constexpr int max_window = 8;

struct Neuron {
  Mode mode;
  int window, iterations;    // offset; masked, one iteration
  int levels;                // sum
};

struct ConvIf {
  std::int64_t batch, out_h, out_w, out_channels, steps;
  Neuron neuron;
  const Product* products;
  int product_count;
  const Residual* residuals;
  int residual_count;
  const std::int32_t* current;    // [N, OH, OW, O], or one for each step [T, N, OH, OW, O], or null
  std::int64_t current_step;      // int32 values from one step's current to the next one's; 0: all steps have the same
  const std::int32_t* bias;       // [O], or one for each step [T, O]
  std::int64_t bias_step;         // likewise
  const std::int32_t* threshold;    // [O], even
  const std::int32_t* state;    // plain and with_sign: [1 or 2, N, OH, OW, O] membranes (and `sent`) before the first
                                // step; null: n / 2 (and 0)
  std::int32_t* state_out;      // likewise after the last step; or null
  std::uint8_t* out;    // masks [ceil(T/8), N, OH, OW, O], with_sign: positive spikes, then negative ones; sum: counts
                        // [1, N, OH, OW, O]
};

// Whether a layer keeps its membranes within +-image_membrane thresholds.
static constexpr bool image_alone(const ConvIf& a) { return a.product_count == 0 && a.residual_count == 0; }

// Convolution of the analog input: current = clamp(rint(acc * (gain[c] * 2^e[n]) + offset[c]), low[c], high[c]),
// high where the two cross,
// with acc = sum w*q exact and the rest in IEEE double without contraction. With `steps` > 0 the
// plain neuron on that constant current follows (low >= 0, high <= n) and `out_mask` is written,
// otherwise `out_current`.
struct AnalogConv {
  std::int64_t batch, in_h, in_w, in_channels, out_h, out_w, out_channels, steps;
  const std::int32_t* x;           // [N, H, W, C]
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

// Window sums. Output row i covers input rows [rows[3i], rows[3i+1]) and divides by rows[3i+2];
// columns alike. value = sum * (multiple / (row divisor * column divisor)); multiple = 0 takes the bare
// sum. Max pooling of spikes takes the OR of the window's masks (any), that of counts the largest.
enum class Pooling : int { sum = 0, any, largest };

struct Pool {
  std::int64_t batch, in_h, in_w, channels, out_h, out_w, steps;
  Coding coding;
  Pooling pooling;
  const std::int64_t* rows;    // [out_h, 3]
  const std::int64_t* cols;    // [out_w, 3]
  std::int64_t multiple;
  const std::uint8_t* x;
  std::uint8_t* out;    // counts [T, N, OH, OW, C] or, of any, masks
};

struct PoolCounts {
  std::int64_t images, in_h, in_w, channels, out_h, out_w;
  const std::int64_t* rows;
  const std::int64_t* cols;
  std::int64_t multiple;
  const std::int32_t* x;    // [images, H, W, C]
  std::int32_t* out;        // [images, OH, OW, C]
};

// Spikes -> spikes counted over steps [first, last): [1, n] totals or, with `prefix`, [last - first, n] running counts.
struct Count {
  std::int64_t elements, steps, first, last;
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

// float32 [N, C, H, W] (any strides) -> int32 NHWC and exponents; x' = x * scale[c] + shift[c], channel c
// of the result reads channel source[c] of x. The exponent is the smallest e with max|x'| <= largest * 2^e.
struct Quantize {
  std::int64_t batch, height, width, channels;
  std::int32_t largest;    // 2^(bits-1) - 1
  const float* x;
  std::int64_t stride_n, stride_c, stride_h, stride_w;
  const std::int64_t* source;    // [C]
  const float* scale;            // [C]
  const float* shift;            // [C]
  std::int32_t* out;             // [N, H, W, C]
  std::int32_t* exponent;        // [N]
};

}    // namespace qcfs
