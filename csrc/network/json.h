// JSON (RFC 8259) as a tree. The text may be hostile: nesting is bounded, and what a reader could take in two ways
// (a name twice in an object, a lone surrogate, bytes that are no UTF-8) is refused.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qcfs::network {

struct Json {
  // A number is an integer if it is written as one; nothing here needs the value of any other. One beyond 64 bits is
  // the least of them, which no field takes.
  enum class Kind { null, boolean, integer, real, string, array, object };
  struct Member;

  Kind kind = Kind::null;
  bool boolean = false;
  std::int64_t integer = 0;
  std::string string;
  std::vector<Json> items;
  std::vector<Member> members;    // sorted by name

  // Raises Error (format) with the offset of what is wrong. `pythons`: NaN and Infinity are numbers, as Python writes
  // them, though JSON has none.
  static Json parse(std::string_view text, bool pythons = false);

  bool is(Kind k) const { return kind == k; }
  // The value of a name in an object; null where there is none, or where this is no object.
  const Json* find(std::string_view name) const;
};

struct Json::Member {
  std::string name;
  Json value;
};

}    // namespace qcfs::network
