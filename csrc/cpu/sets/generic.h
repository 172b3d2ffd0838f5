// The kernel set of an instruction set: the CPU algorithms, which are written once over vectors of any width, for one
// struct `Isa` that says what the instruction set changes. A file of this folder defines that struct and calls
// make_kernel_set<Isa>. What the struct must supply:
//
//     lanes                 int32 in a vector; `Int` is VectorTypes<lanes>::Int
//     list_bytes(x, n, wanted, first, out, value)
//                           writes first + row_bytes * k for every k of [0, n) with x[k] & wanted, and those x[k] where
//                           `value` is not null; returns the end; may write list_slack / 4 entries past it
//     widen_bytes(p)        one signed or unsigned byte for each lane as int32
//     store_bytes(p, x)     writes the lowest byte of each lane
//     compress(x, kept, out)
//                           writes the lanes of x where `kept` is not zero, in order, and a whole vector in all;
//                           returns how many were kept
//     block_vectors_16, block_vectors_8
//                           vectors of output channels that stay in registers while a merged list is added
//     interleaves           whether rows are added in pairs (add_rows.h); if so also low_words, high_words, low_bytes,
//                           high_bytes (the interleaving), dot_bytes, add_words, first_words, last_words (widened
//                           halves) and dot2_chains, 1 or 2
//     dot2(acc, a, b)       acc + sums of products of int16 pairs
//     dot4(acc, u, s)       acc + sums of products of four bytes, u unsigned and at most max_dense_input, s signed
//     analog_vectors        vectors of output channels in the register block of image.h
//     DenseBlock            the register block of dense.h: VectorBlock<Isa>, which also needs dense_rows and
//                           dense_vectors, or TileBlock<..>
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/dense/dense.h"
#include "cpu/dense/dense_vector.h"
#include "cpu/ends/elementwise.h"
#include "cpu/ends/image.h"
#include "cpu/events/fire.h"
#include "cpu/events/grouped.h"
#include "cpu/events/list.h"
#include "cpu/events/merge.h"
#include "cpu/kernel_set.h"
#include "cpu/table/fire.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

// QCFS_SUPPLIES(name, expression): name<Isa> says whether the expression compiles.
#define QCFS_SUPPLIES(name, ...)        \
  template <class Isa, typename = void> \
  constexpr bool name = false;          \
  template <class Isa>                  \
  constexpr bool name<Isa, std::void_t<decltype(__VA_ARGS__)>> = true

QCFS_SUPPLIES(has_lanes, typename Isa::Int{} + Int<Isa>{});
QCFS_SUPPLIES(has_list_bytes, Isa::list_bytes(static_cast<const std::uint8_t*>(nullptr), std::int64_t{}, std::uint8_t{},
                                              std::uint16_t{}, static_cast<std::uint16_t*>(nullptr),
                                              static_cast<std::uint16_t*>(nullptr)));
QCFS_SUPPLIES(has_block_vectors, Isa::block_vectors_16 + Isa::block_vectors_8 + Isa::analog_vectors);
QCFS_SUPPLIES(has_interleaves, bool{Isa::interleaves});
QCFS_SUPPLIES(has_interleaving, Isa::low_words(Int<Isa>{}, Int<Isa>{}) + Isa::high_words(Int<Isa>{}, Int<Isa>{}) +
                                    Isa::low_bytes(Int<Isa>{}, Int<Isa>{}) + Isa::high_bytes(Int<Isa>{}, Int<Isa>{}) +
                                    Isa::dot_bytes(Int<Isa>{}, Int<Isa>{}) + Isa::add_words(Int<Isa>{}, Int<Isa>{}) +
                                    Isa::first_words(Int<Isa>{}) + Isa::last_words(Int<Isa>{}) + Isa::dot2_chains);
QCFS_SUPPLIES(has_dot2, Isa::dot2(Int<Isa>{}, Int<Isa>{}, Int<Isa>{}));
QCFS_SUPPLIES(has_dot4, Isa::dot4(Int<Isa>{}, Int<Isa>{}, Int<Isa>{}));
QCFS_SUPPLIES(has_max_dense_input, int{Isa::max_dense_input});
QCFS_SUPPLIES(has_dense_block, Isa::DenseBlock::rows + Isa::DenseBlock::columns + Isa::DenseBlock::depth);

#undef QCFS_SUPPLIES

template <class Isa>
constexpr bool supplies_everything() {
  static_assert(has_lanes<Isa>, "an instruction set needs `lanes`, and `Int` = VectorTypes<lanes>::Int");
  static_assert(has_list_bytes<Isa>, "an instruction set needs `list_bytes`; see the head of sets/generic.h");
  static_assert(has_block_vectors<Isa>,
                "an instruction set needs `block_vectors_16`, `block_vectors_8` and `analog_vectors`");
  static_assert(has_interleaves<Isa>, "an instruction set needs `interleaves`, true or false");
  if constexpr (has_interleaves<Isa>) {
    static_assert(!Isa::interleaves || has_interleaving<Isa>,
                  "an instruction set that interleaves needs low_words, high_words, low_bytes, high_bytes, dot_bytes, "
                  "add_words, first_words, last_words and dot2_chains");
  }
  static_assert(has_dot2<Isa>, "an instruction set needs `dot2`, the products of int16 pairs");
  static_assert(has_dot4<Isa>, "an instruction set needs `dot4`, the products of four bytes");
  static_assert(has_max_dense_input<Isa>, "an instruction set needs `max_dense_input`, the largest u of dot4");
  static_assert(has_dense_block<Isa>, "an instruction set needs `DenseBlock`, such as VectorBlock<Isa>");
  return true;
}

template <class Isa>
constexpr KernelSet make_kernel_set(const char* name, std::uint32_t isa) {
  static_assert(supplies_everything<Isa>());
  using Block = typename Isa::DenseBlock;
  KernelSet k{};
  k.name = name;
  k.isa = isa;
  k.pack_events = pack_events<Isa>;
  k.list_events = list_events<Isa>;
  k.merge_events_workspace = merge_events_workspace;
  k.merge_events = merge_events<Isa>;
  k.fire_events_workspace = fire_events_workspace;
  k.fire_events = fire_events<Isa>;
  k.fire_grouped_workspace = fire_grouped_workspace;
  k.fire_grouped = fire_grouped<Isa>;
  k.fire_depthwise = fire_depthwise<Isa>;
  k.register_bytes = register_bytes<Isa>;
  k.pack_table = pack_table;
  k.fire_table_workspace = fire_table_workspace<Isa>;
  k.fire_table = fire_table<Isa>;
  k.dense.rows = Block::rows;
  k.dense.columns = Block::columns;
  k.dense.depth = Block::depth;
  k.dense.max_input = Isa::max_dense_input;
  k.pack_dense = pack_dense<Isa>;
  k.expand = expand<Isa>;
  k.fire_dense_workspace = fire_dense_workspace<Isa>;
  k.fire_dense = fire_dense<Isa>;
  k.matrix_loop = Block::matrix_loop;
  k.pack_analog_bytes = pack_analog_bytes<Isa>;
  k.pack_analog = pack_analog<Isa>;
  k.analog_workspace = analog_workspace<Isa>;
  k.analog = analog<Isa>;
  k.pool = pool<Isa>;
  k.pool_counts = pool_counts;
  k.count = count;
  k.readout = readout;
  k.largest = largest;
  k.quantize = quantize;
  return k;
}

}    // namespace
}    // namespace qcfs::cpu
