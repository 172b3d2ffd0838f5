// Python binding of the CUDA backend: unpacks addresses and sizes, makes the operands' device current, queues the
// launches, raises on a bad code. Every address is device memory; shapes, dtypes and devices were checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/cuda.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using qcfs::Coding;
using qcfs::Geometry;
using qcfs::cuda::Launch;
using qcfs::cuda::Plan;

template <typename T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

void check(int code, const std::string& op) {
  if (code != qcfs::cuda::ok) throw std::runtime_error(op + ": " + qcfs::cuda::describe(code));
}

// (device index, stream address)
using Where = std::tuple<int, Address>;

// Makes the device current, and the one before it again at the end.
class Guard {
 public:
  Guard(const Where& where, const std::string& op) {
    const int device = std::get<0>(where);
    check(qcfs::cuda::set_device(device, &previous_), op);
    changed_ = previous_ != device;
    launch_.stream = at<void>(std::get<1>(where));
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

using GeometryTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                 std::int64_t, std::int64_t, std::int64_t>;

Geometry geometry(const GeometryTuple& t) {
  return std::apply([](auto... n) { return Geometry{n...}; }, t);
}

Coding coding(bool count) { return count ? Coding::count : Coding::mask; }

// (address, is_count, height, width, channels, weight address, weight bytes, geometry)
using ProductTuple = std::tuple<Address, bool, std::int64_t, std::int64_t, std::int64_t, Address, int, GeometryTuple>;
// (address, is_count, amplitude address)
using ResidualTuple = std::tuple<Address, bool, Address>;
// (batch, height, width, channels, steps) of the output
using OutputTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
// (counts, height, width, channels, weight or 0, geometry, gain, multiple)
using TermTuple =
    std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, Address, GeometryTuple, Address, std::int64_t>;
// (path, tile, splits, slices, membrane bytes, partial bytes)
using PlanTuple = std::tuple<int, int, int, int, std::int64_t, std::int64_t>;

struct Layer {
  std::vector<qcfs::Product> products;
  std::vector<qcfs::Residual> residuals;
  qcfs::ConvIf a{};

  Layer(const std::vector<ProductTuple>& p, const std::vector<ResidualTuple>& r, const OutputTuple& out) {
    for (const auto& [x, is_count, h, w, c, weight, bytes, g] : p) {
      products.push_back(
          {{at<const std::uint8_t>(x), coding(is_count), h, w, c}, at<const void>(weight), bytes, geometry(g)});
    }
    for (const auto& [x, is_count, amplitude] : r) {
      residuals.push_back({at<const std::uint8_t>(x), coding(is_count), at<const std::int32_t>(amplitude)});
    }
    std::tie(a.batch, a.out_h, a.out_w, a.out_channels, a.steps) = out;
    a.products = products.data();
    a.product_count = static_cast<int>(products.size());
    a.residuals = residuals.data();
    a.residual_count = static_cast<int>(residuals.size());
  }
};

PlanTuple plan_conv_if(const Where& where, const std::vector<ProductTuple>& products, const OutputTuple& out) {
  const Guard guard(where, "conv2d_if");
  const Layer layer(products, {}, out);
  const Plan p = qcfs::cuda::plan_conv_if(layer.a, guard.launch().device);
  return {static_cast<int>(p.path), static_cast<int>(p.tile), p.splits, p.slices, p.membrane_bytes, p.partial_bytes};
}

void conv_if(const Where& where, const std::string& op, const PlanTuple& plan, const std::vector<Address>& packed,
             Address workspace, const std::vector<ProductTuple>& products, const std::vector<ResidualTuple>& residuals,
             Address current, Address bias, Address threshold, Address result, const OutputTuple& out) {
  const Guard guard(where, op);
  Layer layer(products, residuals, out);
  layer.a.current = at<const std::int32_t>(current);
  layer.a.bias = at<const std::int32_t>(bias);
  layer.a.threshold = at<const std::int32_t>(threshold);
  layer.a.out = at<std::uint8_t>(result);
  const auto& [path, tile, splits, slices, membrane, partial] = plan;
  const Plan p{
      static_cast<qcfs::cuda::Path>(path), static_cast<qcfs::cuda::Tile>(tile), splits, slices, membrane, partial};
  std::vector<const std::int8_t*> weights;
  for (const Address w : packed) weights.push_back(at<const std::int8_t>(w));
  check(qcfs::cuda::conv_if(layer.a, weights.data(), p, at<void>(workspace), guard.launch()), op);
}

std::size_t packed_bytes(const GeometryTuple& g, std::int64_t channels, std::int64_t out_channels, int weight_bytes) {
  return qcfs::cuda::packed_bytes(geometry(g), channels, out_channels, weight_bytes);
}

void pack_weight(const Where& where, const GeometryTuple& g, std::int64_t channels, std::int64_t out_channels,
                 int weight_bytes, Address weight, Address packed) {
  const Guard guard(where, "weight packing");
  check(qcfs::cuda::pack_weight(geometry(g), channels, out_channels, weight_bytes, at<const void>(weight),
                                at<std::int8_t>(packed), guard.launch()),
        "weight packing");
}

void analog(const Where& where, Address x, Address exponent, Address weight, Address packed, const GeometryTuple& g,
            Address gain, Address offset, Address low, Address high, Address threshold, Address out_mask,
            Address out_current, std::int64_t batch, std::int64_t in_h, std::int64_t in_w, std::int64_t in_channels,
            std::int64_t out_h, std::int64_t out_w, std::int64_t out_channels, std::int64_t steps) {
  const std::string op = "analog convolution";
  const Guard guard(where, op);
  const qcfs::AnalogConv a{batch,
                           in_h,
                           in_w,
                           in_channels,
                           out_h,
                           out_w,
                           out_channels,
                           steps,
                           at<const std::int16_t>(x),
                           at<const std::int32_t>(exponent),
                           at<const std::int16_t>(weight),
                           geometry(g),
                           at<const double>(gain),
                           at<const double>(offset),
                           at<const std::int32_t>(low),
                           at<const std::int32_t>(high),
                           at<const std::int32_t>(threshold),
                           at<std::uint8_t>(out_mask),
                           at<std::int32_t>(out_current)};
  check(qcfs::cuda::analog(a, at<const std::int8_t>(packed), guard.launch()), op);
}

void encode(const Where& where, Address current, Address threshold, Address out, std::int64_t pixels,
            std::int64_t channels, std::int64_t steps) {
  const Guard guard(where, "encode");
  const qcfs::Encode a{pixels,
                       channels,
                       steps,
                       at<const std::int32_t>(current),
                       at<const std::int32_t>(threshold),
                       at<std::uint8_t>(out)};
  check(qcfs::cuda::encode(a, guard.launch()), "encode");
}

void pool(const Where& where, Address x, bool is_count, bool any, Address rows, Address cols, std::int64_t out_h,
          std::int64_t out_w, std::int64_t multiple, Address out, std::int64_t batch, std::int64_t in_h,
          std::int64_t in_w, std::int64_t channels, std::int64_t steps) {
  const Guard guard(where, "pool");
  const qcfs::Pool a{batch,
                     in_h,
                     in_w,
                     channels,
                     out_h,
                     out_w,
                     steps,
                     coding(is_count),
                     any,
                     at<const std::int64_t>(rows),
                     at<const std::int64_t>(cols),
                     multiple,
                     at<const std::uint8_t>(x),
                     at<std::uint8_t>(out)};
  check(qcfs::cuda::pool(a, guard.launch()), "pool");
}

void pool_counts(const Where& where, Address x, Address rows, Address cols, std::int64_t out_h, std::int64_t out_w,
                 std::int64_t multiple, Address out, std::int64_t images, std::int64_t in_h, std::int64_t in_w,
                 std::int64_t channels) {
  const Guard guard(where, "pool_counts");
  const qcfs::PoolCounts a{images,
                           in_h,
                           in_w,
                           channels,
                           out_h,
                           out_w,
                           at<const std::int64_t>(rows),
                           at<const std::int64_t>(cols),
                           multiple,
                           at<const std::int32_t>(x),
                           at<std::int32_t>(out)};
  check(qcfs::cuda::pool_counts(a, guard.launch()), "pool_counts");
}

void count(const Where& where, Address x, bool is_count, bool prefix, Address out, std::int64_t elements,
           std::int64_t steps) {
  const Guard guard(where, "count");
  const qcfs::Count a{elements, steps, coding(is_count), prefix, at<const std::uint8_t>(x), at<std::int32_t>(out)};
  check(qcfs::cuda::count(a, guard.launch()), "count");
}

void readout(const Where& where, const std::vector<TermTuple>& terms, Address offset, Address out, std::int64_t images,
             std::int64_t samples, std::int64_t out_h, std::int64_t out_w, std::int64_t out_channels,
             std::int64_t steps) {
  const Guard guard(where, "readout");
  std::vector<qcfs::ReadoutTerm> t;
  for (const auto& [x, h, w, c, weight, g, gain, multiple] : terms) {
    t.push_back({at<const std::int32_t>(x), h, w, c, at<const std::int16_t>(weight), geometry(g),
                 at<const double>(gain), multiple});
  }
  const qcfs::Readout a{images,
                        samples,
                        out_h,
                        out_w,
                        out_channels,
                        steps,
                        t.data(),
                        static_cast<int>(t.size()),
                        at<const double>(offset),
                        at<float>(out)};
  check(qcfs::cuda::readout(a, guard.launch()), "readout");
}

void quantize(const Where& where, Address x, const std::vector<std::int64_t>& strides, Address source, Address scale,
              Address shift, Address out, Address exponent, Address workspace, std::int64_t batch, std::int64_t height,
              std::int64_t width, std::int64_t channels) {
  const Guard guard(where, "quantize_input");
  const qcfs::Quantize a{batch,
                         height,
                         width,
                         channels,
                         at<const float>(x),
                         strides.at(0),
                         strides.at(1),
                         strides.at(2),
                         strides.at(3),
                         at<const std::int64_t>(source),
                         at<const float>(scale),
                         at<const float>(shift),
                         at<std::int16_t>(out),
                         at<std::int32_t>(exponent)};
  check(qcfs::cuda::quantize(a, at<std::uint32_t>(workspace), guard.launch()), "quantize_input");
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
  m.attr("MOST_PRODUCTS") = qcfs::cuda::most_products;
  m.attr("MOST_RESIDUALS") = qcfs::cuda::most_residuals;
  m.attr("MOST_TERMS") = qcfs::cuda::most_terms;
  m.attr("TENSOR_CORES") = static_cast<int>(qcfs::cuda::Path::tensor_cores);
  m.def("device_count", [] {
    int n = 0;
    check(qcfs::cuda::device_count(&n), "cudaGetDeviceCount");
    return n;
  });
  m.def("plan_conv_if", &plan_conv_if);
  m.def("conv_if", &conv_if);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_weight", &pack_weight);
  m.def("analog_on_tensor_cores", [](const GeometryTuple& g, std::int64_t channels, std::int64_t out_channels) {
    return qcfs::cuda::analog_on_tensor_cores(geometry(g), channels, out_channels);
  });
  m.def("analog", &analog);
  m.def("encode", &encode);
  m.def("pool", &pool);
  m.def("pool_counts", &pool_counts);
  m.def("count", &count);
  m.def("readout", &readout);
  m.def("quantize", &quantize);
}
