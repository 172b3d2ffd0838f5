// Which engine a spiking layer runs on: the estimated time of each, from the work it does and the rates at which the
// kernel set does it.
//
//     events    T * rate * (inputs under the kernels) * (outputs, filled up to panels)   row elements; listing every
//     input
//               T times; and appending the lists of every kernel row and output pixel T times
//     dense     T * digits * positions * padded inputs * padded outputs   products of bytes, whatever the rate;
//               expanding every input T times; and T steps of every output neuron
//     table     T * (1 - (1 - rate)^4) * (groups under the kernels) * (bytes of a row); listing every group T times for
//               each kernel row; and beginning every output pixel T times
//
// The firing rate is that of the input at hand, read off a sample of it. Engines return the same bytes, so the choice
// can never show but in time.
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/dense/plan.h"
#include "cpu/kernel_set.h"
#include "cpu/layer.h"
#include "cpu/table/plan.h"

namespace qcfs::cpu {
namespace {

// What one thread does in a nanosecond, and the nanoseconds of what is done for each pixel and step. Only ratios within
// a row choose the engine; whether a layer is worth two threads is a matter of the nanoseconds.
// tools/fit_engine_rates.py measures a set and prints its row: avx2 on a 3.2 GHz Zen 3 (inputs and neurons of the dense
// engine on the Xeon below, slowed as its products are), amx, avx512vnni, avx512 and avxvnni on a 2.8 GHz Sapphire
// Rapids or Emerald Rapids (its processor says only "Intel Xeon"). Estimated from the instructions' throughput and not
// measured: neondot, neon, portable.
struct EngineRates {
  const char* set;
  double events_16, events_8;    // row elements
  double products;               // of bytes
  double listed, appended;       // events: inputs; nanoseconds to append the list of a kernel row to a pixel's
  double expanded, fired;        // dense: inputs, neurons
  double groups, pixel, rows;    // table: groups listed; nanoseconds to begin a pixel; bytes of rows
};

constexpr EngineRates engine_rates[] = {
    {"amx", 61, 95, 1700, 1.9, 9.5, 23, 3.4, 2, 16, 107},
    {"avx512vnni", 59, 101, 330, 1.84, 11.2, 13.1, 3.18, 1.77, 19.9, 97.4},
    {"avx512", 52.5, 97.4, 118, 2.05, 11.7, 1000, 2.16, 1.5, 19.8, 102},
    {"avxvnni", 54.6, 69, 174, 1.63, 14.1, 4.29, 1.96, 1.51, 22.3, 89.4},
    {"avx2", 27.1, 31.8, 44.9, 1.44, 23, 2, 1.2, 0.762, 11.3, 47.3},
    {"neondot", 16, 16, 60, 12, 4, 10, 2, 0.5, 8, 30},
    {"neon", 16, 16, 6, 12, 4, 10, 2, 0.5, 8, 30},
    {"portable", 12, 12, 4, 12, 4, 5, 1, 0.4, 8, 30},
};

constexpr bool all_positive() {
  for (const EngineRates& r : engine_rates) {
    const double lowest[] = {r.events_16, r.events_8, r.products, r.listed, r.appended,
                             r.expanded,  r.fired,    r.groups,   r.pixel,  r.rows};
    for (const double rate : lowest) {
      if (!(rate > 0)) return false;
    }
  }
  return true;
}
static_assert(all_positive(), "an engine of infinite cost would never run");

const EngineRates& rates_of(const KernelSet& k) {
  for (const EngineRates& r : engine_rates) {
    if (std::strcmp(r.set, k.name) == 0) return r;
  }
  return engine_rates[sizeof(engine_rates) / sizeof(engine_rates[0]) - 1];
}

// Bytes of a word that are not zero.
int nonzero_bytes(std::uint64_t word) {
  constexpr std::uint64_t low = 0x7f7f7f7f7f7f7f7f;
  return __builtin_popcountll((((word & low) + low) | word) & ~low);
}

// Share of non-zero inputs a step, from up to 64 samples of up to 16 bytes. Samples lie at multiples of the golden
// ratio modulo 1. A constant stride could be a multiple of the row length and would sample a single image column.
double sampled_rate(const ConvIf& a, const Product& p) {
  constexpr std::int64_t samples = 64, max_sample_bytes = 16, word_bytes = 8;
  constexpr std::int64_t golden = 2654435769;    // 2^32 / 1.618..
  const bool mask = p.x.coding == Coding::mask;
  const std::int64_t plane = a.batch * p.x.height * p.x.width * p.x.channels;
  const std::int64_t bytes = plane * (mask ? 1 : a.steps), steps = a.steps < 8 ? a.steps : 8;
  const std::int64_t sample_bytes = bytes < max_sample_bytes * samples ? bytes / samples + 1 : max_sample_bytes;
  const std::uint64_t wanted = std::uint64_t{0x0101010101010101} * ((1u << steps) - 1);
  std::int64_t seen = 0, fired = 0;
  for (std::int64_t i = 0; i < samples; ++i) {
    const double at = static_cast<double>(static_cast<std::uint32_t>(i * golden)) / 4294967296.0;    // of 2^32
    const std::int64_t first = static_cast<std::int64_t>(at * static_cast<double>(bytes));
    const std::int64_t end = first + sample_bytes < bytes ? first + sample_bytes : bytes;
    seen += (end - first) * (mask ? steps : 1);
    for (std::int64_t k = first; k < end; k += word_bytes) {
      std::uint64_t word = 0;
      if (k + word_bytes <= end) {
        std::memcpy(&word, p.x.data + k, word_bytes);    // one load
      } else {
        std::memcpy(&word, p.x.data + k, static_cast<std::size_t>(end - k));
      }
      fired += mask ? __builtin_popcountll(word & wanted) : nonzero_bytes(word);
    }
  }
  return seen == 0 ? 0.0 : static_cast<double>(fired) / static_cast<double>(seen);
}

double events_time(const EngineWork& w, const EngineRates& r) {
  return w.events_16 / r.events_16 + w.events_8 / r.events_8 + w.inputs / r.listed + w.kernel_rows * r.appended;
}

double dense_time(const EngineWork& w, const EngineRates& r) {
  return w.products / r.products + w.inputs / r.expanded + w.neurons / r.fired;
}

double table_time(const EngineWork& w, const EngineRates& r) {
  return w.row_bytes / r.rows + w.groups / r.groups + w.pixels * r.pixel;
}

// What needs no look at the input: all of the dense engine's. Linear layers, as images, fill its blocks with samples.
EngineWork work_at_any_rate(const KernelSet& k, const ConvIf& a) {
  EngineWork w;
  w.pixels = static_cast<double>(a.batch * a.out_h * a.out_w);
  w.neurons = w.pixels * static_cast<double>(a.out_channels);
  w.products = dense_products(k, a);
  for (int i = 0; i < a.product_count; ++i) {
    const Spikes& x = a.products[i].x;
    w.inputs += static_cast<double>(a.batch * x.height * x.width * x.channels);
  }
  return w;
}

}    // namespace

double dense_nanoseconds(const ConvIf& a, std::uint32_t isa) {
  const KernelSet& k = choose(isa);
  return static_cast<double>(a.steps) * dense_time(work_at_any_rate(k, a), rates_of(k));
}

EngineWork engine_work(const ConvIf& a, std::uint32_t isa) {
  const KernelSet& k = choose(isa);
  EngineWork w = work_at_any_rate(k, LinearAsImage(a).a);
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    const double rate = sampled_rate(a, p), silent = (1 - rate) * (1 - rate);
    const double filled = static_cast<double>(round_up(a.out_channels, event_panel_channels(p.weight_bytes)));
    const double kernel_rows = static_cast<double>(p.g.kernel_h);
    const bool narrow = p.weight_bytes == 1 && p.x.coding == Coding::mask;
    (narrow ? w.events_8 : w.events_16) +=
        rate * static_cast<double>(kernel_inputs(p.g, p.x.channels)) * w.pixels * filled;
    w.kernel_rows += w.pixels * kernel_rows;
    const double column = kernel_rows * static_cast<double>(ceil_div(p.x.channels, 4));    // groups
    const double row = static_cast<double>(round_up(a.out_channels * 2 * p.weight_bytes, k.register_bytes));
    w.row_bytes += (1 - silent * silent) * column * static_cast<double>(p.g.kernel_w) * w.pixels * row;
    w.groups += column * static_cast<double>(a.batch * a.out_h * p.x.width);
  }
  return w;
}

const char* engine_name(Engine engine) {
  switch (engine) {
    case Engine::automatic:
      return "auto";
    case Engine::events:
      return "events";
    case Engine::dense:
      return "dense";
    case Engine::table:
      return "table";
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
  const Engine wanted = options.engine;
  if (wanted == Engine::table && table_allowed(k, a)) return Engine::table;
  if (wanted == Engine::dense && dense_allowed(k, a)) return Engine::dense;
  if (wanted != Engine::automatic || a.product_count == 0) return Engine::events;
  const EngineWork work = engine_work(a, options.isa);
  const EngineRates& rates = rates_of(k);
  const double events = events_time(work, rates), dense = dense_time(work, rates), table = table_time(work, rates);
  if (table < events && table < dense && table_is_near(k, a) && table_allowed(k, a)) return Engine::table;
  return dense < events && dense_allowed(k, a) ? Engine::dense : Engine::events;
}

}    // namespace qcfs::cpu
