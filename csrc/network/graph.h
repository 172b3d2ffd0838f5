// A network as its file describes it (docs/format.md), checked: what stands here fits together and cannot overflow.
//
// The reader makes one object of each node and refuses, by the node's and the field's name, what qcfs_fast/network
// (schema.py, layers.py, loading.py) refuses. Sizes of images are not known here; plan.h settles what depends on them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "core/contract.h"
#include "network/pooling.h"
#include "network/tensors.h"

namespace qcfs::network {

// The largest T where nothing bounds it.
constexpr std::int64_t unbounded_steps = 0x7fffffff;

struct NeuronMode {
  Mode mode = Mode::plain;
  int window = 4, iterations = 1;    // of offset and masked

  bool looks_ahead() const { return mode == Mode::offset || mode == Mode::masked; }
  // Steps that layers compute for an answer after T.
  std::int64_t steps(std::int64_t T) const;
  bool operator==(const NeuronMode& other) const {
    return mode == other.mode && window == other.window && iterations == other.iterations;
  }
};

// In a weight's place, a tensor without data is one that the node does not have.
struct ImageInput {
  std::int64_t channels;
  bool vector;
  int bits;
  Tensor source, scale, shift;
  std::vector<PoolSpec> moves;    // what pads, crops or enlarges it
  bool line = false;              // the caller gives maps of one row
};

// The convolution of the image.
struct Current {
  Geometry geometry;
  Tensor weight, weight_low, gain, offset, low, high;
};

struct Encoding {
  Current current;
  bool vector;
  Tensor threshold, bias;
  std::int64_t bias_steps;    // 0: no bias
};

struct Source {
  int weight;
  Geometry geometry;
  int peak;
};

struct Amplitude {
  Tensor values;
  int peak;
};

struct Spiking {
  std::vector<Source> sources;                 // of the first inputs
  std::vector<std::vector<Tensor>> weights;    // of each weight its digits, the upper one first
  std::vector<Amplitude> residuals;            // of the inputs after those
  std::optional<Current> analog;               // of the last input
  bool vector;
  Tensor threshold, bias;
  std::int64_t bias_steps;                // 0: the same bias at all steps
  std::vector<std::int64_t> magnitude;    // [O] the most that a step can add
};

struct Pooling {
  PoolSpec pool;
};

struct Concat {};

struct Term {
  std::vector<PoolSpec> pools;
  bool vector;
  Geometry geometry;
  Tensor weight, weight_low, gain;    // an empty weight: the counts themselves
};

struct Answer {
  std::vector<Term> terms;
  bool vector, flattened;
  Tensor offset;
};

struct Node {
  std::string name;
  std::vector<int> inputs;    // positions of nodes
  std::variant<ImageInput, Encoding, Spiking, Pooling, Concat, Answer> layer;
  std::int64_t max_T = unbounded_steps;    // that the file promises
};

struct Graph {
  std::vector<Node> nodes;
  std::int64_t T;
  int weight_bits;
  NeuronMode neuron;
  std::vector<std::int64_t> input_shape;    // empty: none was settled

  const ImageInput& image() const { return std::get<ImageInput>(nodes.front().layer); }
  const Answer& answer() const { return std::get<Answer>(nodes.back().layer); }
  std::int64_t classes() const { return answer().offset.count(); }
  std::int64_t spiking_layers() const;    // first ones too
};

// Reads a header and the tensors it names, whose memory must outlive the graph. Raises Error (format).
Graph read_graph(const std::string& header, const Tensors& tensors);

// The largest T for which nothing overflows in this mode; raises Error (argument) where the network cannot have it.
std::int64_t max_steps(const Graph& graph, const NeuronMode& neuron);

// What a node sends: an integer up to this, as the nodes before it say; for windows that depend on the image's size, 1.
std::vector<int> known_peaks(const Graph& graph);

}    // namespace qcfs::network
