// From the file's JSON to typed nodes. Three passes: each node by itself, then what nodes ask of each other (kinds,
// channels, peaks), then the bound on T that rules out overflow, computed again from the integers.
#include "network/graph.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "network/error.h"
#include "network/json.h"

namespace qcfs::network {
namespace {

// The limits of qcfs_fast/operators/limits.py, which says why.
constexpr std::int64_t max_weight = 32639, max_byte_weight = 128, max_sum = 0x7fffffff, max_count = 255;
constexpr std::int64_t max_image_threshold = 1 << 25, analog_range = 64;
constexpr std::int64_t max_peak =
    1 << 20;    // no layer takes more than max_count: beyond it makes no difference how far
constexpr int format_version = 5;
constexpr std::size_t geometry_size = 9;

void check(bool condition, const std::string& what) { require(condition, Fault::format, what); }

// ------------------------------------------------------------------------------------------ fields of JSON objects

bool is_whole(const Json& x, std::int64_t least, std::int64_t most) {
  return x.is(Json::Kind::integer) && least <= x.integer && x.integer <= most;
}

// An object's fields by name; what is missing or does not fit is refused by that name.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(object) {
    check(object.is(Json::Kind::object), "an object is missing");
  }

  bool has(const char* name) const { return object_.find(name) != nullptr; }

  const Json& at(const char* name, Json::Kind kind) const {
    const Json* found = object_.find(name);
    check(found != nullptr, std::string(name) + " is missing");
    check(found->is(kind), damaged(name));
    return *found;
  }

  const std::vector<Json>& list(const char* name) const { return at(name, Json::Kind::array).items; }
  const std::string& text(const char* name) const { return at(name, Json::Kind::string).string; }
  bool flag(const char* name) const { return at(name, Json::Kind::boolean).boolean; }

  std::int64_t whole(const char* name, std::int64_t least, std::int64_t most) const {
    const Json& found = at(name, Json::Kind::integer);
    check(is_whole(found, least, most), damaged(name));
    return found.integer;
  }

  std::int64_t whole_or(const char* name, std::int64_t least, std::int64_t most, std::int64_t otherwise) const {
    return has(name) ? whole(name, least, most) : otherwise;
  }

  std::vector<std::int64_t> wholes(const char* name, std::int64_t least, std::int64_t most) const {
    std::vector<std::int64_t> found;
    for (const Json& x : list(name)) {
      check(is_whole(x, least, most), damaged(name));
      found.push_back(x.integer);
    }
    return found;
  }

  std::vector<bool> flags(const char* name) const {
    std::vector<bool> found;
    for (const Json& x : list(name)) {
      check(x.is(Json::Kind::boolean), damaged(name));
      found.push_back(x.boolean);
    }
    return found;
  }

  std::vector<std::string> texts(const char* name) const {
    std::vector<std::string> found;
    for (const Json& x : list(name)) {
      check(x.is(Json::Kind::string), damaged(name));
      found.push_back(x.string);
    }
    return found;
  }

  // Convolutions, in one flat list.
  std::vector<Geometry> geometries(const char* name) const {
    const std::vector<std::int64_t> all = wholes(name, 0, max_extent);
    check(all.size() % geometry_size == 0, damaged(name));
    std::vector<Geometry> found;
    for (std::size_t i = 0; i < all.size(); i += geometry_size) {
      const std::int64_t* g = &all[i];
      check(is_geometry(g), damaged(name));
      found.push_back({g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]});
    }
    return found;
  }

  Geometry geometry(const char* name) const {
    const std::vector<Geometry> found = geometries(name);
    check(found.size() == 1, damaged(name));
    return found[0];
  }

  void pair(const char* name, std::int64_t least, std::int64_t (&to)[2]) const {
    const std::vector<std::int64_t> found = wholes(name, least, max_extent);
    check(found.size() == 2, damaged(name));
    std::copy(found.begin(), found.end(), to);
  }

  bool null(const char* name) const {
    const Json* found = object_.find(name);
    check(found != nullptr, std::string(name) + " is missing");
    return found->is(Json::Kind::null);
  }

  static std::string damaged(const std::string& name) {
    return name + (name.back() == 's' ? " are damaged" : " is damaged");
  }

 private:
  const Json& object_;
};

PoolSpec read_pool(const Json& json) {
  const Fields f(json);
  PoolSpec spec;
  const std::string& kind = f.text("kind");
  check(kind == "avg" || kind == "max", "a pool's kind is damaged");
  spec.max = kind == "max";
  spec.adaptive = f.null("kernel");
  check(spec.adaptive != f.null("output"), "a pool needs a kernel or an output");
  if (!spec.adaptive) f.pair("kernel", 1, spec.kernel);
  f.pair("stride", 1, spec.stride);
  f.pair("padding", 0, spec.padding);
  if (spec.adaptive) {
    const std::vector<Json>& output = f.list("output");
    check(output.size() == 2, "output is damaged");
    for (std::size_t i = 0; i < 2; ++i) {
      check(output[i].is(Json::Kind::null) || is_whole(output[i], 1, max_extent), "output is damaged");
      spec.output[i] = output[i].integer;    // 0 of null
    }
  }
  spec.ceil_mode = f.flag("ceil_mode");
  spec.count_include_pad = f.flag("count_include_pad");
  spec.divisor_override = f.null("divisor_override") ? 0 : f.whole("divisor_override", 0, max_sum);
  spec.multiple = f.whole("multiple", 0, max_sum);
  const std::vector<std::int64_t> section = f.wholes("section", 0, max_extent);
  check(section.size() == 4 && section[0] < section[1] && section[2] < section[3], "section is damaged");
  std::copy(section.begin(), section.end(), spec.section);
  if (f.has("spread")) {
    f.pair("spread", 1, spec.spread);
    if (!f.null("phase")) f.pair("phase", 0, spec.phase);
    const bool alone = !spec.adaptive && spec.kernel[0] == 1 && spec.kernel[1] == 1;
    const bool spreads = spec.spread[0] > 1 || spec.spread[1] > 1;
    check(!spreads || (alone && spec.phase[0] < spec.spread[0] && spec.phase[1] < spec.spread[1]), "spread is damaged");
  }
  if (f.has("border")) {
    static const char* const borders[] = {"replicate", "reflect", "circular"};
    const auto border = std::find(std::begin(borders), std::end(borders), f.text("border"));
    const bool one = spec.kernel[0] * spec.kernel[1] == 1 && spec.stride[0] * spec.stride[1] == 1;
    const bool alone = !spec.adaptive && one && spec.spread[0] * spec.spread[1] == 1 && !spec.ceil_mode;
    check(border != std::end(borders) && alone, "border is damaged");
    spec.border = static_cast<Border>(1 + (border - std::begin(borders)));
  }
  return spec;
}

NeuronMode read_neuron(const Fields& header) {
  NeuronMode neuron;
  if (!header.has("neuron")) return neuron;    // format 1
  const Fields f(header.at("neuron", Json::Kind::object));
  if (f.has("mode")) {
    static const char* const modes[] = {"plain", "offset", "masked", "signed", "sum"};
    const auto mode = std::find(std::begin(modes), std::end(modes), f.text("mode"));
    check(mode != std::end(modes), "neuron is damaged (mode)");
    neuron.mode = static_cast<Mode>(mode - std::begin(modes));
  }
  neuron.window = static_cast<int>(f.whole_or("window", 1, max_window, 4));
  neuron.iterations = static_cast<int>(f.whole_or("iterations", 1, 8, 1));
  check(neuron.iterations == 1 || neuron.mode == Mode::offset, "neuron is damaged (iterations)");
  return neuron;
}

// ------------------------------------------------------------------------------------------------ tensors of a node

template <typename Fits>
bool all_values(const Tensor& t, const Fits& fits) {
  const std::int64_t n = t.count();
  switch (t.dtype) {
    case Dtype::i8:
      return std::all_of(t.as<std::int8_t>(), t.as<std::int8_t>() + n, fits);
    case Dtype::i16:
      return std::all_of(t.as<std::int16_t>(), t.as<std::int16_t>() + n, fits);
    case Dtype::i32:
      return std::all_of(t.as<std::int32_t>(), t.as<std::int32_t>() + n, fits);
    case Dtype::i64:
      return std::all_of(t.as<std::int64_t>(), t.as<std::int64_t>() + n, fits);
    default:
      return false;
  }
}

// The tensors that a node lists. Each is taken once; at the end none may be left.
class NodeTensors {
 public:
  NodeTensors(const Fields& node, const std::string& name, const Tensors& tensors, std::set<std::string>& unclaimed) {
    for (const std::string& key : node.texts("tensors")) {
      const std::string full = name + "/" + key;
      check(unclaimed.erase(full) == 1, "tensor " + full + " is missing");
      left_.emplace(key, tensors.at(full));
    }
  }

  // One value for each of the node's output channels.
  Tensor per_channel(const std::string& name, Dtype dtype, std::int64_t channels) {
    Tensor t = take(name);
    check(t.dtype == dtype && t.shape.size() == 1, name + " must be a vector of another dtype");
    check(t.count() == channels, name + " must have " + std::to_string(channels) + " values");
    if (dtype == Dtype::f32) {
      check(std::all_of(t.as<float>(), t.as<float>() + channels, [](float v) { return std::isfinite(v); }),
            name + " is not finite");
    } else if (dtype == Dtype::f64) {
      check(std::all_of(t.as<double>(), t.as<double>() + channels, [](double v) { return std::isfinite(v); }),
            name + " is not finite");
    }
    return t;
  }

  // The channels of a node, which one of its vectors counts.
  std::int64_t channels_of(const std::string& name) const {
    const auto found = left_.find(name);
    check(found != left_.end(), name + " must have values, but the node lists no such tensor");
    check(found->second.shape.size() == 1, name + " must be a vector");
    return found->second.count();
  }

  Tensor weight(const std::string& name, bool bytes_too, std::size_t dims, std::int64_t channels, bool may_be_empty) {
    Tensor t = take(name);
    check(t.dtype == Dtype::i16 || (bytes_too && t.dtype == Dtype::i8), name + " has another dtype than weights");
    return checked_values(t, name, dims, channels, may_be_empty, t.dtype == Dtype::i8 ? max_byte_weight : max_weight);
  }

  Tensor digit(const std::string& name, std::size_t dims, std::int64_t channels) {
    Tensor t = take(name);
    check(t.dtype == Dtype::i8, name + " has another dtype than digits");
    return checked_values(t, name, dims, channels, false, max_byte_weight);
  }

  // [steps, O], or [O] where `steps` is 0.
  Tensor bias(std::int64_t steps, std::int64_t channels) {
    if (steps == 0) return per_channel("bias", Dtype::i32, channels);
    Tensor t = take("bias");
    check(t.dtype == Dtype::i32, "bias has another dtype");
    t = checked_values(t, "bias", 2, channels, false, max_sum);
    check(t.shape[0] == steps, "bias has other steps than bias_steps");
    return t;
  }

  void finish() const { check(left_.empty(), "unknown tensor " + (left_.empty() ? "" : left_.begin()->first)); }

 private:
  Tensor take(const std::string& name) {
    const auto found = left_.find(name);
    check(found != left_.end(), name + " must have values, but the node lists no such tensor");
    Tensor t = found->second;
    left_.erase(found);
    return t;
  }

  static Tensor checked_values(const Tensor& t, const std::string& name, std::size_t dims, std::int64_t channels,
                               bool may_be_empty, std::int64_t limit) {
    const bool fits = t.shape.size() == dims && t.shape.back() == channels;
    check(fits || (may_be_empty && t.count() == 0),
          name + " does not fit the layer's " + std::to_string(channels) + " channels");
    check(all_values(t, [limit](std::int64_t v) { return -limit <= v && v <= limit; }),
          name + " exceeds " + std::to_string(limit));
    return t;
  }

  Tensors left_;
};

// The input channels of a weight [KH, KW, C/groups, O], or of a vector's [C, O], which must fit its geometry.
std::int64_t channels_read(const Tensor& weight, const Geometry& g, const std::string& name) {
  const bool flat = weight.shape.size() == 2;
  const std::int64_t kernel_h = flat ? 1 : weight.shape[0], kernel_w = flat ? 1 : weight.shape[1];
  const std::int64_t rows = weight.shape[flat ? 0 : 2], columns = weight.shape.back();
  const bool pointwise = g.kernel_h * g.kernel_w * g.stride_h * g.stride_w * g.dilation_h * g.dilation_w == 1 &&
                         g.pad_h + g.pad_w == 0 && g.groups == 1;
  check(kernel_h == g.kernel_h && kernel_w == g.kernel_w && rows > 0 && columns % g.groups == 0 && (!flat || pointwise),
        name + " does not fit its geometry");
  return rows * g.groups;
}

std::int64_t value(const Tensor& t, std::int64_t i) { return t.as<std::int32_t>()[i]; }

void check_thresholds(const Tensor& threshold) {
  check(threshold.count() > 0 && all_values(threshold, [](std::int64_t n) { return n >= 2 && n % 2 == 0; }),
        "thresholds must be even and positive");
}

// What convolves the image: `limit` thresholds bound its range on both sides, and 0 from below where it must be
// positive.
Current read_current(NodeTensors& tensors, const std::string& weight, const Geometry& g, bool long_weights,
                     const Tensor& threshold, std::int64_t least, std::int64_t most) {
  const std::int64_t O = threshold.count();
  Current c{g, tensors.weight(weight, false, 4, O, false), {}, {}, {}, {}, {}};
  if (long_weights) {
    c.weight_low = tensors.weight(weight + "_low", false, 4, O, false);
    check(c.weight_low.shape == c.weight.shape, weight + "_low has another shape than the upper digit");
  }
  c.gain = tensors.per_channel("gain", Dtype::f64, O);
  c.offset = tensors.per_channel("offset", Dtype::f64, O);
  c.low = tensors.per_channel("low", Dtype::i32, O);
  c.high = tensors.per_channel("high", Dtype::i32, O);
  for (std::int64_t i = 0; i < O; ++i) {
    const std::int64_t n = value(threshold, i), low = value(c.low, i), high = value(c.high, i);
    check(low <= high && low >= least * n && high <= most * n, "the current's range is damaged");
  }
  return c;
}

// --------------------------------------------------------------------------------------------------- kinds of nodes

ImageInput read_image(const Fields& config, NodeTensors& tensors) {
  const std::int64_t channels = tensors.channels_of("source");
  ImageInput a{config.whole("channels", 1, max_extent),
               config.flag("vector"),
               static_cast<int>(config.whole_or("bits", 2, 24, 16)),
               tensors.per_channel("source", Dtype::i64, channels),
               tensors.per_channel("scale", Dtype::f32, channels),
               tensors.per_channel("shift", Dtype::f32, channels),
               {}};
  a.line = config.has("line") && config.flag("line");
  check(!a.line || !a.vector, "an image is a line or a vector");
  check(channels > 0 && all_values(a.source, [&](std::int64_t c) { return 0 <= c && c < a.channels; }),
        "source is damaged");
  if (!config.has("moves")) return a;
  for (const Json& move : config.list("moves")) {
    check(move.is(Json::Kind::object), "moves are damaged");
    a.moves.push_back(read_pool(move));
    check(a.moves.back().moves(), "moves are damaged");
  }
  check(a.moves.empty() || !a.vector, "moves are damaged");
  return a;
}

Encoding read_encoding(const Fields& config, NodeTensors& tensors) {
  const bool long_weights = config.whole_or("weight_bits", 24, 24, 0) == 24;
  const std::int64_t steps = config.whole_or("bias_steps", 1, max_extent, 0), O = tensors.channels_of("threshold");
  config.texts("layers");
  Encoding a{{}, config.flag("vector"), tensors.per_channel("threshold", Dtype::i32, O), {}, steps};
  check_thresholds(a.threshold);
  check(all_values(a.threshold, [](std::int64_t n) { return n <= max_image_threshold; }),
        "a threshold exceeds " + std::to_string(max_image_threshold));
  a.current = read_current(tensors, "weight", config.geometry("geometry"), long_weights, a.threshold, 0, 1);
  if (steps > 0) {
    a.bias = tensors.bias(steps, O);
    for (std::int64_t i = 0; i < a.bias.count(); ++i) {
      check(std::abs(value(a.bias, i)) <= value(a.threshold, i % O) / 2,
            "a bias of the first layer exceeds half a threshold");
    }
  }
  return a;
}

// Adds the magnitudes of a weight's rows, in units, to the sums of its channels.
void add_sums(const std::vector<Tensor>& digits, std::int64_t O, std::int64_t* sums) {
  const bool words = digits[0].dtype == Dtype::i16;
  const std::int64_t unit = words || digits.size() > 1 ? 1 : 256;
  for (std::int64_t first = 0; first < digits[0].count(); first += O) {
    for (std::int64_t c = 0; c < O; ++c) {
      std::int64_t x = 0;
      if (words) {
        x = digits[0].as<std::int16_t>()[first + c];
      } else {
        for (const Tensor& d : digits) x = 256 * x + d.as<std::int8_t>()[first + c];
      }
      sums[c] += std::abs(x) * unit;
    }
  }
}

// The most that one step can add to the membrane of each channel: the bracket of docs/format.md, "Overflow". Beyond
// 32 bits it makes no difference how far.
std::vector<std::int64_t> magnitudes(const Spiking& a) {
  constexpr std::int64_t far = std::int64_t{1} << 40;
  const std::int64_t O = a.threshold.count();
  std::vector<std::int64_t> found(static_cast<std::size_t>(O)), sums(found.size());
  for (std::int64_t i = 0; i < a.bias.count(); ++i) {
    std::int64_t& most = found[static_cast<std::size_t>(i % O)];
    most = std::max(most, std::abs(value(a.bias, i)));
  }
  for (std::size_t w = 0; w < a.weights.size(); ++w) {
    std::int64_t peak = 0;    // sections of one pool share a weight, and all of them can be at their peaks
    for (const Source& s : a.sources) peak += s.weight == static_cast<int>(w) ? s.peak : 0;
    std::fill(sums.begin(), sums.end(), 0);
    add_sums(a.weights[w], O, sums.data());
    for (std::size_t c = 0; c < sums.size(); ++c) found[c] += std::min(far, sums[c]) * peak;
  }
  for (std::int64_t c = 0; c < O; ++c) {
    std::int64_t& sum = found[static_cast<std::size_t>(c)];
    for (const Amplitude& r : a.residuals) sum += std::abs(value(r.values, c)) * r.peak;
    if (a.analog) sum += analog_range * value(a.threshold, c);
    sum = std::min(sum, far);
  }
  return found;
}

Spiking read_spiking(const Fields& config, NodeTensors& tensors, std::size_t inputs) {
  const bool long_weights = config.whole_or("weight_bits", 24, 24, 0) == 24;
  const std::int64_t steps = config.whole_or("bias_steps", 1, max_extent, 0), O = tensors.channels_of("threshold");
  config.texts("layers");
  const std::vector<std::int64_t> index = config.wholes("weight_index", 0, max_extent);
  const std::vector<std::int64_t> peaks = config.wholes("peaks", 1, max_count);
  const std::vector<Geometry> geometry = config.geometries("geometry");
  const std::set<std::int64_t> used(index.begin(), index.end());
  check(used.empty() || *used.rbegin() == static_cast<std::int64_t>(used.size()) - 1, "weight_index is damaged");
  check(geometry.size() == index.size(), "geometry is damaged");
  check(peaks.size() >= index.size(), "peaks are damaged");
  const bool analog = config.has("analog_geometry");
  check(inputs > 0 && inputs == peaks.size() + (analog ? 1 : 0), "inputs do not match the weights");
  check(index.size() <= max_products && peaks.size() - index.size() <= max_residuals,
        "at most 64 inputs and 64 residuals can be summed in one layer");

  Spiking a{};
  a.vector = config.flag("vector");
  a.bias_steps = steps;
  a.threshold = tensors.per_channel("threshold", Dtype::i32, O);
  check_thresholds(a.threshold);
  a.bias = tensors.bias(steps, O);
  const std::size_t dims = a.vector ? 2 : 4;
  for (std::size_t w = 0; w < used.size(); ++w) {
    const std::string name = "weight_" + std::to_string(w);
    std::vector<Tensor> digits;
    if (long_weights) {
      for (const char* place : {"", "_middle", "_low"}) digits.push_back(tensors.digit(name + place, dims, O));
      check(digits[1].shape == digits[0].shape && digits[2].shape == digits[0].shape,
            name + " has digits of several shapes");
    } else {
      digits.push_back(tensors.weight(name, true, dims, O, false));
      check(digits[0].dtype == (w == 0 ? digits : a.weights[0])[0].dtype, "all weights of a layer must have one dtype");
    }
    a.weights.push_back(std::move(digits));
  }
  for (std::size_t i = 0; i < index.size(); ++i) {
    a.sources.push_back({static_cast<int>(index[i]), geometry[i], static_cast<int>(peaks[i])});
  }
  for (std::size_t i = index.size(); i < peaks.size(); ++i) {
    const std::string name = "amplitude_" + std::to_string(i - index.size());
    a.residuals.push_back({tensors.per_channel(name, Dtype::i32, O), static_cast<int>(peaks[i])});
  }
  if (analog) {
    a.analog = read_current(tensors, "analog_weight", config.geometry("analog_geometry"), long_weights, a.threshold,
                            -analog_range, analog_range);
  }
  a.magnitude = magnitudes(a);
  return a;
}

Answer read_answer(const Fields& config, NodeTensors& tensors, std::size_t inputs) {
  const bool long_weights = config.whole_or("weight_bits", 24, 24, 0) == 24;
  const std::int64_t O = tensors.channels_of("offset");
  config.texts("layers");
  const std::vector<bool> vectors = config.flags("vectors");
  const std::vector<Geometry> geometry = config.geometries("geometry");
  const std::vector<Json>& pools = config.list("pools");
  check(inputs > 0 && vectors.size() == inputs, "inputs do not match the weights");
  check(geometry.size() == inputs, "geometry is damaged");
  check(pools.size() == inputs, "pools are damaged");
  Answer a{{}, config.flag("vector"), config.flag("flattened"), tensors.per_channel("offset", Dtype::f64, O)};
  check(O > 0, "offset is empty");
  for (std::size_t i = 0; i < inputs; ++i) {
    const std::string place = "_" + std::to_string(i);
    Term term{{}, vectors[i], geometry[i], tensors.weight("weight" + place, false, 4, O, true), {}, {}};
    if (long_weights) {
      term.weight_low = tensors.weight("weight" + place + "_low", false, 4, O, true);
      check(term.weight_low.shape == term.weight.shape, "weight" + place + "_low has another shape");
    }
    term.gain = tensors.per_channel("gain" + place, Dtype::f64, O);
    check(pools[i].is(Json::Kind::array), "pools are damaged");
    for (const Json& pool : pools[i].items) {
      term.pools.push_back(read_pool(pool));
      check(term.pools.size() == 1 || !term.pools.back().max || term.pools[term.pools.size() - 2].max,
            "pools are damaged: a maximum behind an average");
    }
    a.terms.push_back(std::move(term));
  }
  return a;
}

Pooling read_pooling(const Fields& config) {
  const PoolSpec pool = read_pool(config.at("pool", Json::Kind::object));
  if (!pool.max) {
    const std::int64_t divisor = pool.depends_on_size()       ? 1
                                 : pool.divisor_override != 0 ? pool.divisor_override
                                                              : pool.kernel[0] * pool.kernel[1];
    check(pool.multiple > 0 && pool.multiple % divisor == 0,
          "multiple is " + std::to_string(pool.multiple) + ", no common multiple of the windows' divisors");
  }
  return {pool};
}

// --------------------------------------------------------------------------------------------------- the whole graph

bool has_neurons(const Node& node) {
  return std::holds_alternative<Encoding>(node.layer) || std::holds_alternative<Spiking>(node.layer);
}

bool sends_spikes(const Node& node) {
  return !std::holds_alternative<ImageInput>(node.layer) && !std::holds_alternative<Answer>(node.layer);
}

// What a node reads must be of its kind: the image by convolutions, spikes by all else.
void check_inputs(const Graph& graph, const Node& node) {
  std::size_t images = 0;    // of its last inputs
  if (std::holds_alternative<Encoding>(node.layer)) images = 1;
  if (const auto* a = std::get_if<Spiking>(&node.layer)) images = a->analog ? 1 : 0;
  for (std::size_t i = 0; i < node.inputs.size(); ++i) {
    const bool image = i + images >= node.inputs.size();
    const Node& input = graph.nodes[static_cast<std::size_t>(node.inputs[i])];
    check(image ? std::holds_alternative<ImageInput>(input.layer) : sends_spikes(input),
          node.name + " reads " + input.name + ", which sends " + (image ? "no image" : "no spikes"));
  }
}

// How many channels a node sends, as a vector or as maps of a size not known here.
struct Channels {
  std::int64_t count;
  bool vector;

  // A weight for `read` channels can read this; `flat`: as a vector, maps flattened.
  void check_read(std::int64_t read, bool flat, const std::string& name) const {
    check(flat && !vector ? read % count == 0 : read == count,
          name + " takes " + std::to_string(read) + " channels, but its input has " + std::to_string(count));
  }
};

Channels channels_sent(const Node& node, const std::vector<Channels>& in) {
  if (const auto* a = std::get_if<ImageInput>(&node.layer)) return {a->source.count(), false};
  if (const auto* a = std::get_if<Encoding>(&node.layer)) {
    in[0].check_read(channels_read(a->current.weight, a->current.geometry, "weight"), false, "weight");
    return {a->threshold.count(), a->vector};
  }
  if (const auto* a = std::get_if<Spiking>(&node.layer)) {
    for (std::size_t i = 0; i < a->sources.size(); ++i) {
      const Source& s = a->sources[i];
      const std::string name = "weight_" + std::to_string(s.weight);
      in[i].check_read(channels_read(a->weights[static_cast<std::size_t>(s.weight)][0], s.geometry, name), a->vector,
                       name);
    }
    for (std::size_t i = 0; i < a->residuals.size(); ++i) {
      in[a->sources.size() + i].check_read(a->threshold.count(), a->vector, "a residual");
    }
    if (a->analog) {
      const std::int64_t read = channels_read(a->analog->weight, a->analog->geometry, "analog_weight");
      in.back().check_read(read, false, "analog_weight");
    }
    return {a->threshold.count(), a->vector};
  }
  if (std::holds_alternative<Pooling>(node.layer)) {
    check(!in[0].vector, "a pool reads maps of spikes");
    return in[0];
  }
  if (std::holds_alternative<Concat>(node.layer)) {
    Channels all{0, in[0].vector};
    for (const Channels& c : in) {
      check(c.vector == all.vector, "a concatenation reads spikes, all maps or all vectors");
      all.count += c.count;
    }
    return all;
  }
  const auto& answer = std::get<Answer>(node.layer);
  for (std::size_t i = 0; i < in.size(); ++i) {
    const Term& term = answer.terms[i];
    const std::string name = "weight_" + std::to_string(i);
    check(term.pools.empty() || !in[i].vector, "pools of term " + std::to_string(i) + " read a vector");
    const bool identity = term.weight.count() == 0;
    in[i].check_read(identity ? answer.offset.count() : channels_read(term.weight, term.geometry, name), term.vector,
                     name);
  }
  return {answer.offset.count(), true};
}

void check_channels(const Graph& graph) {
  std::vector<Channels> sent;
  for (const Node& node : graph.nodes) {
    std::vector<Channels> in;
    for (const int i : node.inputs) in.push_back(sent[static_cast<std::size_t>(i)]);
    try {
      sent.push_back(channels_sent(node, in));
    } catch (const Error& error) {
      throw Error(error.fault, node.name + ": " + error.what());
    }
  }
}

Node read_node(const Json& json, const Graph& graph, const Tensors& tensors, std::set<std::string>& unclaimed) {
  const Fields f(json);
  Node node{f.text("name"), {}, Concat{}};
  const bool first = graph.nodes.empty();
  check(!node.name.empty(), "a node has no name");
  try {
    const std::string& type = f.text("type");
    const Fields config(f.at("config", Json::Kind::object));
    check(first == (type == "ImageInput") && first == (node.name == "input"),
          "the first node, and no other, must be the image input");
    for (const Node& earlier : graph.nodes) check(earlier.name != node.name, "another node has this name");
    const std::vector<std::string> inputs = f.texts("inputs");
    check(!first || inputs == std::vector<std::string>{node.name}, "the image input reads the image and nothing else");
    for (const std::string& input : first ? std::vector<std::string>{} : inputs) {
      const auto found =
          std::find_if(graph.nodes.begin(), graph.nodes.end(), [&](const Node& n) { return n.name == input; });
      check(found != graph.nodes.end(), "it reads " + input + ", which is no earlier node");
      node.inputs.push_back(static_cast<int>(found - graph.nodes.begin()));
    }
    NodeTensors own(f, node.name, tensors, unclaimed);
    const std::size_t n = inputs.size();
    if (type == "ImageInput") {
      node.layer = read_image(config, own);
    } else if (type == "EncodingLayer") {
      check(n == 1, "inputs do not match the weights");
      node.layer = read_encoding(config, own);
    } else if (type == "SpikingLayer") {
      node.layer = read_spiking(config, own, n);
    } else if (type == "SpikePool") {
      check(n == 1, "a pool has one input");
      node.layer = read_pooling(config);
    } else if (type == "SpikeConcat") {
      check(n > 1, "a concatenation has several inputs");
    } else {
      check(type == "Readout", "unknown kind of layer " + type);
      node.layer = read_answer(config, own, n);
    }
    own.finish();
    check_inputs(graph, node);
  } catch (const Error& error) {
    throw Error(error.fault, node.name + ": " + error.what());
  }
  return node;
}

// The steps that a layer can run before a membrane of its could leave 32 bits.
std::int64_t overflow_free_steps(const Spiking& a, const NeuronMode& neuron) {
  const std::int64_t window = neuron.mode == Mode::offset ? neuron.window : 0;
  const std::int64_t iterations = neuron.mode == Mode::offset ? neuron.iterations : 0;
  std::int64_t steps = a.bias_steps > 0 ? a.bias_steps : unbounded_steps;
  for (std::int64_t c = 0; c < a.threshold.count(); ++c) {
    const std::int64_t n = value(a.threshold, c), most = a.magnitude[static_cast<std::size_t>(c)];
    const std::int64_t room = max_sum - n / 2 - iterations * (n + window * most);
    steps = std::min(steps, room < 0 ? 0 : room / std::max<std::int64_t>(1, most));
  }
  if (neuron.mode == Mode::sum) {
    std::int64_t peak = 1;
    for (const Source& s : a.sources) peak = std::max<std::int64_t>(peak, s.peak);
    for (const Amplitude& r : a.residuals) peak = std::max<std::int64_t>(peak, r.peak);
    steps = std::min(steps, max_count / peak);
  }
  return steps;
}

// What the file says of a layer must be there, and its bound must not promise more than the weights allow.
void read_details(const Fields& all, Node& node) {
  const Fields f(all.at(node.name.c_str(), Json::Kind::object));
  for (const char* name : {"channels", "lossless", "threshold_min", "threshold_max"}) f.whole(name, 0, INT64_MAX);
  const Json* bits = all.at(node.name.c_str(), Json::Kind::object).find("weight_bits_used");
  check(bits != nullptr && (bits->is(Json::Kind::real) || is_whole(*bits, 0, max_extent)),
        node.name + ": weight_bits_used is damaged");
  std::int64_t bound = unbounded_steps;
  if (const auto* a = std::get_if<Spiking>(&node.layer)) bound = overflow_free_steps(*a, {});
  if (const auto* a = std::get_if<Encoding>(&node.layer); a != nullptr && a->bias_steps > 0) bound = a->bias_steps;
  node.max_T = f.whole("max_T", 1, INT64_MAX);
  check(node.max_T <= bound, node.name + ": claims to be free of overflow up to T=" + std::to_string(node.max_T) +
                                 ", but its weights allow " + std::to_string(bound) + "; the file was altered");
}

// How many numbers a form of outputs has. It says how Python puts answers together, and here there is one, number 0.
std::size_t numbers_of(const Json& form) {
  if (is_whole(form, 0, 0)) return 1;
  check(form.is(Json::Kind::array) && form.items.size() == 2, "outputs are damaged");
  const std::string& kind = form.items[0].string;
  const Json& inside = form.items[1];
  check(inside.is(kind == "dict" ? Json::Kind::object : Json::Kind::array), "outputs are damaged");
  check(kind == "tuple" || kind == "list" || kind == "dict", "outputs are damaged");
  std::size_t numbers = 0;
  for (const Json& part : inside.items) numbers += numbers_of(part);
  for (const Json::Member& part : inside.members) numbers += numbers_of(part.value);
  return numbers;
}

void check_peaks(const Graph& graph) {
  const std::vector<int> sent = known_peaks(graph);
  for (const Node& node : graph.nodes) {
    const auto* a = std::get_if<Spiking>(&node.layer);
    if (a == nullptr) continue;
    for (std::size_t i = 0; i < a->sources.size() + a->residuals.size(); ++i) {
      const int said = i < a->sources.size() ? a->sources[i].peak : a->residuals[i - a->sources.size()].peak;
      check(said >= sent[static_cast<std::size_t>(node.inputs[i])],
            node.name + ": peaks are less than what its inputs can send");
    }
  }
}

}    // namespace

std::int64_t Graph::spiking_layers() const { return std::count_if(nodes.begin(), nodes.end(), has_neurons); }

std::int64_t NeuronMode::steps(std::int64_t T) const {
  if (mode == Mode::sum) return 1;
  return looks_ahead() ? std::max<std::int64_t>(T, window) : T;
}

std::vector<int> known_peaks(const Graph& graph) {
  std::vector<int> sent;
  for (const Node& node : graph.nodes) {
    std::int64_t peak = 1;
    if (const auto* a = std::get_if<Pooling>(&node.layer)) {
      const PoolSpec& pool = a->pool;
      peak = sent[static_cast<std::size_t>(node.inputs[0])];
      const std::int64_t window = pool.max || pool.depends_on_size() ? 1 : largest_value(pool);
      peak = std::min(peak * std::min(window, max_peak), max_peak);
    } else if (std::holds_alternative<Concat>(node.layer)) {
      for (const int input : node.inputs) peak = std::max<std::int64_t>(peak, sent[static_cast<std::size_t>(input)]);
    }
    sent.push_back(static_cast<int>(peak));
  }
  return sent;
}

std::int64_t max_steps(const Graph& graph, const NeuronMode& neuron) {
  const auto settle = [&](bool condition, const Node& node, const char* what) {
    require(condition, Fault::argument, [&] { return "layer " + node.name + what; });
  };
  std::int64_t most = unbounded_steps;
  bool layers = false;
  for (const Node& node : graph.nodes) {
    const auto* encoding = std::get_if<Encoding>(&node.layer);
    const auto* spiking = std::get_if<Spiking>(&node.layer);
    if (encoding == nullptr && spiking == nullptr) continue;
    layers = true;
    most = std::min(most, node.max_T);
    const bool causal = neuron.mode == Mode::plain || neuron.mode == Mode::with_sign;
    const std::int64_t bias_steps = spiking != nullptr ? spiking->bias_steps : encoding->bias_steps;
    settle(causal || bias_steps == 0, node, " has a bias for each step, which only plain and signed neurons take");
    if (spiking == nullptr) continue;
    if (neuron.mode == Mode::offset || neuron.mode == Mode::sum) {
      most = std::min(most, overflow_free_steps(*spiking, neuron));
    }
    if (neuron.mode == Mode::with_sign) {
      const std::size_t digits = spiking->weights.empty() ? 1 : spiking->weights[0].size();
      settle(2 * spiking->sources.size() * digits <= max_products && 2 * spiking->residuals.size() <= max_residuals,
             node, " sums more than 32 inputs, and signed neurons send two kinds of spikes");
    }
  }
  if (neuron.mode == Mode::sum) most = std::min(most, max_count);
  require(!neuron.looks_ahead() || !layers || most >= neuron.window, Fault::argument, [&] {
    return "a window of " + std::to_string(neuron.window) + " steps is beyond the overflow bound of " +
           std::to_string(most) + " steps";
  });
  return most;
}

Graph read_graph(const std::string& header, const Tensors& tensors) {
  const Json json = Json::parse(header, true);
  const Fields f(json);
  const std::int64_t version = f.whole("format_version", 1, INT64_MAX);
  check(version <= format_version, "written in format " + std::to_string(version) +
                                       ", this version of qcfs_fast reads up to " + std::to_string(format_version) +
                                       "; upgrade qcfs_fast");
  check(!f.has("tail"), "ends with a function of its logits (tail), which only Python computes");
  Graph graph{};
  graph.weight_bits = static_cast<int>(f.whole("weight_bits", 8, 24));
  check(graph.weight_bits % 8 == 0, "weight_bits is not 8, 16 or 24");
  graph.T = f.whole("T", 1, INT64_MAX);
  if (!f.null("input_shape")) graph.input_shape = f.wholes("input_shape", 1, max_extent);
  graph.neuron = read_neuron(f);
  std::set<std::string> unclaimed;
  for (const auto& [name, tensor] : tensors) unclaimed.insert(name);
  for (const Json& node : f.list("graph")) graph.nodes.push_back(read_node(node, graph, tensors, unclaimed));
  check(unclaimed.empty(), "unknown tensor " + (unclaimed.empty() ? "" : *unclaimed.begin()));
  check(!graph.nodes.empty(), "the graph is missing");
  const auto outputs = std::count_if(graph.nodes.begin(), graph.nodes.end(),
                                     [](const Node& node) { return std::holds_alternative<Answer>(node.layer); });
  check(outputs < 2, "has " + std::to_string(outputs) +
                         " outputs; libqcfs runs networks with one output. Remedy: convert and save a model that "
                         "returns one of them alone");
  check(!f.has("outputs") || f.null("outputs") || numbers_of(*json.find("outputs")) > 0, "outputs are damaged");
  if (f.has("metadata")) f.at("metadata", Json::Kind::object);
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    const bool last = i + 1 == graph.nodes.size();
    check(std::holds_alternative<Answer>(graph.nodes[i].layer) == last,
          "the last node, and no other, must be the readout");
  }
  check_channels(graph);
  check_peaks(graph);
  const Json& said = f.at("details", Json::Kind::object);
  for (Node& node : graph.nodes) {
    if (has_neurons(node)) read_details(Fields(said), node);
  }
  check(graph.spiking_layers() == static_cast<std::int64_t>(said.members.size()),
        "the layers' details do not match the graph");
  const std::vector<std::int64_t>& shape = graph.input_shape;
  check(f.null("input_shape") || (shape.size() == (graph.image().vector ? 1 : 3) && shape[0] == graph.image().channels),
        "input_shape is none that the image input takes");
  check(!graph.image().line || f.null("input_shape") || shape[1] == 1, "input_shape is no line, [C, 1, L]");
  try {
    check(graph.T <= max_steps(graph, graph.neuron), "T=" + std::to_string(graph.T) + " is beyond the overflow bound");
  } catch (const Error& error) {
    throw Error(Fault::format, error.what());
  }
  return graph;
}

}    // namespace qcfs::network
