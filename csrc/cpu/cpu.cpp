// Dispatch and task cutting. Tasks write disjoint output and read shared input; every worker keeps one
// workspace that only grows, so that a network of many layers does not go back to the system for each.
#include "cpu/cpu.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/kernels/kernel_set.h"
#include "cpu/thread_pool.h"

namespace qcfs::cpu {

#define QCFS_KERNEL_SET(name) extern const KernelSet name##_kernels;
#include "cpu/kernels/kernels.inc"
#undef QCFS_KERNEL_SET

namespace {

const KernelSet* const kernel_sets[] = {
#define QCFS_KERNEL_SET(name) &name##_kernels,
#include "cpu/kernels/kernels.inc"
#undef QCFS_KERNEL_SET
};
constexpr int kernel_sets_count = static_cast<int>(sizeof(kernel_sets) / sizeof(kernel_sets[0]));

const KernelSet& choose(std::uint32_t isa) {
  for (const KernelSet* k : kernel_sets) {
    if ((k->isa & ~isa) == 0) return *k;
  }
  return *kernel_sets[kernel_sets_count - 1];
}

class Workspace {
 public:
  ~Workspace() { std::free(data_); }

  void* reserve(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, size_);
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

thread_local Workspace workspace;

// Runs task(index) in parallel; a task returns a Status and the worst one is the result.
template <typename Task>
Status run(std::int64_t tasks, int threads, const Task& task) {
  struct Job {
    const Task& task;
    std::atomic<int> status;
  };
  Job job{task, {static_cast<int>(Status::ok)}};
  parallel_for(
      tasks, threads,
      [](const void* context, std::int64_t index, int) {
        // The pool hands the context on as const; the status is the one thing tasks share.
        Job* j = const_cast<Job*>(static_cast<const Job*>(context));
        const Status s = j->task(index);
        if (s != Status::ok) j->status.store(static_cast<int>(s), std::memory_order_relaxed);
      },
      &job);
  return static_cast<Status>(job.status.load(std::memory_order_relaxed));
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Below this many elementary operations waking other threads costs more than it brings (about 30 us).
constexpr std::int64_t least_parallel_work = 1 << 17;

int useful_threads(std::int64_t work, int threads) { return work < least_parallel_work ? 1 : threads; }

// Cuts `rows` of `row_work` elementary operations each into tasks of at least 2^15 and runs range(row0, row1).
template <typename Range>
Status run_rows(std::int64_t rows, std::int64_t row_work, int threads, const Range& range) {
  if (rows == 0) return Status::ok;
  const std::int64_t least = ceil_div(1 << 15, row_work > 0 ? row_work : 1);
  const std::int64_t per_task = least > ceil_div(rows, 8 * threads) ? least : ceil_div(rows, 8 * threads);
  return run(ceil_div(rows, per_task), useful_threads(rows * row_work, threads), [&](std::int64_t i) {
    const std::int64_t end = (i + 1) * per_task;
    return range(i * per_task, end < rows ? end : rows);
  });
}

// Linear layers on a batch go through the samples panel by panel, so that a panel is read from memory once.
constexpr std::int64_t panel_channels = 128;

// How one layer is cut: first into bands of output rows, then, when those are too few for the threads,
// into ranges of output channels.
struct Cut {
  std::int64_t batch, band, bands, range, ranges;
};

Cut cut_layer(std::int64_t batch, std::int64_t rows, std::int64_t channels, int threads, std::int64_t channel_unit) {
  const std::int64_t wanted = threads > 1 ? 4 * threads : 1;
  Cut c{batch, rows, 1, channels, 1};
  if (batch < wanted) {
    // Bands re-list the halo rows of their neighbours: keep them at least four rows high.
    std::int64_t bands = ceil_div(wanted, batch);
    if (bands > ceil_div(rows, 4)) bands = ceil_div(rows, 4);
    c.band = ceil_div(rows, bands);
    c.bands = ceil_div(rows, c.band);
    if (batch * c.bands < wanted && channel_unit > 0) {
      const std::int64_t ranges = ceil_div(wanted, batch * c.bands);
      c.range = ceil_div(ceil_div(channels, ranges), channel_unit) * channel_unit;
      c.ranges = ceil_div(channels, c.range);
    }
  }
  return c;
}

Tile tile_of(const Cut& c, std::int64_t index, std::int64_t rows, std::int64_t channels) {
  Tile t;
  // Ranges are the outer loop: neighbouring tasks share a panel of weights.
  const std::int64_t band = index % c.bands;
  t.sample = index / c.bands % c.batch;
  const std::int64_t range = index / c.bands / c.batch;
  t.row0 = band * c.band;
  t.row1 = t.row0 + c.band < rows ? t.row0 + c.band : rows;
  t.channel0 = range * c.range;
  t.channel1 = t.channel0 + c.range < channels ? t.channel0 + c.range : channels;
  return t;
}

std::int64_t taps(const Geometry& g, std::int64_t in_channels) {
  return g.kernel_h * g.kernel_w * (in_channels / g.groups);
}

}    // namespace

int kernel_set_count() { return kernel_sets_count; }
const char* kernel_set_name(int index) { return kernel_sets[index]->name; }
std::uint32_t kernel_set_isa(int index) { return kernel_sets[index]->isa; }
const char* chosen_kernel_set(std::uint32_t isa) { return choose(isa).name; }

Status conv_if(const ConvIf& a, const Options& options) {
  if (a.batch == 0) return Status::ok;
  const KernelSet& k = choose(options.isa);
  std::int64_t work = 0;
  for (int i = 0; i < a.product_count; ++i) work += taps(a.products[i].g, a.products[i].x.channels) / 8;
  work = (work + 4) * a.batch * a.out_h * a.out_w * a.out_channels * a.steps;
  const int threads = useful_threads(work, options.threads);
  Cut cut = cut_layer(a.batch, a.out_h, a.out_channels, threads, 64);
  if (a.out_h * a.out_w == 1 && a.batch > 1 && cut.range > panel_channels) {
    cut.range = panel_channels;
    cut.ranges = ceil_div(a.out_channels, cut.range);
  }
  // Event lists are sized for the worst case; bands of many steps get lower to stay near 4 MiB.
  while (cut.band > 1 && k.conv_if_workspace(a, cut.band) > (4u << 20)) {
    cut.band = ceil_div(cut.band, 2);
    cut.bands = ceil_div(a.out_h, cut.band);
  }
  const std::size_t bytes = k.conv_if_workspace(a, cut.band);
  return run(a.batch * cut.bands * cut.ranges, threads, [&](std::int64_t i) {
    void* space = workspace.reserve(bytes);
    if (space == nullptr) return Status::out_of_memory;
    k.conv_if(a, tile_of(cut, i, a.out_h, a.out_channels), space);
    return Status::ok;
  });
}

Status analog(const AnalogConv& a, const Options& options) {
  if (a.batch == 0) return Status::ok;
  const KernelSet& k = choose(options.isa);
  const std::int64_t weights = taps(a.g, a.in_channels) * a.out_channels;
  double* weight = new (std::nothrow) double[static_cast<std::size_t>(weights)];
  if (weight == nullptr) return Status::out_of_memory;
  for (std::int64_t i = 0; i < weights; ++i) weight[i] = a.weight[i];
  const int threads = useful_threads(weights * a.batch * a.out_h * a.out_w / 8, options.threads);
  const Cut cut = cut_layer(a.batch, a.out_h, a.out_channels, threads, 0);
  const std::size_t bytes = k.analog_workspace(a);
  const Status s = run(a.batch * cut.bands, threads, [&](std::int64_t i) {
    void* space = workspace.reserve(bytes);
    if (space == nullptr) return Status::out_of_memory;
    k.analog(a, tile_of(cut, i, a.out_h, a.out_channels), weight, space);
    return Status::ok;
  });
  delete[] weight;
  return s;
}

Status encode(const Encode& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  return run_rows(a.pixels, a.channels * a.steps, options.threads, [&](std::int64_t r0, std::int64_t r1) {
    k.encode(a, r0, r1);
    return Status::ok;
  });
}

Status pool(const Pool& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  const std::int64_t planes = a.any ? (a.coding == Coding::mask ? ceil_div(a.steps, 8) : a.steps) : a.steps;
  const std::int64_t area = ceil_div(a.in_h, a.out_h) * ceil_div(a.in_w, a.out_w);
  return run_rows(planes * a.batch * a.out_h, a.out_w * a.channels * area / 4, options.threads,
                  [&](std::int64_t r0, std::int64_t r1) {
                    k.pool(a, r0, r1);
                    return Status::ok;
                  });
}

Status pool_counts(const PoolCounts& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  const std::int64_t area = ceil_div(a.in_h, a.out_h) * ceil_div(a.in_w, a.out_w);
  return run_rows(a.images * a.out_h, a.out_w * a.channels * area / 4, options.threads,
                  [&](std::int64_t r0, std::int64_t r1) {
                    k.pool_counts(a, r0, r1);
                    return Status::ok;
                  });
}

Status count(const Count& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  return run_rows(a.elements, a.steps, options.threads, [&](std::int64_t e0, std::int64_t e1) {
    k.count(a, e0, e1);
    return Status::ok;
  });
}

Status readout(const Readout& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  std::int64_t work = 1;
  for (int i = 0; i < a.term_count; ++i) {
    if (a.terms[i].weight != nullptr) work += taps(a.terms[i].g, a.terms[i].channels);
  }
  const std::size_t bytes = 2 * sizeof(double) * static_cast<std::size_t>(a.out_channels);
  return run_rows(a.images * a.out_h, a.out_w * a.out_channels * work, options.threads,
                  [&](std::int64_t r0, std::int64_t r1) {
                    void* space = workspace.reserve(bytes);
                    if (space == nullptr) return Status::out_of_memory;
                    k.readout(a, r0, r1, static_cast<double*>(space));
                    return Status::ok;
                  });
}

Status quantize(const Quantize& a, const Options& options) {
  const KernelSet& k = choose(options.isa);
  return run_rows(a.batch, 2 * a.channels * a.height * a.width, options.threads, [&](std::int64_t s0, std::int64_t s1) {
    for (std::int64_t s = s0; s < s1; ++s) {
      if (!k.quantize(a, s)) return Status::not_finite;
    }
    return Status::ok;
  });
}

}    // namespace qcfs::cpu
