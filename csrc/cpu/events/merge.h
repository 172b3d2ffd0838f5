// Merging event lists, step 2 of fire.h.

// Cells of a chunk that follow each other in the list of one input row: one cell, or a run of columns.
struct ListSpan {
  const std::uint32_t* start;    // of step 0 and column 0
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t column, columns;    // first column under output column 0, and how many
  std::int64_t place;              // of its first cell in the chunk, in cells
};

// The same under one output pixel, without padding.
struct ClippedSpan {
  const std::uint32_t* start;    // of step 0
  const std::uint16_t* position;
  const std::uint16_t* value;
  std::int64_t columns;
  std::uint16_t shift;    // what turns a listed position into that of the chunk
};

// Finds the stretches of a chunk under one output row; returns how many there are.
inline int spans_under_row(const EventLayer& layer, int product, std::int64_t chunk, std::int64_t sample, std::int64_t row,
                        ListSpan* out) {
  const Product& p = layer.a->products[product];
  const EventLists& lists = layer.lists[product];
  const EventCut& cut = lists.cut;
  const Geometry& g = p.g;
  const std::int64_t begin = chunk * cut.k_blocks, end = smaller(begin + cut.k_blocks, g.kernel_h * g.kernel_w * cut.blocks);
  int count = 0;
  for (std::int64_t cell = begin, next; cell < end; cell = next) {
    const std::int64_t tap = cell / cut.blocks, kh = tap / g.kernel_w;
    next = lists.positions_span_columns ? smaller(end, (kh + 1) * g.kernel_w) : cell + 1;
    const std::int64_t r = row * g.stride_h - g.pad_h + kh * g.dilation_h;
    if (r < 0 || r >= p.x.height) continue;
    const std::int64_t region = (sample - layer.wave.sample0) * lists.in.rows + (r - lists.in.row0);
    ListSpan& s = out[count++];
    s.start = lists.start + region * layer.a->steps * (p.x.width * cut.blocks + 1) + cell % cut.blocks;
    s.position = lists.position + region * lists.capacity;
    s.value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
    s.column = tap % g.kernel_w * g.dilation_w - g.pad_w;
    s.columns = lists.positions_span_columns ? next - cell : 1;
    s.place = cell - begin;
  }
  return count;
}

// Finds the pieces under one output column; returns how many there are.
inline int spans_under_pixel(const EventLists& lists, const Product& p, const ListSpan* stretches, int count, std::int64_t col,
                     ClippedSpan* out) {
  int found = 0;
  for (int i = 0; i < count; ++i) {
    const ListSpan& s = stretches[i];
    std::int64_t column = col * p.g.stride_w + s.column, columns = s.columns, place = s.place;
    if (column < 0) {
      columns += column;
      place -= column;
      column = 0;
    }
    columns = smaller(columns, p.x.width - column);
    if (columns <= 0) continue;
    if (lists.positions_span_columns) place -= column;
    const std::uint16_t shift = static_cast<std::uint16_t>(row_bytes * lists.cut.block_channels * place);
    out[found++] = {s.start + column * lists.cut.blocks, s.position, s.value, columns, shift};
  }
  return found;
}

using Positions = std::uint16_t __attribute__((vector_size(4 * lanes)));

// Copies n entries, each plus `shift`; reads and writes up to two vectors beyond them.
inline void append(std::uint16_t* to, const std::uint16_t* from, std::int64_t n, std::uint16_t shift) {
  constexpr std::int64_t some = 2 * lanes;
  std::int64_t k = 0;
  do {
    store(to + k, load<Positions>(from + k) + shift);
    store(to + k + some, load<Positions>(from + k + some) + shift);
    k += 2 * some;
  } while (k < n);
}

inline std::int64_t max_k_blocks(const EventLayer& layer) {
  std::int64_t cells = 1;
  for (int i = 0; i < layer.a->product_count; ++i) cells = larger(cells, layer.lists[i].cut.k_blocks);
  return cells;
}

std::size_t merge_events_workspace(const EventLayer& layer) {
  return static_cast<std::size_t>(max_k_blocks(layer)) * (sizeof(ListSpan) + sizeof(ClippedSpan));
}

// Brings together what the pixels of one row of a tile read.
void merge_events(const EventLayer& layer, const EventTile& tile, std::int64_t row, const MergedRow& out,
                  void* workspace) {
  const ConvIf& a = *layer.a;
  const std::int64_t steps = a.steps;
  MergedList* run = out.lists;
  std::uint16_t* to = out.position;
  ListSpan* const stretches = static_cast<ListSpan*>(workspace);
  ClippedSpan* const pieces = reinterpret_cast<ClippedSpan*>(stretches + max_k_blocks(layer));
  for (int i = 0; i < a.product_count; ++i) {
    const EventLists& lists = layer.lists[i];
    for (std::int64_t chunk = 0; chunk < lists.cut.chunks; ++chunk) {
      const int under = spans_under_row(layer, i, chunk, tile.sample, row, stretches);
      for (std::int64_t col = tile.col0; col < tile.col1; ++col) {
        const int count = spans_under_pixel(lists, a.products[i], stretches, under, col, pieces);
        for (std::int64_t t = 0; t < steps; ++t, ++run) {
          const std::int64_t step = t * (a.products[i].x.width * lists.cut.blocks + 1);
          if (lists.used_in_place) {
            *run = {};
            if (count == 0) continue;
            const std::uint32_t begin = pieces->start[step];
            run->position = pieces->position + begin;
            run->value = pieces->value == nullptr ? nullptr : pieces->value + begin;
            run->count = pieces->start[step + 1] - begin;
            continue;
          }
          std::uint16_t* value = lists.value == nullptr ? nullptr : out.value + (to - out.position);
          std::int64_t total = 0;
          for (int j = 0; j < count; ++j) {
            const std::uint32_t* start = pieces[j].start + step;
            const std::int64_t n = start[pieces[j].columns] - start[0];
            append(to + total, pieces[j].position + start[0], n, pieces[j].shift);
            if (value != nullptr) append(value + total, pieces[j].value + start[0], n, 0);
            total += n;
          }
          total = fill_up(lists.cut, total, to, value);
          *run = {to, value, total};
          to += total;
        }
      }
    }
  }
}
