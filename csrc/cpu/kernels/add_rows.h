// The inner loop of events.h: adds one packed weight row per event of a stretch, times its count.
//
// Where the instruction set interleaves two registers and multiplies pairs (x86), rows go two at a time: the words of
// two rows are interleaved and multiplied by (value, value), which takes half the instructions of widening each row.
// 8-bit rows are interleaved as bytes, multiplied by (1, 1) and summed as words, 128 pairs at most before they are
// widened. Interleaving works within 16 bytes, so packed rows hold the channels in the order that makes the results
// come out in theirs (panel_place): of each group, the first half of the channels where `low` halves go.
//
// Elsewhere rows are widened one by one, in order.
//
// The including file defines block_vectors_16 and block_vectors_8, how many vectors of channels one pass takes; with
// QCFS_PAIRS also the interleaving (low_words, high_words, low_bytes, high_bytes), the products (dot2, dot_bytes) and,
// for words, add_words, first_words and last_words (widened halves).

// A list of events, not empty, and the weights it selects: the row of position k begins at rows + k * sizeof(Weight).
struct Stretch {
  std::uintptr_t rows;
  const std::uint32_t* position;
  const std::uint32_t* value;
  std::int64_t count;
};

template <typename Weight>
constexpr int block_vectors = sizeof(Weight) == 1 ? block_vectors_8 : block_vectors_16;

#if defined(QCFS_PAIRS)

// One load into a register: left alone, compilers load once more for the second use, and loads are what limits this
// loop.
inline Int load_once(const void* p) {
  Int v = load<Int>(p);
  __asm__("" : "+v"(v));
  return v;
}

template <typename Weight>
constexpr int panel_place(int channel) {
  constexpr int run = 8 / static_cast<int>(sizeof(Weight));    // channels of half an interleaved 16 bytes
  constexpr int half = 2 * lanes / static_cast<int>(sizeof(Weight));
  const int group = channel / (2 * half) * (2 * half), c = channel % (2 * half);
  return group + 2 * run * (c % half / run) + run * (c / half) + c % run;
}

// A block is made of whole groups of 64 bytes (AVX-512) or 32 (AVX2).
template <typename Weight>
constexpr bool half_block = block_vectors<Weight> / 2 * lanes * static_cast<int>(sizeof(Weight)) % (4 * lanes) == 0;

template <int vectors>
inline void add_rows(const std::int16_t*, const Stretch& s, Int (&acc)[vectors]) {
  const auto row = [&](std::int64_t k) {
    return reinterpret_cast<const std::int16_t*>(s.rows + 2 * static_cast<std::uintptr_t>(s.position[k]));
  };
  const auto add = [&](const std::int16_t* w0, const std::int16_t* w1, Int values) {
    QCFS_UNROLL
    for (int j = 0; j < vectors; j += 2) {
      const Int a = load_once(w0 + j * lanes), b = load_once(w1 + j * lanes);
      acc[j] = dot2(acc[j], low_words(a, b), values);
      acc[j + 1] = dot2(acc[j + 1], high_words(a, b), values);
    }
  };
  // The last pair, or single row, stands behind the loop: whether the count is odd is then data, not a branch.
  const std::int64_t odd = s.count & 1, end = s.count - 2 + odd;
  std::int64_t k = 0;
  if (s.value == nullptr) {
    const Int ones = Int{} + 0x00010001;
    for (; k < end; k += 2) add(row(k), row(k + 1), ones);
    add(row(k), row(k + 1 - odd), Int{} + (odd != 0 ? 1 : 0x00010001));
  } else {
    for (; k < end; k += 2) {
      add(row(k), row(k + 1), Int{} + static_cast<std::int32_t>(s.value[k] | s.value[k + 1] << 16));
    }
    const std::uint32_t second = odd != 0 ? 0 : s.value[k + 1];
    add(row(k), row(k + 1 - odd), Int{} + static_cast<std::int32_t>(s.value[k] | second << 16));
  }
}

template <int vectors>
inline void add_rows(const std::int8_t*, const Stretch& s, Int (&acc)[vectors]) {
  const auto row = [&](std::int64_t k) { return reinterpret_cast<const std::int8_t*>(s.rows + s.position[k]); };
  constexpr int groups = vectors / 4;    // registers of one row
  const auto widen = [&](const Int(&words)[2 * groups]) {
    QCFS_UNROLL
    for (int j = 0; j < 2 * groups; ++j) {
      acc[2 * j] += first_words(words[j]);
      acc[2 * j + 1] += last_words(words[j]);
    }
  };
  if (s.value != nullptr) {
    // A count times a weight fits a word, two of them do not: one row at a time.
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Int values = Int{} + static_cast<std::int32_t>(s.value[k] | s.value[k] << 16);
      Int words[2 * groups];
      QCFS_UNROLL
      for (int j = 0; j < groups; ++j) {
        const Int a = load<Int>(row(k) + 4 * j * lanes);
        words[2 * j] = dot_bytes(values, low_bytes(a, Int{}));
        words[2 * j + 1] = dot_bytes(values, high_bytes(a, Int{}));
      }
      widen(words);
    }
    return;
  }
  const Int ones = Int{} + 0x01010101;
  for (std::int64_t k = 0; k < s.count;) {
    const std::int64_t end = smaller(s.count, k + 256);
    Int words[2 * groups];
    QCFS_UNROLL
    for (int j = 0; j < 2 * groups; ++j) words[j] = Int{};
    const auto add = [&](const std::int8_t* w0, const std::int8_t* w1, Int values) {
      QCFS_UNROLL
      for (int j = 0; j < groups; ++j) {
        const Int a = load_once(w0 + 4 * j * lanes), b = load_once(w1 + 4 * j * lanes);
        words[2 * j] = add_words(words[2 * j], dot_bytes(values, low_bytes(a, b)));
        words[2 * j + 1] = add_words(words[2 * j + 1], dot_bytes(values, high_bytes(a, b)));
      }
    };
    const std::int64_t odd = (end - k) & 1;
    for (; k < end - 2 + odd; k += 2) add(row(k), row(k + 1), ones);
    add(row(k), row(k + 1 - odd), Int{} + (odd != 0 ? 0x00010001 : 0x01010101));
    k = end;
    widen(words);
  }
}

#else

template <typename Weight>
constexpr int panel_place(int channel) {
  return channel;
}

template <typename Weight>
constexpr bool half_block = false;

template <typename Weight, int vectors>
inline void add_rows(const Weight*, const Stretch& s, Int (&acc)[vectors]) {
  const auto row = [&](std::int64_t k) {
    return reinterpret_cast<const Weight*>(s.rows + sizeof(Weight) * static_cast<std::uintptr_t>(s.position[k]));
  };
  if (s.value == nullptr) {
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Weight* w = row(k);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen(w + j * lanes);
    }
  } else {
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Weight* w = row(k);
      const std::int32_t value = static_cast<std::int32_t>(s.value[k]);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen(w + j * lanes) * value;
    }
  }
}

#endif
