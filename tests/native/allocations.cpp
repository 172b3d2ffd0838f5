// Counts what runs of libqcfs allocate. qcfs.h promises that from the second call at a shape on it is nothing.
//
//     allocations FILE...    for each file: calls N allocated M engines NAMES
//
// glibc lets a program bring a malloc of its own. This one counts, and on demand refuses blocks, which is how a run
// meets the end of memory in its middle: a stream must then begin anew. A network runs plainly, with an answer after
// each step, with steps left out, as a stream on new images and on those of before; and beneath the interface on each
// engine, since small layers would choose few. M counts all calls but the first of each kind.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "libqcfs/qcfs.h"
#include "network/network.h"

namespace {

long allocations = 0;
bool refusing = false;

}    // namespace

extern "C" {

void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t bytes) { return ++allocations, __libc_malloc(bytes); }
void* calloc(std::size_t count, std::size_t bytes) { return ++allocations, __libc_calloc(count, bytes); }
void* realloc(void* block, std::size_t bytes) { return ++allocations, __libc_realloc(block, bytes); }
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  ++allocations;
  return refusing ? nullptr : __libc_memalign(alignment, bytes);
}
}

namespace {

constexpr int calls_of_a_kind = 4;

void expect(bool condition, const char* what, const qcfs_error& error = {}) {
  if (condition) return;
  std::fprintf(stderr, "%s: %s\n", what, error.text);
  std::exit(1);
}

struct Counted {
  long calls = 0, allocated = 0;

  template <typename Call>
  void add(const Call& call) {
    for (int i = 0; i < calls_of_a_kind; ++i) {
      const long before = allocations;
      call();
      if (i > 0) allocated += allocations - before;
      ++calls;
    }
  }
};

struct Images {
  explicit Images(const qcfs_info& info) {
    const auto side = [&](std::int64_t settled) { return info.is_vector != 0 ? 1 : settled > 0 ? settled : 12; };
    const std::int64_t height = side(info.height), width = side(info.width);
    pixels.resize(static_cast<std::size_t>(2 * info.channels * height * width));
    for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<float>(i * 37 % 101) / 25 - 2;
    images = {pixels.data(), 0, 2, info.channels, height, width};
  }

  std::vector<float> pixels;
  qcfs_images images;
};

qcfs_network* load(const char* path) {
  qcfs_error error;
  qcfs_network* network = nullptr;
  expect(qcfs_load_file(path, &network, &error) == QCFS_OK, path, error);
  return network;
}

std::vector<float> room_for(const qcfs_network* network, const Images& x, const qcfs_options& options) {
  qcfs_error error;
  qcfs_shape shape;
  expect(qcfs_answer_shape(network, &x.images, &options, &shape, &error) == QCFS_OK, "shape", error);
  return std::vector<float>(shape.count);
}

void run_by_interface(const char* path, const qcfs_info& info, const Images& x, Counted& counted) {
  qcfs_network* network = load(path);
  qcfs_error error;
  qcfs_options kinds[3] = {};
  kinds[1].per_step = 1;
  kinds[2].skip = 1;
  for (const qcfs_options& options : kinds) {
    if (std::string(info.neuron) == "sum" && &options != kinds) break;    // has no steps
    std::vector<float> out = room_for(network, x, options);
    counted.add([&] {
      expect(qcfs_run(network, &x.images, &options, out.data(), out.size(), &error) == QCFS_OK, "run", error);
    });
  }
  qcfs_stream* stream = nullptr;
  if (qcfs_stream_new(network, &stream, &error) == QCFS_OK) {
    const qcfs_options one{};
    qcfs_options longer{};
    longer.steps = 3;
    longer.per_step = 1;
    std::vector<float> out = room_for(network, x, longer);
    const std::size_t count = out.size() / 3;
    const auto go = [&](const qcfs_images* images) {
      expect(qcfs_stream_run(stream, images, &one, out.data(), count, &error) == QCFS_OK, "stream", error);
    };
    counted.add([&] {
      qcfs_stream_reset(stream);
      go(&x.images);
    });
    counted.add([&] {
      qcfs_stream_reset(stream);
      go(&x.images);
      go(nullptr);
    });
    qcfs_stream_free(stream);
  }
  qcfs_free(network);
}

// A stream whose second call finds no memory has been reset, says so, and can begin again. That call takes many steps,
// so that it needs more than the first left.
void end_of_memory(const char* path, const Images& x) {
  qcfs_network* network = load(path);
  qcfs_error error;
  qcfs_stream* stream = nullptr;
  if (qcfs_stream_new(network, &stream, &error) == QCFS_OK) {
    qcfs_options one{}, longer{};
    one.steps = 1;
    longer.steps = 64;
    longer.per_step = 1;
    std::vector<float> out = room_for(network, x, longer), again = out;
    const std::size_t count = out.size() / 64;
    const auto run = [&](const qcfs_options& options, std::vector<float>& to, std::size_t floats) {
      return qcfs_stream_run(stream, &x.images, &options, to.data(), floats, &error);
    };
    expect(run(one, out, count) == QCFS_OK, "stream", error);
    refusing = true;
    const qcfs_status status = run(longer, again, again.size());
    refusing = false;
    expect(status == QCFS_NO_MEMORY && qcfs_stream_steps(stream) == 0, "no memory", error);
    expect(std::string(error.text).find("reset") != std::string::npos, "no word of the reset", error);
    expect(run(one, again, count) == QCFS_OK, "after the end of memory", error);
    expect(std::equal(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(count), again.begin()), "another answer");
  }
  qcfs_stream_free(stream);
  qcfs_free(network);
}

void run_engines(const char* path, const Images& x, Counted& counted, std::set<std::string>& engines) {
  using namespace qcfs::network;
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  File found = read_file(bytes.data(), bytes.size());
  Graph graph = read_graph(found.header, found.tensors);
  Network network(std::move(graph), std::move(found));
  const qcfs_images& i = x.images;
  const Request request{i.batch, i.height, i.width, network.graph().T, network.graph().neuron};
  const auto plan = network.prepare(request);
  const std::int64_t row = i.width, channel = i.height * row, sample = i.channels * channel;
  std::vector<float> out(static_cast<std::size_t>(plan->out_count()));
  std::vector<std::uint8_t> taken(engine_layers(network.graph()).size());
  for (const auto engine : {qcfs::cpu::Engine::events, qcfs::cpu::Engine::dense, qcfs::cpu::Engine::table}) {
    const qcfs::cpu::Options options{qcfs::cpu::host_isa(), 1, engine};
    counted.add([&] { network.run(*plan, {i.data, 0, sample, channel, row, 1}, options, out.data(), taken.data()); });
    for (const std::uint8_t e : taken) engines.insert(engine_name(static_cast<qcfs::cpu::Engine>(e)));
  }
}

}    // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    qcfs_error error;
    qcfs_network* network = load(arguments[i]);
    qcfs_info info;
    expect(qcfs_describe(network, &info, &error) == QCFS_OK, "describe", error);
    qcfs_free(network);
    const Images x(info);
    Counted counted;
    std::set<std::string> engines;
    run_by_interface(arguments[i], info, x, counted);
    run_engines(arguments[i], x, counted, engines);
    if (info.max_steps > 64) end_of_memory(arguments[i], x);
    std::printf("calls %ld allocated %ld engines", counted.calls, counted.allocated);
    for (const std::string& name : engines) std::printf(" %s", name.c_str());
    std::printf("\n");
  }
  return 0;
}
