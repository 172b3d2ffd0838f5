// The register block of dense.h on vector registers: dense_rows positions times dense_vectors vectors of columns. Four
// input channels of a position are broadcast to all lanes and multiplied by dot4 with four packed bytes of each column.
// The including file defines dense_vectors, dense_rows, max_dense_input and dot4.

constexpr int dense_columns = dense_vectors * lanes;
constexpr int dense_depth = 4;

constexpr int dense_place(int k, int column) { return 4 * column + k; }

inline void begin_multiply() {}
inline void end_multiply() {}

inline void multiply(const Segment* segments, int count, std::int64_t sample, std::int64_t t, std::int64_t q0,
                     std::int64_t, const std::int8_t* packed, std::int32_t* sums, bool first) {
  Int acc[dense_rows][dense_vectors];
  QCFS_UNROLL
  for (int i = 0; i < dense_rows; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < dense_vectors; ++j) {
      acc[i][j] = first ? Int{} : load<Int>(sums + i * dense_columns + j * lanes);
    }
  }
  for (int s = 0; s < count; ++s) {
    const Segment& segment = segments[s];
    const std::int64_t pitch = segment.row_bytes;
    const std::uint8_t* x = segment.a + sample * segment.sample_bytes + t * segment.step_bytes + q0 * pitch;
    for (std::int64_t k = 0; k < segment.blocks; ++k, x += 4, packed += 4 * dense_columns) {
      Int w[dense_vectors];
      QCFS_UNROLL
      for (int j = 0; j < dense_vectors; ++j) w[j] = load<Int>(packed + 4 * j * lanes);
      QCFS_UNROLL
      for (int i = 0; i < dense_rows; ++i) {
        std::int32_t four;
        __builtin_memcpy(&four, x + i * pitch, 4);
        const Int bytes = Int{} + four;
        QCFS_UNROLL
        for (int j = 0; j < dense_vectors; ++j) acc[i][j] = dot4(acc[i][j], bytes, w[j]);
      }
    }
  }
  QCFS_UNROLL
  for (int i = 0; i < dense_rows; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < dense_vectors; ++j) store(sums + i * dense_columns + j * lanes, acc[i][j]);
  }
}

// A loop of independent dot4 alone, of different operands: equal ones would be multiplied once.
double matrix_loop(std::int64_t rounds) {
  constexpr int inputs = lanes == 16 ? 3 : 2, weights = 4;
  Int acc[inputs][weights], x[inputs], w[weights];
  QCFS_UNROLL
  for (int j = 0; j < weights; ++j) w[j] = Int{} + 0x01020304 * (j + 1);
  QCFS_UNROLL
  for (int i = 0; i < inputs; ++i) {
    x[i] = Int{} + 0x01010101;
    QCFS_UNROLL
    for (int j = 0; j < weights; ++j) acc[i][j] = Int{} + j;
  }
  for (std::int64_t r = 0; r < rounds; ++r) {
    QCFS_UNROLL
    for (int i = 0; i < inputs; ++i) {
      __asm__ volatile("" : "+m"(x[i]));    // may have changed: or a product would be computed once for all rounds
      const Int bytes = x[i];
      QCFS_UNROLL
      for (int j = 0; j < weights; ++j) acc[i][j] = dot4(acc[i][j], bytes, w[j]);
    }
  }
  Int all{};
  QCFS_UNROLL
  for (int i = 0; i < inputs; ++i) {
    QCFS_UNROLL
    for (int j = 0; j < weights; ++j) all += acc[i][j];
  }
  __asm__ volatile("" : : "m"(all));
  return static_cast<double>(inputs * weights) * 4 * lanes * static_cast<double>(rounds);
}
