// A kernel set is one implementation of the contract for one instruction set: a name, the
// instruction-set bits it needs and the functions that do one task each. Workspaces come from the
// caller: files compiled with instruction-set flags contain no standard containers, whose inline
// functions the linker might keep for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "core/neuron.h"

namespace qcfs::cpu {

// One task: rows [row0, row1) and output channels [channel0, channel1) of one sample.
struct Tile {
  std::int64_t sample, row0, row1, channel0, channel1;
};

struct KernelSet {
  const char* name;
  std::uint32_t isa;
  std::size_t (*conv_if_workspace)(const ConvIf&, std::int64_t rows);
  void (*conv_if)(const ConvIf&, const Tile&, void* workspace);
  // `weight` is the layer's weight converted to double, [KH, KW, C/groups, O].
  std::size_t (*analog_workspace)(const AnalogConv&);
  void (*analog)(const AnalogConv&, const Tile&, const double* weight, void* workspace);
  void (*encode)(const Encode&, std::int64_t pixel0, std::int64_t pixel1);
  void (*pool)(const Pool&, std::int64_t plane_row0, std::int64_t plane_row1);
  void (*pool_counts)(const PoolCounts&, std::int64_t row0, std::int64_t row1);
  void (*count)(const Count&, std::int64_t element0, std::int64_t element1);
  // Output rows [row0, row1) of all images; the workspace holds 2 * O doubles.
  void (*readout)(const Readout&, std::int64_t row0, std::int64_t row1, double* workspace);
  // Returns false when the sample holds a NaN or an infinity.
  bool (*quantize)(const Quantize&, std::int64_t sample);
};

}    // namespace qcfs::cpu
