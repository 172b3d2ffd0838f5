// The C interface (qcfs.h) of csrc/network. Each function is a body under `guarded`, which turns exceptions into codes.
#include "libqcfs/qcfs.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "network/error.h"
#include "network/network.h"

using qcfs::Mode;
using qcfs::network::Error;
using qcfs::network::Fault;
using qcfs::network::Image;
using qcfs::network::Network;
using qcfs::network::Plan;
using qcfs::network::Request;

struct qcfs_network {
  std::shared_ptr<Network> network;
  std::uint32_t isa = qcfs::cpu::host_isa();
};

struct qcfs_stream {
  qcfs::network::Stream stream;
  std::uint32_t isa;
};

namespace {

qcfs_status code_of(Fault fault) {
  switch (fault) {
    case Fault::argument:
      return QCFS_BAD_ARGUMENT;
    case Fault::file:
      return QCFS_BAD_FILE;
    case Fault::format:
      return QCFS_BAD_FORMAT;
    case Fault::shape:
      return QCFS_BAD_SHAPE;
    case Fault::not_finite:
      return QCFS_NOT_FINITE;
    case Fault::out_of_memory:
      return QCFS_NO_MEMORY;
  }
  return QCFS_INTERNAL;
}

template <typename Body>
qcfs_status guarded(qcfs_error* error, const Body& body) noexcept {
  const auto tell = [error](const char* text) {
    if (error != nullptr) std::snprintf(error->text, sizeof(error->text), "%s", text);
  };
  try {
    tell("");
    body();
    return QCFS_OK;
  } catch (const Error& e) {
    tell(e.what());
    return code_of(e.fault);
  } catch (const std::bad_alloc&) {
    tell("no memory");
    return QCFS_NO_MEMORY;
  } catch (const std::exception& e) {
    tell(e.what());
  } catch (...) {
    tell("an unknown error");
  }
  return QCFS_INTERNAL;
}

void given(const void* pointer, const char* name) {
  require(pointer != nullptr, Fault::argument, [&] { return std::string(name) + " is NULL"; });
}

std::vector<char> bytes_of(const char* path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
  require(file != nullptr, Fault::file, std::string(path) + " cannot be opened");
  std::vector<char> bytes;
  char part[1 << 16];
  for (std::size_t n; (n = std::fread(part, 1, sizeof(part), file.get())) > 0;) {
    bytes.insert(bytes.end(), part, part + n);
  }
  require(std::ferror(file.get()) == 0, Fault::file, std::string(path) + " cannot be read");
  return bytes;
}

qcfs_network* loaded(const void* bytes, std::size_t size) {
  qcfs::network::File file = qcfs::network::read_file(bytes, size);
  qcfs::network::Graph graph = qcfs::network::read_graph(file.header, file.tensors);
  return new qcfs_network{std::make_shared<Network>(std::move(graph), std::move(file))};
}

// What a call asks, with the defaults filled in.
struct Call {
  Call(const Network& network, const qcfs_images& images, const qcfs_options* given_options,
       std::int64_t default_steps) {
    if (given_options != nullptr) options = *given_options;
    const qcfs::network::Graph& graph = network.graph();
    require(images.channels == graph.image().channels, Fault::shape, [&] {
      return "the images have " + std::to_string(images.channels) + " channels, the network takes " +
             std::to_string(graph.image().channels);
    });
    require(images.steps >= 0 && options.steps >= 0 && options.threads >= 0, Fault::argument,
            "steps and threads must not be negative");
    const bool varying = images.steps > 0;
    const std::int64_t T = options.steps > 0 ? options.steps : varying ? images.steps : default_steps;
    require(!varying || T == images.steps, Fault::argument, [&] {
      return "the images have " + std::to_string(images.steps) + " steps, but steps=" + std::to_string(T);
    });
    request = {images.batch,          images.height, images.width, T,     graph.neuron,
               options.per_step != 0, options.skip,  varying,      false, true};
    const std::int64_t row = images.width, channel = images.height * row, sample = images.channels * channel;
    image = {images.data, images.batch * sample, sample, channel, row, 1};
  }

  std::size_t max_bytes() const {
    return options.max_bytes == 0 ? SIZE_MAX : static_cast<std::size_t>(options.max_bytes);
  }
  qcfs::cpu::Options kernels(std::uint32_t isa) const { return {isa, std::max(1, options.threads)}; }

  qcfs_options options{};
  Request request;
  Image image;
};

// Sizes bound here, before they are multiplied: what make_plan refuses must not overflow on the way to it.
void check_sizes(const qcfs_images& images) {
  for (const std::int64_t size : {images.batch, images.channels, images.height, images.width}) {
    require(size >= 0 && size <= qcfs::max_extent, Fault::shape, "a size of the images is out of range");
  }
  const std::int64_t area = images.height * images.width;    // at most 2^48
  std::int64_t all = 0;
  require(!__builtin_mul_overflow(area, images.channels, &all) && !__builtin_mul_overflow(all, images.batch, &all) &&
              all < INT64_MAX / 8,
          Fault::shape, "the images are too large");
}

qcfs_shape shape_of(const Plan& plan, const qcfs::network::Graph& graph) {
  const qcfs::network::Answer& answer = graph.answer();
  qcfs_shape shape{};
  const auto add = [&shape](std::int64_t size) { shape.sizes[shape.rank++] = size; };
  if (plan.request.per_step) add(plan.answers);
  add(plan.request.batch);
  if (answer.vector || answer.flattened) {
    add(plan.out_h * plan.out_w * plan.out_channels);
  } else {
    add(plan.out_channels);
    add(plan.out_h);
    add(plan.out_w);
  }
  shape.count = static_cast<std::size_t>(plan.out_count());
  return shape;
}

void check_count(const Plan& plan, const float* out, std::size_t count) {
  require(count == static_cast<std::size_t>(plan.out_count()), Fault::shape, [&] {
    return "out has room for " + std::to_string(count) + " floats, the answer has " + std::to_string(plan.out_count());
  });
  if (count > 0) given(out, "out");
}

}    // namespace

qcfs_status qcfs_load_file(const char* path, qcfs_network** network, qcfs_error* error) {
  return guarded(error, [&] {
    given(path, "path");
    given(network, "network");
    *network = nullptr;
    const std::vector<char> bytes = bytes_of(path);
    try {
      *network = loaded(bytes.data(), bytes.size());
    } catch (const Error& e) {
      throw Error(e.fault, std::string(path) + ": " + e.what());
    }
  });
}

qcfs_status qcfs_load_memory(const void* bytes, size_t size, qcfs_network** network, qcfs_error* error) {
  return guarded(error, [&] {
    given(network, "network");
    *network = nullptr;
    given(bytes, "bytes");
    *network = loaded(bytes, size);
  });
}

void qcfs_free(qcfs_network* network) { delete network; }

qcfs_status qcfs_describe(const qcfs_network* network, qcfs_info* info, qcfs_error* error) {
  return guarded(error, [&] {
    given(network, "network");
    given(info, "info");
    static constexpr const char* neurons[] = {"plain", "offset", "masked", "signed", "sum"};
    const qcfs::network::Graph& graph = network->network->graph();
    const std::vector<std::int64_t>& shape = graph.input_shape;    // [C, H, W] or [C]
    *info = {};
    info->channels = graph.image().channels;
    info->is_vector = graph.image().vector ? 1 : 0;
    info->height = shape.size() == 3 ? shape[1] : 0;
    info->width = shape.size() == 3 ? shape[2] : 0;
    info->classes = graph.classes();
    info->steps = graph.T;
    info->max_steps = max_steps(graph, graph.neuron);
    info->weight_bits = graph.weight_bits;
    info->neuron = neurons[static_cast<int>(graph.neuron.mode)];
    info->layers = graph.spiking_layers();
  });
}

qcfs_status qcfs_answer_shape(const qcfs_network* network, const qcfs_images* images, const qcfs_options* options,
                              qcfs_shape* shape, qcfs_error* error) {
  return guarded(error, [&] {
    given(network, "network");
    given(images, "images");
    given(shape, "shape");
    check_sizes(*images);
    Network& n = *network->network;
    const Call call(n, *images, options, n.graph().T);
    *shape = shape_of(*n.prepare(call.request, call.max_bytes()), n.graph());
  });
}

qcfs_status qcfs_run(const qcfs_network* network, const qcfs_images* images, const qcfs_options* options, float* out,
                     size_t count, qcfs_error* error) {
  return guarded(error, [&] {
    given(network, "network");
    given(images, "images");
    check_sizes(*images);
    if (images->batch > 0) given(images->data, "images->data");
    Network& n = *network->network;
    const Call call(n, *images, options, n.graph().T);
    const std::shared_ptr<const Plan> plan = n.prepare(call.request, call.max_bytes());
    check_count(*plan, out, count);
    n.run(*plan, call.image, call.kernels(network->isa), out);
  });
}

qcfs_status qcfs_stream_new(const qcfs_network* network, qcfs_stream** stream, qcfs_error* error) {
  return guarded(error, [&] {
    given(stream, "stream");
    *stream = nullptr;
    given(network, "network");
    const Mode mode = network->network->graph().neuron.mode;
    require(mode == Mode::plain || mode == Mode::with_sign, Fault::argument,
            "neurons that look at later steps, or have none, have no state to go on from");
    *stream = new qcfs_stream{qcfs::network::Stream(network->network), network->isa};
  });
}

void qcfs_stream_free(qcfs_stream* stream) { delete stream; }

qcfs_status qcfs_stream_run(qcfs_stream* stream, const qcfs_images* images, const qcfs_options* options, float* out,
                            size_t count, qcfs_error* error) {
  return guarded(error, [&] {
    given(stream, "stream");
    qcfs::network::Stream& s = stream->stream;
    Network& n = s.network();
    qcfs_images again{};    // the images of the call before
    if (images == nullptr) {
      const Request& last = s.last();
      again = {nullptr, 0, last.batch, n.graph().image().channels, last.height, last.width};
    } else {
      check_sizes(*images);
      if (images->batch > 0) given(images->data, "images->data");
    }
    Call call(n, images != nullptr ? *images : again, options, 1);
    call.request.going_on = true;
    const std::int64_t most = max_steps(n.graph(), n.graph().neuron);
    require(call.request.T <= most - s.steps(), Fault::argument, [&] {
      return "step " + std::to_string(s.steps()) + " + " + std::to_string(call.request.T) +
             " is beyond this network's bound of " + std::to_string(most) + " steps; reset the stream";
    });
    s.check(call.request, images == nullptr);
    const std::shared_ptr<const Plan> plan = n.prepare(call.request, call.max_bytes());
    check_count(*plan, out, count);
    s.run(*plan, call.image, call.kernels(stream->isa), out);
  });
}

int64_t qcfs_stream_steps(const qcfs_stream* stream) { return stream == nullptr ? 0 : stream->stream.steps(); }

void qcfs_stream_reset(qcfs_stream* stream) {
  if (stream != nullptr) stream->stream.reset();
}
