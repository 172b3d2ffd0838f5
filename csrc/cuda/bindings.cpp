// Python binding of the CUDA backend: reads calls (core/python.h), queues the launches on the caller's stream, raises
// on a bad code. Every address is device memory; shapes, dtypes and devices were checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/python.h"
#include "cuda/cuda.h"

namespace py = pybind11;

namespace {

using qcfs::cuda::Device;
using qcfs::cuda::Launch;
using qcfs::cuda::Plan;
using qcfs::python::data;

void check(int code, const std::string& op) {
  if (code != qcfs::cuda::ok) throw std::runtime_error(op + ": " + qcfs::cuda::describe(code));
}

// (device index, stream address). The caller makes the device current (qcfs_fast/backend/protocol.py).
using Where = std::tuple<int, std::uintptr_t>;

// What launches on a device have to know of it, asked once.
Device device_of(int index, const std::string& op) {
  static std::map<int, Device> known;
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device device{};
  check(qcfs::cuda::query_device(index, &device), op);
  return known[index] = device;
}

Launch launch_on(const Where& where, const std::string& op) {
  const int index = std::get<0>(where);
  int current = 0;
  check(qcfs::cuda::current_device(&current), op);
  if (current != index) {
    throw std::runtime_error(op + ": the operands are on GPU " + std::to_string(index) + ", but GPU " +
                             std::to_string(current) + " is the current one");
  }
  return {reinterpret_cast<void*>(std::get<1>(where)), device_of(index, op)};
}

// Conv2dIf between plan and run (qcfs_fast/backend/protocol.py).
class SpikingLayer {
 public:
  SpikingLayer(const Where& where, py::handle call) : launch_(launch_on(where, "conv2d_if")), a_(call) {
    plan_ = qcfs::cuda::plan_conv_if(a_.layer, launch_.device);
  }

  bool on_tensor_cores() const { return plan_.path == qcfs::cuda::Path::tensor_cores; }
  std::int64_t workspace_bytes() const { return plan_.workspace_bytes(); }
  // `packed` holds one tensor for each product, or none where the direct kernel runs; `state` is None where the layer
  // has none.
  void fire(const std::string& op, const py::list& packed, py::handle workspace, py::handle out, py::handle state) {
    std::vector<const std::int8_t*> weights;
    for (const py::handle w : packed) weights.push_back(data<const std::int8_t>(w));
    a_.layer.out = data<std::uint8_t>(out);
    a_.layer.state_out = data<std::int32_t>(state);
    check(qcfs::cuda::conv_if(a_.layer, weights.data(), plan_, data<void>(workspace), launch_), op);
  }

 private:
  Launch launch_;
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
  const WeightShape w(weight);
  check(qcfs::cuda::pack_weight(w.kernel, w.channels, w.out_channels, w.bytes, image, data<const void>(weight),
                                data<std::int8_t>(packed), launch_on(where, op)),
        op);
}

bool analog_on_tensor_cores(py::handle call) {
  const qcfs::AnalogConv a = qcfs::python::analog_conv(call);
  return qcfs::cuda::analog_on_tensor_cores(a.g, a.in_channels, a.out_channels);
}

void analog(const Where& where, py::handle call, py::handle packed, py::handle out) {
  const std::string op = "analog convolution";
  qcfs::AnalogConv a = qcfs::python::analog_conv(call);
  qcfs::python::set_output(a, out);
  check(qcfs::cuda::analog(a, data<const std::int8_t>(packed), launch_on(where, op)), op);
}

// Both tables of windows on the device, int64 [out, 3].
qcfs::python::Windows windows(py::handle rows, py::handle cols) {
  return {data<const std::int64_t>(rows), data<const std::int64_t>(cols), qcfs::python::shape(rows)[0],
          qcfs::python::shape(cols)[0]};
}

void pool(const Where& where, py::handle call, py::handle rows, py::handle cols, py::handle out) {
  check(qcfs::cuda::pool(qcfs::python::pool(call, out, windows(rows, cols)), launch_on(where, "pool")), "pool");
}

void pool_counts(const Where& where, py::handle call, py::handle rows, py::handle cols, py::handle out) {
  check(qcfs::cuda::pool_counts(qcfs::python::pool_counts(call, out, windows(rows, cols)),
                                launch_on(where, "pool_counts")),
        "pool_counts");
}

void count(const Where& where, py::handle call, py::handle out) {
  check(qcfs::cuda::count(qcfs::python::count(call, out), launch_on(where, "count")), "count");
}

void readout(const Where& where, py::handle call, py::handle out) {
  const qcfs::python::ReadoutLayer layer(call, out);
  check(qcfs::cuda::readout(layer.layer, launch_on(where, "readout")), "readout");
}

void quantize_input(const Where& where, py::handle call, py::handle workspace, py::handle out, py::handle exponent) {
  check(qcfs::cuda::quantize(qcfs::python::quantize(call, out, exponent), data<std::uint32_t>(workspace),
                             launch_on(where, "quantize_input")),
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
