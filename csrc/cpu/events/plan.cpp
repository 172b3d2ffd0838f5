// Cuts a layer of the event engine into waves and tasks; see fire.h for the three steps that the tasks do.
//
// Lists are merged once for each output pixel, whatever the number of output channels, in one of two ways:
//
//     per tile   A task merges the lists of its tile and fires all panels. The merged lists stay in the second-level
//                cache, but every task reads all weights: for layers whose weights fit that cache too, and for rows so
//                wide that only column spans of them can be merged at a time.
//     per wave   All lists of the wave are merged first. A task then fires one tile and one panel, and neighbouring
//                tasks share a panel: for layers with more weights.
#include "cpu/events/plan.h"

#include <unistd.h>

#include <algorithm>
#include <cassert>

#include "cpu/tasks.h"

namespace qcfs::cpu {
namespace {

// Limits in bytes, tuned on a Zen 5 core: 48 KiB of first-level and 1 MiB of second-level cache. The sizes of lists are
// those if every input fired, of which a few remain.
constexpr std::int64_t max_near_weights = 512 << 10;          // that stay in the second-level cache for all rows
constexpr std::int64_t max_tile_lists = 2 << 20;              // merged lists of a tile
constexpr std::int64_t max_row_lists = max_wave_bytes / 4;    // merged lists of one output row of a wave

// Most channels of a panel: 8-bit weights.
constexpr std::int64_t max_panel_channels = event_panel_channels(1);

// Weight rows of a chunk: three quarters of the first-level cache, the rest is for lists and sums. A position has 16
// bits, which is the upper limit: 960 rows and one of zeros, times row_bytes, are below 2^16.
std::int64_t max_chunk_rows() {
  static const std::int64_t rows = [] {
    long cache = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    cache = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    if (cache <= 0) cache = 32 << 10;
    return std::clamp<std::int64_t>(cache * 3 / 4 / row_bytes / 64 * 64, 256, 960);
  }();
  return rows;
}

EventCut cut_events(const Product& p) {
  const std::int64_t max_rows = max_chunk_rows();
  EventCut cut{};
  cut.blocks = ceil_div(p.x.channels, max_rows);
  cut.block_channels = cut.blocks == 1 ? p.x.channels : round_up(ceil_div(p.x.channels, cut.blocks), 64);
  cut.blocks = ceil_div(p.x.channels, cut.block_channels);
  const std::int64_t k_blocks = p.g.kernel_h * p.g.kernel_w * cut.blocks;
  cut.chunks = ceil_div(k_blocks, max_rows / cut.block_channels);
  cut.k_blocks = ceil_div(k_blocks, cut.chunks);
  cut.chunks = ceil_div(k_blocks, cut.k_blocks);
  cut.rows = cut.k_blocks * cut.block_channels + 1;
  assert(cut.rows * row_bytes <= 1 << 16);
  return cut;
}

int weight_bytes_of(const ConvIf& a) { return a.product_count > 0 ? a.products[0].weight_bytes : 2; }

std::int64_t panels_of(const ConvIf& a) { return ceil_div(a.out_channels, event_panel_channels(weight_bytes_of(a))); }

// Whether two products read the same inputs in the same way: digits of one weight do.
bool same_inputs(const Product& p, const Product& q) {
  const Geometry &g = p.g, &h = q.g;
  return p.x.data == q.x.data && p.x.coding == q.x.coding && p.x.channels == q.x.channels && g.kernel_h == h.kernel_h &&
         g.kernel_w == h.kernel_w && g.stride_h == h.stride_h && g.stride_w == h.stride_w && g.pad_h == h.pad_h &&
         g.pad_w == h.pad_w && g.dilation_h == h.dilation_h && g.dilation_w == h.dilation_w && g.groups == h.groups;
}

// A layer on its way through its waves. With `grouped` lists are not merged.
EventLayer begin_layer(const ConvIf& a, bool grouped) {
  EventLayer layer{};
  layer.a = &a;
  for (int i = 0; i < a.product_count; ++i) {
    int& same_as = layer.lists[i].same_as;
    while (same_as < i && !same_inputs(a.products[same_as], a.products[i])) ++same_as;
    layer.lists[i].largest_input = grouped || weight_bytes_of(a) == 2 ? 255 : largest_input(a, a.products[i]);
  }
  return layer;
}

// Places the lists of layer.wave.
void place_lists(EventLayer& layer, bool grouped, Arena& arena) {
  const ConvIf& a = *layer.a;
  const std::int64_t samples = samples_of(layer.wave);
  layer.chunks = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    EventLists& l = layer.lists[i];
    if (l.same_as != i) {
      l = layer.lists[l.same_as];
      layer.chunks += l.cut.chunks;
      continue;
    }
    l.in = input_rows(p, layer.wave.row0, layer.wave.row1);
    l.cut = cut_events(p);
    l.used_in_place = !grouped && l.cut.k_blocks == 1;
    l.positions_span_columns =
        !grouped && l.cut.k_blocks > 1 && l.cut.blocks == 1 && p.g.kernel_w > 1 && p.g.dilation_w == 1;
    l.capacity = a.steps * p.x.width * (p.x.channels + 4 * l.cut.blocks) + list_slack;
    l.start = arena.take<std::uint32_t>(samples * l.in.rows * a.steps * (p.x.width * l.cut.blocks + 1));
    l.position = arena.take<std::uint16_t>(samples * l.in.rows * l.capacity);
    l.value = p.x.coding == Coding::count ? arena.take<std::uint16_t>(samples * l.in.rows * l.capacity) : nullptr;
    layer.chunks += l.cut.chunks;
  }
}

// The merged lists of `columns` pixels of some output rows, if every input fired.
class MergedRows {
 public:
  MergedRows() = default;
  MergedRows(const EventLayer& layer, std::int64_t rows, std::int64_t columns, Arena& arena) {
    const ConvIf& a = *layer.a;
    bool values = false;
    capacity_ = list_slack;
    for (int i = 0; i < a.product_count; ++i) {
      const EventLists& l = layer.lists[i];
      values |= a.products[i].x.coding == Coding::count;
      if (!l.used_in_place && l.same_as == i) capacity_ += columns * a.steps * l.cut.chunks * (l.cut.rows + 4);
    }
    lists_ = layer.chunks * columns * a.steps;
    first_.lists = arena.take<MergedList>(rows * lists_);
    first_.position = arena.take<std::uint16_t>(rows * capacity_);
    first_.value = values ? arena.take<std::uint16_t>(rows * capacity_) : nullptr;
  }

  MergedRow row(std::int64_t i) const {
    return {first_.lists + i * lists_, first_.position + i * capacity_,
            first_.value == nullptr ? nullptr : first_.value + i * capacity_};
  }

 private:
  std::int64_t capacity_ = 0, lists_ = 0;    // of one row
  MergedRow first_{};
};

std::int64_t merged_bytes(const EventLayer& layer, std::int64_t rows, std::int64_t columns) {
  return bytes_of([&](Arena& arena) { MergedRows(layer, rows, columns, arena); });
}

void list_wave(const KernelSet& k, const EventLayer& layer, int threads) {
  const ConvIf& a = *layer.a;
  const std::int64_t samples = samples_of(layer.wave);
  std::int64_t list_rows = 0;
  const auto rows_of_product = [&](int i) { return layer.lists[i].same_as == i ? layer.lists[i].in.rows : 0; };
  for (int i = 0; i < a.product_count; ++i) list_rows += samples * rows_of_product(i);
  run_parallel(list_rows, threads, [&](std::int64_t i) {
    int product = 0;
    while (i >= samples * rows_of_product(product)) i -= samples * rows_of_product(product++);
    const std::int64_t rows = layer.lists[product].in.rows;
    k.list_events(a, product, layer.wave, layer.lists[product], layer.wave.sample0 + i / rows, i % rows);
  });
}

// Memory of sums that wait between chunks for `pixels` pixels.
std::int64_t waiting_bytes_of(const ConvIf& a, std::int64_t pixels) {
  return pixels * a.steps * max_panel_channels * static_cast<std::int64_t>(sizeof(std::int32_t));
}

Status fire_merging_per_tile(const KernelSet& k, const EventLayer& layer, int threads) {
  const ConvIf& a = *layer.a;
  const Wave& wave = layer.wave;
  const std::int64_t samples = samples_of(wave), rows = rows_of(wave);
  // How many times `pixels` pixels a task's lists and sums have room for.
  const auto room_for = [&](std::int64_t pixels) {
    const std::int64_t sums = layer.chunks > 1 ? waiting_bytes_of(a, pixels) : 1;
    return std::min(max_tile_lists / merged_bytes(layer, 1, pixels), max_waiting_bytes / sums);
  };
  const std::int64_t columns = std::clamp<std::int64_t>(room_for(1), 1, a.out_w);
  const std::int64_t column_spans = ceil_div(a.out_w, columns);
  RowCut cut = cut_rows(rows, samples, threads);
  cut.rows_each = std::clamp<std::int64_t>(column_spans > 1 ? 1 : room_for(a.out_w), 1, cut.rows_each);
  cut.spans = ceil_div(rows, cut.rows_each);
  const std::size_t merge =
      static_cast<std::size_t>(round_up(static_cast<std::int64_t>(k.merge_events_workspace(layer)), cache_line));
  const std::size_t lists = static_cast<std::size_t>(merged_bytes(layer, cut.rows_each, columns));
  const std::size_t sums = k.fire_events_workspace(layer, cut.rows_each * columns);
  const std::int64_t panels = panels_of(a);
  return run_with_workspace(samples * cut.spans * column_spans, threads, merge + lists + sums,
                            [&](std::int64_t i, void* workspace) {
                              const RowSpan s = row_span(cut, wave, i / column_spans);
                              const std::int64_t col0 = i % column_spans * columns;
                              const EventTile tile{s.sample, s.row0, s.row1, col0, std::min(a.out_w, col0 + columns)};
                              char* at = static_cast<char*>(workspace);
                              Arena arena(at + merge);
                              const MergedRows merged(layer, cut.rows_each, tile.col1 - tile.col0, arena);
                              for (std::int64_t row = tile.row0; row < tile.row1; ++row) {
                                k.merge_events(layer, tile, row, merged.row(row - tile.row0), at);
                              }
                              for (std::int64_t panel = 0; panel < panels; ++panel) {
                                k.fire_events(layer, tile, panel, merged.row(0).lists, at + merge + lists);
                              }
                            });
}

Status fire_merging_per_wave(const KernelSet& k, const EventLayer& layer, const MergedRows& merged, int threads) {
  const ConvIf& a = *layer.a;
  const Wave& wave = layer.wave;
  const std::int64_t samples = samples_of(wave), rows = rows_of(wave), panels = panels_of(a);
  const Status s = run_with_workspace(samples * rows, threads, k.merge_events_workspace(layer),
                                      [&](std::int64_t i, void* workspace) {
                                        const EventTile tile{wave.sample0 + i / rows, wave.row0, wave.row1, 0, a.out_w};
                                        k.merge_events(layer, tile, wave.row0 + i % rows, merged.row(i), workspace);
                                      });
  if (s != Status::ok) return s;
  RowCut cut = cut_rows(rows, samples * panels, threads);
  if (layer.chunks > 1) {
    cut.rows_each = std::clamp<std::int64_t>(max_waiting_bytes / waiting_bytes_of(a, a.out_w), 1, cut.rows_each);
  }
  cut.spans = ceil_div(rows, cut.rows_each);
  const std::int64_t tiles = samples * cut.spans;
  return run_with_workspace(
      tiles * panels, threads, k.fire_events_workspace(layer, cut.rows_each * a.out_w),
      [&](std::int64_t i, void* workspace) {
        const RowSpan span = row_span(cut, wave, i % tiles);
        const MergedRow first = merged.row((span.sample - wave.sample0) * rows + span.row0 - wave.row0);
        k.fire_events(layer, {span.sample, span.row0, span.row1, 0, a.out_w}, i / tiles, first.lists, workspace);
      });
}

}    // namespace

std::size_t event_weight_bytes(const Product& p, std::int64_t out_channels) {
  const EventCut cut = cut_events(p);
  const std::int64_t panels = ceil_div(out_channels, event_panel_channels(p.weight_bytes));
  return static_cast<std::size_t>(panels * cut.chunks * cut.rows * row_bytes);
}

void pack_event_weights(const KernelSet& k, const Product& p, std::int64_t out_channels, void* out) {
  k.pack_events(p, out_channels, cut_events(p), out);
}

Status run_events(const KernelSet& k, const LinearAsImage& owner, int threads) {
  const ConvIf& a = owner.a;
  EventLayer layer = begin_layer(a, false);
  std::int64_t weight_bytes = 0;
  for (int i = 0; i < a.product_count; ++i) {
    assert(a.products[i].packed != nullptr);
    weight_bytes += panels_of(a) * kernel_inputs(a.products[i].g, a.products[i].x.channels) * row_bytes;
  }
  layer.wave = {0, 1, 0, 1};
  bytes_of([&](Arena& arena) { place_lists(layer, false, arena); });
  const bool per_tile = weight_bytes <= max_near_weights || merged_bytes(layer, 1, a.out_w) > max_row_lists;
  const auto bytes = [&](std::int64_t row0, std::int64_t row1) {
    layer.wave = {0, 1, row0, row1};
    const std::int64_t lists = bytes_of([&](Arena& arena) { place_lists(layer, false, arena); });
    return lists + (per_tile ? 0 : merged_bytes(layer, row1 - row0, a.out_w));
  };
  return run_waves(a, bytes, [&](const Wave& wave) {
    layer.wave = wave;
    MergedRows merged;
    const Status s = place_in_call_workspace([&](Arena& arena) {
      layer.neurons = pad_neurons(a, arena);
      place_lists(layer, false, arena);
      if (!per_tile) merged = MergedRows(layer, samples_of(wave) * rows_of(wave), a.out_w, arena);
    });
    if (s != Status::ok) return s;
    list_wave(k, layer, threads);
    return per_tile ? fire_merging_per_tile(k, layer, threads) : fire_merging_per_wave(k, layer, merged, threads);
  });
}

Status run_grouped(const KernelSet& k, const LinearAsImage& owner, int threads) {
  const ConvIf& a = owner.a;
  EventLayer layer = begin_layer(a, true);
  const auto bytes = [&](std::int64_t row0, std::int64_t row1) {
    layer.wave = {0, 1, row0, row1};
    return bytes_of([&](Arena& arena) { place_lists(layer, true, arena); });
  };
  return run_waves(a, bytes, [&](const Wave& wave) {
    layer.wave = wave;
    const Status s = place_in_call_workspace([&](Arena& arena) {
      layer.neurons = pad_neurons(a, arena);
      place_lists(layer, true, arena);
    });
    if (s != Status::ok) return s;
    list_wave(k, layer, threads);
    const RowCut cut = cut_rows(rows_of(wave), samples_of(wave), threads);
    return run_with_workspace(
        samples_of(wave) * cut.spans, threads, k.fire_grouped_workspace(a),
        [&](std::int64_t i, void* workspace) { k.fire_grouped(layer, row_span(cut, wave, i), workspace); });
  });
}

Status run_depthwise(const KernelSet& k, const ConvIf& a, int threads) {
  Neurons neurons{};
  const Status s = place_in_call_workspace([&](Arena& arena) { neurons = pad_neurons(a, arena); });
  if (s != Status::ok) return s;
  const RowCut cut = cut_rows(a.out_h, a.batch, threads);
  return run_parallel(a.batch * cut.spans, threads, [&](std::int64_t i) {
    k.fire_depthwise(a, neurons, row_span(cut, {0, a.batch, 0, a.out_h}, i));
  });
}

}    // namespace qcfs::cpu
