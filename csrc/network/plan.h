// A plan: everything of a network's run that depends on the images' shape, T and the neurons, settled once.
//
// A plan is a list of steps. A step is a function of a frame, which brings what changes from call to call: memory, the
// image, where the answer goes. Steps call the kernels of cpu/cpu.h; what moves bytes between them stands in plan.cpp.
//
//     prepare (once for a shape)                        run (each call, in any thread)
//     shapes, windows, operands checked,                for each step: operands get the frame's addresses, the
//     one slot of memory for every intermediate         kernel runs
//
// Slots of one block of memory hold the intermediates (memory.h). A run allocates nothing, and a plan never changes:
// threads that run it at the same time have a block each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "core/contract.h"
#include "cpu/cpu.h"
#include "network/graph.h"
#include "network/memory.h"

namespace qcfs::network {

// What a call asks. Two calls that ask the same have the same plan.
struct Request {
  std::int64_t batch, height, width;    // of the images; of vectors height and width are 1
  std::int64_t T;
  NeuronMode neuron;
  bool per_step = false;    // an answer after each step
  std::int64_t skip = 0;    // steps left out of the answer
  bool varying = false;     // one image for each step
  bool going_on = false;
  bool channel_first = false;    // an answer that is a map comes as [.., O, OH, OW]

  bool operator==(const Request& other) const {
    return std::tie(batch, height, width, T, neuron, per_step, skip, varying, going_on, channel_first) ==
           std::tie(other.batch, other.height, other.width, other.T, other.neuron, other.per_step, other.skip,
                    other.varying, other.going_on, other.channel_first);
  }
};

// float32 images of any strides, in elements.
struct Image {
  const float* data;
  std::int64_t step, sample, channel, row, column;
};

// Weights in the orders of the kernels, made when a kernel first wants them and kept as long as the network.
class PackedWeights {
 public:
  // The layer, which of its products (signed neurons have twice as many), engine and kernel set.
  using Key = std::tuple<const void*, int, int, int, const char*>;

  // The packed weights of a key; null where there is no memory. pack(to) writes bytes() bytes.
  template <typename Bytes, typename Pack>
  const void* find(const Key& key, const Bytes& bytes, const Pack& pack) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = made_.find(key);
    if (found == made_.end()) {
      try {
        Block block = make_block(bytes());
        pack(block.get());
        found = made_.emplace(key, std::move(block)).first;
      } catch (const std::exception&) {
        return nullptr;
      }
    }
    return found->second.get();
  }

 private:
  std::mutex mutex_;
  std::map<Key, Block> made_;
};

struct Frame {
  char* arena;
  char* kept;    // what runs go on from; null where none does
  const Placed& memory;
  Image image;            // without data: the image of the call before
  std::int64_t before;    // steps that were run before this call
  float* out;
  cpu::Options options;
  PackedWeights* packed;
  std::uint8_t* engines;    // of each spiking layer that is no first one; or null

  template <typename T>
  T* at(Slot slot) const {
    const std::size_t offset = memory.offsets[slot];
    return reinterpret_cast<T*>(offset < memory.kept_bytes ? kept + offset : arena + (offset - memory.kept_bytes));
  }
};

// What a node leaves for the next call, int32: its "state" (membrane potentials, and what signed neurons have sent),
// the "current" of an image that stays the same; of the answer the counts of term i, "i".
struct Kept {
  std::string node, what;
  std::vector<std::int64_t> shape;
  Slot slot;
};

struct Plan {
  Request request;
  std::int64_t answers, out_h, out_w, out_channels;    // the answer is float32 [answers, N, OH, OW, O]
  std::vector<std::function<Status(const Frame&)>> steps;
  Placed memory;               // of the intermediates
  std::vector<Kept> kept;      // those of a run that goes on
  std::int64_t largest = 0;    // bytes of the largest of them
  std::int64_t held = 0;       // bytes of all spikes that wait for a reader, where they are most
  // Operands that follow from the graph's; deques, because steps point into them.
  std::deque<std::vector<std::int32_t>> integers;
  std::deque<std::vector<double>> doubles;

  std::int64_t out_count() const { return answers * request.batch * out_h * out_w * out_channels; }
};

// Raises Error (shape) where the images do not fit, (argument) where T is too large, (out_of_memory) where a run would
// need more than `max_bytes`. The graph must outlive the plan.
Plan make_plan(const Graph& graph, const Request& request, std::size_t max_bytes);

// The spiking layers whose engines a run tells, in the graph's order.
std::vector<std::string> engine_layers(const Graph& graph);

}    // namespace qcfs::network
