// What a plan (events/plan.cpp, dense/plan.cpp) prepares and a kernel reads; and the words for parts of the work.
//
// A spiking layer is, per step, a matrix product with M = output positions, N = output channels and K = inputs under
// the kernel (taps x input channels). Words for a part of it, from large to small:
//
//     M  wave       some samples, or some output rows of one sample: what is listed or expanded at a time, so that
//                   lists and planes stay in a cache. The waves of a layer run one after the other.
//        row span   output rows [row0, row1) of one sample
//        tile       the part of a wave that one task computes: a row span, or some of its columns if rows are wide
//        block      the positions whose sums are in registers together (dense)
//     N  panel      the output channels whose packed weights lie together: 32 or 64 (events: one row of 64 bytes), or
//                   as many as the register block has columns (dense)
//     K  tap        one (kh, kw) of the kernel
//        K-block    one tap of one block of input channels (events)
//        segment    one tap, or a part of a long one (dense)
//        chunk      consecutive K-blocks or segments whose packed weights fit a cache: all positions of a tile pass
//                   one chunk before the next begins
//
//                                       N: output channels
//                                  panel 0     panel 1     panel 2
//                               +-----------+-----------+-----------+
//             K-block, segment  |           |           |           |
//     K: ..   K-block, segment  |  chunk 0  |  chunk 0  |  chunk 0  |
//                               +- - - - - -+- - - - - -+- - - - - -+    packed weights
//             K-block, segment  |           |           |           |
//             K-block, segment  |  chunk 1  |  chunk 1  |  chunk 1  |
//                               +-----------+-----------+-----------+
//
//                               +-----------+-----------+-----------+
//     M: ..   wave 0,  tile 0   |           |           |           |    each task: one tile, one panel or all;
//                      tile 1   |           |           |           |    chunk 0, then chunk 1
//             wave 1,  tile 0   |           |           |           |
//                               +-----------+-----------+-----------+
//
// The words of event lists:
//
//     list          the inputs of one image row that fired at one step
//     position      an entry of a list: the byte offset of an input's weight row inside its chunk, modulo 2^16
//     merged list   what one output pixel adds at one step from one chunk: the parts of the lists under its kernel
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/contract.h"

namespace qcfs::cpu {

// `static`, as every function that kernels call: see kernel_set.h.
static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return ceil_div(n, to) * to; }

// Alignment of workspaces, and of everything that an arena hands out.
constexpr std::int64_t cache_line = 64;

// Bytes that kernels may read (never use) behind the last byte of packed dense weights and planes.
constexpr std::int64_t slack = 256;

// Entries that may be read and written behind the last of an event list.
constexpr std::int64_t list_slack = 128;

// Samples [sample0, sample1) and output rows [row0, row1). With more than one sample a wave holds all rows of each.
struct Wave {
  std::int64_t sample0, sample1, row0, row1;
};

static constexpr std::int64_t samples_of(const Wave& wave) { return wave.sample1 - wave.sample0; }
static constexpr std::int64_t rows_of(const Wave& wave) { return wave.row1 - wave.row0; }

// Output rows [row0, row1) of one sample.
struct RowSpan {
  std::int64_t sample, row0, row1;
};

// The per-channel operands, padded with zeros to a multiple of channel_padding, so that kernels read whole vectors.
constexpr int channel_padding = 64;

struct Neurons {
  const std::int32_t* threshold;
  const std::int32_t* bias;
  std::int64_t bias_step;    // from the bias of a step to that of the next
  const std::int32_t* amplitude[max_residuals];
};

// The input rows of one product that a wave reads.
struct InputRows {
  std::int64_t row0, rows;
};

// ------------------------------------------------------------------------------------------ events

// A row of packed weights: what one input adds to a panel of output channels (64 of 8 bits, 32 of 16 bits).
constexpr int row_bytes = 64;

static constexpr std::int64_t event_panel_channels(int weight_bytes) { return row_bytes / weight_bytes; }

// How the inputs of one product are cut into chunks whose weights stay in the first-level cache. K-blocks are in the
// order (kh, kw, block of channels).
struct EventCut {
  std::int64_t blocks, block_channels;    // blocks of input channels
  std::int64_t k_blocks;                  // of a chunk; the last chunk of a product may have fewer
  std::int64_t chunks;
  std::int64_t rows;    // of weights in a chunk: those of its K-blocks and, last, one of zeros
};

// The lists of the input rows of one product that a wave reads, by row and step.
struct EventLists {
  int same_as;    // an earlier product of the same input and geometry, whose lists these are; or the product itself
  InputRows in;
  EventCut cut;
  // A position already contains column * channels. The inputs under neighbouring taps of one kernel row are then one
  // contiguous part of the list.
  bool positions_span_columns;
  // The chunk holds one K-block, so the input row's list is used directly; nothing is merged.
  bool used_in_place;
  // Upper bound of the input values (1 for masks). The 8-bit kernels use it to know how many products fit a 16-bit sum.
  int largest_input;
  std::int64_t capacity;      // entries of one row, all steps together
  std::uint32_t* start;       // [samples, rows, T, W * blocks + 1]: the entry at which a column's block begins
  std::uint16_t* position;    // [samples, rows, capacity]
  std::uint16_t* value;       // likewise: the input itself; count planes only, else null
};

// What one output pixel adds at one step from one chunk. Filled up with positions of the row of zeros, so that `count`
// is a multiple of four.
struct MergedList {
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t count;
};

// Room for the merged lists of the pixels of one output row.
struct MergedRow {
  MergedList* lists;    // [chunks, columns, T]
  std::uint16_t* position;
  std::uint16_t* value;    // count planes only
};

struct EventLayer {
  const ConvIf* a;
  Neurons neurons;
  Wave wave;
  EventLists lists[max_products];
  std::int64_t chunks;    // of all products
};

// Output rows [row0, row1) and columns [col0, col1) of one sample.
struct EventTile {
  std::int64_t sample, row0, row1, col0, col1;
};

// ------------------------------------------------------------------------------------------- table

// The table of one product (table/fire.h).
struct TableProduct {
  std::int64_t groups;       // of four inputs under one column of the kernel
  std::int64_t row_bytes;    // sums of all outputs, filled up to whole registers
  int sum_bytes;             // 2 or 4
  const char* rows;
};

struct TableLayer {
  const ConvIf* a;
  Neurons neurons;
  TableProduct product[max_products];
};

// ------------------------------------------------------------------------------------------- dense

// The register block of a dense kernel, and the largest input that it takes.
struct DenseShape {
  int rows;       // output positions
  int columns;    // columns of packed weights; one or two (digits) to an output channel
  int depth;      // the inputs of a run of taps are padded to a multiple of this, with weights of zero
  int max_input;
};

// Taps of a kernel row that read positions side by side in a plane, so that their inputs are one run of bytes: every
// `apart`-th tap from `first`. Taps with a dilation are alone.
struct TapRun {
  std::int64_t first, apart, count;
};

static constexpr std::int64_t tap_runs(const Geometry& g) {
  return g.dilation_w == 1 && g.stride_w < g.kernel_w ? g.stride_w : g.kernel_w;
}

static constexpr TapRun tap_run(const Geometry& g, std::int64_t i) {
  const std::int64_t apart = tap_runs(g);
  return {i, apart, (g.kernel_w - 1 - i) / apart + 1};
}

// One product, its input expanded to bytes (dense.h): planes [T, samples, phases_h, phases_w, plane_h, plane_w, C].
struct DenseProduct {
  std::int64_t phases_h, phases_w;    // see dense.h
  std::int64_t phase_bytes;           // of one phase of one sample
  std::int64_t sample_bytes;
  std::int64_t step_bytes;
  std::uint8_t* plane;
};

// `blocks` * depth inputs of one run of taps, from `a` at output position 0 of a sample and step.
struct Segment {
  const std::uint8_t* a;
  std::int64_t row_bytes, step_bytes, sample_bytes;
  std::int64_t blocks;
};

struct DenseLayer {
  const ConvIf* a;
  Neurons neurons;
  Wave wave;
  std::int64_t plane_h, plane_w;    // positions of one phase; output (r, c) is position r * plane_w + c
  DenseProduct product[max_products];
  const Segment* segments;
  const int* chunk;              // [chunks + 1] ranges of segments, each of products of one scale
  const std::int32_t* factor;    // [chunks]: what sums so far are multiplied by before a chunk's products are added
  int chunks;
  const std::int8_t* packed;    // all products: [panels, segments, ..]
  std::int64_t panel_bytes;
};

// Positions from the first output of a sample to the last.
static inline std::int64_t positions_of(const DenseLayer& layer) {
  return (rows_of(layer.wave) - 1) * layer.plane_w + layer.a->out_w;
}

// Position blocks [block0, block1) of the wave (samples in turn) and one panel.
struct DenseTile {
  std::int64_t block0, block1, panel;
};

}    // namespace qcfs::cpu
