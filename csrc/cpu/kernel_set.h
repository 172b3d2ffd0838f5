// A kernel set is one implementation of the contract for one instruction set: a name, the instruction-set bits it needs
// and the functions that do one task each. Workspaces come from the caller, aligned to cache lines.
//
// The files under sets/ are compiled with instruction-set flags, and so is all that they include. C++ allows an inline
// function (a template, a member defined in its class, most of the standard library) to be compiled in many files and
// keeps any one copy: the one-definition rule promises that all are equal. Here they are not, and the copy kept for
// every caller could be the one with AVX-512. So these files give no function external linkage but through their table:
// everything is in an unnamed namespace or static, and no standard header with functions in it is included.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "cpu/layout.h"

namespace qcfs::cpu {

struct KernelSet {
  const char* name;
  std::uint32_t isa;

  // Packed event weights of one product: [panels, chunks, rows, channels of a panel] of its own type.
  void (*pack_events)(const Product&, std::int64_t out_channels, const EventCut&, void* out);
  // The inputs of one input row (counted from the wave's first) that fired.
  void (*list_events)(const ConvIf&, int product, const Wave&, const EventLists&, std::int64_t sample,
                      std::int64_t row);
  std::size_t (*merge_events_workspace)(const EventLayer&);
  // The merged lists of the tile's columns in one of its rows.
  void (*merge_events)(const EventLayer&, const EventTile&, std::int64_t row, const MergedRow&, void* workspace);
  std::size_t (*fire_events_workspace)(const EventLayer&, std::int64_t pixels);
  // One panel of output channels, from the merged lists of the tile's rows.
  void (*fire_events)(const EventLayer&, const EventTile&, std::int64_t panel, const MergedList* lists,
                      void* workspace);
  // Layers with groups, from plain weights.
  std::size_t (*fire_grouped_workspace)(const ConvIf&);
  void (*fire_grouped)(const EventLayer&, const RowSpan&, void* workspace);
  void (*fire_depthwise)(const ConvIf&, const Neurons&, const RowSpan&);

  // The table of one product.
  std::int64_t register_bytes;
  void (*pack_table)(const Product&, std::int64_t out_channels, int sum_bytes, std::int64_t row_bytes, char* rows);
  std::size_t (*fire_table_workspace)(const TableLayer&);
  void (*fire_table)(const TableLayer&, const RowSpan&, void* workspace);

  DenseShape dense;
  // Packed dense weights of one product, `panel_bytes` from panel to panel.
  void (*pack_dense)(const Product&, std::int64_t out_channels, std::int64_t panel_bytes, std::int8_t* out);
  // One row of the planes of a product and sample, at all steps.
  void (*expand)(const DenseLayer&, int product, std::int64_t sample, std::int64_t plane_row);
  std::size_t (*fire_dense_workspace)(const DenseLayer&, std::int64_t blocks);
  void (*fire_dense)(const DenseLayer&, const DenseTile&, void* workspace);
  // Runs the dense inner instruction alone; returns the multiply-accumulates that it did.
  double (*matrix_loop)(std::int64_t rounds);

  std::size_t (*pack_analog_bytes)(const AnalogConv&);
  void (*pack_analog)(const AnalogConv&, void* out);
  std::size_t (*analog_workspace)(const AnalogConv&);
  // Rows of the image's layer; `end` and its neurons are the layer as one without products, where it fires.
  void (*analog)(const AnalogConv&, const ConvIf& end, const Neurons&, const RowSpan&, void* workspace);

  void (*pool)(const Pool&, std::int64_t row0, std::int64_t row1);
  void (*pool_counts)(const PoolCounts&, std::int64_t row0, std::int64_t row1);
  void (*count)(const Count&, std::int64_t element0, std::int64_t element1);
  // Output rows [row0, row1) of all images; the workspace holds 2 * O doubles.
  void (*readout)(const Readout&, std::int64_t row0, std::int64_t row1, double* workspace);
  // Bits of the largest magnitude (a float32) of rows [row0, row1) of one sample.
  std::int32_t (*largest)(const Quantize&, std::int64_t sample, std::int64_t row0, std::int64_t row1);
  void (*quantize)(const Quantize&, std::int64_t sample, std::int64_t row0, std::int64_t row1);
};

// The sets, each in the file of its name under sets/. Those that the compiler or the processor family lacks are not
// built; kernel_sets.cpp lists those that are.
extern const KernelSet amx_kernels, avx512vnni_kernels, avx512_kernels, avxvnni_kernels, avx2_kernels, neondot_kernels,
    portable_kernels;

// The best set whose needs lie inside `isa`.
const KernelSet& choose(std::uint32_t isa);

}    // namespace qcfs::cpu
