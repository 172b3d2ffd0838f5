// Which engine a spiking layer runs on: the estimated time of each, from the work it does and the rates at which the
// kernel set does it.
//
//     events    T * rate * (inputs under the kernels) * outputs   row elements; listing every input T times; and
//               appending the lists of every kernel row and output pixel T times
//     dense     T * digits * positions * padded inputs * padded outputs   products of bytes, whatever the rate; and
//               expanding every input T times
//
// The firing rate is that of the input at hand, read off a sample of it. Engines return the same bytes, so the choice
// can never show but in time.
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/dense/plan.h"
#include "cpu/kernel_set.h"
#include "cpu/layer.h"

namespace qcfs::cpu {
namespace {

// Row elements (16 and 8-bit weights) and products of bytes that one thread does in a nanosecond. Measured on a 4.4 GHz
// Zen 5 on 3x3 layers of 14x14x256, T = 4, 18 % firing: avx512vnni, avx512, avxvnni, avx2. Estimated from the
// instructions' throughput and not measured: amx, neondot, neon, portable.
struct EngineRates {
  const char* set;
  double events_16, events_8, products;
};

constexpr EngineRates engine_rates[] = {
    {"amx", 105, 165, 1000}, {"avx512vnni", 105, 165, 500}, {"avx512", 105, 165, 270}, {"avxvnni", 80, 92, 260},
    {"avx2", 70, 92, 135},   {"neondot", 16, 16, 60},       {"neon", 16, 16, 6},       {"portable", 12, 12, 4},
};

// The rest of the work, which depends little on the set; on the same machine.
constexpr double listed_inputs_per_ns = 12;
constexpr double appended_list_ns = 4;    // the list of one kernel row, to one output pixel's
constexpr double expanded_inputs_per_ns = 60;

const EngineRates& rates_of(const KernelSet& k) {
  for (const EngineRates& r : engine_rates) {
    if (std::strcmp(r.set, k.name) == 0) return r;
  }
  return engine_rates[sizeof(engine_rates) / sizeof(engine_rates[0]) - 1];
}

// Share of non-zero inputs a step, from up to 64 samples of up to 64 bytes. Samples lie at multiples of the golden
// ratio modulo 1. A constant stride could be a multiple of the row length and would sample a single image column.
double sampled_rate(const ConvIf& a, const Product& p) {
  constexpr std::int64_t samples = 64, max_sample_bytes = 64;
  constexpr std::int64_t golden = 2654435769;    // 2^32 / 1.618..
  const bool mask = p.x.coding == Coding::mask;
  const std::int64_t plane = a.batch * p.x.height * p.x.width * p.x.channels;
  const std::int64_t bytes = plane * (mask ? 1 : a.steps), steps = a.steps < 8 ? a.steps : 8;
  const std::int64_t sample_bytes = bytes < max_sample_bytes * samples ? bytes / samples + 1 : max_sample_bytes;
  const unsigned wanted = (1u << steps) - 1;
  std::int64_t seen = 0, fired = 0;
  for (std::int64_t i = 0; i < samples; ++i) {
    const double at = static_cast<double>(static_cast<std::uint32_t>(i * golden)) / 4294967296.0;    // of 2^32
    const std::int64_t first = static_cast<std::int64_t>(at * static_cast<double>(bytes));
    for (std::int64_t k = first; k < first + sample_bytes && k < bytes; ++k) {
      seen += mask ? steps : 1;
      fired += mask ? __builtin_popcount(p.x.data[k] & wanted) : p.x.data[k] != 0;
    }
  }
  return seen == 0 ? 0.0 : static_cast<double>(fired) / static_cast<double>(seen);
}

bool dense_is_faster(const KernelSet& k, const ConvIf& a) {
  const EngineRates& rates = rates_of(k);
  const bool narrow = a.products[0].weight_bytes == 1;
  const double pixels = static_cast<double>(a.batch * a.out_h * a.out_w), O = static_cast<double>(a.out_channels);
  const LinearAsImage layer(a);    // linear layers fill their blocks with samples
  double events = 0, dense = dense_products(k, layer.a) / rates.products;    // nanoseconds a step
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    const double inputs = static_cast<double>(a.batch * p.x.height * p.x.width * p.x.channels);
    const double rows = sampled_rate(a, p) * static_cast<double>(kernel_inputs(p.g, p.x.channels)) * pixels;
    const double elements_per_ns = narrow && p.x.coding == Coding::mask ? rates.events_8 : rates.events_16;
    events += rows * O / elements_per_ns + inputs / listed_inputs_per_ns +
              appended_list_ns * pixels * static_cast<double>(p.g.kernel_h);
    dense += inputs / expanded_inputs_per_ns;
  }
  return dense < events;
}

}    // namespace

const char* engine_name(Engine engine) {
  switch (engine) {
    case Engine::automatic:
      return "auto";
    case Engine::events:
      return "events";
    case Engine::dense:
      return "dense";
    case Engine::depthwise:
      return "depthwise";
    case Engine::grouped:
      return "grouped";
  }
  return "?";
}

Engine choose_engine(const ConvIf& a, const Options& options) {
  bool grouped = false, depthwise = a.product_count > 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    grouped |= p.g.groups != 1;
    depthwise &= p.g.groups == a.out_channels && p.x.channels == a.out_channels;
  }
  if (depthwise && grouped) return Engine::depthwise;
  if (grouped) return Engine::grouped;
  const KernelSet& k = choose(options.isa);
  if (options.engine == Engine::events || !dense_allowed(k, a)) return Engine::events;
  if (options.engine == Engine::dense) return Engine::dense;
  return dense_is_faster(k, a) ? Engine::dense : Engine::events;
}

}    // namespace qcfs::cpu
