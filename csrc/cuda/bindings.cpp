// Python binding of the CUDA backend: reads calls (core/python.h), makes the tensors' device current, queues the
// launches, raises on a bad code. Every address is device memory; shapes, dtypes and devices were checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/python.h"
#include "cuda/cuda.h"

namespace py = pybind11;

namespace {

using qcfs::cuda::Launch;
using qcfs::cuda::Plan;
using qcfs::python::data;

void check(int code, const std::string& op) {
  if (code != qcfs::cuda::ok) throw std::runtime_error(op + ": " + qcfs::cuda::describe(code));
}

// (device index, stream address)
using Where = std::tuple<int, std::uintptr_t>;

// Makes the device current, and the one before it again at the end.
class Guard {
 public:
  Guard(const Where& where, const std::string& op) {
    const int device = std::get<0>(where);
    check(qcfs::cuda::set_device(device, &previous_), op);
    changed_ = previous_ != device;
    launch_.stream = reinterpret_cast<void*>(std::get<1>(where));
    const int code = qcfs::cuda::query_device(device, &launch_.device);
    if (code != qcfs::cuda::ok) {
      restore();
      check(code, op);
    }
  }
  ~Guard() { restore(); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  const Launch& launch() const { return launch_; }

 private:
  // Restoring can fail only if the context is lost, which the next call reports.
  void restore() {
    int ignored = 0;
    if (changed_) static_cast<void>(qcfs::cuda::set_device(previous_, &ignored));
    changed_ = false;
  }

  int previous_ = 0;
  bool changed_ = false;
  Launch launch_{};
};

// Conv2dIf between plan and run (qcfs_fast/backend/protocol.py).
class SpikingLayer {
 public:
  SpikingLayer(const Where& where, py::handle call) : where_(where), a_(call) {
    const Guard guard(where_, "conv2d_if");
    plan_ = qcfs::cuda::plan_conv_if(a_.layer, guard.launch().device);
  }

  bool on_tensor_cores() const { return plan_.path == qcfs::cuda::Path::tensor_cores; }
  std::int64_t workspace_bytes() const { return plan_.workspace_bytes(); }
  // `packed` holds one tensor for each product, or none where the direct kernel runs; `state` is None where the layer
  // has none.
  void fire(const std::string& op, const py::list& packed, py::handle workspace, py::handle out, py::handle state) {
    const Guard guard(where_, op);
    std::vector<const std::int8_t*> weights;
    for (const py::handle w : packed) weights.push_back(data<const std::int8_t>(w));
    a_.layer.out = data<std::uint8_t>(out);
    a_.layer.state_out = data<std::int32_t>(state);
    check(qcfs::cuda::conv_if(a_.layer, weights.data(), plan_, data<void>(workspace), guard.launch()), op);
  }

 private:
  Where where_;
  qcfs::python::SpikingLayer a_;
  Plan plan_{};
};

// The shape of a weight [KH, KW, C/groups, O] or [K, O] as packing sees it.
struct WeightShape {
  explicit WeightShape(py::handle weight) {
    std::vector<std::int64_t> size = qcfs::python::shape(weight);
    size.insert(size.begin(), 4 - size.size(), 1);
    kernel = {size[0], size[1], 1, 1, 0, 0, 1, 1, 1};
    channels = size[2];
    out_channels = size[3];
    bytes = static_cast<int>(qcfs::python::integer(qcfs::python::result_of(weight, QCFS_NAME("element_size"))));
  }

  qcfs::Geometry kernel;
  std::int64_t channels, out_channels;
  int bytes;
};

std::size_t packed_bytes(py::handle weight, bool image) {
  const WeightShape w(weight);
  return qcfs::cuda::packed_bytes(w.kernel, w.channels, w.out_channels, w.bytes, image);
}

void pack_weight(const Where& where, py::handle weight, bool image, py::handle packed) {
  const std::string op = "weight packing";
  const Guard guard(where, op);
  const WeightShape w(weight);
  check(qcfs::cuda::pack_weight(w.kernel, w.channels, w.out_channels, w.bytes, image, data<const void>(weight),
                                data<std::int8_t>(packed), guard.launch()),
        op);
}

bool analog_on_tensor_cores(py::handle call) {
  const qcfs::AnalogConv a = qcfs::python::analog_conv(call);
  return qcfs::cuda::analog_on_tensor_cores(a.g, a.in_channels, a.out_channels);
}

void analog(const Where& where, py::handle call, py::handle packed, py::handle out) {
  const std::string op = "analog convolution";
  const Guard guard(where, op);
  qcfs::AnalogConv a = qcfs::python::analog_conv(call);
  qcfs::python::set_output(a, out);
  check(qcfs::cuda::analog(a, data<const std::int8_t>(packed), guard.launch()), op);
}

// Both tables of windows on the device, int64 [out, 3].
qcfs::python::Windows windows(py::handle rows, py::handle cols) {
  return {data<const std::int64_t>(rows), data<const std::int64_t>(cols), qcfs::python::shape(rows)[0],
          qcfs::python::shape(cols)[0]};
}

void pool(const Where& where, py::handle call, py::handle rows, py::handle cols, py::handle out) {
  const Guard guard(where, "pool");
  check(qcfs::cuda::pool(qcfs::python::pool(call, out, windows(rows, cols)), guard.launch()), "pool");
}

void pool_counts(const Where& where, py::handle call, py::handle rows, py::handle cols, py::handle out) {
  const Guard guard(where, "pool_counts");
  check(qcfs::cuda::pool_counts(qcfs::python::pool_counts(call, out, windows(rows, cols)), guard.launch()),
        "pool_counts");
}

void count(const Where& where, py::handle call, py::handle out) {
  const Guard guard(where, "count");
  check(qcfs::cuda::count(qcfs::python::count(call, out), guard.launch()), "count");
}

void readout(const Where& where, py::handle call, py::handle out) {
  const Guard guard(where, "readout");
  const qcfs::python::ReadoutLayer layer(call, out);
  check(qcfs::cuda::readout(layer.layer, guard.launch()), "readout");
}

void quantize_input(const Where& where, py::handle call, py::handle workspace, py::handle out, py::handle exponent) {
  const Guard guard(where, "quantize_input");
  check(
      qcfs::cuda::quantize(qcfs::python::quantize(call, out, exponent), data<std::uint32_t>(workspace), guard.launch()),
      "quantize_input");
}

}    // namespace

#if !defined(QCFS_CUDA_MODULE)
#define QCFS_CUDA_MODULE _cuda
#endif
#if !defined(QCFS_CUDA_ARCHITECTURES)
#define QCFS_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(QCFS_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of qcfs_fast; use torch.ops.qcfs_fast instead";
  m.attr("ARCHITECTURES") = QCFS_CUDA_ARCHITECTURES;    // as in TORCH_CUDA_ARCH_LIST
  m.attr("MAX_PRODUCTS") = qcfs::cuda::max_launch_products;
  m.attr("MAX_RESIDUALS") = qcfs::cuda::max_launch_residuals;
  m.attr("MAX_TERMS") = qcfs::cuda::max_launch_terms;
  m.def("device_count", [] {
    int n = 0;
    check(qcfs::cuda::device_count(&n), "cudaGetDeviceCount");
    return n;
  });
  py::class_<SpikingLayer>(m, "SpikingLayer")
      .def(py::init<const Where&, py::handle>())
      .def_property_readonly("on_tensor_cores", &SpikingLayer::on_tensor_cores)
      .def_property_readonly("workspace_bytes", &SpikingLayer::workspace_bytes)
      .def("fire", &SpikingLayer::fire);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_weight", &pack_weight);
  m.def("analog_on_tensor_cores", &analog_on_tensor_cores);
  m.def("analog", &analog);
  m.def("pool", &pool);
  m.def("pool_counts", &pool_counts);
  m.def("count", &count);
  m.def("readout", &readout);
  m.def("quantize_input", &quantize_input);
}
