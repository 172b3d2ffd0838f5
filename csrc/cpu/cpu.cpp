// Every public function of the CPU backend: chooses the kernel set, hands spiking layers to the plan of their engine
// and cuts all other operators into rows.
#include "cpu/cpu.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cmath>
#include <cstring>

#include "cpu/dense/plan.h"
#include "cpu/events/plan.h"
#include "cpu/kernel_set.h"
#include "cpu/layer.h"
#include "cpu/table/plan.h"
#include "cpu/tasks.h"

namespace qcfs::cpu {

double measure_peak(std::uint32_t isa, int threads) {
  using Clock = std::chrono::steady_clock;
  const KernelSet& k = choose(isa);
  constexpr int trials = 12;
  constexpr double min_seconds = 0.01;    // shorter trials are not counted, and the next is longer
  double best = 0;
  std::int64_t rounds = 1000;
  for (int i = 0; i < trials; ++i) {
    std::atomic<std::int64_t> done{0};
    const auto begin = Clock::now();
    run_parallel(threads, threads, [&](std::int64_t) {
      done.fetch_add(static_cast<std::int64_t>(k.matrix_loop(rounds)), std::memory_order_relaxed);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    if (seconds < min_seconds) {
      rounds *= 4;
    } else {
      best = std::max(best, static_cast<double>(done.load(std::memory_order_relaxed)) / seconds);
    }
  }
  return best;
}

bool has_packed(int product, Engine engine) {
  return engine == Engine::events || engine == Engine::table || (engine == Engine::dense && product == 0);
}

std::size_t packed_bytes(const ConvIf& a, int product, Engine engine, std::uint32_t isa) {
  if (engine == Engine::events) return event_weight_bytes(a.products[product], a.out_channels);
  if (engine == Engine::table) return table_weight_bytes(choose(isa), a.products[product], a.out_channels);
  return engine == Engine::dense && product == 0 ? dense_weight_bytes(choose(isa), a) : 0;
}

void pack(const ConvIf& a, int product, Engine engine, std::uint32_t isa, void* out) {
  if (engine == Engine::events) pack_event_weights(choose(isa), a.products[product], a.out_channels, out);
  if (engine == Engine::table) pack_table_weights(choose(isa), a.products[product], a.out_channels, out);
  if (engine == Engine::dense && product == 0) pack_dense_weights(choose(isa), a, static_cast<std::int8_t*>(out));
}

std::size_t packed_bytes(const AnalogConv& a, std::uint32_t isa) { return choose(isa).pack_analog_bytes(a); }
void pack(const AnalogConv& a, std::uint32_t isa, void* out) { choose(isa).pack_analog(a, out); }

Status conv_if(const ConvIf& a, const Options& options) {
  if (a.product_count > max_products || a.residual_count > max_residuals) return Status::too_many_sources;
  if (a.batch == 0) return Status::ok;
  const KernelSet& k = choose(options.isa);
  const Engine engine = options.engine == Engine::automatic ? choose_engine(a, options) : options.engine;
  assert(engine == choose_engine(a, {options.isa, options.threads, engine}));
  const int threads = useful_threads(work_of(a), options.threads);
  if (engine == Engine::depthwise) return run_depthwise(k, a, threads);
  LinearAsImage layer(a);
  single_step_counts_as_masks(layer);
  if (engine == Engine::dense) {
    const bool alone = dense_nanoseconds(layer.a, options.isa) < min_parallel_nanoseconds;
    return run_dense(k, layer, alone ? 1 : threads);
  }
  if (engine == Engine::table) return run_table(k, layer, threads);
  if (engine == Engine::grouped) return run_grouped(k, layer, threads);
  return run_events(k, layer, threads);
}

Status analog(const AnalogConv& a, const Options& options) {
  if (a.batch == 0) return Status::ok;
  const KernelSet& k = choose(options.isa);
  assert(a.packed != nullptr);
  const std::int64_t work = kernel_inputs(a.g, a.in_channels) * a.out_channels * a.batch * a.out_h * a.out_w;
  const int threads = useful_threads(work / 8, options.threads);
  const RowCut cut = cut_rows(a.out_h, a.batch, threads);
  ConvIf end{};
  Neurons neurons{};
  if (a.steps > 0) {
    end.batch = a.batch;
    end.out_h = a.out_h;
    end.out_w = a.out_w;
    end.out_channels = a.out_channels;
    end.steps = a.steps;
    end.threshold = a.threshold;
    end.out = a.out_mask;
    const Status s = place_in_call_workspace([&](Arena& arena) { neurons = pad_neurons(end, arena); });
    if (s != Status::ok) return s;
  }
  return run_with_workspace(a.batch * cut.spans, threads, k.analog_workspace(a), [&](std::int64_t i, void* workspace) {
    k.analog(a, end, neurons, row_span(cut, {0, a.batch, 0, a.out_h}, i), workspace);
  });
}

Status pool(const Pool& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  const std::int64_t planes = a.coding == Coding::mask ? ceil_div(a.steps, 8) : a.steps;
  const std::int64_t area = ceil_div(a.in_h, a.out_h) * ceil_div(a.in_w, a.out_w);
  return run_rows(planes * a.batch * a.out_h, a.out_w * a.channels * area / 4, options.threads,
                  [&](std::int64_t r0, std::int64_t r1) { k.pool(a, r0, r1); });
}

Status pool_counts(const PoolCounts& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  const std::int64_t area = ceil_div(a.in_h, a.out_h) * ceil_div(a.in_w, a.out_w);
  return run_rows(a.images * a.out_h, a.out_w * a.channels * area / 4, options.threads,
                  [&](std::int64_t r0, std::int64_t r1) { k.pool_counts(a, r0, r1); });
}

Status count(const Count& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  return run_rows(a.elements, a.last - a.first, options.threads,
                  [&](std::int64_t e0, std::int64_t e1) { k.count(a, e0, e1); });
}

Status readout(const Readout& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  std::int64_t work = 1;
  for (int i = 0; i < a.term_count; ++i) {
    if (a.terms[i].weight != nullptr) work += kernel_inputs(a.terms[i].g, a.terms[i].channels);
  }
  const std::size_t bytes = 2 * sizeof(double) * static_cast<std::size_t>(a.out_channels);
  return run_rows(a.images * a.out_h, a.out_w * a.out_channels * work, options.threads,
                  [&](std::int64_t r0, std::int64_t r1) {
                    void* workspace = task_workspace(bytes);
                    if (workspace == nullptr) return Status::out_of_memory;
                    k.readout(a, r0, r1, static_cast<double*>(workspace));
                    return Status::ok;
                  });
}

Status quantize(const Quantize& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  const std::int64_t row_work = 2 * a.channels * a.width;
  constexpr std::int32_t infinity = 0x7f800000;
  for (std::int64_t s = 0; s < a.batch; ++s) {
    std::atomic<std::int32_t> largest_bits{0};
    run_rows(a.height, row_work, options.threads, [&](std::int64_t r0, std::int64_t r1) {
      const std::int32_t found = k.largest(a, s, r0, r1);
      std::int32_t before = largest_bits.load(std::memory_order_relaxed);
      while (found > before && !largest_bits.compare_exchange_weak(before, found, std::memory_order_relaxed)) {
      }
    });
    const std::int32_t bits = largest_bits.load(std::memory_order_relaxed);
    if (bits >= infinity) return Status::not_finite;
    float largest = 0;
    std::memcpy(&largest, &bits, sizeof(largest));
    int e = 0;
    if (largest > 0) {
      // frexp gives [1/2, 1), so 2^e is above the quotient; an exact power of two needs one less.
      std::frexp(largest / static_cast<double>(a.largest), &e);
      if (largest <= std::ldexp(a.largest, e - 1)) --e;
    }
    a.exponent[s] = e;
    run_rows(a.height, row_work, options.threads, [&](std::int64_t r0, std::int64_t r1) { k.quantize(a, s, r0, r1); });
  }
  return Status::ok;
}

}    // namespace qcfs::cpu
