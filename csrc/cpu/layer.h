// What the plans of both engines ask of a spiking layer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/contract.h"
#include "cpu/layout.h"
#include "cpu/tasks.h"

namespace qcfs::cpu {

// Inputs of one output neuron.
static constexpr std::int64_t kernel_inputs(const Geometry& g, std::int64_t in_channels) {
  return g.kernel_h * g.kernel_w * (in_channels / g.groups);
}

// Elementary operations of a layer, about, at a usual firing rate.
std::int64_t work_of(const ConvIf& a);

// The largest value of a product's input. Masks answer 1 at once, counts are read.
int largest_input(const ConvIf& a, const Product& p);

// A copy of a layer, whose products may be changed; a linear layer becomes a convolution. It is a 1x1 convolution of
// 1x1 maps already. As one image whose rows are the samples, one tile holds many samples and reads a panel of weights
// once for all of them.
struct LinearAsImage {
  explicit LinearAsImage(const ConvIf& from);
  LinearAsImage(const LinearAsImage&) = delete;
  LinearAsImage& operator=(const LinearAsImage&) = delete;

  ConvIf a;
  Product products[max_products];    // those of `a`
};

// At T = 1 masks and counts look alike, and single steps come as counts. Counts that are spikes become masks, whose
// kernels are faster.
void single_step_counts_as_masks(LinearAsImage& layer);

// The input rows that output rows [row0, row1) read.
InputRows input_rows(const Product& p, std::int64_t row0, std::int64_t row1);

// The padded copies of the per-channel operands; zeros for a bias that is null.
Neurons pad_neurons(const ConvIf& a, Arena& arena);

// The limits below, and those in the plans, were tuned on a Zen 5: 48 KiB of first-level and 1 MiB of second-level
// cache a core, 32 MiB of third-level cache.
constexpr std::int64_t max_wave_bytes = 16 << 20;    // lists or planes of a wave; they stay in the third-level cache
constexpr std::int64_t max_waiting_bytes = 256
                                           << 10;    // sums of a tile that wait in the second-level cache for a chunk

// Runs run(wave), a Status, on the waves of a layer until one is not ok. A wave has at most max_wave_bytes, or one row;
// bytes(row0, row1) are those of one sample.
template <typename Bytes, typename Run>
Status run_waves(const ConvIf& a, const Bytes& bytes, const Run& run) {
  std::int64_t samples = 1, rows = a.out_h;
  const std::int64_t sample = bytes(0, a.out_h);
  if (sample <= max_wave_bytes) {
    samples = std::max<std::int64_t>(1, max_wave_bytes / std::max<std::int64_t>(1, sample));
  } else {
    rows = std::max<std::int64_t>(1, a.out_h * max_wave_bytes / sample);
    while (rows > 1 && bytes(0, rows) > max_wave_bytes) --rows;
  }
  for (std::int64_t n = 0; n < a.batch; n += samples) {
    for (std::int64_t r = 0; r < a.out_h; r += rows) {
      const Status s = run({n, std::min(a.batch, n + samples), r, std::min(a.out_h, r + rows)});
      if (s != Status::ok) return s;
    }
  }
  return Status::ok;
}

}    // namespace qcfs::cpu
