// The CUDA backend: the operators of core/contract.h as kernel launches. Results are the bytes that the CPU kernels
// return.
//
// Every pointer inside the structs (window tables included) is a device pointer. Work is queued on `Launch::stream`;
// nothing here allocates or synchronises, and the caller provides every workspace, so CUDA graphs can capture all of
// it. No torch, no Python. All functions return 0 or an error code that describe() explains.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/contract.h"
#include "cuda/cost_model.h"

namespace qcfs::cuda {

// Sizes of the arrays in kernel parameters. An operator with more sources is `unsupported`.
constexpr int max_launch_products = 64;
constexpr int max_launch_residuals = 16;
constexpr int max_launch_terms = 24;

// Codes of this backend are negative, those of the CUDA runtime positive. `unsupported`: more sources or larger sizes
// than the kernels take. `wrong_plan`: the plan is not one of this layer.
enum Code : int { ok = 0, unsupported = -1, wrong_plan = -2 };

struct Launch {
  void* stream;    // cudaStream_t of the current device
  Device device;
};

const char* describe(int code);
int device_count(int* count);
int current_device(int* index);
int query_device(int index, Device* device);    // the current one; it loads the kernels there

// A spiking layer runs on tensor cores, with the weights of product i packed by pack_weight in `packed[i]`, or in a
// direct kernel, with weights as in the contract and `packed` unused. plan_conv_if chooses one and says how much
// workspace it needs.
Plan plan_conv_if(const ConvIf& a, const Device& device);
int conv_if(const ConvIf& a, const std::int8_t* const* packed, const Plan& plan, void* workspace, const Launch& launch);

// `image`: for the first layer, in an order of its own.
std::size_t packed_bytes(const Geometry& g, std::int64_t channels, std::int64_t out_channels, int weight_bytes,
                         bool image);
int pack_weight(const Geometry& g, std::int64_t channels, std::int64_t out_channels, int weight_bytes, bool image,
                const void* weight, std::int8_t* packed, const Launch& launch);

// The first layer runs on tensor cores where analog_on_tensor_cores allows it; with packed = null, in a plain kernel.
bool analog_on_tensor_cores(const Geometry& g, std::int64_t channels, std::int64_t out_channels);
int analog(const AnalogConv& a, const std::int8_t* packed, const Launch& launch);

int pool(const Pool& a, const Launch& launch);
int pool_counts(const PoolCounts& a, const Launch& launch);
int count(const Count& a, const Launch& launch);
int readout(const Readout& a, const Launch& launch);

// `workspace` holds batch + 1 uint32. The last one is set to 1 when a sample holds a NaN or an infinity, else to 0;
// such a sample comes out as zeros.
int quantize(const Quantize& a, std::uint32_t* workspace, const Launch& launch);

}    // namespace qcfs::cuda
