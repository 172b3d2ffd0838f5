// What goes wrong outside of the kernels: one exception with a code, which a binding turns into its own kind of error.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace qcfs::network {

enum class Fault {
  argument = 1,     // a number that the caller gave
  file,             // a file that cannot be read
  format,           // bytes that are no sound network
  shape,            // images that this network cannot take
  not_finite,       // NaN or infinity in the image
  out_of_memory,    // or more memory than the caller allows
};

class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& what) : std::runtime_error(what), fault(fault) {}

  const Fault fault;
};

// `what` is a text or, where a run asks, a function that makes one: a sentence that nobody reads shall cost nothing.
template <typename What>
void require(bool condition, Fault fault, const What& what) {
  if (condition) return;
  if constexpr (std::is_invocable_v<const What&>) {
    throw Error(fault, what());
  } else {
    throw Error(fault, what);
  }
}

}    // namespace qcfs::network
