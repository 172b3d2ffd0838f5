// Python binding of the CPU backend: unpacks addresses and sizes, releases the GIL, raises on a bad
// status. Shapes, dtypes and devices are checked in qcfs_fast/ops.py before anything arrives here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using qcfs::Coding;
using qcfs::Geometry;
using qcfs::Status;
using qcfs::cpu::Engine;
using qcfs::cpu::Options;

template <typename T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

void check(Status s, const char* op) {
  if (s == Status::ok) return;
  const std::string name(op);
  if (s == Status::out_of_memory) {
    PyErr_SetString(PyExc_MemoryError, (name + ": no memory for the workspace; use a smaller batch").c_str());
    throw py::error_already_set();
  }
  throw py::value_error(name + ": the input holds NaN or infinity; clean the data before it enters the network");
}

using GeometryTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                 std::int64_t, std::int64_t, std::int64_t>;

Geometry geometry(const GeometryTuple& g) {
  return {std::get<0>(g), std::get<1>(g), std::get<2>(g), std::get<3>(g), std::get<4>(g),
          std::get<5>(g), std::get<6>(g), std::get<7>(g), std::get<8>(g)};
}

Coding coding(bool count) { return count ? Coding::count : Coding::mask; }

// (address, is_count, height, width, channels, weight address, weight bytes, geometry)
using ProductTuple = std::tuple<Address, bool, std::int64_t, std::int64_t, std::int64_t, Address, int, GeometryTuple>;
// Addresses of each product's packed weights by engine, 0 where it has none yet.
using PackedTuple = std::tuple<Address, Address>;
// (address, is_count, amplitude address)
using ResidualTuple = std::tuple<Address, bool, Address>;
// (counts, height, width, channels, weight or 0, geometry, gain, multiple)
using TermTuple =
    std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, Address, GeometryTuple, Address, std::int64_t>;

Engine engine(int value) { return static_cast<Engine>(value); }

std::vector<qcfs::Product> unpack(const std::vector<ProductTuple>& products) {
  std::vector<qcfs::Product> p;
  for (const auto& [x, is_count, h, w, c, weight, bytes, g] : products) {
    p.push_back({{at<const std::uint8_t>(x), coding(is_count), h, w, c}, at<const void>(weight), bytes, geometry(g)});
  }
  return p;
}

// Returns the engine that ran, or, negative, the one that was chosen but lacks packed weights: pack them, call again.
int conv_if(const std::vector<ProductTuple>& products, const std::vector<PackedTuple>& packed,
            const std::vector<ResidualTuple>& residuals, Address current, Address bias, Address threshold, Address out,
            std::int64_t batch, std::int64_t out_h, std::int64_t out_w, std::int64_t out_channels, std::int64_t steps,
            std::uint32_t isa, int threads, int wanted) {
  std::vector<qcfs::Product> p = unpack(products);
  std::vector<qcfs::Residual> r;
  for (const auto& [x, is_count, amplitude] : residuals) {
    r.push_back({at<const std::uint8_t>(x), coding(is_count), at<const std::int32_t>(amplitude)});
  }
  const qcfs::ConvIf a{batch,
                       out_h,
                       out_w,
                       out_channels,
                       steps,
                       p.data(),
                       static_cast<int>(p.size()),
                       r.data(),
                       static_cast<int>(r.size()),
                       at<const std::int32_t>(current),
                       at<const std::int32_t>(bias),
                       at<const std::int32_t>(threshold),
                       at<std::uint8_t>(out)};
  Status s;
  Engine chosen;
  {
    py::gil_scoped_release release;
    chosen = qcfs::cpu::choose_engine(a, Options{isa, threads, engine(wanted)});
    for (std::size_t i = 0; i < p.size(); ++i) {
      p[i].packed = at<const void>(chosen == Engine::dense ? std::get<1>(packed.at(i)) : std::get<0>(packed.at(i)));
    }
    for (int i = 0; i < a.product_count; ++i) {
      if (p[static_cast<std::size_t>(i)].packed == nullptr && qcfs::cpu::packed_bytes(a, i, chosen, isa) > 0) {
        return -static_cast<int>(chosen);
      }
    }
    s = qcfs::cpu::conv_if(a, Options{isa, threads, chosen});
  }
  check(s, "conv2d_if");
  return static_cast<int>(chosen);
}

// A layer of which only shapes and weights matter.
qcfs::ConvIf shapes(const std::vector<qcfs::Product>& products, std::int64_t out_channels) {
  qcfs::ConvIf a{};
  a.out_channels = out_channels;
  a.products = products.data();
  a.product_count = static_cast<int>(products.size());
  return a;
}

std::size_t packed_bytes(const std::vector<ProductTuple>& products, std::int64_t out_channels, int product, int wanted,
                         std::uint32_t isa) {
  const std::vector<qcfs::Product> p = unpack(products);
  return qcfs::cpu::packed_bytes(shapes(p, out_channels), product, engine(wanted), isa);
}

void pack(const std::vector<ProductTuple>& products, std::int64_t out_channels, int product, int wanted,
          std::uint32_t isa, Address out) {
  const std::vector<qcfs::Product> p = unpack(products);
  py::gil_scoped_release release;
  qcfs::cpu::pack(shapes(p, out_channels), product, engine(wanted), isa, at<void>(out));
}

qcfs::AnalogConv analog_shape(Address weight, const GeometryTuple& g, std::int64_t in_channels,
                              std::int64_t out_channels) {
  qcfs::AnalogConv a{};
  a.weight = at<const std::int16_t>(weight);
  a.g = geometry(g);
  a.in_channels = in_channels;
  a.out_channels = out_channels;
  return a;
}

std::size_t packed_analog_bytes(const GeometryTuple& g, std::int64_t in_channels, std::int64_t out_channels,
                                std::uint32_t isa) {
  return qcfs::cpu::packed_bytes(analog_shape(0, g, in_channels, out_channels), isa);
}

void pack_analog(Address weight, const GeometryTuple& g, std::int64_t in_channels, std::int64_t out_channels,
                 std::uint32_t isa, Address out) {
  py::gil_scoped_release release;
  qcfs::cpu::pack(analog_shape(weight, g, in_channels, out_channels), isa, at<void>(out));
}

void analog(Address x, Address exponent, Address weight, Address packed, const GeometryTuple& g, Address gain,
            Address offset, Address low, Address high, Address threshold, Address out_mask, Address out_current,
            std::int64_t batch, std::int64_t in_h, std::int64_t in_w, std::int64_t in_channels, std::int64_t out_h,
            std::int64_t out_w, std::int64_t out_channels, std::int64_t steps, std::uint32_t isa, int threads) {
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
                           at<std::int32_t>(out_current),
                           at<const void>(packed)};
  Status s;
  {
    py::gil_scoped_release release;
    s = qcfs::cpu::analog(a, Options{isa, threads});
  }
  check(s, "analog convolution");
}

void encode(Address current, Address threshold, Address out, std::int64_t pixels, std::int64_t channels,
            std::int64_t steps, std::uint32_t isa, int threads) {
  const qcfs::Encode a{pixels,
                       channels,
                       steps,
                       at<const std::int32_t>(current),
                       at<const std::int32_t>(threshold),
                       at<std::uint8_t>(out)};
  Status s;
  {
    py::gil_scoped_release release;
    s = qcfs::cpu::encode(a, Options{isa, threads});
  }
  check(s, "encode");
}

void pool(Address x, bool is_count, bool any, const std::vector<std::int64_t>& rows,
          const std::vector<std::int64_t>& cols, std::int64_t multiple, Address out, std::int64_t batch,
          std::int64_t in_h, std::int64_t in_w, std::int64_t channels, std::int64_t steps, std::uint32_t isa,
          int threads) {
  const qcfs::Pool a{batch,
                     in_h,
                     in_w,
                     channels,
                     static_cast<std::int64_t>(rows.size() / 3),
                     static_cast<std::int64_t>(cols.size() / 3),
                     steps,
                     coding(is_count),
                     any,
                     rows.data(),
                     cols.data(),
                     multiple,
                     at<const std::uint8_t>(x),
                     at<std::uint8_t>(out)};
  Status s;
  {
    py::gil_scoped_release release;
    s = qcfs::cpu::pool(a, Options{isa, threads});
  }
  check(s, "pool");
}

void pool_counts(Address x, const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& cols,
                 std::int64_t multiple, Address out, std::int64_t images, std::int64_t in_h, std::int64_t in_w,
                 std::int64_t channels, std::uint32_t isa, int threads) {
  const qcfs::PoolCounts a{images,
                           in_h,
                           in_w,
                           channels,
                           static_cast<std::int64_t>(rows.size() / 3),
                           static_cast<std::int64_t>(cols.size() / 3),
                           rows.data(),
                           cols.data(),
                           multiple,
                           at<const std::int32_t>(x),
                           at<std::int32_t>(out)};
  Status s;
  {
    py::gil_scoped_release release;
    s = qcfs::cpu::pool_counts(a, Options{isa, threads});
  }
  check(s, "pool_counts");
}

void count(Address x, bool is_count, bool prefix, Address out, std::int64_t elements, std::int64_t steps,
           std::uint32_t isa, int threads) {
  const qcfs::Count a{elements, steps, coding(is_count), prefix, at<const std::uint8_t>(x), at<std::int32_t>(out)};
  Status s;
  {
    py::gil_scoped_release release;
    s = qcfs::cpu::count(a, Options{isa, threads});
  }
  check(s, "count");
}

void readout(const std::vector<TermTuple>& terms, Address offset, Address out, std::int64_t images,
             std::int64_t samples, std::int64_t out_h, std::int64_t out_w, std::int64_t out_channels,
             std::int64_t steps, std::uint32_t isa, int threads) {
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
  Status s;
  {
    py::gil_scoped_release release;
    s = qcfs::cpu::readout(a, Options{isa, threads});
  }
  check(s, "readout");
}

void quantize(Address x, const std::vector<std::int64_t>& strides, Address source, Address scale, Address shift,
              Address out, Address exponent, std::int64_t batch, std::int64_t height, std::int64_t width,
              std::int64_t channels, std::uint32_t isa, int threads) {
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
  Status s;
  {
    py::gil_scoped_release release;
    s = qcfs::cpu::quantize(a, Options{isa, threads});
  }
  check(s, "quantize_input");
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
  m.def("engines", [] {
    std::vector<std::string> names;
    for (const Engine e : {Engine::automatic, Engine::events, Engine::dense, Engine::depthwise, Engine::grouped}) {
      names.emplace_back(qcfs::cpu::engine_name(e));
    }
    return names;
  });
  m.def("measure_peak", &qcfs::cpu::measure_peak, py::call_guard<py::gil_scoped_release>());
  m.def("use_threads_of", [](Address parallel_for) {
    qcfs::cpu::use_threads_of(reinterpret_cast<qcfs::cpu::ParallelFor>(parallel_for));
  });
  m.def("packed_bytes", &packed_bytes);
  m.def("pack", &pack);
  m.def("packed_analog_bytes", &packed_analog_bytes);
  m.def("pack_analog", &pack_analog);
  m.def("host_isa", &qcfs::cpu::host_isa);
  m.def("chosen_kernel_set", &qcfs::cpu::chosen_kernel_set);
  m.def("kernel_sets", [] {
    std::vector<std::pair<std::string, std::uint32_t>> sets;
    for (int i = 0; i < qcfs::cpu::kernel_set_count(); ++i) {
      sets.emplace_back(qcfs::cpu::kernel_set_name(i), qcfs::cpu::kernel_set_isa(i));
    }
    return sets;
  });
  m.def("conv_if", &conv_if);
  m.def("analog", &analog);
  m.def("encode", &encode);
  m.def("pool", &pool);
  m.def("pool_counts", &pool_counts);
  m.def("count", &count);
  m.def("readout", &readout);
  m.def("quantize", &quantize);
}
