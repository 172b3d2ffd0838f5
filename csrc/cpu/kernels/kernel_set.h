// A kernel set is one implementation of the contract for one instruction set: a name, the instruction-set bits it
// needs and the functions that do one task each. Workspaces come from the caller: files compiled with
// instruction-set flags contain no standard containers, whose inline functions the linker might keep for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"

namespace qcfs::cpu {

constexpr int most_products = 64;
constexpr int most_residuals = 64;

// Bytes that kernels may read (never use) behind the last byte of packed dense weights and planes.
constexpr std::int64_t slack = 256;

// Entries that may be read and written behind the last of an event list.
constexpr std::int64_t list_slack = 128;

// What one call of conv_if works on: some samples and output rows at a time (a wave), so that event lists and
// expanded planes stay small. With more than one sample a wave holds all rows of each.
struct Wave {
  std::int64_t sample0, sample1, row0, row1;
};

constexpr int padded_channels = 64;

// The per-channel operands, padded to a multiple of padded_channels.
struct Neurons {
  const std::int32_t* threshold;
  const std::int32_t* bias;
  const std::int32_t* amplitude[most_residuals];
};

// Input rows of one product that a wave reads.
struct InputRows {
  std::int64_t row0, rows;
};

// ------------------------------------------------------------------------------------------ events

// A row of packed weights: what one input adds to a panel of output channels (64 of 8 bits, 32 of 16 bits).
constexpr int row_bytes = 64;

constexpr std::int64_t panel_channels(int weight_bytes) { return row_bytes / weight_bytes; }

// How the inputs of one product are cut into chunks whose weights stay in the first-level cache while all pixels of a
// tile pass. A cell is one tap and one block of input channels; cells are in the order (kh, kw, block).
struct EventCut {
  std::int64_t blocks, block_channels;
  std::int64_t cells;    // of a chunk; the last chunk of a product may have fewer
  std::int64_t chunks;
  std::int64_t rows;    // of a chunk: its cells' and one of zeros, the last
};

// Spikes of the input rows of one product that a wave reads, by row and step. Positions are byte offsets of weight
// rows, modulo 2^16 (events.h).
struct EventLists {
  InputRows in;
  EventCut cut;
  bool columns;               // positions count columns, so that a run of columns is one run of positions
  bool alone;                 // a chunk is one cell: its list serves as it is
  int most;                   // no input is larger: 1 for masks; read with 8-bit weights
  std::int64_t capacity;      // entries of one row's region
  std::uint32_t* start;       // [samples, rows, T, W * blocks + 1], within the row's region
  std::uint16_t* position;    // [samples, rows, capacity]
  std::uint16_t* value;       // likewise; count planes only, else null
};

// What one pixel adds at one step from one chunk; `count` is a multiple of four.
struct EventRun {
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t count;
};

struct EventLayer {
  const ConvIf* a;
  Neurons neurons;
  Wave wave;
  EventLists lists[most_products];
  std::int64_t chunks;    // of all products
};

// What pixels of one output row add.
struct EventRow {
  EventRun* runs;    // [chunks, columns, T]
  std::uint16_t* position;
  std::uint16_t* value;    // count planes only
};

// Output rows [row0, row1) and columns [col0, col1) of one sample.
struct EventTile {
  std::int64_t sample, row0, row1, col0, col1;
};

// ------------------------------------------------------------------------------------------- dense

// Shape of the register block of a dense kernel, and the largest input it takes.
struct DenseShape {
  int rows;       // output positions a block computes
  int columns;    // columns of packed weights; one or two (digits) to an output channel
  int depth;      // input channels are padded to a multiple of this
  int most;
};

// One product, its input expanded to bytes (dense.h): planes [T, samples, phases, grid_h, grid_w, depth].
struct DenseProduct {
  std::int64_t depth;          // padded input channels
  std::int64_t phases_w;       // column phases; phase = row phase * phases_w + column phase
  std::int64_t phase_bytes;    // of one phase of one sample
  std::int64_t sample_bytes;
  std::int64_t step_bytes;
  std::uint8_t* plane;
};

// One tap, or a piece of one: `blocks` * depth input channels from `a` at output position 0 of a sample and step.
struct Segment {
  const std::uint8_t* a;
  std::int64_t row_bytes, step_bytes, sample_bytes;
  std::int64_t blocks;
};

struct DenseLayer {
  const ConvIf* a;
  Neurons neurons;
  Wave wave;
  std::int64_t grid_h, grid_w;    // positions of one phase; output (r, c) is position r * grid_w + c
  DenseProduct product[most_products];
  const Segment* segments;
  const int* chunk;    // [chunks + 1] ranges of segments
  int chunks;
  const std::int8_t* packed;    // all products: [column blocks, segments, ..]
  std::int64_t block_bytes;     // of one column block
};

// Position blocks [block0, block1) of the wave (samples in turn) and one column block.
struct DenseTile {
  std::int64_t block0, block1, column_block;
};

// One task of the operators cut by rows.
struct Tile {
  std::int64_t sample, row0, row1;
};

struct KernelSet {
  const char* name;
  std::uint32_t isa;

  // Packed event weights of one product: [panels, chunks, rows, panel_channels] of its own type.
  void (*pack_events)(const Product&, std::int64_t out_channels, const EventCut&, void* out);
  void (*list_events)(const ConvIf&, int product, const Wave&, const EventLists&, std::int64_t sample,
                      std::int64_t row);
  std::size_t (*merge_events_workspace)(const EventLayer&);
  // Of the tile's columns in one of its rows.
  void (*merge_events)(const EventLayer&, const EventTile&, std::int64_t row, const EventRow&, void* workspace);
  std::size_t (*fire_events_workspace)(const EventLayer&, std::int64_t pixels);
  // One panel of output channels, from the runs of the tile's rows.
  void (*fire_events)(const EventLayer&, const EventTile&, std::int64_t panel, const EventRun* runs, void* workspace);
  // Layers with groups, from plain weights.
  std::size_t (*fire_grouped_workspace)(const ConvIf&);
  void (*fire_grouped)(const EventLayer&, const Tile&, void* workspace);
  void (*fire_depthwise)(const ConvIf&, const Neurons&, const Tile&);

  DenseShape dense;    // rows = 0: this set has no dense kernel
  void (*pack_dense)(const Product&, std::int64_t out_channels, std::int64_t block_bytes, std::int8_t* out);
  void (*expand)(const DenseLayer&, int product, std::int64_t sample, std::int64_t grid_row);
  std::size_t (*fire_dense_workspace)(const DenseLayer&, std::int64_t blocks);
  void (*fire_dense)(const DenseLayer&, const DenseTile&, void* workspace);
  // Runs the dense inner instruction alone; returns the multiply-accumulates that it did.
  double (*matrix_loop)(std::int64_t rounds);

  std::size_t (*pack_analog_bytes)(const AnalogConv&);
  void (*pack_analog)(const AnalogConv&, void* out);
  std::size_t (*analog_workspace)(const AnalogConv&);
  void (*analog)(const AnalogConv&, const Tile&, const void* packed, void* workspace);

  void (*encode)(const Encode&, std::int64_t pixel0, std::int64_t pixel1);
  void (*pool)(const Pool&, std::int64_t row0, std::int64_t row1);
  void (*pool_counts)(const PoolCounts&, std::int64_t row0, std::int64_t row1);
  void (*count)(const Count&, std::int64_t element0, std::int64_t element1);
  // Output rows [row0, row1) of all images; the workspace holds 2 * O doubles.
  void (*readout)(const Readout&, std::int64_t row0, std::int64_t row1, double* workspace);
  // Bits of the largest magnitude (a float32) of rows [row0, row1) of one sample.
  std::int32_t (*largest)(const Quantize&, std::int64_t sample, std::int64_t row0, std::int64_t row1);
  void (*quantize)(const Quantize&, std::int64_t sample, std::int64_t row0, std::int64_t row1);
};

}    // namespace qcfs::cpu
