// The plan of the table engine; the algorithm is in fire.h.
#pragma once

#include <cstddef>

#include "core/contract.h"
#include "cpu/kernel_set.h"
#include "cpu/layer.h"

namespace qcfs::cpu {

// Whether all inputs are spikes, no kernel has groups or is dilated in width, and the tables fit some cache.
bool table_allowed(const KernelSet& k, const ConvIf& a);

// Whether the tables stay in the second-level cache, for which the engine is meant.
bool table_is_near(const KernelSet& k, const ConvIf& a);

std::size_t table_weight_bytes(const KernelSet& k, const Product& p, std::int64_t out_channels);
void pack_table_weights(const KernelSet& k, const Product& p, std::int64_t out_channels, void* out);

Status run_table(const KernelSet& k, const LinearAsImage& layer, int threads);

}    // namespace qcfs::cpu
