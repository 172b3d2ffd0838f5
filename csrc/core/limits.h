// Bounds on the integers that sizes are made of, checked where they enter (core/python.h, network/graph.cpp,
// libqcfs/qcfs.cpp), before any arithmetic with them. The numbers are those of qcfs_fast/operators/limits.py, which
// says why.
#pragma once

#include <cstdint>

#include "core/contract.h"

namespace qcfs {

// Kernels, strides, paddings, dilations, groups, the sizes of images and of what a pool gives.
constexpr std::int64_t max_extent = 1 << 24;
// Windows of a pool along an axis.
constexpr std::int64_t max_pool_windows = 1 << 20;
// Bytes of what a node computes for one image of the shape that a saved network states.
constexpr std::int64_t max_stated = std::int64_t{1} << 32;
// Bytes of the spikes that wait for their readers at the same time, in the same run.
constexpr std::int64_t max_held = std::int64_t{1} << 34;
// Elements of a tensor, an empty batch counted as one sample.
constexpr std::int64_t max_elements = std::int64_t{1} << 37;
// Steps, divisors and common multiples of pools.
constexpr std::int64_t max_steps = 0x7fffffff;

constexpr bool within(std::int64_t value, std::int64_t least, std::int64_t most) {
  return least <= value && value <= most;
}

// Nine integers of a geometry in its order; padding may be zero.
constexpr bool is_geometry(const std::int64_t* g) {
  for (int k = 0; k < 9; ++k) {
    if (!within(g[k], k == 4 || k == 5 ? 0 : 1, max_extent)) return false;
  }
  return true;
}

// Whether the sizes are none below zero and their elements in bounds.
template <typename Sizes>
constexpr bool is_shape(const Sizes& sizes) {
  std::int64_t elements = 1;
  for (const std::int64_t size : sizes) {
    if (size < 0 || size > max_elements / elements) return false;
    if (size > 1) elements *= size;
  }
  return true;
}

}    // namespace qcfs
