// Pooling windows as explicit integers: qcfs_fast/operators/windows.py says the same in Python, and why.
#pragma once

#include <cstdint>
#include <vector>

#include "core/limits.h"

namespace qcfs::network {

// Which pixels stand in the padding.
enum class Border { none, replicate, reflect, circular };

struct PoolSpec {
  bool max = false;
  bool adaptive = false;    // `output` counts, else `kernel`, `stride` and `padding`; pairs are (height, width)
  std::int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0};
  std::int64_t output[2] = {0, 0};    // 0: as many as the input has
  bool ceil_mode = false, count_include_pad = true;
  std::int64_t divisor_override = 0;    // 0: none
  std::int64_t multiple = 0;            // of all divisors; 0: bare sums
  std::int64_t section[4] = {0, 1, 0, 1};
  std::int64_t spread[2] = {1, 1};     // else: each input takes so many outputs, and there are no windows
  std::int64_t phase[2] = {-1, -1};    // -1: all of those outputs; else one alone, and the others are zero
  Border border = Border::none;        // else: windows of one pixel

  bool depends_on_size() const;
  // Whether it only says where pixels go: windows of one or none.
  bool moves() const;
};

// Three integers for each output row or column: first input index, last + 1, divisor.
struct Windows {
  std::vector<std::int64_t> rows, cols;

  std::int64_t out_h() const { return static_cast<std::int64_t>(rows.size()) / 3; }
  std::int64_t out_w() const { return static_cast<std::int64_t>(cols.size()) / 3; }
};

// Raises Error (shape) where a window does not lie in the input.
Windows windows_of(const PoolSpec& spec, std::int64_t height, std::int64_t width);

// The least common multiple of all divisors.
std::int64_t common_multiple(const Windows& windows);

// The largest value of a window of ones, sum * (multiple / divisor); raises Error (shape) where a divisor does not
// divide the multiple.
std::int64_t largest_value(const Windows& windows, std::int64_t multiple);

// The same of a pool whose windows do not depend on the size of its input.
std::int64_t largest_value(const PoolSpec& spec);

}    // namespace qcfs::network
