// Which engine a spiking layer runs on: estimated time of each, from the work it does and the rates at which the kernel
// set does it.
//
//     events    T * rate * (inputs under the kernels) * outputs   row elements, plus listing every input T times and
//               bringing the lists of every kernel row and output pixel together T times
//     dense     T * digits * positions * padded inputs * padded outputs   products of bytes, whatever the rate
//
// The firing rate is that of the input at hand, read off a sample of it. Engines return the same bytes, so the choice
// can never show but in time.
#pragma once

#include <cstdint>

#include "core/contract.h"

namespace qcfs::cpu {

// Row elements and products of bytes that one thread does in a nanosecond, for 16 and 8-bit weights. Measured on a
// 4.4 GHz Zen 5 on 3x3 layers of 14x14x256, T = 4, 18 % firing: avx512vnni, avx512, avxvnni, avx2. Estimated from the
// instructions' throughput and not measured: amx, neondot, neon, portable.
struct EngineRates {
  const char* set;
  double events_16, events_8, products;
};

constexpr EngineRates engine_rates[] = {
    {"amx", 105, 165, 1000}, {"avx512vnni", 105, 165, 500}, {"avx512", 105, 165, 270}, {"avxvnni", 80, 92, 260},
    {"avx2", 70, 92, 135},   {"neondot", 16, 16, 60},       {"neon", 16, 16, 6},       {"portable", 12, 12, 4},
};

// Share of non-zero inputs a step, from up to 64 pieces of up to 64 bytes. Multiples of the golden section, not of a
// whole number of pixels: these can all lie in one column.
inline double sampled_rate(const ConvIf& a, const Product& p) {
  const bool mask = p.x.coding == Coding::mask;
  const std::int64_t bytes = a.batch * p.x.height * p.x.width * p.x.channels;
  const std::int64_t planes = mask ? 1 : a.steps, steps = a.steps < 8 ? a.steps : 8;
  const std::int64_t pieces = 64, piece = bytes * planes < 64 * pieces ? bytes * planes / pieces + 1 : 64;
  const unsigned wanted = (1u << steps) - 1;
  std::int64_t seen = 0, fired = 0;
  for (std::int64_t i = 0; i < pieces; ++i) {
    const double at = static_cast<double>(static_cast<std::uint32_t>(i * 2654435769)) / 4294967296.0;
    const std::int64_t first = static_cast<std::int64_t>(at * static_cast<double>(bytes * planes));
    for (std::int64_t k = first; k < first + piece && k < bytes * planes; ++k) {
      seen += mask ? steps : 1;
      fired += mask ? __builtin_popcount(p.x.data[k] & wanted) : p.x.data[k] != 0;
    }
  }
  return seen == 0 ? 0.0 : static_cast<double>(fired) / static_cast<double>(seen);
}

}    // namespace qcfs::cpu
