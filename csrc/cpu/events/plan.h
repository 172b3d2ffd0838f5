// Plans of the event engine and of the layers with groups; the algorithms are in fire.h and grouped.h.
#pragma once

#include <cstddef>

#include "core/contract.h"
#include "cpu/kernel_set.h"
#include "cpu/layer.h"

namespace qcfs::cpu {

std::size_t event_weight_bytes(const Product& p, std::int64_t out_channels);
void pack_event_weights(const KernelSet& k, const Product& p, std::int64_t out_channels, void* out);

Status run_events(const KernelSet& k, const LinearAsImage& layer, int threads);
Status run_grouped(const KernelSet& k, const LinearAsImage& layer, int threads);
Status run_depthwise(const KernelSet& k, const ConvIf& a, int threads);

}    // namespace qcfs::cpu
