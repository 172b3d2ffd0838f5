// The CUDA backend: the operators of core/contract.h as kernel launches. No torch, no Python, no allocation
// and no synchronisation: every pointer inside the structs (window tables included) is a device pointer, every
// workspace comes from the caller, everything is queued on `Launch::stream`, so CUDA graphs can capture it.
//
// All functions return 0 or an error code that describe() explains. Results are the bytes that
// the CPU kernels return.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "cuda/cost_model.h"

namespace qcfs::cuda {

// Arrays inside kernel parameters have these sizes; an operator with more of them is `unsupported`.
constexpr int max_products = 64;
constexpr int max_residuals = 16;
constexpr int max_terms = 24;
constexpr int most_products = max_products, most_residuals = max_residuals, most_terms = max_terms;

// Own codes are negative, those of the CUDA runtime positive.
enum Code : int { ok = 0, unsupported = -1, wrong_plan = -2 };

struct Launch {
  void* stream;    // cudaStream_t of the current device
  Device device;
};

const char* describe(int code);
int device_count(int* count);
int set_device(int index, int* previous);
int query_device(int index, Device* device);

// conv_if chooses among tensor cores (weights packed by pack_weight, `packed[i]` for product i) and a direct kernel
// (weights as in the contract, `packed` unused). plan_conv_if says which, and how much workspace is needed.
Plan plan_conv_if(const ConvIf& a, const Device& device);
int conv_if(const ConvIf& a, const std::int8_t* const* packed, const Plan& plan, void* workspace, const Launch& launch);

std::size_t packed_bytes(const Geometry& g, std::int64_t channels, std::int64_t out_channels, int weight_bytes);
int pack_weight(const Geometry& g, std::int64_t channels, std::int64_t out_channels, int weight_bytes,
                const void* weight, std::int8_t* packed, const Launch& launch);

// With weights packed as those of a pointwise layer of kernel_h * kernel_w * channels inputs, tensor cores do it; with
// packed = null a plain kernel. The first is possible where analog_on_tensor_cores says so.
bool analog_on_tensor_cores(const Geometry& g, std::int64_t channels, std::int64_t out_channels);
int analog(const AnalogConv& a, const std::int8_t* packed, const Launch& launch);

int encode(const Encode& a, const Launch& launch);
int pool(const Pool& a, const Launch& launch);
int pool_counts(const PoolCounts& a, const Launch& launch);
int count(const Count& a, const Launch& launch);
int readout(const Readout& a, const Launch& launch);

// `workspace` holds batch + 1 uint32. The last one is set to 1 when a sample holds a NaN or an infinity, else to 0;
// such a sample comes out as zeros.
int quantize(const Quantize& a, std::uint32_t* workspace, const Launch& launch);

}    // namespace qcfs::cuda
