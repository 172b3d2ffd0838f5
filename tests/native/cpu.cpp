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

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>

#include "core/contract.h"
#include "cpu/isa.h"
#include "layers.h"

namespace {

using namespace qcfs;
using namespace layers;

// An array whose last byte is the last byte of a mapping that a page without access follows.
template <typename T>
class Guarded {
 public:
  // No offset: the end decides where the array begins.
  explicit Guarded(i64 count, i64 = 0) : count_(count) {
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

  T* data() const { return data_; }
  i64 count() const { return count_; }
  T& operator[](i64 i) const { return data_[i]; }

 private:
  i64 count_;
  std::size_t used_ = 0, size_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

// What the processor has, and tiles where they are emulated.
std::uint32_t usable_isa() {
  std::uint32_t isa = cpu::host_isa();
#if defined(QCFS_EMULATE_TILES)
  if ((isa & cpu::isa_avx512vnni) != 0) isa |= cpu::isa_amx;
#endif
  return isa;
}

// One random layer on every kernel set and engine; `engines` are bits of those that ran.
void run_case(int threads, Evidence& evidence, unsigned& engines) {
  RandomLayer<Guarded> layer(0, evidence);
  ConvIf a = layer.a;
  for (int k = 0; k < cpu::kernel_set_count(); ++k) {
    const std::uint32_t isa = cpu::kernel_set_isa(k);
    if ((isa & ~usable_isa()) != 0) continue;
    for (const cpu::Engine wanted : {cpu::Engine::events, cpu::Engine::dense, cpu::Engine::table}) {
      const Guarded<std::uint8_t> out(layer.out_bytes());
      const Guarded<std::int32_t> state(layer.state_words());
      a.out = out.data();
      if (a.state != nullptr) a.state_out = state.data();
      const cpu::Engine engine = cpu::choose_engine(a, {isa, threads, wanted});
      std::deque<Guarded<std::uint8_t>> packed;
      for (int i = 0; i < a.product_count; ++i) {
        const std::size_t bytes = cpu::packed_bytes(a, i, engine, isa);
        void* to = packed.emplace_back(static_cast<i64>(bytes)).data();
        if (bytes > 0) cpu::pack(a, i, engine, isa, to);
        layer.products[static_cast<std::size_t>(i)].packed = bytes > 0 ? to : nullptr;
      }
      engines |= 1u << static_cast<int>(engine);
      const std::string name = std::string(cpu::kernel_set_name(k)) + " " + cpu::engine_name(engine);
      if (cpu::conv_if(a, {isa, threads, engine}) != Status::ok) fail(name);
      layer.check(out, state, name);
    }
  }
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
  if (!limits_hold()) fail("more sources than the contract's were taken");
  Evidence evidence;
  unsigned engines = 0;
  for (int i = 0; i < cases; ++i) run_case(threads, evidence, engines);
  std::printf("cases %d rate %.3f ties %ld engines %d kernels", cases, evidence.rate(),
              static_cast<long>(evidence.ties), __builtin_popcount(engines));
  for (int k = 0; k < cpu::kernel_set_count(); ++k) {
    if ((cpu::kernel_set_isa(k) & ~usable_isa()) == 0) std::printf(" %s", cpu::kernel_set_name(k));
  }
  std::printf("\n");
  return 0;
}
