// Cuts a layer of the dense engine into waves and tasks; see dense.h for the two steps that the tasks do.
#include "cpu/dense/plan.h"

#include <algorithm>
#include <cassert>

#include "cpu/tasks.h"

namespace qcfs::cpu {
namespace {

// The limits below were tuned on a Zen 5 core with 1 MiB of second-level cache. Weights of a panel pass it whole up to
// the first limit; more are cut into chunks of the second, which leaves room for the sums that wait between chunks.
constexpr std::int64_t max_whole_panel_bytes = 640 << 10;
constexpr std::int64_t chunk_bytes = 320 << 10;

std::int64_t panel_channels(const KernelSet& k, const ConvIf& a) {
  return k.dense.columns / a.products[0].weight_bytes;
}

std::int64_t panels_of(const KernelSet& k, const ConvIf& a) { return ceil_div(a.out_channels, panel_channels(k, a)); }

std::int64_t product_panel_bytes(const KernelSet& k, const Product& p) {
  std::int64_t inputs = 0;
  for (std::int64_t i = 0; i < tap_runs(p.g); ++i) {
    inputs += round_up(tap_run(p.g, i).count * p.x.channels, k.dense.depth);
  }
  return p.g.kernel_h * inputs * k.dense.columns;
}

std::int64_t panel_bytes(const KernelSet& k, const ConvIf& a) {
  std::int64_t bytes = 0;
  for (int i = 0; i < a.product_count; ++i) bytes += product_panel_bytes(k, a.products[i]);
  return bytes;
}

// Phases of a strided dimension: as many as taps reach.
std::int64_t phases_of(std::int64_t kernel, std::int64_t stride, std::int64_t dilation) {
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < kernel; ++i) last = std::max(last, i * dilation % stride);
  return last + 1;
}

struct PlaneSize {
  std::int64_t h, w;
};

// Positions of one phase: those of `rows` output rows and what taps reach behind them.
PlaneSize plane_size(const ConvIf& a, std::int64_t rows) {
  PlaneSize size{rows, a.out_w};
  for (int i = 0; i < a.product_count; ++i) {
    const Geometry& g = a.products[i].g;
    size.h = std::max(size.h, rows + (g.kernel_h - 1) * g.dilation_h / g.stride_h);
    size.w = std::max(size.w, a.out_w + (g.kernel_w - 1) * g.dilation_w / g.stride_w);
  }
  return size;
}

// Places the planes of layer.wave.
void place_planes(const KernelSet& k, DenseLayer& layer, Arena& arena) {
  const ConvIf& a = *layer.a;
  const PlaneSize size = plane_size(a, rows_of(layer.wave));
  layer.plane_h = size.h;
  layer.plane_w = size.w;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    DenseProduct& d = layer.product[i];
    d.phases_h = phases_of(p.g.kernel_h, p.g.stride_h, p.g.dilation_h);
    d.phases_w = phases_of(p.g.kernel_w, p.g.stride_w, p.g.dilation_w);
    d.phase_bytes = size.h * size.w * p.x.channels;
    d.sample_bytes = d.phases_h * d.phases_w * d.phase_bytes;
    d.step_bytes = samples_of(layer.wave) * d.sample_bytes;
    // The last block reads a whole block of positions and all taps behind them, each run to its full depth.
    d.plane =
        arena.take<std::uint8_t>(a.steps * d.step_bytes + (k.dense.rows + 1) * p.x.channels + k.dense.depth + slack);
  }
}

// Bytes of the weights for k.dense.depth inputs; of a chunk, at most; and how many times such inputs fill one.
struct ChunkSize {
  ChunkSize(const KernelSet& k, const DenseLayer& layer)
      : unit(k.dense.depth * k.dense.columns),
        limit(layer.panel_bytes > max_whole_panel_bytes ? chunk_bytes : max_whole_panel_bytes),
        blocks(std::max<std::int64_t>(1, limit / unit)) {}

  std::int64_t unit, limit, blocks;
};

// The segments of a layer in the order of the packed weights; chunk c is segments [chunk[c], chunk[c + 1]), of products
// of one scale.
struct Segments {
  Segment* all;
  int* chunk;
  std::int32_t* factor;
};

// A chunk begins at a product or at a segment.
Segments place_segments(const KernelSet& k, const DenseLayer& layer, Arena& arena) {
  std::int64_t segments = 0;
  for (int i = 0; i < layer.a->product_count; ++i) {
    const Product& p = layer.a->products[i];
    for (std::int64_t run = 0; run < tap_runs(p.g); ++run) {
      const std::int64_t inputs = ceil_div(tap_run(p.g, run).count * p.x.channels, k.dense.depth);
      segments += p.g.kernel_h * ceil_div(inputs, ChunkSize(k, layer).blocks);
    }
  }
  const std::int64_t chunks = layer.a->product_count + segments;
  return {arena.take<Segment>(segments), arena.take<int>(chunks + 1), arena.take<std::int32_t>(chunks)};
}

void cut_segments(const KernelSet& k, DenseLayer& layer, const Segments& out) {
  const ConvIf& a = *layer.a;
  const ChunkSize size(k, layer);
  int segments = 0, chunks = 0;
  std::int64_t filled = 0;    // bytes of the current chunk
  const auto next_chunk = [&](std::int32_t factor) {
    out.chunk[chunks] = segments;
    out.factor[chunks++] = factor;
    filled = 0;
  };
  next_chunk(1);
  for (int i = 0; i < a.product_count; ++i) {
    if (i > 0 && a.products[i].scale != a.products[i - 1].scale) {
      next_chunk(a.products[i - 1].scale / a.products[i].scale);
    }
    const Geometry& g = a.products[i].g;
    const std::int64_t channels = a.products[i].x.channels;
    const DenseProduct& d = layer.product[i];
    for (std::int64_t kh = 0; kh < g.kernel_h; ++kh) {
      for (std::int64_t i = 0; i < tap_runs(g); ++i) {
        // Where the run meets output position 0: its phase and the offset inside it (dense.h).
        const TapRun run = tap_run(g, i);
        const std::int64_t h = kh * g.dilation_h, w = run.first * g.dilation_w;
        const std::uint8_t* inputs = d.plane + (h % g.stride_h * d.phases_w + w % g.stride_w) * d.phase_bytes +
                                     (h / g.stride_h * layer.plane_w + w / g.stride_w) * channels;
        const std::int64_t depth = round_up(run.count * channels, k.dense.depth);
        for (std::int64_t first = 0; first < depth;) {
          const std::int64_t blocks = std::min((depth - first) / k.dense.depth, size.blocks);
          if (filled > 0 && filled + blocks * size.unit > size.limit) next_chunk(1);
          out.all[segments++] = {inputs + first, channels, d.step_bytes, d.sample_bytes, blocks};
          filled += blocks * size.unit;
          first += blocks * k.dense.depth;
        }
      }
    }
  }
  out.chunk[chunks] = segments;
  layer.segments = out.all;
  layer.chunk = out.chunk;
  layer.factor = out.factor;
  layer.chunks = chunks;
}

void expand_wave(const KernelSet& k, const DenseLayer& layer, int threads) {
  const std::int64_t samples = samples_of(layer.wave);
  run_parallel(layer.a->product_count * samples * layer.plane_h, threads, [&](std::int64_t i) {
    const std::int64_t image = i / layer.plane_h;
    k.expand(layer, static_cast<int>(image / samples), layer.wave.sample0 + image % samples, i % layer.plane_h);
  });
}

Status fire_wave(const KernelSet& k, const DenseLayer& layer, int threads) {
  const ConvIf& a = *layer.a;
  const std::int64_t panels = panels_of(k, a);
  const std::int64_t blocks = samples_of(layer.wave) * ceil_div(positions_of(layer), k.dense.rows);
  const std::int64_t wanted = threads > 1 ? ceil_div(tasks_per_thread * threads, panels) : 1;
  std::int64_t per_task = ceil_div(blocks, std::min(wanted, blocks));
  if (layer.chunks > 1) {
    const std::int64_t sum_bytes = a.steps * k.dense.rows * k.dense.columns * 4;
    per_task = std::min(per_task, std::max<std::int64_t>(1, max_waiting_bytes / sum_bytes));
  }
  const std::int64_t ranges = ceil_div(blocks, per_task);
  return run_with_workspace(panels * ranges, threads, k.fire_dense_workspace(layer, per_task),
                            [&](std::int64_t i, void* workspace) {
                              const std::int64_t first = i % ranges * per_task;
                              const DenseTile tile{first, std::min(blocks, first + per_task), i / ranges};
                              k.fire_dense(layer, tile, workspace);
                            });
}

}    // namespace

bool dense_allowed(const KernelSet& k, const ConvIf& a) {
  bool allowed = a.product_count > 0;
  for (int i = 0; i < a.product_count; ++i) {
    allowed &= k.dense.max_input == 255 || largest_input(a, a.products[i]) <= k.dense.max_input;
  }
  return allowed;
}

double dense_products(const KernelSet& k, const ConvIf& a) {
  const PlaneSize size = plane_size(a, a.out_h);
  const std::int64_t positions = a.batch * round_up((a.out_h - 1) * size.w + a.out_w, k.dense.rows);
  return static_cast<double>(positions) * static_cast<double>(panels_of(k, a) * panel_bytes(k, a));
}

std::size_t dense_weight_bytes(const KernelSet& k, const ConvIf& a) {
  return static_cast<std::size_t>(panels_of(k, a) * panel_bytes(k, a) + slack);
}

void pack_dense_weights(const KernelSet& k, const ConvIf& a, std::int8_t* out) {
  for (int i = 0; i < a.product_count; ++i) {
    k.pack_dense(a.products[i], a.out_channels, panel_bytes(k, a), out);
    out += product_panel_bytes(k, a.products[i]);
  }
}

Status run_dense(const KernelSet& k, const LinearAsImage& owner, int threads) {
  const ConvIf& a = owner.a;
  assert(a.product_count > 0 && a.products[0].packed != nullptr);
  DenseLayer layer{};
  layer.a = &a;
  layer.packed = static_cast<const std::int8_t*>(a.products[0].packed);
  layer.panel_bytes = panel_bytes(k, a);
  const auto bytes = [&](std::int64_t row0, std::int64_t row1) {
    layer.wave = {0, 1, row0, row1};
    return bytes_of([&](Arena& arena) { place_planes(k, layer, arena); });
  };
  return run_waves(a, bytes, [&](const Wave& wave) {
    layer.wave = wave;
    Segments segments{};
    const Status s = place_in_call_workspace([&](Arena& arena) {
      layer.neurons = pad_neurons(a, arena);
      place_planes(k, layer, arena);
      segments = place_segments(k, layer, arena);
    });
    if (s != Status::ok) return s;
    cut_segments(k, layer, segments);
    expand_wave(k, layer, threads);
    return fire_wave(k, layer, threads);
  });
}

}    // namespace qcfs::cpu
