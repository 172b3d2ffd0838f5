#include "network/pooling.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <set>
#include <utility>

#include "network/error.h"

namespace qcfs::network {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Of a window's area, up to 2^48, and a factor, up to 2^31. Beyond 2^62 it makes no difference how far.
std::int64_t product(std::int64_t area, std::int64_t factor) { return std::min(area, std::int64_t{1} << 31) * factor; }

void check_windows(std::int64_t windows) {
  require(windows <= max_pool_windows, Fault::shape,
          "pooling: " + std::to_string(windows) + " windows along an axis; at most " +
              std::to_string(max_pool_windows) + " are possible");
}

// Which of n pixels stands at place i, at most n outside.
std::int64_t pixel_of(Border border, std::int64_t i, std::int64_t n) {
  if (border == Border::replicate) return std::clamp<std::int64_t>(i, 0, n - 1);
  if (border == Border::circular) return (i + n) % n;
  return n - 1 - std::abs(n - 1 - std::abs(i));
}

// The windows of one axis before a section is cut out of them.
std::vector<std::int64_t> whole_windows(const PoolSpec& spec, std::int64_t size, int axis) {
  std::vector<std::int64_t> found;
  if (const std::int64_t f = spec.spread[axis], phase = spec.phase[axis]; spec.spread[0] * spec.spread[1] != 1) {
    check_windows(size * f);
    for (std::int64_t i = 0; i < size * f; ++i) {
      found.insert(found.end(), {i / f, i / f + (phase < 0 || i % f == phase ? 1 : 0), 1});
    }
    return found;
  }
  if (spec.adaptive) {
    const std::int64_t out = spec.output[axis] != 0 ? spec.output[axis] : size;
    check_windows(out);
    for (std::int64_t i = 0; i < out; ++i) {
      const std::int64_t first = i * size / out, end = ceil_div((i + 1) * size, out);
      found.insert(found.end(), {first, end, end - first});
    }
    return found;
  }
  const std::int64_t k = spec.kernel[axis], s = spec.stride[axis], p = spec.padding[axis];
  if (spec.border != Border::none) {
    check_windows(size + 2 * p);
    require(spec.border == Border::replicate || p <= size - (spec.border == Border::reflect ? 1 : 0), Fault::shape,
            "pooling: a border of " + std::to_string(p) + " is too wide for an input of " + std::to_string(size));
    for (std::int64_t i = -p; i < size + p; ++i) {
      const std::int64_t at = pixel_of(spec.border, i, size);
      found.insert(found.end(), {at, at + 1, 1});
    }
    return found;
  }
  const std::int64_t span = size + 2 * p - k;
  require(span >= 0, Fault::shape,
          "pooling: an input of " + std::to_string(size) + " with padding " + std::to_string(p) +
              " is smaller than the window of " + std::to_string(k));
  std::int64_t out = (spec.ceil_mode ? ceil_div(span, s) : span / s) + 1;
  // As PyTorch: the last window must start inside the input or its left padding.
  if (spec.ceil_mode && (out - 1) * s >= size + p) --out;
  check_windows(out);
  for (std::int64_t i = 0; i < out; ++i) {
    const std::int64_t start = i * s - p, end = std::min(start + k, size + p);
    const std::int64_t first = std::clamp<std::int64_t>(start, 0, size), last = std::clamp<std::int64_t>(end, 0, size);
    const std::int64_t divisor = spec.count_include_pad ? end - start : last - first;
    found.insert(found.end(), {first, last,
                               spec.divisor_override == 0 ? divisor
                               : axis == 0                ? spec.divisor_override
                                                          : 1});
  }
  return found;
}

std::vector<std::int64_t> windows_of(const PoolSpec& spec, std::int64_t size, int axis) {
  std::vector<std::int64_t> found = whole_windows(spec, size, axis);
  const std::int64_t part = spec.section[2 * axis], parts = spec.section[2 * axis + 1];
  for (std::size_t i = 0; i < found.size(); i += 3) {
    const std::int64_t first = found[i], end = found[i + 1];
    if (parts > 1) {
      found[i] = first + (end - first) * part / parts;
      found[i + 1] = first + (end - first) * (part + 1) / parts;
    }
    require(0 <= found[i] && found[i] <= found[i + 1] && found[i + 1] <= size && found[i + 2] >= 1, Fault::shape,
            "pooling: a window does not lie in an input of " + std::to_string(size));
  }
  require(!found.empty(), Fault::shape, "pooling: there are no windows");
  return found;
}

// Extent and divisor of the windows of one axis, each pair once.
std::set<std::pair<std::int64_t, std::int64_t>> kinds_of(const std::vector<std::int64_t>& windows) {
  std::set<std::pair<std::int64_t, std::int64_t>> found;
  for (std::size_t i = 0; i < windows.size(); i += 3) found.insert({windows[i + 1] - windows[i], windows[i + 2]});
  return found;
}

}    // namespace

bool PoolSpec::depends_on_size() const {
  if (adaptive) return true;
  if (divisor_override != 0) return false;
  return ceil_mode || ((padding[0] != 0 || padding[1] != 0) && !count_include_pad);
}

bool PoolSpec::moves() const {
  const bool whole = section[0] + section[2] == 0 && section[1] * section[3] == 1;
  const bool plain = whole && stride[0] * stride[1] == 1, padded = padding[0] + padding[1] != 0;
  if (adaptive || ceil_mode) return false;
  if (spread[0] * spread[1] != 1) return plain && !padded;
  if (padded) return plain && kernel[0] * kernel[1] == 1;
  return section[1] == kernel[0] && section[3] == kernel[1];
}

Windows windows_of(const PoolSpec& spec, std::int64_t height, std::int64_t width) {
  return {windows_of(spec, height, 0), windows_of(spec, width, 1)};
}

std::int64_t common_multiple(const Windows& windows) {
  constexpr std::int64_t most = 0x7fffffff;
  std::int64_t found = 1;
  for (const auto& row : kinds_of(windows.rows)) {
    for (const auto& column : kinds_of(windows.cols)) {
      const std::int64_t divisor = row.second * column.second;    // both at most 2^25
      found = found / std::gcd(found, divisor) * std::min(divisor, std::int64_t{1} << 31);
      require(found <= most, Fault::shape, "pooling: the windows' divisors have no common multiple of 32 bits");
    }
  }
  return found;
}

std::int64_t largest_value(const Windows& windows, std::int64_t multiple) {
  std::int64_t largest = 0;
  for (const auto& row : kinds_of(windows.rows)) {
    for (const auto& column : kinds_of(windows.cols)) {
      const std::int64_t divisor = row.second * column.second;
      require(multiple % divisor == 0, Fault::shape,
              "pooling: the multiple " + std::to_string(multiple) + " is not divisible by a window's " +
                  std::to_string(divisor) + "; convert again with input_shape= set to this image size");
      largest = std::max(largest, product(row.first * column.first, multiple != 0 ? multiple / divisor : 1));
    }
  }
  return largest;
}

std::int64_t largest_value(const PoolSpec& spec) {
  const std::int64_t divisor = spec.divisor_override != 0 ? spec.divisor_override : spec.kernel[0] * spec.kernel[1];
  const std::int64_t factor = spec.multiple != 0 ? spec.multiple / divisor : 1;
  return product(ceil_div(spec.kernel[0], spec.section[1]) * ceil_div(spec.kernel[1], spec.section[3]), factor);
}

}    // namespace qcfs::network
