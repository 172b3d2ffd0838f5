// The inner loop of fire.h: adds one packed weight row per position of a merged list, times its value. Row k begins at
// rows + position[k].
//
// Where the instruction set interleaves two registers and multiplies pairs (Isa::interleaves, x86), rows go two at a
// time: the words of two rows are interleaved and multiplied by (value, value), which takes half the instructions of
// widening each row. 8-bit rows are interleaved as bytes, multiplied by their values or ones and summed as words, as
// many as words hold before they are widened.
//
// x86 unpack instructions interleave within each 128-bit lane and so permute channels. pack_events stores rows in the
// inverse order (panel_place), and sums come out in channel order.
//
// Elsewhere rows are widened one by one, in order.
//
// The sum of a register is a chain of dependent additions. Where one addition takes longer than the loads of a row (dot
// products, additions of 512 bits), rows alternate between two sets of registers (Isa::dot2_chains).
#pragma once

#include <cassert>
#include <cstdint>

#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// Vectors of channels that one pass over a merged list takes; a panel is one or more passes.
template <class Isa, typename Weight>
constexpr int block_vectors = sizeof(Weight) == 1 ? Isa::block_vectors_8 : Isa::block_vectors_16;

// Where a channel sits in a packed row.
template <class Isa, typename Weight>
constexpr int panel_place(int channel) {
  if constexpr (!Isa::interleaves) return channel;
  constexpr int run = 8 / static_cast<int>(sizeof(Weight));    // channels of half an interleaved 16 bytes
  constexpr int half = 2 * Isa::lanes / static_cast<int>(sizeof(Weight));
  const int group = channel / (2 * half) * (2 * half), c = channel % (2 * half);
  return group + 2 * run * (c % half / run) + run * (c / half) + c % run;
}

// One load into a register: left alone, compilers load once more for the second use, and loads are what limits this
// loop.
template <class Isa>
inline Int<Isa> load_once(const void* p) {
  Int<Isa> v = load<Int<Isa>>(p);
  __asm__("" : "+v"(v));
  return v;
}

template <class Isa, int vectors>
inline void add_row_pairs_16(const char* rows, const MergedList& s, Int<Isa> (&acc)[vectors]) {
  using Int = cpu::Int<Isa>;
  constexpr int lanes = Isa::lanes;
  Int more[vectors];
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) more[j] = Int{};
  const auto add = [&](std::int64_t k, Int values, Int(&to)[vectors]) {
    const std::int16_t* w0 = reinterpret_cast<const std::int16_t*>(rows + s.position[k]);
    const std::int16_t* w1 = reinterpret_cast<const std::int16_t*>(rows + s.position[k + 1]);
    QCFS_UNROLL
    for (int j = 0; j < vectors; j += 2) {
      const Int a = load_once<Isa>(w0 + j * lanes), b = load_once<Isa>(w1 + j * lanes);
      to[j] = Isa::dot2(to[j], Isa::low_words(a, b), values);
      to[j + 1] = Isa::dot2(to[j + 1], Isa::high_words(a, b), values);
    }
  };
  if (s.value == nullptr) {
    const Int ones = Int{} + 0x00010001;
    for (std::int64_t k = 0; k < s.count; k += 4) {
      add(k, ones, acc);
      add(k + 2, ones, Isa::dot2_chains == 2 ? more : acc);
    }
  } else {
    for (std::int64_t k = 0; k < s.count; k += 4) {
      add(k, Int{} + load<std::int32_t>(s.value + k), acc);
      add(k + 2, Int{} + load<std::int32_t>(s.value + k + 2), Isa::dot2_chains == 2 ? more : acc);
    }
  }
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) acc[j] += more[j];
}

template <class Isa, int vectors>
inline void add_row_pairs_8(const char* rows, const MergedList& s, int largest_input, Int<Isa> (&acc)[vectors]) {
  using Int = cpu::Int<Isa>;
  constexpr int lanes = Isa::lanes;
  const auto row = [&](std::int64_t k) { return reinterpret_cast<const std::int8_t*>(rows + s.position[k]); };
  constexpr int groups = vectors / 4;    // registers of one row
  using Sums = Int[2 * groups];
  const auto widen = [&](const Sums& words) {
    QCFS_UNROLL
    for (int j = 0; j < 2 * groups; ++j) {
      acc[2 * j] += Isa::first_words(words[j]);
      acc[2 * j + 1] += Isa::last_words(words[j]);
    }
  };
  if (largest_input > 64) {
    // One product fits a word, four may not.
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Int values = Int{} + static_cast<std::int32_t>(s.value[k] * 0x00010001u);
      Sums words;
      QCFS_UNROLL
      for (int j = 0; j < groups; ++j) {
        const Int a = load<Int>(row(k) + 4 * j * lanes);
        words[2 * j] = Isa::dot_bytes(values, Isa::low_bytes(a, Int{}));
        words[2 * j + 1] = Isa::dot_bytes(values, Isa::high_bytes(a, Int{}));
      }
      widen(words);
    }
    return;
  }
  const std::int64_t word_rows = 256 / larger(1, largest_input) / 4 * 4;    // rows whose sums words hold
  for (std::int64_t k = 0; k < s.count;) {
    const std::int64_t end = smaller(s.count, k + word_rows);
    Sums words, more;
    QCFS_UNROLL
    for (int j = 0; j < 2 * groups; ++j) words[j] = more[j] = Int{};
    const auto add = [&](std::int64_t at, Int values, Sums& to) {
      QCFS_UNROLL
      for (int j = 0; j < groups; ++j) {
        const Int a = load_once<Isa>(row(at) + 4 * j * lanes), b = load_once<Isa>(row(at + 1) + 4 * j * lanes);
        to[2 * j] = Isa::add_words(to[2 * j], Isa::dot_bytes(values, Isa::low_bytes(a, b)));
        to[2 * j + 1] = Isa::add_words(to[2 * j + 1], Isa::dot_bytes(values, Isa::high_bytes(a, b)));
      }
    };
    if (s.value == nullptr) {
      const Int ones = Int{} + 0x01010101;
      for (; k < end; k += 4) {
        add(k, ones, words);
        add(k + 2, ones, more);
      }
    } else {
      const auto pair = [&](std::int64_t at) {
        return Int{} + static_cast<std::int32_t>((s.value[at] | s.value[at + 1] << 8) * 0x00010001u);
      };
      for (; k < end; k += 4) {
        add(k, pair(k), words);
        add(k + 2, pair(k + 2), more);
      }
    }
    QCFS_UNROLL
    for (int j = 0; j < 2 * groups; ++j) words[j] = Isa::add_words(words[j], more[j]);
    widen(words);
  }
}

template <class Isa, typename Weight, int vectors>
inline void add_rows_widened(const char* rows, const MergedList& s, Int<Isa> (&acc)[vectors]) {
  const auto row = [&](std::int64_t k) { return reinterpret_cast<const Weight*>(rows + s.position[k]); };
  if (s.value == nullptr) {
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Weight* w = row(k);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen<Isa>(w + j * Isa::lanes);
    }
  } else {
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Weight* w = row(k);
      const std::int32_t value = s.value[k];
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen<Isa>(w + j * Isa::lanes) * value;
    }
  }
}

// No input of the list is larger than `largest_input`.
template <class Isa, typename Weight, int vectors>
inline void add_rows(const char* rows, const MergedList& s, int largest_input, Int<Isa> (&acc)[vectors]) {
  assert(s.count % 4 == 0 && largest_input <= 255);
  if constexpr (!Isa::interleaves) {
    add_rows_widened<Isa, Weight>(rows, s, acc);
  } else if constexpr (sizeof(Weight) == 2) {
    add_row_pairs_16<Isa>(rows, s, acc);
  } else {
    add_row_pairs_8<Isa>(rows, s, largest_input, acc);
  }
}

}    // namespace
}    // namespace qcfs::cpu
