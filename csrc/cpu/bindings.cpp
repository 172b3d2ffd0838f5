// Python binding of the CPU backend: reads calls (core/python.h), releases the GIL, raises on a bad status. Shapes,
// dtypes and devices were checked in qcfs_fast/operators before anything arrives here.
//
// A layer that reads weights in an order of its own is an object between plan and run (qcfs_fast/backend/protocol.py):
// it holds the call's struct and the engine chosen for it, says how many bytes the packed weights take, packs and
// runs.
#include "network/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/python.h"
#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace {

using qcfs::Status;
using qcfs::cpu::Engine;
using qcfs::cpu::Options;
using qcfs::python::data;
using qcfs::python::without_gil;

void check(Status s, const std::string& op) {
  switch (s) {
    case Status::ok:
      return;
    case Status::out_of_memory:
      PyErr_SetString(PyExc_MemoryError, (op + ": no memory for the workspace; use a smaller batch").c_str());
      throw py::error_already_set();
    case Status::not_finite:
      throw py::value_error(
          py::module_::import("qcfs_fast.operators.signature").attr("NOT_FINITE").cast<std::string>());
    case Status::too_many_sources:
      throw py::value_error(op + ": at most " + std::to_string(qcfs::max_products) + " inputs and " +
                            std::to_string(qcfs::max_residuals) + " residuals can be summed in one layer");
  }
}

// Runs a kernel without the GIL.
template <typename Operand>
void run(Status (*kernel)(const Operand&, const Options&), const Operand& a, const Options& options, const char* op) {
  Status s = Status::ok;
  without_gil([&] { s = kernel(a, options); });
  check(s, op);
}

Options options(std::uint32_t isa, int threads) { return {isa, threads}; }

class SpikingLayer {
 public:
  SpikingLayer(py::handle call, std::uint32_t isa, int threads, int wanted)
      : a_(call), options_{isa, threads, static_cast<Engine>(wanted)} {
    without_gil([this] { options_.engine = qcfs::cpu::choose_engine(a_.layer, options_); });    // looks at the input
  }

  // By engine, in the order of a row of rates in engines.cpp; tools/fit_engine_rates.py fits the rates to it.
  py::dict work() const {
    const qcfs::cpu::EngineWork w = qcfs::cpu::engine_work(a_.layer, options_.isa);
    py::dict by_engine;
    by_engine["events"] = py::make_tuple(w.events_16, w.events_8, w.inputs, w.kernel_rows);
    by_engine["dense"] = py::make_tuple(w.products, w.inputs, w.neurons);
    by_engine["table"] = py::make_tuple(w.groups, w.pixels, w.row_bytes);
    return by_engine;
  }
  const char* engine() const { return qcfs::cpu::engine_name(options_.engine); }
  std::size_t packed_bytes(int product) const {
    return qcfs::cpu::packed_bytes(a_.layer, product, options_.engine, options_.isa);
  }
  void pack(int product, py::handle out) const {
    void* to = data<void>(out);
    without_gil([&] { qcfs::cpu::pack(a_.layer, product, options_.engine, options_.isa, to); });
  }
  // `packed` holds one tensor for each of the first products; `state` is None where the layer has none.
  void fire(const py::list& packed, py::handle out, py::handle state) {
    for (std::size_t i = 0; i < packed.size(); ++i) a_.products.at(i).packed = data<const void>(packed[i]);
    a_.layer.out = data<std::uint8_t>(out);
    a_.layer.state_out = data<std::int32_t>(state);
    run(qcfs::cpu::conv_if, a_.layer, options_, "conv2d_if");
  }

 private:
  qcfs::python::SpikingLayer a_;
  Options options_;
};

class AnalogLayer {
 public:
  AnalogLayer(py::handle call, std::uint32_t isa, int threads)
      : a_(qcfs::python::analog_conv(call)), options_{isa, threads} {}

  std::size_t packed_bytes() const { return qcfs::cpu::packed_bytes(a_, options_.isa); }
  void pack(py::handle out) const {
    void* to = data<void>(out);
    without_gil([&] { qcfs::cpu::pack(a_, options_.isa, to); });
  }
  void fire(py::handle packed, py::handle out) {
    a_.packed = data<const void>(packed);
    qcfs::python::set_output(a_, out);
    run(qcfs::cpu::analog, a_, options_, "analog convolution");
  }

 private:
  qcfs::AnalogConv a_;
  Options options_;
};

// The pooling windows of a call on [.., H, W, C], kept here while a kernel reads them.
struct HostWindows {
  HostWindows(py::handle a, const std::array<std::int64_t, 5>& in)
      : rows(qcfs::python::windows(QCFS_ATTRIBUTE(a, "rows"), in[2])),
        cols(qcfs::python::windows(QCFS_ATTRIBUTE(a, "cols"), in[3])) {}

  qcfs::python::Windows view() const {
    return {rows.data(), cols.data(), static_cast<std::int64_t>(rows.size() / 3),
            static_cast<std::int64_t>(cols.size() / 3)};
  }

  std::vector<std::int64_t> rows, cols;
};

void pool(py::handle a, py::handle out, std::uint32_t isa, int threads) {
  const HostWindows windows(a, qcfs::python::shape_of<5>(QCFS_ATTRIBUTE(a, "x")));
  run(qcfs::cpu::pool, qcfs::python::pool(a, out, windows.view()), options(isa, threads), "pool");
}

void pool_counts(py::handle a, py::handle out, std::uint32_t isa, int threads) {
  const HostWindows windows(a, qcfs::python::shape_of<5>(QCFS_ATTRIBUTE(a, "counts")));
  run(qcfs::cpu::pool_counts, qcfs::python::pool_counts(a, out, windows.view()), options(isa, threads), "pool_counts");
}

void count(py::handle a, py::handle out, std::uint32_t isa, int threads) {
  run(qcfs::cpu::count, qcfs::python::count(a, out), options(isa, threads), "count");
}

void readout(py::handle a, py::handle out, std::uint32_t isa, int threads) {
  const qcfs::python::ReadoutLayer layer(a, out);
  run(qcfs::cpu::readout, layer.layer, options(isa, threads), "readout");
}

void quantize_input(py::handle a, py::handle out, py::handle exponent, std::uint32_t isa, int threads) {
  const qcfs::Quantize image = qcfs::python::quantize(a, out, exponent);
  const std::int64_t channels = qcfs::python::shape_of<4>(QCFS_ATTRIBUTE(a, "x"))[1];
  for (std::int64_t c = 0; c < image.channels; ++c) {
    qcfs::python::require(qcfs::within(image.source[c], 0, channels - 1), "quantize_input: source, a channel of x, is");
  }
  run(qcfs::cpu::quantize, image, options(isa, threads), "quantize_input");
}

}    // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of qcfs_fast; use torch.ops.qcfs_fast instead";
  for (const auto& [name, bit] : {std::pair{"ISA_AVX2", qcfs::cpu::isa_avx2},
                                  {"ISA_AVX512", qcfs::cpu::isa_avx512},
                                  {"ISA_AVXVNNI", qcfs::cpu::isa_avxvnni},
                                  {"ISA_AVX512VNNI", qcfs::cpu::isa_avx512vnni},
                                  {"ISA_AMX", qcfs::cpu::isa_amx},
                                  {"ISA_NEON", qcfs::cpu::isa_neon},
                                  {"ISA_NEONDOT", qcfs::cpu::isa_neondot}}) {
    m.attr(name) = static_cast<std::uint32_t>(bit);
  }
  m.attr("MAX_PRODUCTS") = qcfs::max_products;
  m.attr("MAX_RESIDUALS") = qcfs::max_residuals;
  m.attr("MAX_EXTENT") = qcfs::max_extent;
  m.attr("MAX_ELEMENTS") = qcfs::max_elements;
  m.attr("MAX_POOL_WINDOWS") = qcfs::max_pool_windows;
  m.attr("MAX_STATED") = qcfs::max_stated;
  m.attr("MAX_HELD") = qcfs::max_held;
  m.def("host_isa", &qcfs::cpu::host_isa);
  m.def("chosen_kernel_set", &qcfs::cpu::chosen_kernel_set);
  m.def("kernel_sets", [] {
    std::vector<std::pair<std::string, std::uint32_t>> sets;
    for (int i = 0; i < qcfs::cpu::kernel_set_count(); ++i) {
      sets.emplace_back(qcfs::cpu::kernel_set_name(i), qcfs::cpu::kernel_set_isa(i));
    }
    return sets;
  });
  m.def("engines", [] {
    std::vector<std::string> names;
    for (const Engine e :
         {Engine::automatic, Engine::events, Engine::dense, Engine::table, Engine::depthwise, Engine::grouped}) {
      names.emplace_back(qcfs::cpu::engine_name(e));
    }
    return names;
  });
  m.def("measure_peak", &qcfs::cpu::measure_peak, py::call_guard<py::gil_scoped_release>());
  m.def("use_threads_of", [](std::uintptr_t parallel_for) {
    qcfs::cpu::use_threads_of(reinterpret_cast<qcfs::cpu::ParallelFor>(parallel_for));
  });
  py::class_<SpikingLayer>(m, "SpikingLayer")
      .def(py::init<py::handle, std::uint32_t, int, int>())
      .def_property_readonly("engine", &SpikingLayer::engine)
      .def("work", &SpikingLayer::work)
      .def("packed_bytes", &SpikingLayer::packed_bytes)
      .def("pack", &SpikingLayer::pack)
      .def("fire", &SpikingLayer::fire);
  py::class_<AnalogLayer>(m, "AnalogLayer")
      .def(py::init<py::handle, std::uint32_t, int>())
      .def("packed_bytes", &AnalogLayer::packed_bytes)
      .def("pack", &AnalogLayer::pack)
      .def("fire", &AnalogLayer::fire);
  m.def("pool", &pool);
  m.def("pool_counts", &pool_counts);
  m.def("count", &count);
  m.def("readout", &readout);
  m.def("quantize_input", &quantize_input);
  qcfs::network::bind(m);
}
