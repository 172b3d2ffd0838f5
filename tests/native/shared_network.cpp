// Calls one network from several threads at the same time, under the sanitizer of threads.
//
//     shared_network CALLS FILE...
//
// The threads begin with a network that nothing has run yet, so they make its plans and packed weights beside each
// other's calls, on one or two threads of the pool that all share. Some calls load, run and drop a network of their
// own. At the end each has a stream, which goes on while the network itself is dropped. Every answer must be that of a
// network in one thread.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "libqcfs/qcfs.h"

namespace {

constexpr int callers = 4;
constexpr std::int64_t most_images = 3;

void expect(bool condition, const char* what, const qcfs_error& error) {
  if (condition) return;
  std::fprintf(stderr, "%s: %s\n", what, error.text);
  std::exit(1);
}

// A request, and what a network in one thread answers to it.
struct Call {
  qcfs_images images;
  qcfs_options options;
  std::vector<float> want;
};

qcfs_network* load(const char* path) {
  qcfs_error error;
  qcfs_network* network = nullptr;
  expect(qcfs_load_file(path, &network, &error) == QCFS_OK, path, error);
  return network;
}

std::vector<float> run(const qcfs_network* network, const Call& call, int threads) {
  qcfs_error error;
  qcfs_options options = call.options;
  options.threads = threads;
  qcfs_shape shape;
  expect(qcfs_answer_shape(network, &call.images, &options, &shape, &error) == QCFS_OK, "shape", error);
  std::vector<float> out(shape.count);
  expect(qcfs_run(network, &call.images, &options, out.data(), out.size(), &error) == QCFS_OK, "run", error);
  return out;
}

void same(const std::vector<float>& found, const std::vector<float>& want) {
  const bool equal =
      found.size() == want.size() && std::memcmp(found.data(), want.data(), want.size() * sizeof(float)) == 0;
  expect(equal, "another answer than in one thread", {});
}

std::vector<Call> calls_of(const qcfs_network* network, const qcfs_info& info, const std::vector<float>& pixels,
                           std::int64_t side) {
  std::vector<Call> calls;
  for (std::int64_t batch = 1; batch <= most_images; ++batch) {
    for (const std::int64_t steps : {std::int64_t{1}, std::int64_t{3}, info.steps}) {
      for (const int per_step : {0, 1}) {
        Call call{{pixels.data(), 0, batch, info.channels, side, side}, {}, {}};
        call.options.steps = std::min(steps, info.max_steps);
        call.options.per_step = per_step;
        call.want = run(network, call, 1);
        calls.push_back(std::move(call));
      }
    }
  }
  return calls;
}

// The steps of a call one by one, in a stream.
void flow(qcfs_stream* stream, const Call& call) {
  qcfs_error error;
  qcfs_options one{};
  one.steps = 1;
  std::vector<float> out(call.want.size());
  for (std::int64_t t = 0; t < call.options.steps; ++t) {
    const qcfs_images* images = t == 0 ? &call.images : nullptr;
    expect(qcfs_stream_run(stream, images, &one, out.data(), out.size(), &error) == QCFS_OK, "stream", error);
  }
  same(out, call.want);
}

void work(unsigned seed, int count, const char* path, const qcfs_network* network, const std::vector<Call>& calls,
          std::atomic<int>& done) {
  std::mt19937 random(seed);
  const auto any = [&]() -> const Call& { return calls[random() % calls.size()]; };
  for (int i = 0; i < count; ++i) {
    const Call& call = any();
    same(run(network, call, 1 + static_cast<int>(random() % 2)), call.want);
    if (i % 8 == 0) {
      qcfs_network* own = load(path);
      same(run(own, call, 2), call.want);
      qcfs_free(own);
    }
  }
  qcfs_error error;
  qcfs_stream* stream = nullptr;
  expect(qcfs_stream_new(network, &stream, &error) == QCFS_OK, "stream", error);
  ++done;
  for (int i = 0; i < 4; ++i) {
    const Call& call = any();
    if (call.options.per_step == 0) flow(stream, call);
    qcfs_stream_reset(stream);
  }
  qcfs_stream_free(stream);
}

}    // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  for (int i = 2; i < count; ++i) {
    qcfs_network* first = load(arguments[i]);
    qcfs_error error;
    qcfs_info info;
    expect(qcfs_describe(first, &info, &error) == QCFS_OK, "describe", error);
    const std::int64_t side = info.is_vector != 0 ? 1 : info.height > 0 ? info.height : 12;
    std::vector<float> pixels(static_cast<std::size_t>(most_images * info.channels * side * side));
    for (std::size_t k = 0; k < pixels.size(); ++k) pixels[k] = static_cast<float>(k * 37 % 101) / 25 - 2;
    const std::vector<Call> calls = calls_of(first, info, pixels, side);
    qcfs_free(first);
    qcfs_network* shared = load(arguments[i]);
    std::atomic<int> done{0};
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < callers; ++seed) {
      threads.emplace_back(work, seed, std::atoi(arguments[1]), arguments[i], shared, std::cref(calls), std::ref(done));
    }
    while (done < callers) std::this_thread::yield();
    qcfs_free(shared);
    for (std::thread& thread : threads) thread.join();
    std::printf("calls %d of %s\n", callers * std::atoi(arguments[1]), info.neuron);
  }
  return 0;
}
