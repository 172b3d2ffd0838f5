#include "network/steps.h"

#include <algorithm>

namespace qcfs::network {

Status AnalogStep::operator()(const Frame& f) const {
  if (keeps && f.image.data == nullptr) return Status::ok;
  AnalogConv now = a;
  now.x = f.at<const std::int32_t>(x);
  now.exponent = f.at<const std::int32_t>(exponent);
  if (now.steps > 0) {
    now.out_mask = f.at<std::uint8_t>(out);
  } else {
    now.out_current = f.at<std::int32_t>(out);
  }
  const std::uint32_t isa = f.options.isa;
  now.packed = f.packed->find(
      {now.weight, 0, -1, 0, cpu::chosen_kernel_set(isa)}, [&] { return cpu::packed_bytes(now, isa); },
      [&](void* to) { cpu::pack(now, isa, to); });
  return now.packed == nullptr ? Status::out_of_memory : cpu::analog(now, f.options);
}

Status FireStep::operator()(const Frame& f) const {
  Product p[max_products];
  Residual r[max_residuals];
  std::copy(products.begin(), products.end(), p);
  std::copy(residuals.begin(), residuals.end(), r);
  for (std::size_t i = 0; i < products.size(); ++i) p[i].x.data = f.at<const std::uint8_t>(inputs[i]);
  for (std::size_t i = 0; i < residuals.size(); ++i) {
    r[i].data = f.at<const std::uint8_t>(inputs[products.size() + i]);
  }
  ConvIf now = a;
  now.products = p;
  now.residuals = r;
  now.out = f.at<std::uint8_t>(out);
  if (has_current) now.current = f.at<const std::int32_t>(current);
  if (now.bias_step != 0) now.bias += f.before * now.bias_step;
  if (has_state) now.state_out = f.at<std::int32_t>(state);
  if (f.before > 0) now.state = now.state_out;
  cpu::Options options = f.options;
  options.engine = cpu::choose_engine(now, options);
  if (f.engines != nullptr && place >= 0) f.engines[place] = static_cast<std::uint8_t>(options.engine);
  for (int i = 0; i < now.product_count; ++i) {
    if (!cpu::has_packed(i, options.engine)) continue;
    const PackedWeights::Key key{layer, i, static_cast<int>(options.engine), now.product_count,
                                 cpu::chosen_kernel_set(options.isa)};
    p[i].packed = f.packed->find(
        key, [&] { return cpu::packed_bytes(now, i, options.engine, options.isa); },
        [&](void* to) { cpu::pack(now, i, options.engine, options.isa, to); });
    if (p[i].packed == nullptr) return Status::out_of_memory;
  }
  return cpu::conv_if(now, options);
}

}    // namespace qcfs::network
