// Walks the graph once and turns each node into steps (plan.h). The operands are those that qcfs_fast/network/layers.py
// hands to the operators, so the same kernels compute the same bytes; a test compares the two for every network.
#include "network/plan.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <utility>

#include "network/error.h"
#include "network/memory.h"
#include "network/steps.h"

namespace qcfs::network {
namespace {

constexpr std::int64_t max_bytes_of_value = std::int64_t{1} << 46;
constexpr std::int64_t image_range = 31;        // thresholds: limits.py
constexpr std::int64_t max_listed = 1 << 29;    // limits.py
constexpr std::size_t max_terms = 64;           // of the readout
constexpr Geometry pointwise = {1, 1, 1, 1, 0, 0, 1, 1, 1};

void fits(bool condition, const std::string& what) { require(condition, Fault::shape, what); }

// A product of sizes, each of which is at least 0.
std::int64_t bounded(const std::vector<std::int64_t>& sizes) {
  std::int64_t all = 1;
  for (const std::int64_t size : sizes) {
    const bool too_large = __builtin_mul_overflow(all, size, &all) || all > max_bytes_of_value;
    require(!too_large, Fault::out_of_memory, "the images are too large");
  }
  return all;
}

std::int64_t mask_planes(std::int64_t steps) { return (steps + 7) / 8; }

// What a node sends: maps [planes, N, H, W, C] of spikes, those of signed neurons as two of them.
struct Value {
  Slot positive = 0, negative = 0;
  bool with_sign = false;
  Coding coding = Coding::mask;
  bool vector = false;    // H and W are 1, and no convolution or pool may read it
  std::int64_t planes = 0, batch = 0, height = 0, width = 0, channels = 0;
  std::int64_t peak = 1;    // the largest integer of a step; totals (sum) can be T times as large

  std::int64_t elements() const { return bounded({batch, height, width, channels}); }
  std::int64_t bytes() const { return bounded({planes, elements()}); }
  std::int64_t held_bytes() const { return bytes() * (with_sign ? 2 : 1); }
  // That of `rows` integers for each, as Python's tensors have it.
  std::vector<std::int64_t> shape(std::int64_t rows) const {
    if (vector) return {rows, batch, channels};
    return {rows, batch, height, width, channels};
  }
};

struct ImageValue {
  Slot integers = 0, exponents = 0;
  std::int64_t images = 0;    // N, or T * N
  std::int64_t height = 0, width = 0;
};

std::int64_t out_size(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                      std::int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

std::pair<std::int64_t, std::int64_t> convolved_size(std::int64_t height, std::int64_t width, std::int64_t channels,
                                                     const std::vector<std::int64_t>& weight, const Geometry& g) {
  fits(weight.size() == 4 && weight[0] == g.kernel_h && weight[1] == g.kernel_w,
       "a weight is not of its kernel's size");
  fits(channels > 0 && weight[2] <= channels && weight[2] * g.groups == channels && weight[3] % g.groups == 0,
       "a weight does not fit " + std::to_string(channels) + " input channels");
  const bool inside =
      height + 2 * g.pad_h > g.dilation_h * (g.kernel_h - 1) && width + 2 * g.pad_w > g.dilation_w * (g.kernel_w - 1);
  fits(inside, "the input of " + std::to_string(height) + "x" + std::to_string(width) +
                   " is smaller than the kernel; use larger images");
  return {out_size(height, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
          out_size(width, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w)};
}

// ---------------------------------------------------------------------------------------------------------- the walk

class Builder {
 public:
  Builder(const Graph& graph, const Request& request) : graph_(graph), r_(request) {
    plan_.request = request;
    steps_ = r_.neuron.steps(r_.T);
  }

  Plan build(std::size_t max_bytes) {
    check_request();
    int place = 0;
    for (const Node& node : graph_.nodes) {
      try {
        Value sent;
        if (const auto* a = std::get_if<ImageInput>(&node.layer)) {
          quantize(*a);
          for (const PoolSpec& spec : a->moves) move(spec);
        }
        if (const auto* a = std::get_if<Encoding>(&node.layer)) sent = encode(*a);
        if (const auto* a = std::get_if<Spiking>(&node.layer)) sent = fire(*a, node, place++);
        if (const auto* a = std::get_if<Pooling>(&node.layer)) sent = pooled(input(node, 0), a->pool);
        if (std::holds_alternative<Concat>(node.layer)) sent = concatenated(node);
        if (const auto* a = std::get_if<Answer>(&node.layer)) answer(*a, node);
        values_.push_back(sent);
      } catch (const Error& error) {
        throw Error(error.fault, node.name + ": " + error.what());
      }
    }
    plan_.held = most_held();
    plan_.memory = memory_.place();
    require(plan_.memory.bytes <= max_bytes, Fault::out_of_memory,
            "a run needs " + std::to_string(plan_.memory.bytes) + " bytes; use a smaller batch");
    return std::move(plan_);
  }

 private:
  void check_request() const {
    const std::int64_t most = max_steps(graph_, r_.neuron);
    const auto asked = [](bool condition, const std::string& what) { require(condition, Fault::argument, what); };
    asked(1 <= r_.T && r_.T <= most, "T=" + std::to_string(r_.T) +
                                         " is not within 1 and this network's overflow bound of " +
                                         std::to_string(most) + " steps; convert again with a larger max_T");
    asked(0 <= r_.skip && r_.skip < r_.T, "skip must leave at least one step");
    asked(r_.neuron.mode != Mode::sum || !(r_.per_step || r_.skip != 0 || r_.varying || r_.going_on),
          "sum mode is an integer ANN, which has no steps");
    asked(!r_.varying || steps_ == r_.T, "the images over time have fewer steps than the neurons' window");
    asked(!r_.going_on || (r_.skip == 0 && !r_.neuron.looks_ahead()),
          "neurons that look at later steps have no state to go on from");
    const ImageInput& image = graph_.image();
    fits(r_.batch >= 0 && r_.batch <= max_extent && 1 <= r_.height && r_.height <= max_extent && 1 <= r_.width &&
             r_.width <= max_extent && (!image.vector || (r_.height == 1 && r_.width == 1)),
         "the images' shape is none that a network takes");
  }

  // -------------------------------------------------------------------------------------------------------- memory

  // A node's spikes are held until the last node that reads them has run. loading.py computes the same.
  std::int64_t most_held() const {
    std::vector<std::size_t> last(values_.size());
    for (std::size_t i = 0; i < values_.size(); ++i) {
      for (const int from : graph_.nodes[i].inputs) last[static_cast<std::size_t>(from)] = i;
    }
    std::int64_t held = 0, most = 0;
    for (std::size_t i = 0; i < values_.size(); ++i) {
      held += values_[i].held_bytes();
      most = std::max(most, held);
      const std::vector<int>& inputs = graph_.nodes[i].inputs;
      for (const int from : std::set<int>(inputs.begin(), inputs.end())) {
        if (last[static_cast<std::size_t>(from)] == i) held -= values_[static_cast<std::size_t>(from)].held_bytes();
      }
    }
    return most;
  }

  // A slot that lives from the step that is made next.
  Slot take(std::int64_t bytes) {
    plan_.largest = std::max(plan_.largest, bytes);
    taken_ = bounded({taken_ + bytes});    // so that no sum of places leaves 64 bits
    return memory_.take(static_cast<std::size_t>(bytes), plan_.steps.size());
  }

  Slot take_integers(std::int64_t count) { return take(bounded({count, 4})); }

  // A slot that a later call finds as this one left it.
  Slot keep_integers(std::string what, std::vector<std::int64_t> shape) {
    const Slot slot = take_integers(bounded(shape));
    memory_.keep(slot);
    const std::string& node = graph_.nodes[values_.size()].name;    // that is being planned
    plan_.kept.push_back({node, std::move(what), std::move(shape), slot});
    return slot;
  }

  // The step that is made next reads these.
  void read(std::initializer_list<Slot> slots) {
    for (const Slot slot : slots) memory_.read(slot, plan_.steps.size());
  }

  template <typename Step>
  void step(Step&& made) {
    plan_.steps.emplace_back(std::forward<Step>(made));
  }

  template <typename Make>
  const std::int32_t* integers(std::int64_t count, const Make& make) {
    std::vector<std::int32_t>& made = plan_.integers.emplace_back(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < made.size(); ++i) made[i] = make(i);
    return made.data();
  }

  template <typename Make>
  const double* doubles(std::int64_t count, const Make& make) {
    std::vector<double>& made = plan_.doubles.emplace_back(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < made.size(); ++i) made[i] = make(i);
    return made.data();
  }

  const Value& input(const Node& node, std::size_t i) const {
    return values_[static_cast<std::size_t>(node.inputs[i])];
  }

  // --------------------------------------------------------------------------------------------------------- image

  // Images over time get one exponent for all steps of a sample: they are quantised as one image of T * H rows.
  void quantize(const ImageInput& a) {
    const std::int64_t T = r_.varying ? r_.T : 1, rows = bounded({T, r_.height}), C = a.source.count();
    const std::int64_t row = bounded({r_.width, C}), sample = bounded({rows, row});
    image_.images = bounded({T, r_.batch});
    image_.height = r_.height;
    image_.width = r_.width;
    Quantize q{};
    q.batch = r_.batch;
    q.height = rows;
    q.width = r_.width;
    q.channels = C;
    q.largest = (std::int32_t{1} << (a.bits - 1)) - 1;
    q.source = a.source.as<std::int64_t>();
    q.scale = a.scale.as<float>();
    q.shift = a.shift.as<float>();
    const Slot integers = take_integers(bounded({r_.batch, sample})), exponents = take_integers(r_.batch);
    if (!r_.varying) {
      image_.integers = integers;
      image_.exponents = exponents;
      step([=](const Frame& f) {
        if (f.image.data == nullptr) return Status::ok;
        Quantize now = q;
        now.x = f.image.data;
        now.stride_n = f.image.sample;
        now.stride_c = f.image.channel;
        now.stride_h = f.image.row;
        now.stride_w = f.image.column;
        now.out = f.at<std::int32_t>(integers);
        now.exponent = f.at<std::int32_t>(exponents);
        return cpu::quantize(now, f.options);
      });
      return;
    }
    const std::int64_t channels = a.channels, height = r_.height, width = r_.width, batch = r_.batch;
    const Slot gathered = take_integers(bounded({batch, channels, rows, width}));    // float32, as large
    step([=](const Frame& f) {
      float* to = f.at<float>(gathered);
      for (std::int64_t n = 0; n < batch; ++n) {
        for (std::int64_t c = 0; c < channels; ++c) {
          for (std::int64_t i = 0; i < rows; ++i) {
            const float* from = f.image.data + i / height * f.image.step + n * f.image.sample + c * f.image.channel +
                                i % height * f.image.row;
            for (std::int64_t j = 0; j < width; ++j) *to++ = from[j * f.image.column];
          }
        }
      }
      Quantize now = q;
      now.x = f.at<float>(gathered);
      now.stride_w = 1;
      now.stride_h = width;
      now.stride_c = rows * width;
      now.stride_n = channels * now.stride_c;
      now.out = f.at<std::int32_t>(integers);
      now.exponent = f.at<std::int32_t>(exponents);
      return cpu::quantize(now, f.options);
    });
    read({integers, exponents});
    image_.integers = take_integers(bounded({batch, sample}));
    image_.exponents = take_integers(image_.images);
    const std::int64_t frame = bounded({height, row});
    const ImageValue to = image_;
    step([=](const Frame& f) {
      for (std::int64_t i = 0; i < to.images; ++i) {
        const std::int64_t t = i / batch, n = i % batch;
        std::memcpy(f.at<std::int32_t>(to.integers) + i * frame, f.at<std::int32_t>(integers) + n * sample + t * frame,
                    static_cast<std::size_t>(frame) * sizeof(std::int32_t));
        f.at<std::int32_t>(to.exponents)[i] = f.at<std::int32_t>(exponents)[n];
      }
      return Status::ok;
    });
  }

  // Pads, crops or enlarges the image: each pixel of the new one is a pixel of it, or zeros.
  void move(const PoolSpec& spec) {
    const std::int64_t C = graph_.image().source.count();
    const ImageValue from = image_;
    const auto windows = std::make_shared<const Windows>(windows_of(spec, from.height, from.width));
    image_.height = windows->out_h();
    image_.width = windows->out_w();
    read({from.integers});
    image_.integers = take_integers(bounded({image_.images, image_.height, image_.width, C}));
    const Slot integers = image_.integers;
    step([=](const Frame& f) {
      if (f.image.data == nullptr) return Status::ok;
      std::int32_t* to = f.at<std::int32_t>(integers);
      const std::int32_t* x = f.at<std::int32_t>(from.integers);
      const std::vector<std::int64_t>&rows = windows->rows, &cols = windows->cols;
      for (std::int64_t n = 0; n < from.images; ++n, x += from.height * from.width * C) {
        for (std::size_t i = 0; i < rows.size(); i += 3) {
          for (std::size_t j = 0; j < cols.size(); j += 3, to += C) {
            const bool there = rows[i] < rows[i + 1] && cols[j] < cols[j + 1];
            if (there) std::copy_n(x + (rows[i] * from.width + cols[j]) * C, C, to);
            if (!there) std::fill_n(to, C, 0);
          }
        }
      }
      return Status::ok;
    });
  }

  // One convolution of the image: its current, or with `steps` the masks of plain neurons on it.
  AnalogConv analog_conv(const Geometry& g, const Tensor& weight) const {
    AnalogConv a{};
    a.batch = image_.images;
    a.in_h = image_.height;
    a.in_w = image_.width;
    a.in_channels = graph_.image().source.count();
    std::tie(a.out_h, a.out_w) = convolved_size(a.in_h, a.in_w, a.in_channels, weight.shape, g);
    a.out_channels = weight.shape[3];
    a.weight = weight.as<std::int16_t>();
    a.g = g;
    return a;
  }

  std::int64_t out_elements(const AnalogConv& a) const { return bounded({a.batch, a.out_h, a.out_w, a.out_channels}); }

  // The current of the image, int32 [N or T * N, OH, OW, O]; `value` gets its size.
  Slot image_current(const Current& c, const Tensor& threshold, const std::int32_t* low, const std::int32_t* high,
                     Value& value) {
    AnalogConv a = analog_conv(c.geometry, c.weight);
    const std::int64_t O = a.out_channels, count = out_elements(a);
    const bool keeps = r_.going_on && !r_.varying;
    value.batch = r_.batch;
    value.height = a.out_h;
    value.width = a.out_w;
    value.channels = O;
    const auto convolve = [&](const AnalogConv& conv, Slot to) {
      read({image_.integers, image_.exponents});
      step(AnalogStep{conv, image_.integers, image_.exponents, to, keeps});
    };
    // A run that goes on keeps room for it even where each step has an image, so that all its plans agree on the
    // places.
    const std::vector<std::int64_t> of_one{r_.batch, a.out_h, a.out_w, O};
    if (r_.going_on && !keeps) keep_integers("current", of_one);
    const Slot current = keeps ? keep_integers("current", of_one) : take_integers(count);
    a.gain = c.gain.as<double>();
    a.offset = c.offset.as<double>();
    a.low = low;
    a.high = high;
    if (c.weight_low.data == nullptr) {
      convolve(a, current);
      return current;
    }
    // The last digit's share is the error of 16-bit weights. Half a threshold is far beyond it, and leaves the sum in
    // 32 bits.
    const std::int32_t* n = threshold.as<std::int32_t>();
    AnalogConv last = a;
    last.weight = c.weight_low.as<std::int16_t>();
    last.offset = doubles(O, [](std::size_t) { return 0.0; });
    last.low = integers(O, [&](std::size_t i) { return -(n[i] / 2); });
    last.high = integers(O, [&](std::size_t i) { return n[i] / 2; });
    a.gain = doubles(O, [&](std::size_t i) { return c.gain.as<double>()[i] * 256; });
    convolve(a, current);
    const Slot share = take_integers(count);
    convolve(last, share);
    read({current, share});
    step([=](const Frame& f) {
      if (keeps && f.image.data == nullptr) return Status::ok;
      std::int32_t* sum = f.at<std::int32_t>(current);
      const std::int32_t* more = f.at<std::int32_t>(share);
      for (std::int64_t i = 0; i < count; ++i) {
        sum[i] = std::max(low[i % O], std::min(high[i % O], sum[i] + more[i]));
      }
      return Status::ok;
    });
    return current;
  }

  // -------------------------------------------------------------------------------------------------------- neurons

  Value encode(const Encoding& a) {
    const bool constant = !r_.going_on && !r_.varying && r_.neuron.mode != Mode::masked && a.bias_steps == 0;
    if (!constant) return encoded_by_current(a, r_.neuron, steps_);
    // On an image that stays the same there is nothing to mend for other modes: such neurons are plain ones.
    const bool sum = r_.neuron.mode == Mode::sum;
    const std::int64_t steps = sum ? r_.T : steps_;
    Value sent;
    if (a.current.weight_low.data != nullptr) {
      sent = encoded_by_current(a, {}, steps);
    } else {
      AnalogConv conv = analog_conv(a.current.geometry, a.current.weight);
      conv.steps = steps;
      conv.gain = a.current.gain.as<double>();
      conv.offset = a.current.offset.as<double>();
      conv.low = a.current.low.as<std::int32_t>();
      conv.high = a.current.high.as<std::int32_t>();
      conv.threshold = a.threshold.as<std::int32_t>();
      sent = map_of_masks(conv.out_h, conv.out_w, conv.out_channels, steps);
      sent.positive = take(sent.bytes());
      read({image_.integers, image_.exponents});
      step(AnalogStep{conv, image_.integers, image_.exponents, sent.positive, false});
    }
    check_vector(a.vector, sent);
    return sum ? totals(sent, steps) : sent;
  }

  Value map_of_masks(std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t steps) const {
    Value v;
    v.planes = mask_planes(steps);
    v.batch = r_.batch;
    v.height = height;
    v.width = width;
    v.channels = channels;
    return v;
  }

  static void check_vector(bool vector, Value& sent) {
    fits(!vector || (sent.height == 1 && sent.width == 1), "a linear layer's output is a map");
    sent.vector = vector;
  }

  // The spikes of any neurons on any image.
  Value encoded_by_current(const Encoding& a, const NeuronMode& neuron, std::int64_t steps) {
    const std::int32_t* n = a.threshold.as<std::int32_t>();
    const std::int64_t O = a.threshold.count();
    const auto range = [&](int sign) {
      return integers(O, [&](std::size_t i) { return static_cast<std::int32_t>(sign * image_range * n[i]); });
    };
    FireStep fire;
    Value sent;
    fire.current = image_current(a.current, a.threshold, range(-1), range(1), sent);
    fire.has_current = true;
    if (a.bias_steps > 0) {
      fire.a.bias = a.bias.as<std::int32_t>();
      fire.a.bias_step = O;
    }
    check_vector(a.vector, sent);
    return add_neurons(std::move(fire), a.threshold, sent, neuron, steps);
  }

  // Sum mode: the number of spikes of a plain neuron in T steps.
  Value totals(const Value& masks, std::int64_t steps) {
    Value sent = masks;
    const std::int64_t n = masks.elements();
    const Slot counts = take_integers(n);
    read({masks.positive});
    step([=](const Frame& f) {
      return cpu::count(
          {n, steps, 0, steps, Coding::mask, false, f.at<std::uint8_t>(masks.positive), f.at<std::int32_t>(counts)},
          f.options);
    });
    read({counts});
    sent.coding = Coding::count;
    sent.planes = 1;
    sent.positive = take(n);
    const Slot out = sent.positive;
    step([=](const Frame& f) {
      std::copy_n(f.at<std::int32_t>(counts), n, f.at<std::uint8_t>(out));
      return Status::ok;
    });
    return sent;
  }

  Value fire(const Spiking& a, const Node& node, int place) {
    const bool with_sign = r_.neuron.mode == Mode::with_sign;
    FireStep fire;
    fire.layer = &a;
    fire.place = place;
    Value sent;
    bool first = true;
    const auto agree = [&](std::int64_t batch, std::int64_t height, std::int64_t width, const char* what) {
      fits(first || (sent.batch == batch && sent.height == height && sent.width == width),
           std::string(what) + " has another size than the layer's other inputs");
      first = false;
      sent.batch = batch;
      sent.height = height;
      sent.width = width;
      sent.channels = a.threshold.count();
    };
    const std::size_t digits = a.weights.empty() ? 1 : a.weights[0].size();
    for (std::size_t d = 0; d < digits; ++d) {
      for (std::size_t i = 0; i < a.sources.size(); ++i) {
        const Source& s = a.sources[i];
        const Value x = source_value(input(node, i), a.vector, s.peak);
        const Tensor& weight = a.weights[static_cast<std::size_t>(s.weight)][d];
        std::vector<std::int64_t> shape = weight.shape;
        if (a.vector) shape.insert(shape.begin(), {1, 1});
        const Geometry g = a.vector ? pointwise : s.geometry;
        const auto [oh, ow] = convolved_size(x.height, x.width, x.channels, shape, g);
        agree(x.batch, oh, ow, "a source");
        const int bytes = weight.dtype == Dtype::i8 ? 1 : 2;
        const std::int32_t scale = digits == 3 ? (d == 0 ? 65536 : d == 1 ? 256 : 1) : bytes == 1 ? 256 : 1;
        add_product(fire, {{nullptr, x.coding, x.height, x.width, x.channels}, weight.data, bytes, scale, g},
                    x.positive);
        if (with_sign && x.with_sign) {
          add_product(fire, {{nullptr, x.coding, x.height, x.width, x.channels}, weight.data, bytes, -scale, g},
                      x.negative);
        }
      }
    }
    for (std::size_t i = 0; i < a.residuals.size(); ++i) {
      const Amplitude& amplitude = a.residuals[i];
      const Value& x = input(node, a.sources.size() + i);
      check_peak(x, amplitude.peak);
      fits(a.vector || !x.vector, "a vector is added to a map");
      fits(x.channels == a.threshold.count(), "a residual has other channels than the layer");
      agree(x.batch, x.height, x.width, "a residual");
      const std::int32_t* values = amplitude.values.as<std::int32_t>();
      add_residual(fire, x, values, x.positive);
      if (with_sign && x.with_sign) {
        add_residual(fire, x, integers(x.channels, [&](std::size_t c) { return -values[c]; }), x.negative);
      }
    }
    if (a.analog) {
      Value size;
      fire.current = image_current(*a.analog, a.threshold, a.analog->low.as<std::int32_t>(),
                                   a.analog->high.as<std::int32_t>(), size);
      fire.has_current = true;
      agree(size.batch, size.height, size.width, "the image's current");
    }
    fits(!a.vector || (sent.height == 1 && sent.width == 1), "a map is added to a linear layer's output");
    sent.vector = a.vector;
    fire.a.bias = a.bias.as<std::int32_t>();
    fire.a.bias_step = a.bias_steps > 0 ? a.threshold.count() : 0;
    return add_neurons(std::move(fire), a.threshold, sent, r_.neuron, steps_);
  }

  static void check_peak(const Value& x, int said) {
    fits(x.peak <= said, "an input can send " + std::to_string(x.peak) + ", but its peak is " + std::to_string(said) +
                             "; convert again with input_shape= set to this image size");
  }

  // A source as the layer reads it: a linear layer takes a map as one row of values.
  Value source_value(Value x, bool vector, int peak) const {
    check_peak(x, peak);
    if (vector) {
      x.channels = bounded({x.height, x.width, x.channels});
      x.height = x.width = 1;
    } else {
      fits(!x.vector, "a convolution reads a vector");
    }
    fits(bounded({x.width, x.channels, steps_}) < max_listed, "a row has too many inputs; use smaller images");
    return x;
  }

  void add_product(FireStep& fire, const Product& p, Slot x) {
    fire.inputs.insert(fire.inputs.begin() + static_cast<std::ptrdiff_t>(fire.products.size()), x);
    fire.products.push_back(p);
  }

  void add_residual(FireStep& fire, const Value& x, const std::int32_t* amplitude, Slot slot) {
    fire.residuals.push_back({nullptr, x.coding, amplitude});
    fire.inputs.push_back(slot);
  }

  // The end of a layer: its neurons. `size` is that of the map.
  Value add_neurons(FireStep fire, const Tensor& threshold, const Value& size, const NeuronMode& neuron,
                    std::int64_t steps) {
    Value sent = map_of_masks(size.height, size.width, size.channels, steps);
    sent.vector = size.vector;
    const std::int64_t neurons = sent.elements(), mask_bytes = sent.bytes();
    ConvIf& a = fire.a;
    a.batch = sent.batch;
    a.out_h = sent.height;
    a.out_w = sent.width;
    a.out_channels = sent.channels;
    a.steps = steps;
    a.neuron = {neuron.mode, 0, 0, 0};
    if (neuron.looks_ahead()) a.neuron = {neuron.mode, neuron.window, neuron.iterations, 0};
    if (neuron.mode == Mode::sum) a.neuron.levels = static_cast<int>(r_.T);
    a.product_count = static_cast<int>(fire.products.size());
    a.residual_count = static_cast<int>(fire.residuals.size());
    a.current_step = fire.has_current && r_.varying ? neurons : 0;
    a.threshold = threshold.as<std::int32_t>();
    for (const Slot x : fire.inputs) read({x});
    if (fire.has_current) read({fire.current});
    const bool with_sign = neuron.mode == Mode::with_sign;
    if (r_.going_on) {
      fire.state = keep_integers("state", sent.shape(with_sign ? 2 : 1));
      fire.has_state = true;
    }
    if (neuron.mode == Mode::sum) sent.coding = Coding::count;
    fire.out = take((with_sign ? 2 : 1) * mask_bytes);
    sent.positive = fire.out;
    sent.with_sign = with_sign;
    step(std::move(fire));
    return with_sign ? halves(sent, mask_bytes) : sent;
  }

  // Masks of positive spikes and then those of negative ones, as two slots.
  Value halves(Value both, std::int64_t bytes) {
    const Slot whole = both.positive, negative = take(bytes);
    read({whole});
    both.negative = negative;
    step([=](const Frame& f) {
      std::memcpy(f.at<char>(negative), f.at<char>(whole) + bytes, static_cast<std::size_t>(bytes));
      return Status::ok;
    });
    return both;
  }

  // ------------------------------------------------------------------------------------- pools and concatenations

  Value pooled(const Value& x, const PoolSpec& spec) {
    fits(!x.vector, "a pool reads a vector");
    const auto windows = std::make_shared<const Windows>(windows_of(spec, x.height, x.width));
    Value sent = x;
    sent.height = windows->out_h();
    sent.width = windows->out_w();
    if (spec.max) {
      sent.positive = add_pool(x, x.positive, sent, windows,
                               r_.neuron.mode == Mode::sum ? qcfs::Pooling::largest : qcfs::Pooling::any, 0);
      if (x.with_sign && spec.moves()) {    // one spike of either sign, or none
        sent.negative = add_pool(x, x.negative, sent, windows, qcfs::Pooling::any, 0);
      } else if (x.with_sign) {
        // All spikes of a window are negative where in no place of it the negative spike is missing.
        const Slot missing = add_complement(x.negative, x.bytes(), 0xff);
        const Slot somewhere = add_pool(x, missing, sent, windows, qcfs::Pooling::any, 0);
        const int left = static_cast<int>(steps_ % 8);
        sent.negative = add_complement(somewhere, sent.bytes(), left == 0 ? 0xff : (1 << left) - 1);
      }
      return sent;
    }
    sent.peak = bounded({x.peak, std::min(largest_value(*windows, spec.multiple), max_bytes_of_value)});
    const std::int64_t most = bounded({sent.peak, r_.neuron.mode == Mode::sum ? r_.T : 1});
    fits(most <= 255,
         "a window's value can reach " + std::to_string(most) + ", but counts hold at most 255; pool in two stages");
    sent.coding = Coding::count;
    sent.planes = steps_;
    sent.positive = add_pool(x, x.positive, sent, windows, qcfs::Pooling::sum, spec.multiple);
    if (x.with_sign) sent.negative = add_pool(x, x.negative, sent, windows, qcfs::Pooling::sum, spec.multiple);
    return sent;
  }

  // One kind of spikes of x, pooled. A maximum is taken plane by plane, whatever a byte holds.
  Slot add_pool(const Value& x, Slot from, const Value& size, const std::shared_ptr<const Windows>& windows,
                qcfs::Pooling pooling, std::int64_t multiple) {
    const bool sums = pooling == qcfs::Pooling::sum;
    const Pool pool{x.batch,
                    x.height,
                    x.width,
                    x.channels,
                    size.height,
                    size.width,
                    sums ? steps_ : x.planes,
                    sums ? x.coding : Coding::count,
                    pooling,
                    nullptr,
                    nullptr,
                    multiple,
                    nullptr,
                    nullptr};
    const Slot out = take(size.bytes());
    read({from});
    step([=](const Frame& f) {
      Pool now = pool;
      now.rows = windows->rows.data();
      now.cols = windows->cols.data();
      now.x = f.at<std::uint8_t>(from);
      now.out = f.at<std::uint8_t>(out);
      return cpu::pool(now, f.options);
    });
    return out;
  }

  // ~x; `last` are the bits of the last plane that stand for steps.
  Slot add_complement(Slot x, std::int64_t bytes, int last) {
    const Slot out = take(bytes);
    const std::int64_t plane = bytes / mask_planes(steps_);
    read({x});
    step([=](const Frame& f) {
      const std::uint8_t* from = f.at<std::uint8_t>(x);
      for (std::int64_t i = 0; i < bytes; ++i) {
        f.at<std::uint8_t>(out)[i] = static_cast<std::uint8_t>(~from[i] & (i < bytes - plane ? 0xff : last));
      }
      return Status::ok;
    });
    return out;
  }

  Value concatenated(const Node& node) {
    Value sent = input(node, 0);
    sent.channels = 0;
    sent.with_sign = false;
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      const Value& x = input(node, i);
      fits(x.planes == sent.planes && x.batch == sent.batch && x.height == sent.height && x.width == sent.width &&
               x.vector == sent.vector,
           "its inputs have several sizes");
      sent.channels += x.channels;
      sent.with_sign |= x.with_sign;
      sent.peak = std::max(sent.peak, x.peak);
      if (x.coding == Coding::count) sent.coding = Coding::count;    // of one step masks and counts look alike
    }
    sent.positive = add_concat(node, sent, &Value::positive);
    if (sent.with_sign) sent.negative = add_concat(node, sent, &Value::negative);
    return sent;
  }

  Slot add_concat(const Node& node, const Value& size, Slot Value::* kind) {
    const Slot out = take(size.bytes());
    std::int64_t first = 0;
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      const Value& x = input(node, i);
      const bool none = kind == &Value::negative && !x.with_sign;
      const std::int64_t from_channels = x.channels, to_channels = size.channels, at = first;
      const std::int64_t pixels = x.bytes() / std::max<std::int64_t>(1, from_channels);
      const Slot from = x.*kind;
      read({out});
      if (!none) read({from});
      step([=](const Frame& f) {
        for (std::int64_t p = 0; p < pixels; ++p) {
          std::uint8_t* to = f.at<std::uint8_t>(out) + p * to_channels + at;
          if (none) {
            std::memset(to, 0, static_cast<std::size_t>(from_channels));
          } else {
            std::memcpy(to, f.at<std::uint8_t>(from) + p * from_channels, static_cast<std::size_t>(from_channels));
          }
        }
        return Status::ok;
      });
      first += from_channels;
    }
    return out;
  }

  // --------------------------------------------------------------------------------------------------------- answer

  // What a term reads: int32 counts [answers, N, H, W, C] behind the average pools.
  struct Counts {
    Slot slot;
    std::int64_t height, width, channels, multiple;
  };

  void answer(const Answer& a, const Node& node) {
    const std::int64_t steps = r_.neuron.mode == Mode::sum ? 1 : r_.T - r_.skip;
    plan_.answers = r_.per_step ? steps : 1;
    std::vector<Counts> counts;
    for (std::size_t i = 0; i < a.terms.size(); ++i) {
      counts.push_back(add_counts(input(node, i), a.terms[i], std::to_string(i)));
    }
    std::vector<ReadoutTerm> terms;
    std::vector<Slot> slots;
    bool first = true;
    const std::int64_t O = a.offset.count();
    const auto add = [&](std::size_t i, const Tensor& weight, const double* gain) {
      const Counts& c = counts[i];
      const bool identity = weight.count() == 0;
      const Geometry& g = a.terms[i].geometry;
      auto [oh, ow] = std::pair(c.height, c.width);
      if (!identity) std::tie(oh, ow) = convolved_size(c.height, c.width, c.channels, weight.shape, g);
      fits(!identity || c.channels == O, "a term has other channels than the answer");
      fits(first || (oh == plan_.out_h && ow == plan_.out_w), "its terms have several sizes");
      first = false;
      plan_.out_h = oh;
      plan_.out_w = ow;
      terms.push_back({nullptr, c.height, c.width, c.channels, identity ? nullptr : weight.as<std::int16_t>(), g, gain,
                       c.multiple});
      slots.push_back(c.slot);
    };
    const auto is_long = [](const Term& t) { return t.weight_low.data != nullptr && t.weight.count() > 0; };
    for (std::size_t i = 0; i < a.terms.size(); ++i) {
      const double* gain = a.terms[i].gain.as<double>();
      if (is_long(a.terms[i])) gain = doubles(O, [gain](std::size_t c) { return gain[c] * 256; });
      add(i, a.terms[i].weight, gain);
    }
    for (std::size_t i = 0; i < a.terms.size(); ++i) {
      if (is_long(a.terms[i])) add(i, a.terms[i].weight_low, a.terms[i].gain.as<double>());
    }
    fits(terms.size() <= max_terms, "it has more than " + std::to_string(max_terms) + " terms");
    plan_.out_channels = O;
    bounded({plan_.answers, r_.batch, plan_.out_h, plan_.out_w, O});
    for (const Slot s : slots) read({s});
    const std::int64_t answers = plan_.answers, N = r_.batch, T = r_.T;
    Readout readout{answers * N,
                    N,
                    plan_.out_h,
                    plan_.out_w,
                    O,
                    r_.T - r_.skip,
                    nullptr,
                    static_cast<int>(terms.size()),
                    a.offset.as<double>(),
                    nullptr};
    const bool going_on = r_.going_on, turned = r_.channel_first && !a.vector && plan_.out_h * plan_.out_w > 1;
    const std::int64_t image = plan_.out_h * plan_.out_w * O;
    const Slot maps = turned ? take_integers(answers * N * image) : 0;    // float32, as large
    step([=, terms = std::move(terms), slots = std::move(slots)](const Frame& f) {
      // Of a run that goes on, each answer stands for another number of steps: they are read out one by one.
      const std::int64_t calls = going_on ? answers : 1;
      ReadoutTerm now[max_terms];
      std::copy(terms.begin(), terms.end(), now);
      for (std::int64_t i = 0; i < calls; ++i) {
        for (std::size_t k = 0; k < terms.size(); ++k) {
          now[k].counts = f.at<std::int32_t>(slots[k]) + i * N * now[k].height * now[k].width * now[k].channels;
        }
        Readout one = readout;
        one.terms = now;
        one.out = (turned ? f.at<float>(maps) : f.out) + i * N * image;
        if (going_on) {
          one.images = N;
          one.steps = f.before + T - answers + 1 + i;
        }
        const Status status = cpu::readout(one, f.options);
        if (status != Status::ok) return status;
      }
      for (std::int64_t i = 0; turned && i < answers * N * image; ++i) {
        f.out[i - i % image + i % O * (image / O) + i % image / O] = f.at<float>(maps)[i];
      }
      return Status::ok;
    });
  }

  Counts add_counts(Value x, const Term& term, const std::string& name) {
    for (const PoolSpec& pool : term.pools) {
      if (pool.max) x = pooled(x, pool);
    }
    const std::int64_t n = x.elements();
    const Slot counted = add_count(x, x.positive, n);
    if (x.with_sign) {
      const Slot negative = add_count(x, x.negative, n);
      read({counted, negative});
      const std::int64_t all = plan_.answers * n;
      step([=](const Frame& f) {
        for (std::int64_t i = 0; i < all; ++i) f.at<std::int32_t>(counted)[i] -= f.at<std::int32_t>(negative)[i];
        return Status::ok;
      });
    }
    if (r_.going_on) add_before(counted, n, keep_integers(name, x.shape(1)));
    Counts c{counted, x.height, x.width, x.channels, 1};
    std::int64_t largest = bounded({x.peak, r_.T});
    for (const PoolSpec& pool : term.pools) {
      if (!pool.max) {
        fits(!x.vector, "a pool reads a vector");
        c = add_pool_counts(c, pool, largest);
      }
    }
    if (term.vector || x.vector) {
      c.channels = bounded({c.height, c.width, c.channels});
      c.height = c.width = 1;
    }
    return c;
  }

  // Spikes counted over the steps of the answer.
  Slot add_count(const Value& x, Slot from, std::int64_t n) {
    const bool sum = r_.neuron.mode == Mode::sum;
    const Slot out = take_integers(bounded({plan_.answers, n}));
    const Count count{n, steps_, sum ? 0 : r_.skip, sum ? 1 : r_.T, x.coding, r_.per_step, nullptr, nullptr};
    read({from});
    step([=](const Frame& f) {
      Count now = count;
      now.x = f.at<std::uint8_t>(from);
      now.out = f.at<std::int32_t>(out);
      return cpu::count(now, f.options);
    });
    return out;
  }

  // Adds the counts of the calls before, and keeps the sum for the next.
  void add_before(Slot counts, std::int64_t n, Slot kept) {
    const std::int64_t answers = plan_.answers;
    read({counts});
    step([=](const Frame& f) {
      std::int32_t *now = f.at<std::int32_t>(counts), *before = f.at<std::int32_t>(kept);
      for (std::int64_t i = 0; f.before > 0 && i < answers * n; ++i) now[i] += before[i % n];
      std::copy_n(now + (answers - 1) * n, n, before);
      return Status::ok;
    });
  }

  // `largest` is the largest count, and becomes that of the sums.
  Counts add_pool_counts(const Counts& c, const PoolSpec& spec, std::int64_t& largest) {
    const auto windows = std::make_shared<const Windows>(windows_of(spec, c.height, c.width));
    const std::int64_t multiple = common_multiple(*windows);
    largest = bounded({largest, largest_value(*windows, multiple)});
    fits(largest <= 0x7fffffff, "pooled counts can leave 32 bits");
    Counts sent{0, windows->out_h(), windows->out_w(), c.channels, bounded({c.multiple, multiple})};
    const std::int64_t images = plan_.answers * r_.batch;
    const Slot from = c.slot, out = take_integers(bounded({images, sent.height, sent.width, sent.channels}));
    const PoolCounts pool{images,  c.height, c.width,  c.channels, sent.height, sent.width,
                          nullptr, nullptr,  multiple, nullptr,    nullptr};
    read({from});
    step([=](const Frame& f) {
      PoolCounts now = pool;
      now.rows = windows->rows.data();
      now.cols = windows->cols.data();
      now.x = f.at<std::int32_t>(from);
      now.out = f.at<std::int32_t>(out);
      return cpu::pool_counts(now, f.options);
    });
    sent.slot = out;
    return sent;
  }

  const Graph& graph_;
  const Request r_;
  std::int64_t steps_ = 0;    // that layers compute
  Plan plan_{};
  Memory memory_;
  std::int64_t taken_ = 0;       // bytes of all slots
  std::vector<Value> values_;    // of the nodes
  ImageValue image_;
};

}    // namespace

Plan make_plan(const Graph& graph, const Request& request, std::size_t max_bytes) {
  return Builder(graph, request).build(max_bytes);
}

std::vector<std::string> engine_layers(const Graph& graph) {
  std::vector<std::string> names;
  for (const Node& node : graph.nodes) {
    if (std::holds_alternative<Spiking>(node.layer)) names.push_back(node.name);
  }
  return names;
}

}    // namespace qcfs::network
