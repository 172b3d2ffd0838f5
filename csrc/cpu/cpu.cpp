// Dispatch and task cutting. Tasks write disjoint output and read shared input; every worker keeps one
// workspace that only grows, so that a network of many layers does not go back to the system for each.
#include "cpu/cpu.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/engines.h"
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

thread_local Workspace workspace;    // of a task
thread_local Workspace shared;       // of a call: what its tasks read

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

// Bands of output rows, so that there is work for all threads.
struct Cut {
  std::int64_t band, bands;
};

Cut cut_rows(std::int64_t rows, std::int64_t images, int threads) {
  const std::int64_t wanted = threads > 1 ? ceil_div(4 * threads, images) : 1;
  const std::int64_t band = ceil_div(rows, std::min(wanted, rows));
  return {band, ceil_div(rows, band)};
}

// Band i of a wave, samples in turn.
Tile tile_of(const Cut& cut, const Wave& wave, std::int64_t i) {
  const std::int64_t row0 = wave.row0 + i % cut.bands * cut.band;
  return {wave.sample0 + i / cut.bands, row0, std::min(wave.row1, row0 + cut.band)};
}

std::int64_t taps(const Geometry& g, std::int64_t in_channels) {
  return g.kernel_h * g.kernel_w * (in_channels / g.groups);
}

std::int64_t round_up(std::int64_t n, std::int64_t to) { return ceil_div(n, to) * to; }

// Hands out pieces of one block of memory, cache lines each; without a block it only adds up.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(std::int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(at);
  }

  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// A wave's lists or planes should stay in the second or third-level cache.
constexpr std::int64_t wave_bytes = 16 << 20;

// Dense weights of one column block that go through the second-level cache at a time.
constexpr std::int64_t whole_block_bytes = 640 << 10, chunk_bytes = 320 << 10;

// Sums of a tile that wait there between chunks of weights.
constexpr std::int64_t waiting_bytes = 256 << 10;

// Event weights that stay there for all rows, and merged lists of a tile if every input fired.
constexpr std::int64_t near_weights = 512 << 10, near_lists = 2 << 20;

InputRows input_rows(const Product& p, std::int64_t row0, std::int64_t row1) {
  const std::int64_t first = std::max<std::int64_t>(0, row0 * p.g.stride_h - p.g.pad_h);
  const std::int64_t last =
      std::min(p.x.height, (row1 - 1) * p.g.stride_h - p.g.pad_h + (p.g.kernel_h - 1) * p.g.dilation_h + 1);
  return {first, std::max<std::int64_t>(0, last - first)};
}

// Cuts a layer into waves of at most wave_bytes, or one row; bytes(row0, row1) are those of one sample.
template <typename Bytes>
std::vector<Wave> cut_waves(const ConvIf& a, const Bytes& bytes) {
  std::vector<Wave> waves;
  const std::int64_t sample = bytes(0, a.out_h);
  if (sample <= wave_bytes) {
    const std::int64_t samples = std::max<std::int64_t>(1, wave_bytes / std::max<std::int64_t>(1, sample));
    for (std::int64_t n = 0; n < a.batch; n += samples) {
      waves.push_back({n, std::min(a.batch, n + samples), 0, a.out_h});
    }
    return waves;
  }
  std::int64_t rows = std::max<std::int64_t>(1, a.out_h * wave_bytes / sample);
  while (rows > 1 && bytes(0, rows) > wave_bytes) --rows;
  for (std::int64_t n = 0; n < a.batch; ++n) {
    for (std::int64_t r = 0; r < a.out_h; r += rows) waves.push_back({n, n + 1, r, std::min(a.out_h, r + rows)});
  }
  return waves;
}

Neurons pad_neurons(const ConvIf& a, Carver& space) {
  const std::int64_t O = a.out_channels, padded = round_up(O, padded_channels);
  const auto copy = [&](const std::int32_t* from) {
    std::int32_t* to = space.take<std::int32_t>(padded);
    if (to != nullptr) {
      std::copy(from, from + O, to);
      std::fill(to + O, to + padded, 0);
    }
    return to;
  };
  Neurons n{};
  n.threshold = copy(a.threshold);
  n.bias = copy(a.bias);
  for (int i = 0; i < a.residual_count; ++i) n.amplitude[i] = copy(a.residuals[i].amplitude);
  return n;
}

std::int64_t work_of(const ConvIf& a) {
  std::int64_t work = 4;
  for (int i = 0; i < a.product_count; ++i) work += taps(a.products[i].g, a.products[i].x.channels) / 8;
  return work * a.batch * a.out_h * a.out_w * a.out_channels * a.steps;
}

// Runs the tasks of one parallel step, each with a workspace of `bytes`.
template <typename Task>
Status run_tasks(std::int64_t tasks, int threads, std::size_t bytes, const Task& task) {
  return run(tasks, threads, [&](std::int64_t i) {
    void* space = workspace.reserve(bytes);
    if (space == nullptr) return Status::out_of_memory;
    task(i, space);
    return Status::ok;
  });
}

// ------------------------------------------------------------------------------------------ layers

// A linear layer is a 1x1 convolution of 1x1 maps. Seen as one image whose rows are the samples, its tasks may hold
// many samples and so read a panel of weights once for all of them.
bool is_linear(const ConvIf& a) {
  bool linear = a.out_h == 1 && a.out_w == 1 && a.product_count > 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    linear &= p.x.height == 1 && p.x.width == 1 && p.g.kernel_h == 1 && p.g.kernel_w == 1 && p.g.pad_h == 0 &&
              p.g.pad_w == 0 && p.g.groups == 1;
  }
  return linear;
}

int largest_input(const ConvIf& a, const Product& p) {
  if (p.x.coding == Coding::mask) return 1;
  const std::int64_t bytes = a.steps * a.batch * p.x.height * p.x.width * p.x.channels;
  std::uint8_t most = 0;
  for (std::int64_t i = 0; i < bytes; ++i) most = std::max(most, p.x.data[i]);
  return most;
}

// A copy of a layer whose products may be changed.
struct Layer {
  explicit Layer(const ConvIf& from) : a(from), products(from.products, from.products + from.product_count) {
    if (is_linear(a)) {
      a.out_h = a.batch;
      a.batch = 1;
      for (Product& p : products) {
        p.x.height = a.out_h;
        p.g.stride_h = p.g.stride_w = p.g.dilation_h = p.g.dilation_w = 1;
      }
    }
    a.products = products.data();
  }

  ConvIf a;
  std::vector<Product> products;
};

// ------------------------------------------------------------------------------------------ events

// Rows of a chunk: three quarters of the first-level cache, the rest is for lists and sums.
std::int64_t most_event_rows() {
  static const std::int64_t rows = [] {
    long bytes = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    if (bytes <= 0) bytes = 32 << 10;
    return std::clamp<std::int64_t>(bytes * 3 / 4 / row_bytes / 64 * 64, 256, 960);    // offsets have 16 bits
  }();
  return rows;
}

EventCut cut_events(const Product& p) {
  const std::int64_t most = most_event_rows();
  EventCut cut{};
  cut.blocks = ceil_div(p.x.channels, most);
  cut.block_channels = cut.blocks == 1 ? p.x.channels : round_up(ceil_div(p.x.channels, cut.blocks), 64);
  cut.blocks = ceil_div(p.x.channels, cut.block_channels);
  const std::int64_t cells = p.g.kernel_h * p.g.kernel_w * cut.blocks;
  cut.chunks = ceil_div(cells, most / cut.block_channels);
  cut.cells = ceil_div(cells, cut.chunks);
  cut.chunks = ceil_div(cells, cut.cells);
  cut.rows = cut.cells * cut.block_channels + 1;
  return cut;
}

void carve_lists(EventLayer& layer, bool grouped, Carver& space) {
  const ConvIf& a = *layer.a;
  const std::int64_t samples = layer.wave.sample1 - layer.wave.sample0;
  layer.chunks = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    EventLists& l = layer.lists[i];
    l.in = input_rows(p, layer.wave.row0, layer.wave.row1);
    l.cut = cut_events(p);
    l.alone = !grouped && l.cut.cells == 1;
    l.columns = !grouped && l.cut.cells > 1 && l.cut.blocks == 1 && p.g.kernel_w > 1 && p.g.dilation_w == 1;
    l.capacity = a.steps * p.x.width * (p.x.channels + 4 * l.cut.blocks) + list_slack;
    l.start = space.take<std::uint32_t>(samples * l.in.rows * a.steps * (p.x.width * l.cut.blocks + 1));
    l.position = space.take<std::uint16_t>(samples * l.in.rows * l.capacity);
    l.value = p.x.coding == Coding::count ? space.take<std::uint16_t>(samples * l.in.rows * l.capacity) : nullptr;
    layer.chunks += l.cut.chunks;
  }
}

// Room for what `columns` pixels of some output rows add, one row after the other; not all may be needed.
class MergedRows {
 public:
  MergedRows(const EventLayer& layer, std::int64_t rows, std::int64_t columns, Carver& space) {
    const ConvIf& a = *layer.a;
    bool values = false;
    capacity_ = list_slack;
    for (int i = 0; i < a.product_count; ++i) {
      const EventLists& l = layer.lists[i];
      values |= a.products[i].x.coding == Coding::count;
      if (!l.alone) capacity_ += columns * a.steps * l.cut.chunks * (l.cut.rows + 4);
    }
    runs_ = layer.chunks * columns * a.steps;
    first_.runs = space.take<EventRun>(rows * runs_);
    first_.position = space.take<std::uint16_t>(rows * capacity_);
    first_.value = values ? space.take<std::uint16_t>(rows * capacity_) : nullptr;
  }

  EventRow row(std::int64_t i) const {
    return {first_.runs + i * runs_, first_.position + i * capacity_,
            first_.value == nullptr ? nullptr : first_.value + i * capacity_};
  }

 private:
  std::int64_t capacity_, runs_;
  EventRow first_;
};

std::int64_t merged_bytes(const EventLayer& layer, std::int64_t rows, std::int64_t columns) {
  Carver count(nullptr);
  MergedRows(layer, rows, columns, count);
  return static_cast<std::int64_t>(count.used());
}

void list_wave(const KernelSet& k, const EventLayer& layer, int threads) {
  const ConvIf& a = *layer.a;
  const std::int64_t samples = layer.wave.sample1 - layer.wave.sample0;
  std::int64_t list_rows = 0;
  for (int i = 0; i < a.product_count; ++i) list_rows += samples * layer.lists[i].in.rows;
  run(list_rows, threads, [&](std::int64_t i) {
    int product = 0;
    while (i >= samples * layer.lists[product].in.rows) i -= samples * layer.lists[product++].in.rows;
    const std::int64_t rows = layer.lists[product].in.rows;
    k.list_events(a, product, layer.wave, layer.lists[product], layer.wave.sample0 + i / rows, i % rows);
    return Status::ok;
  });
}

// Tasks that take a tile of a few rows, or columns of one row, through all panels; its merged lists are the task's.
Status fire_together(const KernelSet& k, const EventLayer& layer, std::int64_t panels, int threads) {
  const ConvIf& a = *layer.a;
  const Wave& wave = layer.wave;
  const std::int64_t samples = wave.sample1 - wave.sample0, rows = wave.row1 - wave.row0;
  const auto most = [&](std::int64_t pixels) {    // such pieces that a task's lists and sums have room for
    const std::int64_t sums = layer.chunks > 1 ? pixels * a.steps * padded_channels * 4 : 1;
    return std::min(near_lists / merged_bytes(layer, 1, pixels), waiting_bytes / sums);
  };
  const std::int64_t columns = std::clamp<std::int64_t>(most(1), 1, a.out_w);
  const std::int64_t strips = ceil_div(a.out_w, columns);
  Cut cut = cut_rows(rows, samples, threads);
  cut.band = std::clamp<std::int64_t>(strips > 1 ? 1 : most(a.out_w), 1, cut.band);
  cut.bands = ceil_div(rows, cut.band);
  const std::size_t merge = (k.merge_events_workspace(layer) + 63) / 64 * 64;
  const std::size_t lists = static_cast<std::size_t>(merged_bytes(layer, cut.band, columns));
  const std::size_t sums = k.fire_events_workspace(layer, cut.band * columns);
  return run_tasks(samples * cut.bands * strips, threads, merge + lists + sums, [&](std::int64_t i, void* memory) {
    const Tile t = tile_of(cut, wave, i / strips);
    const std::int64_t col0 = i % strips * columns;
    const EventTile tile{t.sample, t.row0, t.row1, col0, std::min(a.out_w, col0 + columns)};
    char* at = static_cast<char*>(memory);
    Carver mine(at + merge);
    const MergedRows merged(layer, cut.band, tile.col1 - tile.col0, mine);
    for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
      k.merge_events(layer, tile, row, merged.row(row - tile.row0), at);
    }
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      k.fire_events(layer, tile, panel, merged.row(0).runs, at + merge + lists);
    }
  });
}

// All lists of a wave are merged before; tasks take a tile and a panel, and neighbouring tasks share a panel.
Status fire_apart(const KernelSet& k, const EventLayer& layer, const MergedRows& merged, std::int64_t panels,
                  int threads) {
  const ConvIf& a = *layer.a;
  const Wave& wave = layer.wave;
  const std::int64_t samples = wave.sample1 - wave.sample0, rows = wave.row1 - wave.row0;
  const Status s =
      run_tasks(samples * rows, threads, k.merge_events_workspace(layer), [&](std::int64_t i, void* memory) {
        const EventTile tile{wave.sample0 + i / rows, wave.row0, wave.row1, 0, a.out_w};
        k.merge_events(layer, tile, wave.row0 + i % rows, merged.row(i), memory);
      });
  if (s != Status::ok) return s;
  Cut cut = cut_rows(rows, samples * panels, threads);
  const std::int64_t most = waiting_bytes / (a.out_w * a.steps * padded_channels * 4);
  if (layer.chunks > 1) cut.band = std::clamp<std::int64_t>(most, 1, cut.band);
  cut.bands = ceil_div(rows, cut.band);
  const std::int64_t tiles = samples * cut.bands;
  return run_tasks(tiles * panels, threads, k.fire_events_workspace(layer, cut.band * a.out_w),
                   [&](std::int64_t i, void* memory) {
                     const Tile t = tile_of(cut, wave, i % tiles);
                     const EventRow first = merged.row((t.sample - wave.sample0) * rows + t.row0 - wave.row0);
                     k.fire_events(layer, {t.sample, t.row0, t.row1, 0, a.out_w}, i / tiles, first.runs, memory);
                   });
}

Status fire_groups(const KernelSet& k, const EventLayer& layer, int threads) {
  const Wave& wave = layer.wave;
  const std::int64_t samples = wave.sample1 - wave.sample0;
  const Cut cut = cut_rows(wave.row1 - wave.row0, samples, threads);
  return run_tasks(samples * cut.bands, threads, k.fire_grouped_workspace(*layer.a),
                   [&](std::int64_t i, void* memory) { k.fire_grouped(layer, tile_of(cut, wave, i), memory); });
}

Status run_events(const KernelSet& k, const Layer& owner, Engine engine, int threads) {
  const bool grouped = engine == Engine::grouped;
  const ConvIf& a = owner.a;
  EventLayer layer{};
  layer.a = &a;
  const int weight_bytes = a.product_count > 0 ? a.products[0].weight_bytes : 2;
  const std::int64_t panels = ceil_div(a.out_channels, panel_channels(weight_bytes));
  std::int64_t weights = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    weights += panels * taps(p.g, p.x.channels) * row_bytes;
    layer.lists[i].most = grouped || weight_bytes == 2 ? 255 : largest_input(a, p);
  }
  // Lists merged by the task that uses them stay in the second-level cache, but every task then reads all weights: for
  // those that fit there too, and for rows so wide that only strips of them can be merged at a time.
  layer.wave = {0, 1, 0, 1};
  Carver row(nullptr);
  carve_lists(layer, grouped, row);
  const bool together = weights <= near_weights || merged_bytes(layer, 1, a.out_w) > wave_bytes / 4;
  const bool apart = !grouped && !together;
  const auto bytes = [&](std::int64_t row0, std::int64_t row1) {
    layer.wave = {0, 1, row0, row1};
    Carver count(nullptr);
    carve_lists(layer, grouped, count);
    return static_cast<std::int64_t>(count.used()) + (apart ? merged_bytes(layer, row1 - row0, a.out_w) : 0);
  };
  for (const Wave& wave : cut_waves(a, bytes)) {
    const std::int64_t merged_rows = apart ? (wave.sample1 - wave.sample0) * (wave.row1 - wave.row0) : 0;
    layer.wave = wave;
    Carver count(nullptr);
    pad_neurons(a, count);
    carve_lists(layer, grouped, count);
    MergedRows(layer, merged_rows, a.out_w, count);
    void* memory = shared.reserve(count.used());
    if (memory == nullptr) return Status::out_of_memory;
    Carver space(memory);
    layer.neurons = pad_neurons(a, space);
    carve_lists(layer, grouped, space);
    const MergedRows merged(layer, merged_rows, a.out_w, space);
    list_wave(k, layer, threads);
    const Status s = grouped    ? fire_groups(k, layer, threads)
                     : together ? fire_together(k, layer, panels, threads)
                                : fire_apart(k, layer, merged, panels, threads);
    if (s != Status::ok) return s;
  }
  return Status::ok;
}

Status run_depthwise(const KernelSet& k, const ConvIf& a, int threads) {
  Carver count(nullptr);
  pad_neurons(a, count);
  void* memory = shared.reserve(count.used());
  if (memory == nullptr) return Status::out_of_memory;
  Carver space(memory);
  const Neurons neurons = pad_neurons(a, space);
  const Cut cut = cut_rows(a.out_h, a.batch, threads);
  return run(a.batch * cut.bands, threads, [&](std::int64_t i) {
    k.fire_depthwise(a, neurons, tile_of(cut, {0, a.batch, 0, a.out_h}, i));
    return Status::ok;
  });
}

// ------------------------------------------------------------------------------------------- dense

std::int64_t block_channels(const KernelSet& k, const ConvIf& a) {
  return k.dense.columns / a.products[0].weight_bytes;
}

std::int64_t dense_product_bytes(const KernelSet& k, const Product& p) {
  return p.g.kernel_h * p.g.kernel_w * round_up(p.x.channels, k.dense.depth) * k.dense.columns;
}

std::int64_t dense_block_bytes(const KernelSet& k, const ConvIf& a) {
  std::int64_t bytes = 0;
  for (int i = 0; i < a.product_count; ++i) bytes += dense_product_bytes(k, a.products[i]);
  return bytes;
}

// Phases of a strided dimension: as many as taps reach.
std::int64_t phases_of(std::int64_t kernel, std::int64_t stride, std::int64_t dilation) {
  std::int64_t most = 0;
  for (std::int64_t i = 0; i < kernel; ++i) most = std::max(most, i * dilation % stride);
  return most + 1;
}

struct Grid {
  std::int64_t h, w;
};

Grid dense_grid(const ConvIf& a, std::int64_t rows) {
  Grid g{rows, a.out_w};
  for (int i = 0; i < a.product_count; ++i) {
    const Geometry& geometry = a.products[i].g;
    g.h = std::max(g.h, rows + (geometry.kernel_h - 1) * geometry.dilation_h / geometry.stride_h);
    g.w = std::max(g.w, a.out_w + (geometry.kernel_w - 1) * geometry.dilation_w / geometry.stride_w);
  }
  return g;
}

void carve_planes(const KernelSet& k, DenseLayer& layer, Carver& space) {
  const ConvIf& a = *layer.a;
  const Grid grid = dense_grid(a, layer.wave.row1 - layer.wave.row0);
  layer.grid_h = grid.h;
  layer.grid_w = grid.w;
  const std::int64_t samples = layer.wave.sample1 - layer.wave.sample0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    DenseProduct& d = layer.product[i];
    d.depth = round_up(p.x.channels, k.dense.depth);
    d.phases_w = phases_of(p.g.kernel_w, p.g.stride_w, p.g.dilation_w);
    d.phase_bytes = grid.h * grid.w * d.depth;
    d.sample_bytes = phases_of(p.g.kernel_h, p.g.stride_h, p.g.dilation_h) * d.phases_w * d.phase_bytes;
    d.step_bytes = samples * d.sample_bytes;
    // The last block reads a whole block of positions and all taps behind them.
    d.plane = space.take<std::uint8_t>(a.steps * d.step_bytes + (k.dense.rows + 1) * d.depth + slack);
  }
}

std::int64_t plane_bytes(const KernelSet& k, const ConvIf& a, std::int64_t rows) {
  DenseLayer layer{};
  layer.a = &a;
  layer.wave = {0, 1, 0, rows};
  Carver count(nullptr);
  carve_planes(k, layer, count);
  return static_cast<std::int64_t>(count.used());
}

// Taps in the order of the packed weights, long ones in pieces, and where one chunk ends and the next begins.
void cut_segments(const KernelSet& k, const DenseLayer& layer, std::vector<Segment>& segments,
                  std::vector<int>& chunk) {
  const ConvIf& a = *layer.a;
  const std::int64_t unit = k.dense.depth * k.dense.columns;
  const std::int64_t limit = dense_block_bytes(k, a) > whole_block_bytes ? chunk_bytes : whole_block_bytes;
  chunk.assign(1, 0);
  segments.clear();
  std::int64_t filled = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Geometry& g = a.products[i].g;
    const DenseProduct& d = layer.product[i];
    for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
      for (std::int64_t kw = 0; kw < g.kernel_w; ++kw) {
        const std::int64_t h = kh * g.dilation_h, w = kw * g.dilation_w;
        const std::uint8_t* tap = d.plane + (h % g.stride_h * d.phases_w + w % g.stride_w) * d.phase_bytes +
                                  (h / g.stride_h * layer.grid_w + w / g.stride_w) * d.depth;
        for (std::int64_t first = 0; first < d.depth;) {
          const std::int64_t blocks =
              std::min((d.depth - first) / k.dense.depth, std::max<std::int64_t>(1, limit / unit));
          if (filled > 0 && filled + blocks * unit > limit) {
            chunk.push_back(static_cast<int>(segments.size()));
            filled = 0;
          }
          segments.push_back({tap + first, d.depth, d.step_bytes, d.sample_bytes, blocks});
          filled += blocks * unit;
          first += blocks * k.dense.depth;
        }
      }
    }
  }
  chunk.push_back(static_cast<int>(segments.size()));
}

Status run_dense(const KernelSet& k, const Layer& owner, int threads) {
  const ConvIf& a = owner.a;
  DenseLayer layer{};
  layer.a = &a;
  layer.packed = static_cast<const std::int8_t*>(a.products[0].packed);
  layer.block_bytes = dense_block_bytes(k, a);
  const std::int64_t column_blocks = ceil_div(a.out_channels, block_channels(k, a));
  std::vector<Segment> segments;
  std::vector<int> chunk;
  for (const Wave& wave :
       cut_waves(a, [&](std::int64_t row0, std::int64_t row1) { return plane_bytes(k, a, row1 - row0); })) {
    layer.wave = wave;
    Carver count(nullptr);
    pad_neurons(a, count);
    carve_planes(k, layer, count);
    void* memory = shared.reserve(count.used());
    if (memory == nullptr) return Status::out_of_memory;
    Carver space(memory);
    layer.neurons = pad_neurons(a, space);
    carve_planes(k, layer, space);
    cut_segments(k, layer, segments, chunk);
    layer.segments = segments.data();
    layer.chunk = chunk.data();
    layer.chunks = static_cast<int>(chunk.size()) - 1;

    const std::int64_t samples = wave.sample1 - wave.sample0;
    run(a.product_count * samples * layer.grid_h, threads, [&](std::int64_t i) {
      const std::int64_t image = i / layer.grid_h;
      k.expand(layer, static_cast<int>(image / samples), wave.sample0 + image % samples, i % layer.grid_h);
      return Status::ok;
    });

    const std::int64_t positions = (wave.row1 - wave.row0 - 1) * layer.grid_w + a.out_w;
    const std::int64_t blocks = samples * ceil_div(positions, k.dense.rows);
    const std::int64_t wanted = threads > 1 ? ceil_div(4 * threads, column_blocks) : 1;
    std::int64_t per_task = ceil_div(blocks, std::min(wanted, blocks));
    if (layer.chunks > 1) {
      const std::int64_t sums = a.steps * k.dense.rows * k.dense.columns * 4;
      per_task = std::min(per_task, std::max<std::int64_t>(1, waiting_bytes / sums));
    }
    const std::int64_t ranges = ceil_div(blocks, per_task);
    const Status s =
        run_tasks(column_blocks * ranges, threads, k.fire_dense_workspace(layer, per_task),
                  [&](std::int64_t i, void* memory_of_task) {
                    const std::int64_t first = i % ranges * per_task;
                    k.fire_dense(layer, {first, std::min(blocks, first + per_task), i / ranges}, memory_of_task);
                  });
    if (s != Status::ok) return s;
  }
  return Status::ok;
}

// ----------------------------------------------------------------------------------------- choice

bool dense_allowed(const KernelSet& k, const ConvIf& a) {
  bool allowed = k.dense.rows > 0 && a.product_count > 0;
  for (int i = 0; i < a.product_count; ++i) {
    allowed &= k.dense.most == 255 || largest_input(a, a.products[i]) <= k.dense.most;
  }
  return allowed;
}

const EngineRates& rates_of(const KernelSet& k) {
  for (const EngineRates& r : engine_rates) {
    if (std::strcmp(r.set, k.name) == 0) return r;
  }
  return engine_rates[sizeof(engine_rates) / sizeof(engine_rates[0]) - 1];
}

bool dense_is_faster(const KernelSet& k, const ConvIf& a) {
  const EngineRates& rates = rates_of(k);
  const Layer layer(a);    // linear layers fill their blocks with samples
  const bool narrow = a.products[0].weight_bytes == 1;
  const Grid grid = dense_grid(layer.a, layer.a.out_h);
  const double steps = static_cast<double>(a.steps);
  const double positions =
      static_cast<double>(layer.a.batch * round_up((layer.a.out_h - 1) * grid.w + layer.a.out_w, k.dense.rows));
  const double pixels = static_cast<double>(a.batch * a.out_h * a.out_w);
  const double O = static_cast<double>(a.out_channels);
  const double columns =
      static_cast<double>(round_up(a.out_channels, block_channels(k, a)) * a.products[0].weight_bytes);
  double events = 0, dense = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    const double inputs = static_cast<double>(a.batch * p.x.height * p.x.width * p.x.channels);
    const double kernel = static_cast<double>(taps(p.g, p.x.channels));
    const double depth = static_cast<double>(p.g.kernel_h * p.g.kernel_w * round_up(p.x.channels, k.dense.depth));
    const double per_row = narrow && p.x.coding == Coding::mask ? rates.events_8 : rates.events_16;
    const double lists = inputs / 12 + 4 * pixels * static_cast<double>(p.g.kernel_h);
    events += steps * (sampled_rate(a, p) * kernel * pixels * O / per_row + lists);
    dense += steps * (depth * positions * columns / rates.products + inputs / 60);
  }
  return dense < events;
}

}    // namespace

int kernel_set_count() { return kernel_sets_count; }
const char* kernel_set_name(int index) { return kernel_sets[index]->name; }
std::uint32_t kernel_set_isa(int index) { return kernel_sets[index]->isa; }
const char* chosen_kernel_set(std::uint32_t isa) { return choose(isa).name; }

const char* engine_name(Engine engine) {
  switch (engine) {
    case Engine::automatic:
      return "auto";
    case Engine::events:
      return "events";
    case Engine::dense:
      return "dense";
    case Engine::depthwise:
      return "depthwise";
    case Engine::grouped:
      return "grouped";
  }
  return "?";
}

double measure_peak(std::uint32_t isa, int threads) {
  using Clock = std::chrono::steady_clock;
  const KernelSet& k = choose(isa);
  double best = 0;
  std::int64_t rounds = 1000;
  for (int i = 0; i < 12; ++i) {
    std::atomic<std::int64_t> done{0};
    const auto begin = Clock::now();
    run(threads, threads, [&](std::int64_t) {
      done.fetch_add(static_cast<std::int64_t>(k.matrix_loop(rounds)), std::memory_order_relaxed);
      return Status::ok;
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    if (seconds < 0.01) {
      rounds *= 4;
    } else {
      best = std::max(best, static_cast<double>(done.load(std::memory_order_relaxed)) / seconds);
    }
  }
  return best;
}

Engine choose_engine(const ConvIf& a, const Options& options) {
  bool grouped = false, depthwise = a.product_count > 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    grouped |= p.g.groups != 1;
    depthwise &= p.g.groups == a.out_channels && p.x.channels == a.out_channels;
  }
  if (depthwise && grouped) return Engine::depthwise;
  if (grouped) return Engine::grouped;
  const KernelSet& k = choose(options.isa);
  if (options.engine == Engine::events || !dense_allowed(k, a)) return Engine::events;
  if (options.engine == Engine::dense) return Engine::dense;
  return dense_is_faster(k, a) ? Engine::dense : Engine::events;
}

std::size_t packed_bytes(const ConvIf& a, int product, Engine engine, std::uint32_t isa) {
  const KernelSet& k = choose(isa);
  const Product& p = a.products[product];
  if (engine == Engine::events) {
    const EventCut cut = cut_events(p);
    const std::int64_t panels = ceil_div(a.out_channels, panel_channels(p.weight_bytes));
    return static_cast<std::size_t>(panels * cut.chunks * cut.rows * row_bytes);
  }
  if (engine == Engine::dense && product == 0) {
    const std::int64_t blocks = ceil_div(a.out_channels, block_channels(k, a));
    return static_cast<std::size_t>(blocks * dense_block_bytes(k, a) + slack);
  }
  return 0;
}

void pack(const ConvIf& a, int product, Engine engine, std::uint32_t isa, void* out) {
  const KernelSet& k = choose(isa);
  if (engine == Engine::events) {
    k.pack_events(a.products[product], a.out_channels, cut_events(a.products[product]), out);
  }
  if (engine != Engine::dense || product != 0) return;
  std::int8_t* to = static_cast<std::int8_t*>(out);
  for (int i = 0; i < a.product_count; ++i) {
    k.pack_dense(a.products[i], a.out_channels, dense_block_bytes(k, a), to);
    to += dense_product_bytes(k, a.products[i]);
  }
}

std::size_t packed_bytes(const AnalogConv& a, std::uint32_t isa) { return choose(isa).pack_analog_bytes(a); }
void pack(const AnalogConv& a, std::uint32_t isa, void* out) { choose(isa).pack_analog(a, out); }

Status conv_if(const ConvIf& a, const Options& options) {
  if (a.batch == 0) return Status::ok;
  const KernelSet& k = choose(options.isa);
  const Engine engine = options.engine == Engine::automatic ? choose_engine(a, options) : options.engine;
  for (int i = 0; i < a.product_count; ++i) {
    if (a.products[i].packed == nullptr && packed_bytes(a, i, engine, options.isa) > 0) return Status::not_packed;
  }
  const int threads = useful_threads(work_of(a), options.threads);
  if (engine == Engine::depthwise) return run_depthwise(k, a, threads);
  Layer layer(a);
  for (Product& p : layer.products) {
    // At T = 1 masks and counts look alike and come as counts; spikes go the faster way of masks.
    if (a.steps == 1 && largest_input(layer.a, p) <= 1) p.x.coding = Coding::mask;
  }
  if (engine == Engine::dense) return run_dense(k, layer, threads);
  return run_events(k, layer, engine, threads);
}

Status analog(const AnalogConv& a, const Options& options) {
  if (a.batch == 0) return Status::ok;
  const KernelSet& k = choose(options.isa);
  if (a.packed == nullptr) return Status::not_packed;
  const std::int64_t work = taps(a.g, a.in_channels) * a.out_channels * a.batch * a.out_h * a.out_w;
  const int threads = useful_threads(work / 8, options.threads);
  const Cut cut = cut_rows(a.out_h, a.batch, threads);
  return run_tasks(a.batch * cut.bands, threads, k.analog_workspace(a), [&](std::int64_t i, void* space) {
    k.analog(a, tile_of(cut, {0, a.batch, 0, a.out_h}, i), a.packed, space);
  });
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
  const std::int64_t planes = a.coding == Coding::mask ? ceil_div(a.steps, 8) : a.steps;
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
  const std::int64_t row_work = 2 * a.channels * a.width;
  constexpr std::int32_t infinity = 0x7f800000;
  for (std::int64_t s = 0; s < a.batch; ++s) {
    std::atomic<std::int32_t> most{0};
    run_rows(a.height, row_work, options.threads, [&](std::int64_t r0, std::int64_t r1) {
      const std::int32_t found = k.largest(a, s, r0, r1);
      std::int32_t before = most.load(std::memory_order_relaxed);
      while (found > before && !most.compare_exchange_weak(before, found, std::memory_order_relaxed)) {
      }
      return Status::ok;
    });
    const std::int32_t bits = most.load(std::memory_order_relaxed);
    if (bits >= infinity) return Status::not_finite;
    float largest = 0;
    std::memcpy(&largest, &bits, sizeof(largest));
    int e = 0;
    if (largest > 0) {
      // frexp gives [1/2, 1), so 2^e is above the quotient; an exact power of two needs one less.
      std::frexp(largest / 32767.0, &e);
      if (largest <= std::ldexp(32767.0, e - 1)) --e;
    }
    a.exponent[s] = e;
    run_rows(a.height, row_work, options.threads, [&](std::int64_t r0, std::int64_t r1) {
      k.quantize(a, s, r0, r1);
      return Status::ok;
    });
  }
  return Status::ok;
}

}    // namespace qcfs::cpu
