// Reads the container: eight bytes with the length of a JSON text, the text, and the bytes of all tensors, which must
// lie one behind the other and fill the file. Every tensor is copied, because a file promises no alignment. The
// checksum that most files have is compared, since a bit that flipped in a weight shows nowhere else.
#include "network/tensors.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string_view>

#include "network/error.h"
#include "network/json.h"

namespace qcfs::network {
namespace {

constexpr std::uint64_t max_header_bytes = 100'000'000;    // as safetensors
constexpr const char* header_key = "qcfs_fast";

struct Named {
  const char* name;
  Dtype dtype;
  std::size_t bytes;
};

constexpr Named dtypes[] = {{"I8", Dtype::i8, 1},   {"I16", Dtype::i16, 2}, {"I32", Dtype::i32, 4},
                            {"I64", Dtype::i64, 8}, {"F32", Dtype::f32, 4}, {"F64", Dtype::f64, 8}};

void check(bool condition, const std::string& what) {
  require(condition, Fault::format, "not a complete safetensors file (" + what + "); copy it again from its source");
}

// CRC-32 as zlib and PNG have it: polynomial 0x04c11db7, bits reversed.
class Checksum {
 public:
  Checksum() {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      table_[byte] = byte;
      for (int bit = 0; bit < 8; ++bit) table_[byte] = table_[byte] >> 1 ^ (table_[byte] & 1 ? 0xedb88320u : 0);
    }
  }

  void add(const void* bytes, std::size_t count) {
    const unsigned char* from = static_cast<const unsigned char*>(bytes);
    for (std::size_t i = 0; i < count; ++i) crc_ = crc_ >> 8 ^ table_[(crc_ ^ from[i]) & 0xff];
  }

  std::string text() const {
    char digits[9];
    std::snprintf(digits, sizeof(digits), "%08x", static_cast<unsigned>(~crc_));
    return digits;
  }

 private:
  std::uint32_t table_[256];
  std::uint32_t crc_ = 0xffffffffu;
};

// A header can end with a checksum of what stands before it and of all tensors; those of version 0.1.0 do not.
void check_seal(const File& file) {
  static constexpr std::string_view begin = ", \"crc32\": \"", end = "\"}";
  constexpr std::size_t digits = 8, length = begin.size() + digits + end.size();
  if (file.header.size() < length) return;
  const std::string_view seal = std::string_view(file.header).substr(file.header.size() - length);
  const std::string_view said = seal.substr(begin.size(), digits);
  if (seal.substr(0, begin.size()) != begin || seal.substr(length - end.size()) != end ||
      said.find_first_not_of("0123456789abcdef") != std::string_view::npos) {
    return;
  }
  Checksum sum;
  sum.add(file.header.data(), file.header.size() - length);
  for (const auto& [name, tensor] : file.tensors) {
    sum.add(name.data(), name.size());
    sum.add(tensor.data, static_cast<std::size_t>(tensor.count()) * size_of(tensor.dtype));
  }
  require(sum.text() == said, Fault::format,
          "its checksum does not fit its contents; the file was damaged, copy it again from its source");
}

// Where a tensor's bytes lie, and what they are.
struct Place {
  std::string name;
  Tensor tensor;
  std::uint64_t begin, end;
};

std::uint64_t natural(const Json& number, const std::string& name) {
  check(number.is(Json::Kind::integer) && number.integer >= 0, "a size of tensor " + name);
  return static_cast<std::uint64_t>(number.integer);
}

Place place_of(const std::string& name, const Json& entry) {
  const Json *dtype = entry.find("dtype"), *shape = entry.find("shape"), *offsets = entry.find("data_offsets");
  check(dtype != nullptr && shape != nullptr && offsets != nullptr && shape->is(Json::Kind::array) &&
            offsets->is(Json::Kind::array) && offsets->items.size() == 2,
        "the entry of tensor " + name);
  const auto known =
      std::find_if(std::begin(dtypes), std::end(dtypes), [&](const Named& d) { return dtype->string == d.name; });
  require(known != std::end(dtypes), Fault::format, name + " has dtype " + dtype->string);
  Place found{name, {known->dtype, {}, nullptr}, natural(offsets->items[0], name), natural(offsets->items[1], name)};
  std::uint64_t bytes = known->bytes;
  for (const Json& size : shape->items) {
    const std::uint64_t n = natural(size, name);
    check(!__builtin_mul_overflow(bytes, n, &bytes), "the shape of tensor " + name);
    found.tensor.shape.push_back(static_cast<std::int64_t>(n));
  }
  check(found.begin <= found.end && found.end - found.begin == bytes, "the offsets of tensor " + name);
  return found;
}

}    // namespace

std::size_t size_of(Dtype dtype) {
  return std::find_if(std::begin(dtypes), std::end(dtypes), [&](const Named& d) { return d.dtype == dtype; })->bytes;
}

std::int64_t Tensor::count() const {
  std::int64_t n = 1;
  for (const std::int64_t size : shape) n *= size;
  return n;
}

File read_file(const void* bytes, std::size_t size) {
  const char* text = static_cast<const char*>(bytes);
  check(size >= 8, "it has " + std::to_string(size) + " bytes");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(text[i]);
  check(length <= max_header_bytes && length <= size - 8, "a header of " + std::to_string(length) + " bytes");
  const Json header = Json::parse({text + 8, static_cast<std::size_t>(length)});
  check(header.is(Json::Kind::object) && text[8] == '{', "the header is no object");

  File file;
  std::vector<Place> places;
  bool ours = false;
  for (const auto& [name, value] : header.members) {
    if (name != "__metadata__") {
      places.push_back(place_of(name, value));
      continue;
    }
    check(value.is(Json::Kind::object), "the metadata");
    for (const auto& [key, entry] : value.members) {
      check(entry.is(Json::Kind::string), "the metadata");
      if (key == header_key) file.header = entry.string;
      ours |= key == header_key;
    }
  }
  require(ours, Fault::format, "a safetensors file, but not a network saved by qcfs_fast");
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  const char* data = text + 8 + length;
  std::uint64_t filled = 0;
  for (Place& p : places) {
    check(p.begin == filled, "the offsets of tensor " + p.name);
    filled = p.end;
    check(filled <= size - 8 - length, "it ends before tensor " + p.name + " does");
    const std::size_t count = static_cast<std::size_t>(p.end - p.begin);
    file.memory.push_back(std::make_unique<std::uint64_t[]>(count / 8 + 1));
    if (count > 0) std::memcpy(file.memory.back().get(), data + p.begin, count);
    p.tensor.data = file.memory.back().get();
    file.tensors.emplace(p.name, std::move(p.tensor));
  }
  check(filled == size - 8 - length, "bytes that belong to no tensor");
  check_seal(file);
  return file;
}

}    // namespace qcfs::network
