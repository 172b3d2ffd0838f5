// A network that runs: a graph, the plans made for it so far, and what its runs share. All of it may be used from
// several threads at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "network/graph.h"
#include "network/plan.h"

namespace qcfs::network {

class Network {
 public:
  // `memory` holds the graph's tensors where nobody else does. Raises Error (format) where the graph cannot run on an
  // image of the shape that it states.
  explicit Network(Graph graph, File memory = {});
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  const Graph& graph() const { return graph_; }

  // The plan for a request, made at its first call. Raises Error, as make_plan.
  std::shared_ptr<const Plan> prepare(const Request& request, std::size_t max_bytes = SIZE_MAX);

  // Runs a plan of this network; `out` is float32 [plan.out_count()]. One that goes on from other runs, of `before`
  // steps in all, finds what they left in `kept`, plan.memory.kept_bytes aligned to cache lines, and replaces it.
  // Raises Error (not_finite: `kept` is as it was; out_of_memory: it is damaged).
  void run(const Plan& plan, const Image& image, const cpu::Options& options, float* out,
           std::uint8_t* engines = nullptr, char* kept = nullptr, std::int64_t before = 0);

 private:
  // Blocks of memory that wait for a run. There are as many as threads ran at the same time.
  struct Waiting {
    Block block;
    std::size_t bytes;
  };

  const Graph graph_;
  const File memory_;
  PackedWeights packed_;
  std::mutex mutex_;                                // guards what follows
  std::list<std::shared_ptr<const Plan>> plans_;    // the last used first
  std::vector<Waiting> waiting_;
};

// A run that goes on from call to call. One thread at a time.
class Stream {
 public:
  explicit Stream(std::shared_ptr<Network> network) : network_(std::move(network)) {}

  Network& network() { return *network_; }
  std::int64_t steps() const { return steps_; }
  void reset() { steps_ = 0; }
  // The call before, since the last reset or not.
  const Request& last() const { return last_; }

  // Raises Error unless this request may come next: of the same images' shape and neurons as those since the last reset
  // and, where `same_image`, after an image that stays the same.
  void check(const Request& request, bool same_image) const;

  // Runs the plan of a request that goes on and has been checked. An image without data is the one of the call before.
  // After an Error that the images are to blame for, the stream is as it was; after any other it has been reset.
  void run(const Plan& plan, const Image& image, const cpu::Options& options, float* out);

 private:
  std::shared_ptr<Network> network_;
  Block kept_{nullptr, std::free};
  std::size_t bytes_ = 0;
  std::int64_t steps_ = 0;
  Request last_{};
};

}    // namespace qcfs::network
