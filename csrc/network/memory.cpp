#include "network/memory.h"

#include <algorithm>
#include <cstdlib>

#include "network/error.h"

namespace qcfs::network {
namespace {

constexpr std::size_t line = 64;    // bytes of a cache line

std::size_t whole_lines(std::size_t bytes) { return (bytes + line - 1) / line * line; }

}    // namespace

Block make_block(std::size_t bytes) {
  Block block(static_cast<char*>(std::aligned_alloc(line, (bytes / line + 1) * line)), std::free);
  require(block != nullptr, Fault::out_of_memory, "no memory for the workspace; use a smaller batch");
  return block;
}

// Kept slots first, in the order in which they were taken. Then the largest first, each at the lowest place where it
// meets no other that lives at the same time.
Placed Memory::place() const {
  std::vector<std::size_t> order;
  Placed result;
  result.offsets.resize(slots_.size());
  for (Slot i = 0; i < slots_.size(); ++i) {
    if (slots_[i].kept) {
      result.offsets[i] = result.kept_bytes;
      result.kept_bytes += whole_lines(slots_[i].bytes);
    } else {
      order.push_back(i);
    }
  }
  result.bytes = result.kept_bytes;
  std::stable_sort(order.begin(), order.end(), [&](Slot a, Slot b) { return slots_[a].bytes > slots_[b].bytes; });
  std::vector<Slot> placed;    // by offset
  for (const Slot i : order) {
    std::size_t at = result.kept_bytes;
    for (const Slot other : placed) {
      const bool meet = slots_[other].first <= slots_[i].last && slots_[i].first <= slots_[other].last;
      const bool before = at + whole_lines(slots_[i].bytes) <= result.offsets[other];
      if (meet && !before) at = std::max(at, result.offsets[other] + whole_lines(slots_[other].bytes));
    }
    result.offsets[i] = at;
    result.bytes = std::max(result.bytes, at + whole_lines(slots_[i].bytes));
    placed.insert(std::upper_bound(placed.begin(), placed.end(), at,
                                   [&](std::size_t offset, Slot s) { return offset < result.offsets[s]; }),
                  i);
  }
  return result;
}

}    // namespace qcfs::network
