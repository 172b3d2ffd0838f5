// The inner loop of events.h: adds one packed weight row per event of a run, times its count. Row k
// begins at rows + position[k].
//
// Where the instruction set interleaves two registers and multiplies pairs (x86), rows go two at a time: the words of
// two rows are interleaved and multiplied by (value, value), which takes half the instructions of widening each row.
// 8-bit rows are interleaved as bytes, multiplied by their counts or ones and summed as words, as many as words hold
// before they are widened. Interleaving works within 16 bytes, so packed rows hold the channels in the order that makes
// the results come out in theirs (panel_place): of each group, the first half of the channels where `low` halves go.
//
// Elsewhere rows are widened one by one, in order.
//
// The sum of a register is a chain of dependent additions; where one addition takes longer than the loads of a row
// (dot products, additions of 512 bits), rows alternate between two sets of registers.
//
// The including file defines block_vectors_16 and block_vectors_8, how many vectors of channels one pass takes; with
// QCFS_PAIRS also the interleaving (low_words, high_words, low_bytes, high_bytes), the products (dot2, dot_bytes) and,
// for words, add_words, first_words and last_words (widened halves), and dot2_chains, 1 or 2.

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

template <int vectors>
inline void add_rows(const std::int16_t*, const char* rows, const MergedList& s, int, Int (&acc)[vectors]) {
  Int more[vectors];
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) more[j] = Int{};
  const auto add = [&](std::int64_t k, Int values, Int(&to)[vectors]) {
    const std::int16_t* w0 = reinterpret_cast<const std::int16_t*>(rows + s.position[k]);
    const std::int16_t* w1 = reinterpret_cast<const std::int16_t*>(rows + s.position[k + 1]);
    QCFS_UNROLL
    for (int j = 0; j < vectors; j += 2) {
      const Int a = load_once(w0 + j * lanes), b = load_once(w1 + j * lanes);
      to[j] = dot2(to[j], low_words(a, b), values);
      to[j + 1] = dot2(to[j + 1], high_words(a, b), values);
    }
  };
  if (s.value == nullptr) {
    const Int ones = Int{} + 0x00010001;
    for (std::int64_t k = 0; k < s.count; k += 4) {
      add(k, ones, acc);
      add(k + 2, ones, dot2_chains == 2 ? more : acc);
    }
  } else {
    for (std::int64_t k = 0; k < s.count; k += 4) {
      add(k, Int{} + load<std::int32_t>(s.value + k), acc);
      add(k + 2, Int{} + load<std::int32_t>(s.value + k + 2), dot2_chains == 2 ? more : acc);
    }
  }
  QCFS_UNROLL
  for (int j = 0; j < vectors; ++j) acc[j] += more[j];
}

template <int vectors>
inline void add_rows(const std::int8_t*, const char* rows, const MergedList& s, int most, Int (&acc)[vectors]) {
  const auto row = [&](std::int64_t k) { return reinterpret_cast<const std::int8_t*>(rows + s.position[k]); };
  constexpr int groups = vectors / 4;    // registers of one row
  using Sums = Int[2 * groups];
  const auto widen = [&](const Sums& words) {
    QCFS_UNROLL
    for (int j = 0; j < 2 * groups; ++j) {
      acc[2 * j] += first_words(words[j]);
      acc[2 * j + 1] += last_words(words[j]);
    }
  };
  if (most > 64) {
    // One product fits a word, four may not.
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Int values = Int{} + static_cast<std::int32_t>(s.value[k] * 0x00010001u);
      Sums words;
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
  const std::int64_t stretch = 256 / larger(1, most) / 4 * 4;    // rows whose sums words hold
  for (std::int64_t k = 0; k < s.count;) {
    const std::int64_t end = smaller(s.count, k + stretch);
    Sums words, more;
    QCFS_UNROLL
    for (int j = 0; j < 2 * groups; ++j) words[j] = more[j] = Int{};
    const auto add = [&](std::int64_t at, Int values, Sums& to) {
      QCFS_UNROLL
      for (int j = 0; j < groups; ++j) {
        const Int a = load_once(row(at) + 4 * j * lanes), b = load_once(row(at + 1) + 4 * j * lanes);
        to[2 * j] = add_words(to[2 * j], dot_bytes(values, low_bytes(a, b)));
        to[2 * j + 1] = add_words(to[2 * j + 1], dot_bytes(values, high_bytes(a, b)));
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
    for (int j = 0; j < 2 * groups; ++j) words[j] = add_words(words[j], more[j]);
    widen(words);
  }
}

#else

template <typename Weight>
constexpr int panel_place(int channel) {
  return channel;
}

template <typename Weight, int vectors>
inline void add_rows(const Weight*, const char* rows, const MergedList& s, int, Int (&acc)[vectors]) {
  const auto row = [&](std::int64_t k) { return reinterpret_cast<const Weight*>(rows + s.position[k]); };
  if (s.value == nullptr) {
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Weight* w = row(k);
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen(w + j * lanes);
    }
  } else {
    for (std::int64_t k = 0; k < s.count; ++k) {
      const Weight* w = row(k);
      const std::int32_t value = s.value[k];
      QCFS_UNROLL
      for (int j = 0; j < vectors; ++j) acc[j] += widen(w + j * lanes) * value;
    }
  }
}

#endif
