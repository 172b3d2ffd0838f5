// The graph comes as the text of a saved file's header, with torch tensors in place of the file's: Python and C share
// one reader. The network reads the tensors' memory and holds them.
#include "network/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/python.h"
#include "network/error.h"
#include "network/network.h"

namespace qcfs::network {
namespace {

namespace py = pybind11;

Tensors tensors_of(const py::dict& named) {
  static constexpr std::pair<const char*, Dtype> dtypes[] = {
      {"torch.int8", Dtype::i8},   {"torch.int16", Dtype::i16},   {"torch.int32", Dtype::i32},
      {"torch.int64", Dtype::i64}, {"torch.float32", Dtype::f32}, {"torch.float64", Dtype::f64}};
  Tensors found;
  for (const auto& [name, tensor] : named) {
    const std::string dtype = py::str(QCFS_ATTRIBUTE(tensor, "dtype"));
    for (const auto& [known, meant] : dtypes) {
      if (dtype == known) {
        found.emplace(py::cast<std::string>(name),
                      Tensor{meant, python::shape(tensor), python::data<const void>(tensor)});
      }
    }
  }
  return found;
}

struct PlanHandle {
  std::shared_ptr<const Plan> plan;
  bool vector;    // the answer is [.., N, classes]
};

class Executor {
 public:
  Executor(const std::string& header, py::dict named)
      : tensors_(std::move(named)), network_(read_graph(header, tensors_of(tensors_))) {}

  PlanHandle prepare(std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t T,
                     std::array<int, 3> neuron, bool per_step, std::int64_t skip, bool varying, bool going_on) {
    const NeuronMode mode{static_cast<Mode>(neuron[0]), neuron[1], neuron[2]};
    const Request request{batch, height, width, T, mode, per_step, skip, varying, going_on};
    py::gil_scoped_release release;
    return {network_.prepare(request), network_.graph().answer().vector};
  }

  // `x`, `out` and `kept` are addresses; the strides those of step, sample, channel, row and column. The engine of each
  // layer.
  py::bytes run(const PlanHandle& plan, std::uintptr_t x, std::array<std::int64_t, 5> stride, std::uintptr_t out,
                std::uint32_t isa, int threads, int engine, std::uintptr_t kept, std::int64_t before) {
    std::string engines(layers().size(), '\0');
    {
      py::gil_scoped_release release;
      const Image image{reinterpret_cast<const float*>(x), stride[0], stride[1], stride[2], stride[3], stride[4]};
      network_.run(*plan.plan, image, {isa, threads, static_cast<cpu::Engine>(engine)}, reinterpret_cast<float*>(out),
                   reinterpret_cast<std::uint8_t*>(engines.data()), reinterpret_cast<char*>(kept), before);
    }
    return engines;
  }

  const std::vector<std::string>& layers() const { return layers_; }

 private:
  const py::dict tensors_;
  Network network_;
  const std::vector<std::string> layers_ = engine_layers(network_.graph());
};

// A run can fail in the ways in which operators do, with their exceptions; all else is a NetworkError.
void translate(std::exception_ptr thrown, const py::object& network_error) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const Error& error) {
    if (error.fault == Fault::not_finite) {
      const py::object text = py::module_::import("qcfs_fast.operators.signature").attr("NOT_FINITE");
      PyErr_SetObject(PyExc_ValueError, text.ptr());
    } else {
      PyErr_SetString(error.fault == Fault::out_of_memory ? PyExc_MemoryError : network_error.ptr(), error.what());
    }
  }
}

}    // namespace

void bind(py::module_& m) {
  static PyObject* const network_error = PyErr_NewException("qcfs_fast._cpu.NetworkError", PyExc_ValueError, nullptr);
  m.attr("NetworkError") = py::handle(network_error);
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    translate(std::move(thrown), py::reinterpret_borrow<py::object>(network_error));
  });
  py::class_<PlanHandle>(m, "Plan")
      .def_property_readonly("shape",
                             [](const PlanHandle& handle) -> py::tuple {
                               const Plan& p = *handle.plan;
                               if (handle.vector)
                                 return py::make_tuple(p.answers, p.request.batch, p.out_h * p.out_w * p.out_channels);
                               return py::make_tuple(p.answers, p.request.batch, p.out_h, p.out_w, p.out_channels);
                             })
      .def_property_readonly("kept_bytes", [](const PlanHandle& handle) { return handle.plan->memory.kept_bytes; })
      // Of what a run leaves: the node, what it is, its shape, and where its int32 begin.
      .def_property_readonly("kept", [](const PlanHandle& handle) {
        py::list all;
        for (const Kept& k : handle.plan->kept) {
          all.append(py::make_tuple(k.node, k.what, k.shape, handle.plan->memory.offsets[k.slot] / 4));
        }
        return all;
      });
  py::class_<Executor>(m, "Network")
      .def(py::init<const std::string&, py::dict>())
      .def_property_readonly("layers", &Executor::layers)
      .def("prepare", &Executor::prepare)
      .def("run", &Executor::run);
}

}    // namespace qcfs::network
