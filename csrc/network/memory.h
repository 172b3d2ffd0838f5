// The memory of a run: one block, in which every intermediate has a slot.
//
// A slot lives from the step that writes it to the last that reads it. Slots that live at different times share bytes,
// so memory does not grow with depth.
//
// A run that goes on from another one (Request::going_on) keeps what it left in slots of its own: the neurons'
// membranes, the current of an image that stays the same, the spikes counted for the answer. They lie first, in the
// same places for any number of steps, so a later call may bring another plan; and in a block of their own, which waits
// for that call while other runs use the rest.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace qcfs::network {

// Memory aligned to cache lines.
using Block = std::unique_ptr<char, void (*)(void*)>;
Block make_block(std::size_t bytes);    // raises Error (out_of_memory)

using Slot = std::size_t;

// Where the slots lie: kept ones before `kept_bytes`.
struct Placed {
  std::vector<std::size_t> offsets;
  std::size_t kept_bytes = 0, bytes = 0;    // what a later call needs, and all
};

class Memory {
 public:
  // A slot that lives from a step.
  Slot take(std::size_t bytes, std::size_t step) {
    slots_.push_back({bytes, step, step, false});
    return slots_.size() - 1;
  }
  void keep(Slot slot) { slots_[slot].kept = true; }
  void read(Slot slot, std::size_t step) { slots_[slot].last = step; }

  Placed place() const;

 private:
  struct Life {
    std::size_t bytes, first, last;    // steps
    bool kept;
  };
  std::vector<Life> slots_;
};

}    // namespace qcfs::network
