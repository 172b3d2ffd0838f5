// Random layers on every kernel set against plain 64-bit loops, with operands that end at an unreadable page.
//
// Intrinsics escape the address sanitizer, so each operand is placed flush against a page without access: a
// read or write one byte past its end faults. Built by tests/test_native.py with the address and
// undefined-behaviour sanitizers and, for the thread pool, with the thread sanitizer.
//
// Usage: differential SEED CASES THREADS. Prints one line "cases C rate R ties N engines E kernels NAMES" and exits
// with 0, or says what differed and exits with 1.

#include "cpu/cpu.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/contract.h"
#include "cpu/isa.h"

namespace {

using namespace qcfs;

// An array whose last byte is the last byte of a mapping that a page without access follows.
template <typename T>
class Guarded {
 public:
  explicit Guarded(std::int64_t count) : count_(count) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    used_ = (bytes + page - 1) / page * page;
    size_ = used_ + page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + used_, page, PROT_NONE) != 0) {
      std::perror("guard page");
      std::exit(2);
    }
    data_ = reinterpret_cast<T*>(base_ + used_ - bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }

  T* data() { return data_; }
  std::int64_t size() const { return count_; }
  T& operator[](std::int64_t i) { return data_[i]; }

 private:
  std::int64_t count_;
  std::size_t used_ = 0, size_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

using Bytes = Guarded<std::uint8_t>;
using Words = Guarded<std::int32_t>;

std::mt19937_64 generator;

std::int64_t pick(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(generator);
}

bool chance(int percent) { return pick(1, 100) <= percent; }

std::int64_t planes(Coding coding, std::int64_t T) { return coding == Coding::mask ? (T + 7) / 8 : T; }

std::unique_ptr<Bytes> spikes(Coding coding, std::int64_t T, std::int64_t neurons) {
  auto x = std::make_unique<Bytes>(planes(coding, T) * neurons);
  const int rate = chance(50) ? 15 : 50;
  for (std::int64_t i = 0; i < x->size(); ++i) {
    if (coding == Coding::count) {
      (*x)[i] = static_cast<std::uint8_t>(chance(rate) ? pick(1, 255) : 0);
    } else {
      for (int b = 0; b < 8; ++b) (*x)[i] = static_cast<std::uint8_t>((*x)[i] | (chance(rate) << b));
    }
  }
  return x;
}

std::int64_t value(std::uint8_t* x, Coding coding, std::int64_t neurons, std::int64_t index, std::int64_t t) {
  if (coding == Coding::count) return x[t * neurons + index];
  return (x[(t / 8) * neurons + index] >> (t % 8)) & 1;
}

struct Totals {
  std::int64_t cases = 0, neurons = 0, spikes = 0, ties = 0;
  unsigned engines = 0;    // bits of those that ran
};

// What the processor has, and tiles where they are emulated.
std::uint32_t usable_isa() {
  std::uint32_t isa = cpu::host_isa();
#if defined(QCFS_EMULATE_TILES)
  if ((isa & cpu::isa_avx512vnni) != 0) isa |= cpu::isa_amx;
#endif
  return isa;
}

// One random layer; returns false where a kernel set differs from the plain loops.
bool run_case(int threads, Totals& totals) {
  const std::int64_t channels[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129};
  const std::int64_t T = chance(10) ? 1 : pick(2, chance(15) ? 40 : 20), N = pick(1, 3);
  std::int64_t O = channels[pick(0, 14)];
  const int weight_bytes = chance(50) ? 1 : 2;
  const std::int64_t groups = !chance(25) ? 1 : O % 3 == 0 && chance(50) ? 3 : O;    // or depthwise
  std::vector<Product> products;
  std::vector<Residual> residuals;
  std::vector<std::unique_ptr<Bytes>> kept;
  std::vector<std::unique_ptr<Words>> kept_words;

  Geometry g{pick(1, 3), pick(1, 3), pick(1, 2), pick(1, 2), pick(0, 1), pick(0, 1), pick(1, 2), pick(1, 2), groups};
  const bool linear = groups == 1 && chance(15);
  if (linear) g.kernel_h = g.kernel_w = 1, g.pad_h = g.pad_w = 0;
  const std::int64_t H = linear ? 1 : pick(5, 9), W = linear ? 1 : pick(5, 9);
  const std::int64_t OH = (H + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1) / g.stride_h + 1;
  const std::int64_t OW = (W + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1) / g.stride_w + 1;
  const auto add_product = [&](std::int64_t h, std::int64_t w, std::int64_t C, const Geometry& geometry) {
    const Coding coding = chance(25) ? Coding::count : Coding::mask;
    kept.push_back(spikes(coding, T, N * h * w * C));
    Spikes x{kept.back()->data(), coding, h, w, C};
    const std::int64_t weights = geometry.kernel_h * geometry.kernel_w * (C / geometry.groups) * O;
    kept.push_back(std::make_unique<Bytes>(weights * weight_bytes));
    const bool extreme = chance(20);
    for (std::int64_t i = 0; i < weights; ++i) {
      const std::int64_t digit = extreme ? (chance(50) ? 127 : -127) : pick(-3, 3);
      if (weight_bytes == 1) {
        kept.back()->data()[i] = static_cast<std::uint8_t>(static_cast<std::int8_t>(digit));
      } else {
        const std::int16_t wide = static_cast<std::int16_t>(digit * 257 - (extreme ? digit : digit * 193));
        std::memcpy(kept.back()->data() + 2 * i, &wide, 2);
      }
    }
    products.push_back({x, kept.back()->data(), weight_bytes, geometry});
  };
  // Now and then more inputs than one chunk of event rows takes.
  add_product(H, W, groups == 1 ? (chance(2) ? pick(500, 1300) : channels[pick(0, 14)]) : groups, g);
  if (chance(30)) add_product(OH, OW, channels[pick(0, 14)], {1, 1, 1, 1, 0, 0, 1, 1, 1});
  const std::int64_t outputs = N * OH * OW * O;
  const std::int64_t unit = weight_bytes == 1 ? 256 : 64;
  while (residuals.size() < 2 && chance(40)) {
    const Coding coding = chance(25) ? Coding::count : Coding::mask;
    kept.push_back(spikes(coding, T, outputs));
    kept_words.push_back(std::make_unique<Words>(O));
    for (std::int64_t o = 0; o < O; ++o) (*kept_words.back())[o] = static_cast<std::int32_t>(pick(0, 4) * unit);
    residuals.push_back({kept.back()->data(), coding, kept_words.back()->data()});
  }
  Words bias(O), threshold(O), current(outputs);
  const bool constant = chance(20);
  for (std::int64_t o = 0; o < O; ++o) bias[o] = static_cast<std::int32_t>(pick(-1, 2) * unit);
  for (std::int64_t i = 0; i < outputs; ++i) current[i] = static_cast<std::int32_t>(pick(-2, 2) * unit);

  // The formula, neuron by neuron.
  std::vector<std::int64_t> drive(static_cast<std::size_t>(outputs * T));
  std::int64_t largest = 0;    // of any membrane, whatever the order of additions
  for (std::int64_t i = 0; i < outputs; ++i) {
    std::int64_t size = 0;
    const std::int64_t o = i % O, col = i / O % OW, row = i / O / OW % OH, n = i / O / OW / OH;
    for (std::int64_t t = 0; t < T; ++t) {
      std::int64_t sum = 0;
      for (const Product& p : products) {
        const std::int64_t per_group = p.x.channels / p.g.groups;
        const std::int64_t first = o / (O / p.g.groups) * per_group;
        const std::int64_t neurons = N * p.x.height * p.x.width * p.x.channels;
        for (std::int64_t kh = 0; kh < p.g.kernel_h; ++kh) {
          for (std::int64_t kw = 0; kw < p.g.kernel_w; ++kw) {
            const std::int64_t r = row * p.g.stride_h - p.g.pad_h + kh * p.g.dilation_h;
            const std::int64_t c = col * p.g.stride_w - p.g.pad_w + kw * p.g.dilation_w;
            if (r < 0 || c < 0 || r >= p.x.height || c >= p.x.width) continue;
            for (std::int64_t k = 0; k < per_group; ++k) {
              const std::int64_t at = ((kh * p.g.kernel_w + kw) * per_group + k) * O + o;
              const std::int64_t w = weight_bytes == 1 ? 256 * static_cast<const std::int8_t*>(p.weight)[at]
                                                       : static_cast<const std::int16_t*>(p.weight)[at];
              const std::int64_t index = ((n * p.x.height + r) * p.x.width + c) * p.x.channels + first + k;
              const std::int64_t part = w * value(const_cast<std::uint8_t*>(p.x.data), p.x.coding, neurons, index, t);
              sum += part;
              size += std::llabs(part);
            }
          }
        }
      }
      for (const Residual& r : residuals) {
        sum += r.amplitude[o] * value(const_cast<std::uint8_t*>(r.data), r.coding, outputs, i, t);
      }
      drive[static_cast<std::size_t>(i * T + t)] = sum + bias[o] + (constant ? current[i] : 0);
      size += 2048 * unit;    // all but the products
    }
    largest = std::max(largest, size);
  }
  if (largest + largest / T + 4 * unit >= std::int64_t{1} << 31) return true;    // beyond the contract
  ++totals.cases;
  for (std::int64_t o = 0; o < O; ++o) {
    std::int64_t total = 0;
    for (std::int64_t i = o; i < outputs; i += O) {
      for (std::int64_t t = 0; t < T; ++t) total += std::llabs(drive[static_cast<std::size_t>(i * T + t)]);
    }
    const std::int64_t mean = total / (outputs / O * T);
    threshold[o] = static_cast<std::int32_t>(2 * unit * (mean / (2 * unit)) + 2 * unit);
  }
  std::vector<std::uint8_t> want(static_cast<std::size_t>((T + 7) / 8 * outputs));
  for (std::int64_t i = 0; i < outputs; ++i) {
    std::int64_t v = threshold[i % O] / 2;
    for (std::int64_t t = 0; t < T; ++t) {
      v += drive[static_cast<std::size_t>(i * T + t)];
      totals.ties += v == threshold[i % O];
      const bool spike = v >= threshold[i % O];
      totals.spikes += spike;
      ++totals.neurons;
      if (spike) {
        v -= threshold[i % O];
        std::uint8_t& byte = want[static_cast<std::size_t>((t / 8) * outputs + i)];
        byte = static_cast<std::uint8_t>(byte | (1 << (t % 8)));
      }
    }
  }

  for (int k = 0; k < cpu::kernel_set_count(); ++k) {
    const std::uint32_t isa = cpu::kernel_set_isa(k);
    if ((isa & ~usable_isa()) != 0) continue;
    for (const cpu::Engine wanted : {cpu::Engine::events, cpu::Engine::dense}) {
      Bytes out((T + 7) / 8 * outputs);
      ConvIf a{N,
               OH,
               OW,
               O,
               T,
               products.data(),
               static_cast<int>(products.size()),
               residuals.data(),
               static_cast<int>(residuals.size()),
               constant ? current.data() : nullptr,
               bias.data(),
               threshold.data(),
               out.data()};
      const cpu::Engine engine = cpu::choose_engine(a, {isa, threads, wanted});
      std::vector<std::unique_ptr<Bytes>> packed;
      for (int i = 0; i < a.product_count; ++i) {
        const std::size_t bytes = cpu::packed_bytes(a, i, engine, isa);
        packed.push_back(std::make_unique<Bytes>(static_cast<std::int64_t>(bytes)));
        if (bytes > 0) cpu::pack(a, i, engine, isa, packed.back()->data());
        products[static_cast<std::size_t>(i)].packed = bytes > 0 ? packed.back()->data() : nullptr;
      }
      totals.engines |= 1u << static_cast<int>(engine);
      if (cpu::conv_if(a, {isa, threads, engine}) != Status::ok) {
        std::printf("%s: failed\n", cpu::kernel_set_name(k));
        return false;
      }
      if (std::memcmp(out.data(), want.data(), want.size()) != 0) {
        std::printf("%s %s differs: N %ld T %ld O %ld groups %ld bytes %d\n", cpu::kernel_set_name(k),
                    cpu::engine_name(engine), static_cast<long>(N), static_cast<long>(T), static_cast<long>(O),
                    static_cast<long>(groups), weight_bytes);
        return false;
      }
    }
  }
  return true;
}

// More sources than arrays hold are refused before anything is read.
bool limits_hold() {
  ConvIf a{};
  a.batch = a.out_h = a.out_w = a.out_channels = a.steps = 1;
  ConvIf b = a;
  a.product_count = max_products + 1;
  b.residual_count = max_residuals + 1;
  return cpu::conv_if(a, {0, 1}) == Status::too_many_sources && cpu::conv_if(b, {0, 1}) == Status::too_many_sources;
}

}    // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: differential SEED CASES THREADS\n");
    return 2;
  }
  generator.seed(std::strtoull(argv[1], nullptr, 10));
  const int cases = std::atoi(argv[2]), threads = std::atoi(argv[3]);
  if (!limits_hold()) {
    std::printf("more sources than the contract's were taken\n");
    return 1;
  }
  Totals totals;
  while (totals.cases < cases) {
    if (!run_case(threads, totals)) return 1;
  }
  std::printf("cases %d rate %.3f ties %ld engines %d kernels", cases,
              static_cast<double>(totals.spikes) / static_cast<double>(totals.neurons), static_cast<long>(totals.ties),
              __builtin_popcount(totals.engines));
  for (int k = 0; k < qcfs::cpu::kernel_set_count(); ++k) {
    if ((qcfs::cpu::kernel_set_isa(k) & ~usable_isa()) == 0) std::printf(" %s", qcfs::cpu::kernel_set_name(k));
  }
  std::printf("\n");
  return 0;
}
