// The plan of the dense engine; the algorithm is in dense.h.
#pragma once

#include <cstddef>

#include "core/contract.h"
#include "cpu/kernel_set.h"
#include "cpu/layer.h"

namespace qcfs::cpu {

// Whether the layer has products and the dense kernel takes inputs as large as theirs.
bool dense_allowed(const KernelSet& k, const ConvIf& a);

// Products of bytes that the layer takes at one step, padding included.
double dense_products(const KernelSet& k, const ConvIf& a);

// Weights of all products of a layer, one array.
std::size_t dense_weight_bytes(const KernelSet& k, const ConvIf& a);
void pack_dense_weights(const KernelSet& k, const ConvIf& a, std::int8_t* out);

Status run_dense(const KernelSet& k, const LinearAsImage& layer, int threads);

}    // namespace qcfs::cpu
