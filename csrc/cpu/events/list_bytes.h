// The inner loop of list.h for instruction sets without a compressing store: a table turns eight bits into the
// positions of those that are set, without a branch on the spikes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

typedef std::uint16_t EightPositions __attribute__((vector_size(16)));

struct PositionTable {
  std::uint16_t position[256][8];
};

constexpr PositionTable make_position_table() {
  PositionTable t{};
  for (int mask = 0; mask < 256; ++mask) {
    int n = 0;
    for (int b = 0; b < 8; ++b) {
      if (mask >> b & 1) t.position[mask][n++] = static_cast<std::uint16_t>(row_bytes * b);
    }
  }
  return t;
}

constexpr PositionTable position_table = make_position_table();

// Isa::list_bytes (sets/generic.h) by way of Isa::fired(x, wanted), whose bit k says whether x[k] & wanted is not zero,
// for Isa::fired_bytes bytes. Writes up to 8 entries past the end.
template <class Isa>
inline std::uint16_t* list_bytes_by_table(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted,
                                          std::uint16_t first, std::uint16_t* out, std::uint16_t* value) {
  constexpr int fired_bytes = Isa::fired_bytes;
  std::uint8_t rest[fired_bytes] = {};
  for (std::int64_t k = 0; k < n; k += fired_bytes) {
    const std::uint8_t* bytes = x + k;
    if (n - k < fired_bytes) {
      __builtin_memcpy(rest, bytes, static_cast<std::size_t>(n - k));
      bytes = rest;
    }
    std::uint32_t set = Isa::fired(bytes, wanted);
    for (int part = 0; part < fired_bytes; part += 8, set >>= 8) {
      const std::uint16_t* position = position_table.position[set & 0xff];
      store(out, load<EightPositions>(position) + static_cast<std::uint16_t>(first + row_bytes * (k + part)));
      const int found = __builtin_popcount(set & 0xff);
      if (value != nullptr) {
        for (int j = 0; j < found; ++j) value[j] = bytes[part + position[j] / row_bytes];
        value += found;
      }
      out += found;
    }
  }
  return out;
}

}    // namespace
}    // namespace qcfs::cpu
