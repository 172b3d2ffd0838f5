// Event lists, step 1 of fire.h.

#if !defined(QCFS_OWN_LISTING)
using Places = std::uint16_t __attribute__((vector_size(16)));

struct PlaceTable {
  std::uint16_t place[256][8];
};

constexpr PlaceTable make_place_table() {
  PlaceTable t{};
  for (int mask = 0; mask < 256; ++mask) {
    int n = 0;
    for (int b = 0; b < 8; ++b) {
      if (mask >> b & 1) t.place[mask][n++] = static_cast<std::uint16_t>(row_bytes * b);
    }
  }
  return t;
}

constexpr PlaceTable place_table = make_place_table();

#if !defined(QCFS_FIRED)
constexpr int fired_bytes = 8;

// Bit k says whether x[k] & wanted is not zero; a multiplication gathers the lowest bits of eight bytes.
inline std::uint32_t fired(const std::uint8_t* x, std::uint8_t wanted) {
  const std::uint64_t word = load<std::uint64_t>(x) & 0x0101010101010101ull * wanted;
  const std::uint64_t low7 = 0x7f7f7f7f7f7f7f7full;
  const std::uint64_t set = (((word & low7) + low7) | word) >> 7 & 0x0101010101010101ull;
  return static_cast<std::uint32_t>(set * 0x0102040810204080ull >> 56);
}
#endif

// Writes first + 64 * k for every k of [0, n) with x[k] & wanted, and those bytes where `value` is not null; returns
// the end. Writes up to 8 entries past it. A table turns eight bits into places, without a branch on the spikes.
inline std::uint16_t* list_bytes(const std::uint8_t* x, std::int64_t n, std::uint8_t wanted, std::uint16_t first,
                                 std::uint16_t* out, std::uint16_t* value) {
  std::uint8_t rest[fired_bytes] = {};
  for (std::int64_t k = 0; k < n; k += fired_bytes) {
    const std::uint8_t* bytes = x + k;
    if (n - k < fired_bytes) {
      __builtin_memcpy(rest, bytes, static_cast<std::size_t>(n - k));
      bytes = rest;
    }
    std::uint32_t set = fired(bytes, wanted);
    for (int part = 0; part < fired_bytes; part += 8, set >>= 8) {
      const std::uint16_t* place = place_table.place[set & 0xff];
      store(out, load<Places>(place) + static_cast<std::uint16_t>(first + row_bytes * (k + part)));
      const int found = __builtin_popcount(set & 0xff);
      if (value != nullptr) {
        for (int j = 0; j < found; ++j) value[j] = bytes[part + place[j] / row_bytes];
        value += found;
      }
      out += found;
    }
  }
  return out;
}
#endif

// Whether any tap of any output reads this input coordinate (strided 1x1 shortcuts skip most).
inline bool is_read(std::int64_t i, std::int64_t pad, std::int64_t stride, std::int64_t dilation, std::int64_t kernel) {
  for (std::int64_t k = 0; k < kernel; ++k) {
    if ((i + pad - k * dilation) % stride == 0) return true;
  }
  return false;
}

// Fills a list of n entries up to a multiple of four with the position of the chunk's row of zeros; returns its length.
inline std::int64_t fill_up(const EventCut& cut, std::int64_t n, std::uint16_t* position, std::uint16_t* value) {
  for (std::int64_t k = n; k < n + 4; ++k) position[k] = static_cast<std::uint16_t>(row_bytes * (cut.rows - 1));
  for (std::int64_t k = n; value != nullptr && k < n + 4; ++k) value[k] = 0;
  return (n + 3) / 4 * 4;
}

// Lists input row lists.in.row0 + row of one sample of the wave.
void list_events(const ConvIf& a, int product, const Wave& wave, const EventLists& lists, std::int64_t sample,
                 std::int64_t row) {
  const Product& p = a.products[product];
  const std::int64_t width = p.x.width, channels = p.x.channels, steps = a.steps;
  const std::int64_t blocks = lists.cut.blocks, block = lists.cut.block_channels;
  const std::int64_t region = (sample - wave.sample0) * lists.in.rows + row;
  std::uint32_t* start = lists.start + region * steps * (width * blocks + 1);
  std::uint16_t* const position = lists.position + region * lists.capacity;
  std::uint16_t* const value = lists.value == nullptr ? nullptr : lists.value + region * lists.capacity;
  const std::int64_t r = lists.in.row0 + row;
  if (!is_read(r, p.g.pad_h, p.g.stride_h, p.g.dilation_h, p.g.kernel_h)) {
    for (std::int64_t i = 0; i < steps * (width * blocks + 1); ++i) start[i] = 0;
    return;
  }
  const bool mask = p.x.coding == Coding::mask;
  const bool all_columns = p.g.stride_w == 1;
  const std::int64_t plane = a.batch * p.x.height * width * channels;
  const std::uint8_t* x = p.x.data + (sample * p.x.height + r) * width * channels;
  std::uint16_t* out = position;
  for (std::int64_t t = 0; t < steps; ++t) {
    const std::uint8_t* bytes = x + (mask ? t / 8 : t) * plane;
    const std::uint8_t wanted = mask ? static_cast<std::uint8_t>(1u << (t % 8)) : std::uint8_t{0xff};
    for (std::int64_t c = 0; c < width; ++c) {
      const bool read = all_columns || is_read(c, p.g.pad_w, p.g.stride_w, p.g.dilation_w, p.g.kernel_w);
      for (std::int64_t b = 0; b < blocks; ++b) {
        *start++ = static_cast<std::uint32_t>(out - position);
        if (!read) continue;
        std::uint16_t* const begin = out;
        std::uint16_t* const values = value == nullptr ? nullptr : value + (out - position);
        const std::uint16_t first = static_cast<std::uint16_t>(lists.positions_span_columns ? row_bytes * c * block : 0);
        out = list_bytes(bytes + c * channels + b * block, smaller(block, channels - b * block), wanted, first, out,
                         values);
        if (lists.used_in_place) out = begin + fill_up(lists.cut, out - begin, begin, values);
      }
    }
    *start++ = static_cast<std::uint32_t>(out - position);
  }
}
