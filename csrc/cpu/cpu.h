// The CPU backend: one function per operator of core/contract.h, cut into tasks over a thread pool.
//
// `isa` is the set of instruction sets that may be used (a mask over cpu::Isa bits). The first kernel set of
// kernel_sets.cpp whose needs lie inside it runs. Callers pass host_isa(), possibly capped.
//
// A spiking layer runs on one of several engines. choose_engine picks one for each call by a cost model (engines.cpp)
// from the layer's shape, T, the kernel set and the firing rate of the input at hand, or as the caller asks:
//
//     events       lists of the inputs that fired, one weight row added for each (events/fire.h)
//     dense        a matrix product of bytes (dense/dense.h)
//     table        tables of the sums of four weights, few outputs (table/fire.h)
//     depthwise    one input channel to an output channel (events/grouped.h)
//     grouped      other groups (events/grouped.h)
//
// The first three read weights in an order of their own. So a caller chooses the engine, packs the weights for it,
// once, and passes both with every call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/contract.h"

namespace qcfs::cpu {

enum class Engine : int { automatic = 0, events, dense, table, depthwise, grouped };

const char* engine_name(Engine engine);

struct Options {
  std::uint32_t isa;
  int threads;
  Engine engine = Engine::automatic;    // automatic, or events, dense or table where the layer allows it
};

int kernel_set_count();
const char* kernel_set_name(int index);
std::uint32_t kernel_set_isa(int index);
const char* chosen_kernel_set(std::uint32_t isa);

// Multiply-accumulates of bytes that all threads do in a second where nothing but the inner instruction of the dense
// engine runs.
double measure_peak(std::uint32_t isa, int threads);

// The engine for a layer; never automatic.
Engine choose_engine(const ConvIf& a, const Options& options);

// What a step of a layer asks of each engine, by which choose_engine estimates times (engines.cpp).
struct EngineWork {
  double events_16 = 0, events_8 = 0;    // events: elements of rows of weights, for sums of 16-bit and of 8-bit weights
  double inputs = 0, kernel_rows = 0;    // events: inputs listed, lists appended; dense: inputs expanded
  double products = 0;                   // dense: products of bytes
  double neurons = 0;                    // dense: output neurons
  double pixels = 0;                     // table: output pixels
  double groups = 0, row_bytes = 0;      // table: groups listed, bytes of rows added
};
EngineWork engine_work(const ConvIf& a, std::uint32_t isa);

// The estimated time of a layer on the dense engine, one thread; a linear one is given as an image (layer.h).
double dense_nanoseconds(const ConvIf& a, std::uint32_t isa);

// Weights in the order of an engine and kernel set, for Product::packed. Dense weights of all products of a layer are
// one array, which the first product carries. Where has_packed is false the product carries none.
bool has_packed(int product, Engine engine);
// Reads all weights of some engines: for packing, not for each call.
std::size_t packed_bytes(const ConvIf& a, int product, Engine engine, std::uint32_t isa);
void pack(const ConvIf& a, int product, Engine engine, std::uint32_t isa, void* out);
std::size_t packed_bytes(const AnalogConv& a, std::uint32_t isa);
void pack(const AnalogConv& a, std::uint32_t isa, void* out);

// options.engine must be what choose_engine answered (automatic: it is asked again), and every product that
// has_packed must carry weights packed for it. More sources than max_products or max_residuals are refused.
Status conv_if(const ConvIf& a, const Options& options);
// Needs a.packed.
Status analog(const AnalogConv& a, const Options& options);
Status pool(const Pool& a, const Options& options);
Status pool_counts(const PoolCounts& a, const Options& options);
Status count(const Count& a, const Options& options);
Status readout(const Readout& a, const Options& options);
Status quantize(const Quantize& a, const Options& options);

}    // namespace qcfs::cpu
