// The register block of dense.h on vector registers: Isa::dense_rows positions times Isa::dense_vectors vectors of
// columns. Four input channels of a position are broadcast to all lanes and multiplied by Isa::dot4 with four packed
// bytes of each column.
#pragma once

#include <cassert>
#include <cstdint>

#include "cpu/layout.h"
#include "cpu/vector.h"

namespace qcfs::cpu {
namespace {

template <class Isa>
struct VectorBlock {
  static constexpr int lanes = Isa::lanes;
  static constexpr int rows = Isa::dense_rows;
  static constexpr int vectors = Isa::dense_vectors;
  static constexpr int columns = vectors * lanes;
  static constexpr int depth = 4;

  static constexpr int place(int k, int column) { return 4 * column + k; }

  static void begin() {}
  static void end() {}
  static constexpr int awake_rows = rows;
  static void stay_awake() {}

  static void multiply(const Segment* segments, int count, std::int64_t sample, std::int64_t t, std::int64_t q0,
                       std::int64_t, std::int64_t, const std::int8_t* packed, std::int32_t* sums, bool first) {
    assert(count > 0 && q0 >= 0);
    Int<Isa> acc[rows][vectors];
    QCFS_UNROLL
    for (int i = 0; i < rows; ++i) {
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) {
        acc[i][j] = first ? Int<Isa>{} : load<Int<Isa>>(sums + i * columns + j * lanes);
      }
    }
    for (int s = 0; s < count; ++s) {
      const Segment& segment = segments[s];
      const std::int64_t pitch = segment.row_bytes;
      const std::uint8_t* x = segment.a + sample * segment.sample_bytes + t * segment.step_bytes + q0 * pitch;
      for (std::int64_t k = 0; k < segment.blocks; ++k, x += 4, packed += 4 * columns) {
        Int<Isa> w[vectors];
        QCFS_UNROLL
        for (int j = 0; j < vectors; ++j) w[j] = load<Int<Isa>>(packed + 4 * j * lanes);
        QCFS_UNROLL
        for (int i = 0; i < rows; ++i) {
          std::int32_t four;
          __builtin_memcpy(&four, x + i * pitch, 4);
          const Int<Isa> bytes = Int<Isa>{} + four;
          QCFS_UNROLL
          for (int j = 0; j < vectors; ++j) acc[i][j] = Isa::dot4(acc[i][j], bytes, w[j]);
        }
      }
    }
    QCFS_UNROLL
    for (int i = 0; i < rows; ++i) {
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) store(sums + i * columns + j * lanes, acc[i][j]);
    }
  }

  // A loop of independent dot4 alone, of different operands: equal ones would be multiplied once.
  static double matrix_loop(std::int64_t rounds) {
    constexpr int inputs = lanes == 16 ? 3 : 2, weights = 4;
    Int<Isa> acc[inputs][weights], x[inputs], w[weights];
    QCFS_UNROLL
    for (int j = 0; j < weights; ++j) w[j] = Int<Isa>{} + 0x01020304 * (j + 1);
    QCFS_UNROLL
    for (int i = 0; i < inputs; ++i) {
      x[i] = Int<Isa>{} + 0x01010101;
      QCFS_UNROLL
      for (int j = 0; j < weights; ++j) acc[i][j] = Int<Isa>{} + j;
    }
    for (std::int64_t r = 0; r < rounds; ++r) {
      QCFS_UNROLL
      for (int i = 0; i < inputs; ++i) {
        __asm__ volatile("" : "+m"(x[i]));    // may have changed: or a product would be computed once for all rounds
        const Int<Isa> bytes = x[i];
        QCFS_UNROLL
        for (int j = 0; j < weights; ++j) acc[i][j] = Isa::dot4(acc[i][j], bytes, w[j]);
      }
    }
    Int<Isa> all{};
    QCFS_UNROLL
    for (int i = 0; i < inputs; ++i) {
      QCFS_UNROLL
      for (int j = 0; j < weights; ++j) all += acc[i][j];
    }
    __asm__ volatile("" : : "m"(all));
    return static_cast<double>(inputs * weights) * 4 * lanes * static_cast<double>(rounds);
  }
};

}    // namespace
}    // namespace qcfs::cpu
