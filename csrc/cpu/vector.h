// Vectors of `Isa::lanes` int32, and of bytes and words beside them, for the kernels of one instruction set.
//
// Everything is in an unnamed namespace: see kernel_set.h.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

namespace qcfs::cpu {
namespace {

#if defined(__clang__)
#define QCFS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define QCFS_UNROLL _Pragma("GCC unroll 64")
#endif

// typedef, because GCC ignores an attribute behind the type of a template's alias.
template <int lanes>
struct VectorTypes {
  typedef std::int32_t Int __attribute__((vector_size(4 * lanes)));
  typedef std::uint32_t Unsigned __attribute__((vector_size(4 * lanes)));
  // One element for each lane.
  typedef std::uint8_t LaneBytes __attribute__((vector_size(lanes)));
  typedef std::int8_t LaneInt8 __attribute__((vector_size(lanes)));
  typedef std::int16_t LaneInt16 __attribute__((vector_size(2 * lanes)));
  // A whole register.
  typedef std::uint8_t Bytes __attribute__((vector_size(4 * lanes)));
  typedef std::uint16_t Words __attribute__((vector_size(4 * lanes)));
};

template <class Isa>
using Int = typename VectorTypes<Isa::lanes>::Int;
template <class Isa>
using Unsigned = typename VectorTypes<Isa::lanes>::Unsigned;
template <class Isa>
using LaneBytes = typename VectorTypes<Isa::lanes>::LaneBytes;
template <class Isa>
using Bytes = typename VectorTypes<Isa::lanes>::Bytes;
template <class Isa>
using Words = typename VectorTypes<Isa::lanes>::Words;

template <class Isa>
constexpr std::int64_t register_bytes = 4 * Isa::lanes;

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// The first `count` elements, the rest zero.
template <typename V, typename T>
inline V load_some(const T* p, std::int64_t count) {
  assert(count >= 0 && static_cast<std::size_t>(count) * sizeof(T) <= sizeof(V));
  V v{};
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(T));
  return v;
}

template <typename V, typename T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Weights as int32, the first `count` of a vector.
template <class Isa>
inline Int<Isa> widen(const std::int8_t* w, std::int64_t count = Isa::lanes) {
  using Narrow = typename VectorTypes<Isa::lanes>::LaneInt8;
  return __builtin_convertvector(count == Isa::lanes ? load<Narrow>(w) : load_some<Narrow>(w, count), Int<Isa>);
}

template <class Isa>
inline Int<Isa> widen(const std::int16_t* w, std::int64_t count = Isa::lanes) {
  using Narrow = typename VectorTypes<Isa::lanes>::LaneInt16;
  return __builtin_convertvector(count == Isa::lanes ? load<Narrow>(w) : load_some<Narrow>(w, count), Int<Isa>);
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}    // namespace
}    // namespace qcfs::cpu
