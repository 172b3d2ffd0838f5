// The steps of a plan that read weights: what they hold from when the plan is made, and the call of the kernel.
//
// In a frame they find the addresses of their operands. The engine of a spiking layer is chosen here, in each call, for
// it depends on the firing rate of the input; its weights are packed when an engine first asks for them.
#pragma once

#include <vector>

#include "core/contract.h"
#include "network/plan.h"

namespace qcfs::network {

// The convolution of the image.
struct AnalogStep {
  AnalogConv a;
  Slot x, exponent, out;
  bool keeps;    // what it gave for the image of the call before

  Status operator()(const Frame& f) const;
};

// A spiking layer.
struct FireStep {
  ConvIf a{};
  std::vector<Product> products;
  std::vector<Residual> residuals;
  std::vector<Slot> inputs;    // of the products, then of the residuals
  Slot out = 0;
  bool has_current = false, has_state = false;
  Slot current = 0, state = 0;    // the state is replaced in place: a neuron reads its own before it writes it
  const void* layer = nullptr;
  int place = -1;    // among the layers whose engines a run tells

  Status operator()(const Frame& f) const;
};

}    // namespace qcfs::network
