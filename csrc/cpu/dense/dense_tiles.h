// The register block of dense.h on tile registers (AMX): 32 positions times 32 columns as two by two tiles of sums, so
// that every tile loaded feeds two products. A tile of the left matrix is 16 positions x 64 channels, read in
// place with the position's stride; a tile of weights is 64 inputs x 16 columns, stored as the product wants it:
// [16 groups of four inputs][16 columns][4].
//
//                     weights 6      weights 7          16-bit weights: 6 high digits, 7 low digits
//     positions 4      sums 0         sums 1             of the same 16 channels
//     positions 5      sums 2         sums 3
//
// The including file defines TILE_* (the instructions, or their emulation in tests) and tile_configuration.

constexpr int dense_rows = 32;
constexpr int dense_columns = 32;
constexpr int dense_depth = 64;

constexpr int dense_place(int k, int column) { return column / 16 * 1024 + k / 4 * 64 + column % 16 * 4 + k % 4; }

inline void begin_multiply() { TILE_CONFIGURE(); }
inline void end_multiply() { TILE_RELEASE(); }

inline void multiply(const Segment* segments, int count, std::int64_t sample, std::int64_t t, std::int64_t q0,
                     std::int64_t rows, const std::int8_t* packed, std::int32_t* sums, bool first) {
  // The tile instructions of some compilers do not say that they read memory.
  __asm__ volatile("" ::: "memory");
  constexpr std::int64_t sum_bytes = dense_columns * sizeof(std::int32_t);
  const bool both = rows > 16;
  if (first) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  } else {
    TILE_LOAD(0, sums, sum_bytes);
    TILE_LOAD(1, sums + 16, sum_bytes);
    TILE_LOAD(2, sums + 16 * dense_columns, sum_bytes);
    TILE_LOAD(3, sums + 16 * dense_columns + 16, sum_bytes);
  }
  for (int s = 0; s < count; ++s) {
    const Segment& segment = segments[s];
    const std::int64_t pitch = segment.row_bytes;
    const std::uint8_t* x = segment.a + sample * segment.sample_bytes + t * segment.step_bytes + q0 * pitch;
    if (both) {
      for (std::int64_t k = 0; k < segment.blocks; ++k, x += 64, packed += 2048) {
        TILE_LOAD(6, packed, 64);
        TILE_LOAD(4, x, pitch);
        TILE_LOAD(7, packed + 1024, 64);
        TILE_DOT(0, 4, 6);
        TILE_LOAD(5, x + 16 * pitch, pitch);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
      }
    } else {
      for (std::int64_t k = 0; k < segment.blocks; ++k, x += 64, packed += 2048) {
        TILE_LOAD(6, packed, 64);
        TILE_LOAD(4, x, pitch);
        TILE_LOAD(7, packed + 1024, 64);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
      }
    }
  }
  TILE_STORE(0, sums, sum_bytes);
  TILE_STORE(1, sums + 16, sum_bytes);
  TILE_STORE(2, sums + 16 * dense_columns, sum_bytes);
  TILE_STORE(3, sums + 16 * dense_columns + 16, sum_bytes);
}

// A loop of tile products alone.
double matrix_loop(std::int64_t rounds) {
  TILE_CONFIGURE();
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  TILE_ZERO(4);
  TILE_ZERO(5);
  TILE_ZERO(6);
  TILE_ZERO(7);
  for (std::int64_t r = 0; r < rounds; ++r) {
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
  }
  TILE_RELEASE();
  return 4.0 * 16 * 16 * 64 * static_cast<double>(rounds);
}
