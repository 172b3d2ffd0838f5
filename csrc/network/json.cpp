// A parser by recursive descent, one function for each kind of value.
#include "network/json.h"

#include <algorithm>
#include <cstring>

#include "network/error.h"

namespace qcfs::network {
namespace {

constexpr int max_depth = 64;

class Parser {
 public:
  Parser(std::string_view text, bool pythons) : text_(text), pythons_(pythons) {}

  Json whole() {
    Json found = value(0);
    skip_space();
    check(at_ == text_.size(), "text after the end");
    return found;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw Error(Fault::format, "JSON: " + std::string(what) + " at byte " + std::to_string(at_));
  }
  void check(bool condition, const char* what) const {
    if (!condition) fail(what);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  char next() {
    check(at_ < text_.size(), "the text ends too early");
    return text_[at_++];
  }
  bool skip(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\n\r", text_[at_]) != nullptr && text_[at_] != '\0') ++at_;
  }
  bool word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) return false;
    at_ += expected.size();
    return true;
  }

  Json value(int depth) {
    check(depth < max_depth, "values nested deeper than 64 (make the metadata flatter, and save again)");
    skip_space();
    Json found;
    switch (peek()) {
      case '{':
        object(found, depth);
        return found;
      case '[':
        array(found, depth);
        return found;
      case '"':
        found.kind = Json::Kind::string;
        found.string = string();
        return found;
      default:
        break;
    }
    if (word("null")) return found;
    if (word("true") || word("false")) {
      found.kind = Json::Kind::boolean;
      found.boolean = text_[at_ - 2] == 'u';    // trUe, falSe
      return found;
    }
    number(found);
    return found;
  }

  void object(Json& found, int depth) {
    found.kind = Json::Kind::object;
    next();
    skip_space();
    if (skip('}')) return;
    do {
      skip_space();
      check(peek() == '"', "a name is missing");
      std::string name = string();
      skip_space();
      check(skip(':'), "a colon is missing");
      found.members.push_back({std::move(name), value(depth + 1)});
      skip_space();
    } while (skip(','));
    check(skip('}'), "an object does not end");
    std::sort(found.members.begin(), found.members.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    const auto twice = std::adjacent_find(found.members.begin(), found.members.end(),
                                          [](const auto& a, const auto& b) { return a.name == b.name; });
    check(twice == found.members.end(), "a name stands twice in the object that ends");
  }

  void array(Json& found, int depth) {
    found.kind = Json::Kind::array;
    next();
    skip_space();
    if (skip(']')) return;
    do {
      found.items.push_back(value(depth + 1));
      skip_space();
    } while (skip(','));
    check(skip(']'), "an array does not end");
  }

  static bool digit(char c) { return c >= '0' && c <= '9'; }
  std::size_t digits() {
    const std::size_t first = at_;
    while (digit(peek())) ++at_;
    check(at_ > first, "a digit is missing");
    return at_ - first;
  }

  void number(Json& found) {
    const bool negative = skip('-');
    if (pythons_ && ((!negative && word("NaN")) || word("Infinity"))) {
      found.kind = Json::Kind::real;
      return;
    }
    const std::size_t first = at_;
    check(digit(peek()), "a value is missing");
    const std::size_t count = digits();
    check(count == 1 || text_[first] != '0', "a number begins with 0");
    bool whole = true;
    if (skip('.')) {
      whole = false;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (!skip('+')) skip('-');
      digits();
    }
    found.kind = whole ? Json::Kind::integer : Json::Kind::real;
    if (!whole) return;
    std::int64_t magnitude = 0;
    bool held = true;
    for (std::size_t i = first; held && i < at_; ++i) {
      held = !__builtin_mul_overflow(magnitude, 10, &magnitude) &&
             !__builtin_add_overflow(magnitude, text_[i] - '0', &magnitude);
    }
    found.integer = !held ? INT64_MIN : negative ? -magnitude : magnitude;
  }

  std::uint32_t four_hex_digits() {
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next();
      const char lower = static_cast<char>(c | 0x20);
      const bool letter = lower >= 'a' && lower <= 'f';
      check(digit(c) || letter, "\\u needs four hexadecimal digits");
      code = code * 16 + static_cast<std::uint32_t>(letter ? lower - 'a' + 10 : c - '0');
    }
    return code;
  }

  std::uint32_t escaped_code() {
    const std::uint32_t code = four_hex_digits();
    if (code < 0xd800 || code > 0xdfff) return code;
    constexpr const char* half = "half of a surrogate pair, which is no text (rename what holds it, and save again)";
    check(code < 0xdc00 && word("\\u"), half);
    const std::uint32_t low = four_hex_digits();
    check(low >= 0xdc00 && low <= 0xdfff, half);
    return 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }

  static void append_utf8(std::string& to, std::uint32_t code) {
    if (code < 0x80) {
      to += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    constexpr std::uint32_t lead[] = {0, 0xc0, 0xe0, 0xf0};
    to += static_cast<char>(lead[more] | (code >> (6 * more)));
    for (int i = more - 1; i >= 0; --i) to += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3f));
  }

  // One character that is not ASCII: decoded, and encoded again. Bytes that differ from that are no UTF-8.
  void utf8(std::string& to, unsigned char lead) {
    const int more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    std::uint32_t code = lead & (0x3fu >> more);
    std::string bytes(1, static_cast<char>(lead)), again;
    for (int i = 0; i < more; ++i) {
      bytes += next();
      code = code << 6 | (static_cast<unsigned char>(bytes.back()) & 0x3f);
    }
    append_utf8(again, code);
    check(again == bytes && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff), "bytes that are no UTF-8");
    to += bytes;
  }

  std::string string() {
    next();
    std::string found;
    for (;;) {
      const char c = next();
      if (c == '"') return found;
      check(static_cast<unsigned char>(c) >= 0x20, "a control character in a string");
      if (static_cast<unsigned char>(c) >= 0x80) {
        utf8(found, static_cast<unsigned char>(c));
      } else if (c != '\\') {
        found += c;
      } else if (skip('u')) {
        append_utf8(found, escaped_code());
      } else {
        constexpr std::string_view names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
        const std::size_t i = names.find(next());
        check(i != std::string_view::npos, "an unknown escape");
        found += meant[i];
      }
    }
  }

  std::string_view text_;
  bool pythons_;
  std::size_t at_ = 0;
};

}    // namespace

Json Json::parse(std::string_view text, bool pythons) { return Parser(text, pythons).whole(); }

const Json* Json::find(std::string_view name) const {
  const auto found = std::lower_bound(members.begin(), members.end(), name,
                                      [](const Member& m, std::string_view wanted) { return m.name < wanted; });
  return found != members.end() && found->name == name ? &found->value : nullptr;
}

}    // namespace qcfs::network
