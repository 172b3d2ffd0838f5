// See layer.h.
#include "cpu/layer.h"

namespace qcfs::cpu {
namespace {

bool is_linear(const ConvIf& a) {
  bool linear = a.out_h == 1 && a.out_w == 1 && a.product_count > 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    linear &= p.x.height == 1 && p.x.width == 1 && p.g.kernel_h == 1 && p.g.kernel_w == 1 && p.g.pad_h == 0 &&
              p.g.pad_w == 0 && p.g.groups == 1;
  }
  return linear;
}

}    // namespace

std::int64_t work_of(const ConvIf& a) {
  std::int64_t per_neuron = 4;
  for (int i = 0; i < a.product_count; ++i) per_neuron += kernel_inputs(a.products[i].g, a.products[i].x.channels) / 8;
  return per_neuron * a.batch * a.out_h * a.out_w * a.out_channels * a.steps;
}

int largest_input(const ConvIf& a, const Product& p) {
  if (p.x.coding == Coding::mask) return 1;
  const std::int64_t bytes = a.steps * a.batch * p.x.height * p.x.width * p.x.channels;
  std::uint8_t largest = 0;
  for (std::int64_t i = 0; i < bytes; ++i) largest = std::max(largest, p.x.data[i]);
  return largest;
}

LinearAsImage::LinearAsImage(const ConvIf& from) : a(from) {
  a.product_count = std::min(from.product_count, max_products);    // conv_if refuses more
  std::copy_n(from.products, a.product_count, products);
  a.products = products;
  if (!is_linear(a)) return;
  a.out_h = a.batch;
  a.batch = 1;
  for (int i = 0; i < a.product_count; ++i) {
    Product& p = products[i];
    p.x.height = a.out_h;
    p.g.stride_h = p.g.stride_w = p.g.dilation_h = p.g.dilation_w = 1;
  }
}

void single_step_counts_as_masks(LinearAsImage& layer) {
  if (layer.a.steps != 1) return;
  for (int i = 0; i < layer.a.product_count; ++i) {
    Product& p = layer.products[i];
    if (largest_input(layer.a, p) <= 1) p.x.coding = Coding::mask;
  }
}

InputRows input_rows(const Product& p, std::int64_t row0, std::int64_t row1) {
  const std::int64_t first = std::max<std::int64_t>(0, row0 * p.g.stride_h - p.g.pad_h);
  const std::int64_t last =
      std::min(p.x.height, (row1 - 1) * p.g.stride_h - p.g.pad_h + (p.g.kernel_h - 1) * p.g.dilation_h + 1);
  return {first, std::max<std::int64_t>(0, last - first)};
}

Neurons pad_neurons(const ConvIf& a, Arena& arena) {
  const std::int64_t O = a.out_channels, padded = round_up(O, channel_padding);
  const auto copy = [&](const std::int32_t* from, std::int64_t rows = 1) {
    std::int32_t* to = arena.take<std::int32_t>(rows * padded);
    if (to != nullptr) std::fill(to, to + rows * padded, 0);
    for (std::int64_t i = 0; to != nullptr && from != nullptr && i < rows; ++i) {
      std::copy(from + i * O, from + (i + 1) * O, to + i * padded);
    }
    return to;
  };
  Neurons n{};
  n.threshold = copy(a.threshold);
  n.bias = copy(a.bias, a.bias_step == 0 ? 1 : a.steps);
  n.bias_step = a.bias_step == 0 ? 0 : padded;
  for (int i = 0; i < a.residual_count; ++i) n.amplitude[i] = copy(a.residuals[i].amplitude);
  return n;
}

}    // namespace qcfs::cpu
