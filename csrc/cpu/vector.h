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

// One element for each lane as int32; of `count`, the rest zero. Bytes by the instruction set's own means: compilers
// convert vectors of less than a register one element at a time.
template <class Isa, typename T>
inline Int<Isa> widen(const T* p) {
  if constexpr (sizeof(T) == 1) {
    return Isa::widen_bytes(p);
  } else {
    return __builtin_convertvector(load<typename VectorTypes<Isa::lanes>::LaneInt16>(p), Int<Isa>);
  }
}

template <class Isa, typename T>
inline Int<Isa> widen(const T* p, std::int64_t count) {
  assert(count >= 0);
  if (count >= Isa::lanes) return widen<Isa>(p);
  T some[Isa::lanes] = {};
  __builtin_memcpy(some, p, static_cast<std::size_t>(count) * sizeof(T));
  return widen<Isa>(some);
}

// The lowest byte of each of `count` lanes.
template <class Isa>
inline void store_bytes(std::uint8_t* p, Int<Isa> x, std::int64_t count = Isa::lanes) {
  if (count >= Isa::lanes) return Isa::store_bytes(p, x);
  std::uint8_t bytes[Isa::lanes];
  Isa::store_bytes(bytes, x);
  __builtin_memcpy(p, bytes, static_cast<std::size_t>(count));
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}    // namespace
}    // namespace qcfs::cpu
