// The CPU backend: one function per operator of core/contract.h, cut into tasks over a thread pool.
//
// `isa` is the set of instruction sets that may be used (a mask over cpu::Isa bits); the first kernel set
// of kernels.inc whose needs lie inside it runs. Callers pass host_isa(), possibly capped.
#pragma once

#include <cstdint>

#include "core/contract.h"

namespace qcfs::cpu {

struct Options {
  std::uint32_t isa;
  int threads;
};

int kernel_set_count();
const char* kernel_set_name(int index);
std::uint32_t kernel_set_isa(int index);
const char* chosen_kernel_set(std::uint32_t isa);

Status conv_if(const ConvIf& a, const Options& options);
Status analog(const AnalogConv& a, const Options& options);
Status encode(const Encode& a, const Options& options);
Status pool(const Pool& a, const Options& options);
Status pool_counts(const PoolCounts& a, const Options& options);
Status count(const Count& a, const Options& options);
Status readout(const Readout& a, const Options& options);
Status quantize(const Quantize& a, const Options& options);

}    // namespace qcfs::cpu
