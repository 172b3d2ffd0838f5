// Calls from Python as the contract's structs, for every native module.
//
// A call is an object of qcfs_fast/operators/signature.py: its attributes are torch tensors, lists of tensors and
// integers, checked and contiguous. What sizes are made of is bounded here once more (core/limits.h), since a kernel
// believes it. Tensors are read by their Python methods (data_ptr, shape, element_size), so no
// torch header enters here and one build serves every torch version. A struct holds bare addresses: the caller keeps
// the call alive, and the result tensor too.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/contract.h"
#include "core/limits.h"

namespace qcfs::python {

namespace py = pybind11;

inline py::object attribute(py::handle object, PyObject* name) {
  PyObject* found = PyObject_GetAttr(object.ptr(), name);
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

inline py::object result_of(py::handle object, PyObject* method) {
  PyObject* found = PyObject_CallMethodObjArgs(object.ptr(), method, nullptr);
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

// An interned name, made once: a network looks up dozens of attributes a layer.
#define QCFS_NAME(text)                                             \
  [] {                                                              \
    static PyObject* const name = PyUnicode_InternFromString(text); \
    return name;                                                    \
  }()
#define QCFS_ATTRIBUTE(object, text) ::qcfs::python::attribute(object, QCFS_NAME(text))

// Runs `body` without the GIL. Where the interpreter has ended meanwhile, Python ends the thread that asks for it back,
// by an unwinding that no destructor lets through: py::gil_scoped_release would end the process by an abort instead.
template <typename Body>
void without_gil(const Body& body) {
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    PyEval_RestoreThread(thread);
    throw;
  }
  PyEval_RestoreThread(thread);
}

inline std::int64_t integer(py::handle value) { return value.cast<std::int64_t>(); }

// Address of a tensor's first element; null for None and for a tensor without elements.
template <typename T>
T* data(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  void* address = PyLong_AsVoidPtr(result_of(tensor, QCFS_NAME("data_ptr")).ptr());
  if (address == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return static_cast<T*>(address);
}

inline void require(bool condition, const char* what) {
  if (!condition) throw py::value_error(std::string(what) + " out of range");
}

// Of a tensor, or of the result of a call.
inline std::vector<std::int64_t> shape(py::handle tensor) {
  auto sizes = QCFS_ATTRIBUTE(tensor, "shape").cast<std::vector<std::int64_t>>();
  require(is_shape(sizes), "a shape is");
  return sizes;
}

template <std::size_t dims>
std::array<std::int64_t, dims> shape_of(py::handle call) {
  const std::vector<std::int64_t> found = shape(call);
  require(found.size() == dims, "the number of dimensions is");
  std::array<std::int64_t, dims> sizes;
  std::copy(found.begin(), found.end(), sizes.begin());
  return sizes;
}

inline std::int64_t steps_of(py::handle call) {
  const std::int64_t T = integer(QCFS_ATTRIBUTE(call, "T"));
  require(within(T, 1, max_steps), "T is");
  return T;
}

// The geometry at place i of a flat list of them.
inline Geometry geometry(py::handle list, std::size_t i = 0) {
  std::array<std::int64_t, 9> g;
  require(PySequence_Fast_GET_SIZE(list.ptr()) >= static_cast<Py_ssize_t>((i + 1) * g.size()), "the geometry is");
  for (std::size_t k = 0; k < g.size(); ++k) {
    g[k] = integer(PySequence_Fast_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i * g.size() + k)));
  }
  require(is_geometry(g.data()), "the geometry is");
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]};
}

// T planes are counts, fewer are masks; at T = 1 the two coincide and come as counts.
inline Coding coding(std::int64_t planes, std::int64_t steps) { return planes == steps ? Coding::count : Coding::mask; }

// Conv2dIf. The struct points into the two vectors, so this stays where it was made.
struct SpikingLayer {
  explicit SpikingLayer(py::handle a) {
    const auto out = shape_of<5>(a);    // [planes, N, OH, OW, O]
    layer.batch = out[1];
    layer.out_h = out[2];
    layer.out_w = out[3];
    layer.out_channels = out[4];
    layer.steps = steps_of(a);
    const auto x = QCFS_ATTRIBUTE(a, "x").cast<py::list>(), weight = QCFS_ATTRIBUTE(a, "weight").cast<py::list>();
    const py::object geometries = QCFS_ATTRIBUTE(a, "geometry");
    const auto scales = QCFS_ATTRIBUTE(a, "scales").cast<std::vector<std::int32_t>>();
    products.reserve(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::vector<std::int64_t> size = shape(x[i]);    // [planes, N, H, W, C]
      products.push_back({{data<const std::uint8_t>(x[i]), coding(size[0], layer.steps), size[2], size[3], size[4]},
                          data<const void>(weight[i]),
                          static_cast<int>(integer(result_of(weight[i], QCFS_NAME("element_size")))),
                          scales.at(i),
                          geometry(geometries, i)});
    }
    const auto residual = QCFS_ATTRIBUTE(a, "residual").cast<py::list>();
    const auto amplitude = QCFS_ATTRIBUTE(a, "amplitude").cast<py::list>();
    residuals.reserve(residual.size());
    for (std::size_t i = 0; i < residual.size(); ++i) {
      residuals.push_back({data<const std::uint8_t>(residual[i]), coding(shape(residual[i])[0], layer.steps),
                           data<const std::int32_t>(amplitude[i])});
    }
    layer.products = products.data();
    layer.product_count = static_cast<int>(products.size());
    layer.residuals = residuals.data();
    layer.residual_count = static_cast<int>(residuals.size());
    const auto neuron = QCFS_ATTRIBUTE(a, "neuron").cast<std::array<int, 3>>();
    const Mode mode = static_cast<Mode>(neuron[0]);
    layer.neuron = {mode, mode == Mode::sum ? 0 : neuron[1], neuron[2], mode == Mode::sum ? neuron[1] : 0};
    const py::object current = QCFS_ATTRIBUTE(a, "current"), bias = QCFS_ATTRIBUTE(a, "bias");
    layer.current = data<const std::int32_t>(current);
    layer.current_step = !current.is_none() && shape(current).size() == 5 ? out[1] * out[2] * out[3] * out[4] : 0;
    layer.bias = data<const std::int32_t>(bias);
    layer.bias_step = shape(bias).size() == 2 ? out[4] : 0;
    layer.threshold = data<const std::int32_t>(QCFS_ATTRIBUTE(a, "threshold"));
    layer.state = data<const std::int32_t>(QCFS_ATTRIBUTE(a, "state"));
  }
  SpikingLayer(const SpikingLayer&) = delete;
  SpikingLayer& operator=(const SpikingLayer&) = delete;

  std::vector<Product> products;
  std::vector<Residual> residuals;
  ConvIf layer{};
};

// Conv2dEncode, or Conv2dCurrent, which has no T; `out` gets the masks or the current.
inline AnalogConv analog_conv(py::handle a) {
  AnalogConv c{};
  const py::object x = QCFS_ATTRIBUTE(a, "x"), weight = QCFS_ATTRIBUTE(a, "weight");
  const std::vector<std::int64_t> in = shape(x), out = shape(a);    // [N, H, W, C], [(planes,) N, OH, OW, O]
  c.batch = in[0];
  c.in_h = in[1];
  c.in_w = in[2];
  c.in_channels = in[3];
  c.out_h = out[out.size() - 3];
  c.out_w = out[out.size() - 2];
  c.out_channels = out[out.size() - 1];
  c.x = data<const std::int32_t>(x);
  c.exponent = data<const std::int32_t>(QCFS_ATTRIBUTE(a, "exponent"));
  c.weight = data<const std::int16_t>(weight);
  c.g = geometry(QCFS_ATTRIBUTE(a, "geometry"));
  c.gain = data<const double>(QCFS_ATTRIBUTE(a, "gain"));
  c.offset = data<const double>(QCFS_ATTRIBUTE(a, "offset"));
  c.low = data<const std::int32_t>(QCFS_ATTRIBUTE(a, "low"));
  c.high = data<const std::int32_t>(QCFS_ATTRIBUTE(a, "high"));
  if (out.size() == 5) {
    c.steps = steps_of(a);
    c.threshold = data<const std::int32_t>(QCFS_ATTRIBUTE(a, "threshold"));
  }
  return c;
}

inline void set_output(AnalogConv& c, py::handle out) {
  if (c.steps > 0) {
    c.out_mask = data<std::uint8_t>(out);
  } else {
    c.out_current = data<std::int32_t>(out);
  }
}

// Windows as a kernel reads them: three ints for each output row or column, on its own device.
struct Windows {
  const std::int64_t* rows;
  const std::int64_t* cols;
  std::int64_t out_h, out_w;
};

// The windows of one axis of a call on inputs of `size`, here where they can be looked at.
inline std::vector<std::int64_t> windows(py::handle list, std::int64_t size) {
  auto found = list.cast<std::vector<std::int64_t>>();
  bool sound = !found.empty() && found.size() % 3 == 0;
  for (std::size_t i = 0; sound && i < found.size(); i += 3) {
    sound = within(found[i], 0, found[i + 1]) && found[i + 1] <= size && within(found[i + 2], 1, max_steps);
  }
  require(sound, "the windows are");
  return found;
}

inline std::int64_t multiple_of(py::handle call) {
  const std::int64_t multiple = integer(QCFS_ATTRIBUTE(call, "multiple"));
  require(within(multiple, 0, max_steps), "the multiple is");
  return multiple;
}

// Pool, or MaxPool: an OR of masks or the largest of counts, plane by plane.
inline Pool pool(py::handle a, py::handle out, const Windows& w) {
  const bool max = !py::hasattr(a, "multiple");
  const py::object x = QCFS_ATTRIBUTE(a, "x");
  const std::vector<std::int64_t> in = shape(x);    // [planes, N, H, W, C]
  const std::int64_t steps = max ? in[0] : steps_of(a);
  const Pooling pooling = !max                                       ? Pooling::sum
                          : QCFS_ATTRIBUTE(a, "counts").cast<bool>() ? Pooling::largest
                                                                     : Pooling::any;
  return {in[1],
          in[2],
          in[3],
          in[4],
          w.out_h,
          w.out_w,
          steps,
          coding(in[0], steps),
          pooling,
          w.rows,
          w.cols,
          max ? 0 : multiple_of(a),
          data<const std::uint8_t>(x),
          data<std::uint8_t>(out)};
}

inline PoolCounts pool_counts(py::handle a, py::handle out, const Windows& w) {
  const py::object counts = QCFS_ATTRIBUTE(a, "counts");
  const std::vector<std::int64_t> in = shape(counts);    // [S, N, H, W, C]
  return {in[0] * in[1],
          in[2],
          in[3],
          in[4],
          w.out_h,
          w.out_w,
          w.rows,
          w.cols,
          multiple_of(a),
          data<const std::int32_t>(counts),
          data<std::int32_t>(out)};
}

inline Count count(py::handle a, py::handle out) {
  const py::object x = QCFS_ATTRIBUTE(a, "x");
  const std::vector<std::int64_t> in = shape(x);
  const std::int64_t steps = steps_of(a);
  const std::int64_t first = integer(QCFS_ATTRIBUTE(a, "first")), last = integer(QCFS_ATTRIBUTE(a, "last"));
  require(within(first, 0, last - 1) && last <= steps, "the span is");
  std::int64_t elements = 1;    // of one plane
  for (std::size_t i = 1; i < in.size(); ++i) elements *= in[i];
  return {elements,
          steps,
          first,
          last,
          coding(in[0], steps),
          QCFS_ATTRIBUTE(a, "prefix").cast<bool>(),
          data<const std::uint8_t>(x),
          data<std::int32_t>(out)};
}

// Readout. The struct points into the vector, so this stays where it was made.
struct ReadoutLayer {
  ReadoutLayer(py::handle a, py::handle out) {
    const auto counts = QCFS_ATTRIBUTE(a, "counts").cast<py::list>(),
               weight = QCFS_ATTRIBUTE(a, "weight").cast<py::list>();
    const auto gain = QCFS_ATTRIBUTE(a, "gain").cast<py::list>(),
               multiple = QCFS_ATTRIBUTE(a, "multiple").cast<py::list>();
    const py::object geometries = QCFS_ATTRIBUTE(a, "geometry");
    terms.reserve(counts.size());
    for (std::size_t i = 0; i < counts.size(); ++i) {
      const std::vector<std::int64_t> in = shape(counts[i]);    // [1 or T, N, H, W, C]
      const bool identity = integer(result_of(weight[i], QCFS_NAME("numel"))) == 0;
      terms.push_back({data<const std::int32_t>(counts[i]), in[2], in[3], in[4],
                       identity ? nullptr : data<const std::int16_t>(weight[i]), geometry(geometries, i),
                       data<const double>(gain[i]), integer(multiple[i])});
    }
    const auto size = shape_of<5>(a);    // [1 or T, N, OH, OW, O]
    layer = {size[0] * size[1],
             size[1],
             size[2],
             size[3],
             size[4],
             steps_of(a),
             terms.data(),
             static_cast<int>(terms.size()),
             data<const double>(QCFS_ATTRIBUTE(a, "offset")),
             data<float>(out)};
  }
  ReadoutLayer(const ReadoutLayer&) = delete;
  ReadoutLayer& operator=(const ReadoutLayer&) = delete;

  std::vector<ReadoutTerm> terms;
  Readout layer{};
};

inline Quantize quantize(py::handle a, py::handle out, py::handle exponent) {
  const py::object x = QCFS_ATTRIBUTE(a, "x");
  const auto stride = result_of(x, QCFS_NAME("stride")).cast<std::array<std::int64_t, 4>>();
  const auto size = shape_of<4>(a);    // [N, H, W, C]
  return {size[0],
          size[1],
          size[2],
          size[3],
          static_cast<std::int32_t>((std::int64_t{1} << (integer(QCFS_ATTRIBUTE(a, "bits")) - 1)) - 1),
          data<const float>(x),
          stride[0],
          stride[1],
          stride[2],
          stride[3],
          data<const std::int64_t>(QCFS_ATTRIBUTE(a, "source")),
          data<const float>(QCFS_ATTRIBUTE(a, "scale")),
          data<const float>(QCFS_ATTRIBUTE(a, "shift")),
          data<std::int32_t>(out),
          data<std::int32_t>(exponent)};
}

}    // namespace qcfs::python
