// Packs the tables of the table engine and cuts its layers into tasks; the algorithm is in fire.h.
#include "cpu/table/plan.h"

#include <algorithm>
#include <cassert>
#include <limits>
#include <vector>

#include "cpu/tasks.h"

namespace qcfs::cpu {
namespace {

// Packed weights begin with a cache line of which the first int32 says how many bytes a sum has.
constexpr std::int64_t header_bytes = cache_line;

// Of all tables of a layer, if their sums have 32 bits.
constexpr std::int64_t max_table_bytes = 4 << 20;
constexpr std::int64_t max_near_table_bytes = 640 << 10;
std::int64_t groups_of(const Product& p) { return p.g.kernel_h * ceil_div(p.x.channels, 4); }

std::int64_t row_bytes_of(const KernelSet& k, std::int64_t out_channels, int sum_bytes) {
  return round_up(out_channels * sum_bytes, k.register_bytes);
}

std::int64_t table_bytes(const KernelSet& k, const Product& p, std::int64_t out_channels, int sum_bytes) {
  return p.g.kernel_w * groups_of(p) * 16 * row_bytes_of(k, out_channels, sum_bytes);
}

std::int64_t layer_table_bytes(const KernelSet& k, const ConvIf& a, int sum_bytes) {
  std::int64_t bytes = 0;
  for (int i = 0; i < a.product_count; ++i) bytes += table_bytes(k, a.products[i], a.out_channels, sum_bytes);
  return bytes;
}

// Whether 16 bits hold the sum of any of an output's weights, for all outputs.
template <typename Weight>
bool sums_fit_16_bits(const Product& p, std::int64_t out_channels) {
  std::vector<std::int64_t> highest(static_cast<std::size_t>(out_channels)), lowest(highest);
  const Weight* w = static_cast<const Weight*>(p.weight);
  for (std::int64_t k = kernel_inputs(p.g, p.x.channels); k > 0; --k) {
    for (std::size_t o = 0; o < highest.size(); ++o, ++w) (*w > 0 ? highest : lowest)[o] += *w;
  }
  using Limits = std::numeric_limits<std::int16_t>;
  return *std::max_element(highest.begin(), highest.end()) <= Limits::max() &&
         *std::min_element(lowest.begin(), lowest.end()) >= Limits::min();
}

int sum_bytes_of(const Product& p, std::int64_t out_channels) {
  const bool fit = p.weight_bytes == 1 ? sums_fit_16_bits<std::int8_t>(p, out_channels)
                                       : sums_fit_16_bits<std::int16_t>(p, out_channels);
  return fit ? 2 : 4;
}

}    // namespace

bool table_allowed(const KernelSet& k, const ConvIf& a) {
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    if (p.g.groups != 1 || (p.g.dilation_w != 1 && p.g.kernel_w != 1)) return false;
    if (p.x.coding == Coding::count && a.steps > 1) return false;
    // An entry holds the column of the image.
    const std::int64_t image = (p.x.width + p.g.kernel_w) * groups_of(p) * 16 * row_bytes_of(k, a.out_channels, 4);
    if (image > std::numeric_limits<std::int32_t>::max()) return false;
  }
  if (a.product_count == 0 || layer_table_bytes(k, a, 4) > max_table_bytes) return false;
  for (int i = 0; i < a.product_count; ++i) {
    if (largest_input(a, a.products[i]) > 1) return false;
  }
  return true;
}

bool table_is_near(const KernelSet& k, const ConvIf& a) {
  return layer_table_bytes(k, a, 2 * a.products[0].weight_bytes) <= max_near_table_bytes;
}

std::size_t table_weight_bytes(const KernelSet& k, const Product& p, std::int64_t out_channels) {
  return static_cast<std::size_t>(header_bytes + table_bytes(k, p, out_channels, sum_bytes_of(p, out_channels)));
}

void pack_table_weights(const KernelSet& k, const Product& p, std::int64_t out_channels, void* out) {
  const int sum_bytes = sum_bytes_of(p, out_channels);
  *static_cast<std::int32_t*>(out) = sum_bytes;
  k.pack_table(p, out_channels, sum_bytes, row_bytes_of(k, out_channels, sum_bytes),
               static_cast<char*>(out) + header_bytes);
}

Status run_table(const KernelSet& k, const LinearAsImage& owner, int threads) {
  const ConvIf& a = owner.a;
  TableLayer layer{};
  layer.a = &a;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    assert(p.packed != nullptr);
    TableProduct& t = layer.product[i];
    t.groups = groups_of(p);
    t.sum_bytes = *static_cast<const std::int32_t*>(p.packed);
    t.row_bytes = row_bytes_of(k, a.out_channels, t.sum_bytes);
    t.rows = static_cast<const char*>(p.packed) + header_bytes;
  }
  const Status s = place_in_call_workspace([&](Arena& arena) { layer.neurons = pad_neurons(a, arena); });
  if (s != Status::ok) return s;
  const RowCut cut = cut_rows(a.out_h, a.batch, threads);
  return run_with_workspace(a.batch * cut.spans, threads, k.fire_table_workspace(layer),
                            [&](std::int64_t i, void* workspace) {
                              k.fire_table(layer, row_span(cut, {0, a.batch, 0, a.out_h}, i), workspace);
                            });
}

}    // namespace qcfs::cpu
