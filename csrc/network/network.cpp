#include "network/network.h"

#include <algorithm>
#include <string>

#include "core/limits.h"
#include "network/error.h"

namespace qcfs::network {
namespace {

constexpr std::size_t max_plans = 16;    // of a network; a plan has a few kilobytes

bool goes_on(const Request& from, const Request& to) {
  return from.batch == to.batch && from.height == to.height && from.width == to.width && from.neuron == to.neuron;
}

}    // namespace

Network::Network(Graph graph, File memory) : graph_(std::move(graph)), memory_(std::move(memory)) {
  const std::vector<std::int64_t>& shape = graph_.input_shape;
  if (shape.empty()) return;
  const bool map = shape.size() == 3;
  try {
    const Plan plan = make_plan(
        graph_, {1, map ? shape[1] : 1, map ? shape[2] : 1, graph_.T, graph_.neuron, false, 0, false, false}, SIZE_MAX);
    require(std::max(plan.largest, 4 * plan.out_count()) <= max_stated, Fault::format,
            "a node would compute more than " + std::to_string(max_stated) + " bytes");
    require(plan.held <= max_held, Fault::format,
            "spikes of more than " + std::to_string(max_held) + " bytes would wait for their readers");
  } catch (const Error& error) {
    throw Error(Fault::format, std::string("cannot run on an image of the shape stated: ") + error.what());
  }
}

std::shared_ptr<const Plan> Network::prepare(const Request& request, std::size_t max_bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found =
        std::find_if(plans_.begin(), plans_.end(), [&](const auto& plan) { return plan->request == request; });
    if (found != plans_.end() && (*found)->memory.bytes <= max_bytes) {
      plans_.splice(plans_.begin(), plans_, found);
      return plans_.front();
    }
  }
  auto plan = std::make_shared<const Plan>(make_plan(graph_, request, max_bytes));
  const std::lock_guard<std::mutex> lock(mutex_);
  plans_.push_front(plan);
  if (plans_.size() > max_plans) plans_.pop_back();
  return plan;
}

void Network::run(const Plan& plan, const Image& image, const cpu::Options& options, float* out, std::uint8_t* engines,
                  char* kept, std::int64_t before) {
  const std::size_t bytes = plan.memory.bytes - plan.memory.kept_bytes;
  Waiting mine{Block(nullptr, std::free), 0};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The largest that waits, so that one that is too small is replaced and not kept beside the new one.
    const auto largest = std::max_element(waiting_.begin(), waiting_.end(),
                                          [](const Waiting& a, const Waiting& b) { return a.bytes < b.bytes; });
    if (largest != waiting_.end()) {
      mine = std::move(*largest);
      *largest = std::move(waiting_.back());
      waiting_.pop_back();
    }
  }
  if (mine.block == nullptr || mine.bytes < bytes) {
    mine.block.reset();
    mine = {make_block(bytes), bytes};
  }
  const auto give_back = [&] {
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(std::move(mine));
  };
  const Frame frame{mine.block.get(), kept, plan.memory, image, before, out, options, &packed_, engines};
  Status status = Status::ok;
  for (auto step = plan.steps.begin(); status == Status::ok && step != plan.steps.end(); ++step)
    status = (*step)(frame);
  give_back();
  require(status != Status::not_finite, Fault::not_finite,
          "the image holds NaN or infinity; clean the data before it enters the network");
  // Too many sources there never are: the graph was checked.
  require(status == Status::ok, Fault::out_of_memory, "no memory for the workspace; use a smaller batch");
}

void Stream::check(const Request& request, bool same_image) const {
  require(steps_ == 0 || goes_on(last_, request), Fault::shape,
          "the stream runs on images of another shape; reset it first");
  require(!same_image || (steps_ > 0 && !last_.varying), Fault::argument,
          "which images? The call before had none that stay the same");
}

void Stream::run(const Plan& plan, const Image& image, const cpu::Options& options, float* out) {
  if (steps_ == 0 && bytes_ < plan.memory.kept_bytes) {
    kept_ = make_block(plan.memory.kept_bytes);
    bytes_ = plan.memory.kept_bytes;
  }
  try {
    network_->run(plan, image, options, out, nullptr, kept_.get(), steps_);
  } catch (const Error& error) {
    if (error.fault == Fault::not_finite) throw;
    reset();
    throw Error(error.fault, std::string(error.what()) + "; the stream has been reset");
  } catch (...) {
    reset();
    throw;
  }
  steps_ += plan.request.T;
  last_ = plan.request;
}

}    // namespace qcfs::network
