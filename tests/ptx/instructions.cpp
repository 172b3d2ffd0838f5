// What each PTX instruction does, by the PTX ISA. Integers are computed in 64 bits and cut to their type. An opcode is
// split into its family and its last part, the type: "add.s32" is "add" of s32. What is not listed is refused.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "cuda/emulation/emulation.h"
#include "machine.h"

namespace ptx {

namespace {

namespace emulation = qcfs::cuda::emulation;

struct Type {
  char kind;    // s, u, b: bits; f: float; p: predicate
  int bytes;
};

std::optional<Type> type_of(const std::string& name) {
  if (name == "pred") return Type{'p', 1};
  if (name.size() < 2 || std::strchr("subf", name[0]) == nullptr) return std::nullopt;
  for (const int bytes : {1, 2, 4, 8}) {
    if (name.substr(1) == std::to_string(8 * bytes)) return Type{name[0], bytes};
  }
  return std::nullopt;
}

// The low bits that the type has, sign- or zero-extended.
std::uint64_t cut(std::uint64_t value, Type type) {
  const int unused = 64 - 8 * type.bytes;
  if (type.kind != 's') return value << unused >> unused;
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(value << unused) >> unused);
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ------------------------------------------------------------------------------------------------------- arithmetic

// registers[0] = f(registers[1], ..) lane by lane, on values as they lie in registers.
template <typename F>
Meaning raw(F f) {
  return [f](Warp& w, const Instruction& i, Lanes lanes) {
    const std::uint64_t* s[4] = {};
    for (std::size_t k = 1; k < i.registers.size() && k < 5; ++k) s[k - 1] = w.values(i.registers[k]);
    std::uint64_t* d = w.values(i.registers[0]);
    for_each_lane(lanes, [&](int lane) {
      if constexpr (std::is_invocable_v<F, std::uint64_t>) {
        d[lane] = f(s[0][lane]);
      } else if constexpr (std::is_invocable_v<F, std::uint64_t, std::uint64_t>) {
        d[lane] = f(s[0][lane], s[1][lane]);
      } else if constexpr (std::is_invocable_v<F, std::uint64_t, std::uint64_t, std::uint64_t>) {
        d[lane] = f(s[0][lane], s[1][lane], s[2][lane]);
      } else {
        d[lane] = f(s[0][lane], s[1][lane], s[2][lane], s[3][lane]);
      }
    });
  };
}

// Integers of one type, where signed and unsigned ones differ: f takes two std::int64_t or two std::uint64_t.
template <typename F>
Meaning integer(Type t, F f) {
  if (t.kind == 's') {
    return raw([=](std::uint64_t a, std::uint64_t b) {
      return cut(
          static_cast<std::uint64_t>(f(static_cast<std::int64_t>(cut(a, t)), static_cast<std::int64_t>(cut(b, t)))), t);
    });
  }
  return raw(
      [=](std::uint64_t a, std::uint64_t b) { return cut(static_cast<std::uint64_t>(f(cut(a, t), cut(b, t))), t); });
}

// Floats of either width, rounded to nearest. Compiled with -ffp-contract=off.
template <typename F>
Meaning floating(Type t, F f) {
  if (t.bytes == 8) {
    return raw([f](std::uint64_t a, std::uint64_t b) {
      return bits_as<std::uint64_t>(f(bits_as<double>(a), bits_as<double>(b)));
    });
  }
  return raw([f](std::uint64_t a, std::uint64_t b) -> std::uint64_t {
    return bits_as<std::uint32_t>(
        f(bits_as<float>(static_cast<std::uint32_t>(a)), bits_as<float>(static_cast<std::uint32_t>(b))));
  });
}

template <typename F>
Meaning compare_with(Type t, F f) {
  if (t.kind != 'f') {
    const auto order = [f](auto a, auto b) { return f(a, b); };
    if (t.kind == 's') {
      return raw([=](std::uint64_t a, std::uint64_t b) -> std::uint64_t {
        return order(static_cast<std::int64_t>(cut(a, t)), static_cast<std::int64_t>(cut(b, t)));
      });
    }
    return raw([=](std::uint64_t a, std::uint64_t b) -> std::uint64_t { return order(cut(a, t), cut(b, t)); });
  }
  const auto value = [t](std::uint64_t x) {
    return t.bytes == 8 ? bits_as<double>(x) : bits_as<float>(static_cast<std::uint32_t>(x));
  };
  return raw([=](std::uint64_t a, std::uint64_t b) -> std::uint64_t { return f(value(a), value(b)); });
}

std::optional<Meaning> comparison(const std::string& order, Type t) {
  if (order == "eq") return compare_with(t, [](auto a, auto b) { return a == b; });
  if (order == "ne") return compare_with(t, [](auto a, auto b) { return a < b || a > b; });
  if (order == "lt") return compare_with(t, [](auto a, auto b) { return a < b; });
  if (order == "le") return compare_with(t, [](auto a, auto b) { return a <= b; });
  if (order == "gt") return compare_with(t, [](auto a, auto b) { return a > b; });
  if (order == "ge") return compare_with(t, [](auto a, auto b) { return a >= b; });
  // True also where one is a NaN.
  if (order == "neu") return compare_with(t, [](auto a, auto b) { return !(a == b); });
  if (order == "ltu") return compare_with(t, [](auto a, auto b) { return !(a >= b); });
  if (order == "gtu") return compare_with(t, [](auto a, auto b) { return !(a <= b); });
  return std::nullopt;
}

// cvt[.rounding].to.from: between integers; rni: to the nearest integer, ties to even; rzi: towards zero.
std::optional<Meaning> conversion(const std::string& rounding, Type to, Type from) {
  if (to.kind != 'f' && from.kind != 'f') {
    return raw([=](std::uint64_t a) { return cut(cut(a, from), to); });
  }
  const auto value = [from](std::uint64_t a) -> double {
    if (from.kind == 'f') return from.bytes == 8 ? bits_as<double>(a) : bits_as<float>(static_cast<std::uint32_t>(a));
    const std::uint64_t x = cut(a, from);
    return from.kind == 's' ? static_cast<double>(static_cast<std::int64_t>(x)) : static_cast<double>(x);
  };
  if (to.kind != 'f') {    // saturating; a NaN gives 0
    if ((rounding != "rzi" && rounding != "rni") || to.kind != 's') return std::nullopt;
    const double limit = std::ldexp(1.0, 8 * to.bytes - 1);
    return raw([=](std::uint64_t a) -> std::uint64_t {
      const double x = rounding == "rni" ? std::nearbyint(value(a)) : value(a);
      if (std::isnan(x)) return 0;
      if (x >= limit) return (std::uint64_t{1} << (8 * to.bytes - 1)) - 1;
      return static_cast<std::uint64_t>(static_cast<std::int64_t>(std::max(x, -limit)));
    });
  }
  // Twice rounded where a 64-bit integer becomes a float: refused.
  if (to.bytes == 4 && from.kind != 'f' && from.bytes == 8) return std::nullopt;
  if (rounding != "" && rounding != "rn" && rounding != "rni") return std::nullopt;
  return raw([=](std::uint64_t a) -> std::uint64_t {
    const double x = rounding == "rni" ? std::nearbyint(value(a)) : value(a);
    return to.bytes == 8 ? bits_as<std::uint64_t>(x) : bits_as<std::uint32_t>(static_cast<float>(x));
  });
}

std::uint64_t insert_field(std::uint64_t field, std::uint64_t into, std::uint64_t position, std::uint64_t length) {
  const std::uint64_t ones = (std::uint64_t{1} << std::min<std::uint64_t>(length & 0xff, 32)) - 1;
  const std::uint64_t mask = (position & 0xff) < 32 ? ones << (position & 0xff) : 0;
  return ((into & ~mask) | ((position & 0xff) < 32 ? field << (position & 0xff) & mask : 0)) & 0xffffffff;
}

// prmt: each nibble of the selector names a byte of {b, a}, and by its high bit that byte's sign alone.
std::uint64_t permute(std::uint64_t a, std::uint64_t b, std::uint64_t selector) {
  const std::uint64_t bytes = (b & 0xffffffff) << 32 | (a & 0xffffffff);
  std::uint64_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint64_t choice = selector >> (4 * i) & 15;
    std::uint64_t byte = bytes >> (8 * (choice & 7)) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// mov between a register and a pair of half its width, {low, high}. "_" is a register that nobody reads.
Meaning pair(Type t) {
  const Type half{'b', t.bytes / 2};
  return [=](Warp& w, const Instruction& i, Lanes lanes) {
    const bool packs = i.text.find('{') > i.text.find(',');
    std::uint64_t *x = w.values(i.registers[0]), *y = w.values(i.registers[1]), *z = w.values(i.registers[2]);
    for_each_lane(lanes, [&](int lane) {
      if (packs) {
        x[lane] = cut(y[lane], half) | cut(z[lane], half) << (8 * half.bytes);
      } else {
        const std::uint64_t value = z[lane];
        x[lane] = cut(value, half);
        y[lane] = cut(value >> (8 * half.bytes), half);
      }
    });
  };
}

std::optional<Meaning> arithmetic(const std::string& family, Type t) {
  const bool is_float = t.kind == 'f';
  const auto wrap = [t](auto f) { return raw([=](std::uint64_t a, std::uint64_t b) { return cut(f(a, b), t); }); };
  if (is_float) {
    if (family == "add" || family == "add.rn") return floating(t, [](auto a, auto b) { return a + b; });
    if (family == "sub" || family == "sub.rn") return floating(t, [](auto a, auto b) { return a - b; });
    if (family == "mul" || family == "mul.rn") return floating(t, [](auto a, auto b) { return a * b; });
    if (family == "div.rn") return floating(t, [](auto a, auto b) { return a / b; });
  } else if (t.kind != 'p') {
    if (family == "add") return wrap([](auto a, auto b) { return a + b; });
    if (family == "sub") return wrap([](auto a, auto b) { return a - b; });
    if (family == "mul.lo") return wrap([](auto a, auto b) { return a * b; });
    if (family == "mad.lo") {
      return raw([=](std::uint64_t a, std::uint64_t b, std::uint64_t c) { return cut(a * b + c, t); });
    }
    if (family == "mul.wide" || family == "mad.wide") {
      const Type wide{t.kind, 2 * t.bytes};
      if (family == "mul.wide") {
        return raw([=](std::uint64_t a, std::uint64_t b) { return cut(cut(a, t) * cut(b, t), wide); });
      }
      return raw(
          [=](std::uint64_t a, std::uint64_t b, std::uint64_t c) { return cut(cut(a, t) * cut(b, t) + c, wide); });
    }
    if (family == "div") return integer(t, [](auto a, auto b) { return b == 0 ? ~decltype(a){0} : a / b; });
    if (family == "rem") return integer(t, [](auto a, auto b) { return b == 0 ? a : a % b; });
    if (family == "min") return integer(t, [](auto a, auto b) { return std::min(a, b); });
    if (family == "max") return integer(t, [](auto a, auto b) { return std::max(a, b); });
    if (family == "neg") return raw([=](std::uint64_t a) { return cut(0 - a, t); });
    if (family == "abs") {
      return raw([=](std::uint64_t a) { return cut(cut(a, t) >> 63 ? 0 - cut(a, t) : cut(a, t), t); });
    }
    if (family == "shl") return wrap([](auto a, auto n) { return (n & 0xffffffff) < 64 ? a << (n & 0xffffffff) : 0; });
    if (family == "shr") {
      return raw([=](std::uint64_t a, std::uint64_t n) {
        const int by = static_cast<int>(std::min<std::uint64_t>(n & 0xffffffff, 64)), bits = 8 * t.bytes;
        if (t.kind == 's') {
          return cut(static_cast<std::uint64_t>(static_cast<std::int64_t>(cut(a, t)) >> std::min(by, 63)), t);
        }
        return by >= bits ? 0 : cut(a, t) >> by;
      });
    }
    if (family == "bfi" && t.bytes == 4) return raw(insert_field);
    if (family == "prmt" && t.bytes == 4) return raw(permute);
  }
  if (family == "and") return wrap([](auto a, auto b) { return a & b; });
  if (family == "or") return wrap([](auto a, auto b) { return a | b; });
  if (family == "xor") return wrap([](auto a, auto b) { return a ^ b; });
  if (family == "not") return raw([=](std::uint64_t a) { return t.kind == 'p' ? a ^ 1 : cut(~a, t); });
  if (family == "mov" || family == "cvta.to.global" || family == "cvta.to.shared") {
    return raw([=](std::uint64_t a) { return cut(a, t); });
  }
  if (family == "selp") {
    return raw([=](std::uint64_t a, std::uint64_t b, std::uint64_t p) { return cut(p != 0 ? a : b, t); });
  }
  if (family.rfind("setp.", 0) == 0) return comparison(family.substr(5), t);
  if (family.rfind("cvt.", 0) == 0) {
    const std::size_t dot = family.rfind('.');
    const std::optional<Type> to = type_of(family.substr(dot + 1));
    if (to) return conversion(dot > 3 ? family.substr(4, dot - 4) : "", *to, t);
  }
  return std::nullopt;
}

// ----------------------------------------------------------------------------------------------------------- memory

std::uint64_t address(Warp& w, const Instruction& i, std::size_t which, int lane) {
  const Address& a = i.addresses[which];
  return w.values(a.base)[lane] + static_cast<std::uint64_t>(a.offset);
}

// ld and st of one, two or four values. Addresses of parameters are the host's, as those of global memory are.
std::optional<Meaning> access(const std::string& family, Type t) {
  Space space = Space::global;
  bool is_volatile = false, loads = false;
  std::size_t count = 1;
  std::string part;
  for (std::size_t at = 0; at < family.size(); at += part.size() + 1) {
    part = family.substr(at, family.find('.', at) - at);
    if (part == "ld")
      loads = true;
    else if (part == "shared" || part == "shared::cta")
      space = Space::own_shared;
    else if (part == "shared::cluster")
      space = Space::cluster_shared;
    else if (part == "volatile")
      is_volatile = true;
    else if (part == "v2" || part == "v4")
      count = static_cast<std::size_t>(part[1] - '0');
    else if (part != "st" && part != "param" && part != "global" && part != "nc")
      return std::nullopt;
  }
  return [=](Warp& w, const Instruction& i, Lanes lanes) {
    const auto bytes = static_cast<std::size_t>(t.bytes);
    for_each_lane(lanes, [&](int lane) {
      set_current_lane(lane);
      unsigned char value[32];
      if (loads) {
        const unsigned char* from =
            memory().read(w.thread(lane), space, address(w, i, 0, lane), count * bytes, is_volatile);
        for (std::size_t k = 0; k < count; ++k) {
          std::uint64_t x = 0;
          std::memcpy(&x, from + k * bytes, bytes);
          w.values(i.registers[k])[lane] = cut(x, t);
        }
        return;
      }
      for (std::size_t k = 0; k < count; ++k) std::memcpy(value + k * bytes, w.values(i.registers[k]) + lane, bytes);
      memory().write(w.thread(lane), space, address(w, i, 0, lane), value, count * bytes);
    });
  };
}

// Of atom, red and redux.
bool combines(const std::string& how) {
  for (const char* known : {"min", "max", "add", "and", "or", "xor"}) {
    if (how == known) return true;
  }
  return false;
}
std::uint64_t combine(const std::string& how, Type t, std::uint64_t a, std::uint64_t b) {
  if (how == "add") return cut(a + b, t);
  if (how == "and") return a & b;
  if (how == "or") return a | b;
  if (how == "xor") return a ^ b;
  const bool less = t.kind == 's' ? static_cast<std::int64_t>(a) < static_cast<std::int64_t>(b) : a < b;
  return less == (how == "min") ? a : b;
}

// atom returns what was there, red nothing.
std::optional<Meaning> atomic(const std::string& family, Type t) {
  const std::size_t dot = family.rfind('.');
  const std::string how = family.substr(dot + 1), where = family.substr(0, dot);
  const bool returns = where == "atom.global";
  if ((!returns && where != "red.global") || !combines(how) || t.kind == 'f') return std::nullopt;
  return [=](Warp& w, const Instruction& i, Lanes lanes) {
    const auto bytes = static_cast<std::size_t>(t.bytes);
    for_each_lane(lanes, [&](int lane) {
      set_current_lane(lane);
      unsigned char* at = memory().update(w.thread(lane), address(w, i, 0, lane), bytes);
      std::uint64_t before = 0;
      std::memcpy(&before, at, bytes);
      before = cut(before, t);
      const std::uint64_t after = combine(how, t, before, cut(w.values(i.registers.back())[lane], t));
      std::memcpy(at, &after, bytes);
      if (returns) w.values(i.registers[0])[lane] = before;
    });
  };
}

void copy(Warp& w, const Instruction& i, Lanes lanes) {
  for_each_lane(lanes, [&](int lane) {
    set_current_lane(lane);
    const std::uint64_t bytes = w.values(i.registers[0])[lane];
    const std::uint64_t source_bytes = i.registers.size() > 1 ? w.values(i.registers[1])[lane] & 0xffffffff : bytes;
    if (bytes != 16 && i.opcode == "cp.async.cg.shared.global") fail("cp.async.cg copies 16 bytes");
    memory().copy(w.thread(lane), address(w, i, 0, lane), address(w, i, 1, lane), bytes, source_bytes);
  });
}

// f(thread) for each lane.
template <typename F>
Meaning of_threads(F f) {
  return [f](Warp& w, const Instruction& i, Lanes lanes) {
    for_each_lane(lanes, [&](int lane) {
      set_current_lane(lane);
      f(w.thread(lane), i.registers.empty() ? 0 : w.values(i.registers[0])[lane]);
    });
  };
}

// -------------------------------------------------------------------------------------- what a warp does as a whole

// Four 8 x 8 matrices of 16 bits: lane 8 * m + r gives the address of row r of matrix m; lane l receives, of each
// matrix, elements 2 * (l % 4) and the next of row l / 4.
void load_matrices(Warp& w, const Instruction& i, Lanes) {
  for (int lane = 0; lane < warp_size; ++lane) {
    set_current_lane(lane);
    const unsigned char* row = memory().read(w.thread(lane), Space::own_shared, address(w, i, 0, lane), 16, false);
    for (int k = 0; k < 4; ++k) {
      std::uint32_t word;
      std::memcpy(&word, row + 4 * k, 4);
      w.values(i.registers[static_cast<std::size_t>(lane / 8)])[lane % 8 * 4 + k] = word;
    }
  }
}

// The lanes' fragments of a product, for the emulation's functions of the fragment tables.
struct Fragments {
  std::array<std::array<std::int32_t, 4>, warp_size> acc;
  std::array<std::array<std::uint32_t, 4>, warp_size> a;
  std::array<std::array<std::uint32_t, 2>, warp_size> b;

  void multiply_16x8x32(bool is_signed) {
    std::array<emulation::Fragments, warp_size> lanes;
    void* pointers[warp_size];
    for (std::size_t l = 0; l < warp_size; ++l) {
      lanes[l] = {acc[l].data(), a[l].data(), b[l][0], b[l][1]};
      pointers[l] = &lanes[l];
    }
    (is_signed ? emulation::multiply_16x8x32<true> : emulation::multiply_16x8x32<false>)(pointers);
  }
  void multiply_8x8x16(bool is_signed) {
    std::array<emulation::SmallFragments, warp_size> lanes;
    void* pointers[warp_size];
    for (std::size_t l = 0; l < warp_size; ++l) {
      lanes[l] = {&acc[l][0], &acc[l][1], a[l][0], b[l][0]};
      pointers[l] = &lanes[l];
    }
    (is_signed ? emulation::multiply_8x8x16<true> : emulation::multiply_8x8x16<false>)(pointers);
  }
};

// Registers `first`, .. of an instruction to or from each lane's array.
template <typename Arrays>
void gather(Warp& w, const Instruction& i, std::size_t first, std::size_t count, Arrays& to) {
  for (std::size_t k = 0; k < count; ++k) {
    const std::uint64_t* values = w.values(i.registers[first + k]);
    for (std::size_t l = 0; l < warp_size; ++l) {
      to[l][k] = static_cast<typename Arrays::value_type::value_type>(static_cast<std::uint32_t>(values[l]));
    }
  }
}
void scatter(Warp& w, const Instruction& i, std::size_t first, std::size_t count, const Fragments& from) {
  for (std::size_t k = 0; k < count; ++k) {
    std::uint64_t* values = w.values(i.registers[first + k]);
    for (std::size_t l = 0; l < warp_size; ++l) values[l] = static_cast<std::uint32_t>(from.acc[l][k]);
  }
}

// mma: registers d, a, b, c; d = a * b + c.
Meaning multiply(bool small, bool is_signed) {
  const std::size_t d = small ? 2 : 4, a = small ? 1 : 4, b = small ? 1 : 2;
  return [=](Warp& w, const Instruction& i, Lanes) {
    Fragments f;
    gather(w, i, d + a + b, d, f.acc);
    gather(w, i, d, a, f.a);
    gather(w, i, d + a, b, f.b);
    small ? f.multiply_8x8x16(is_signed) : f.multiply_16x8x32(is_signed);
    scatter(w, i, 0, d, f);
  };
}

// wgmma m64nNk32, one warp's 16 rows: registers d (N / 2), a (4), descriptor, whether to accumulate. For each eight
// columns these are the fragments of mma.m16n8k32. b lies in shared memory, 64 bytes of k a column, behind the
// descriptor: address / 16, the distance of eight columns / 16 from bit 32 on, the swizzle's mode from bit 62 on. In
// the mode of 64 bytes bits 4 and 5 of an address are XORed with bits 7 and 8.
Meaning multiply_asynchronously(std::size_t columns) {
  return [=](Warp& w, const Instruction& i, Lanes) {
    if (!w.products_fenced) fail("wgmma.mma_async without a wgmma.fence before it");
    const std::size_t d = columns / 2;
    const std::uint64_t descriptor = w.values(i.registers[d + 4])[0];
    for (int lane = 0; lane < warp_size; ++lane) {
      if (w.values(i.registers[d + 4])[lane] != descriptor) fail("the lanes of a warp have different descriptors");
    }
    const std::uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 2) fail("a descriptor with another swizzle than that of 64 bytes");
    if ((descriptor >> 49 & 7) != 0) fail("a descriptor with a base offset");
    const bool accumulates = w.values(i.registers[d + 5])[0] != 0;
    Fragments f;
    gather(w, i, d, 4, f.a);
    for (std::size_t group = 0; group < columns / 8; ++group) {
      for (int lane = 0; lane < warp_size; ++lane) {
        set_current_lane(lane);
        for (int k = 0; k < 8; ++k) {
          const auto depth = static_cast<std::uint64_t>(k / 4 * 16 + lane % 4 * 4 + k % 4);
          const std::uint64_t at = start + group * stride + static_cast<std::uint64_t>(lane / 4 * 64) + depth;
          const std::uint32_t value = memory().read_for_product(w.thread(lane), at ^ (at >> 7 & 3) << 4);
          std::uint32_t& word = f.b[static_cast<std::size_t>(lane)][static_cast<std::size_t>(k / 4)];
          word = (k % 4 == 0 ? 0 : word) | value << (8 * (k % 4));
        }
      }
      gather(w, i, 4 * group, 4, f.acc);
      if (!accumulates) f.acc = {};
      f.multiply_16x8x32(false);
      scatter(w, i, 4 * group, 4, f);
    }
  };
}

// shfl.sync: registers d, and perhaps a predicate, then the value, b, c and the mask of lanes. c holds the segments'
// mask from bit 8 on and the bound of the other lane in its low bits.
std::optional<Meaning> shuffle(const std::string& how) {
  if (how != "up" && how != "down" && how != "bfly" && how != "idx") return std::nullopt;
  return [=](Warp& w, const Instruction& i, Lanes) {
    const std::size_t first = i.registers.size() - 4;
    const std::uint64_t *value = w.values(i.registers[first]), *b = w.values(i.registers[first + 1]);
    const std::uint64_t* c = w.values(i.registers[first + 2]);
    std::array<std::uint64_t, warp_size> result, in_bounds;
    for (int lane = 0; lane < warp_size; ++lane) {
      const int by = b[lane] & 31, bound = c[lane] & 31, segment = c[lane] >> 8 & 31;
      const int most = (lane & segment) | (bound & ~segment), least = lane & segment;
      const int other = how == "up"     ? lane - by
                        : how == "down" ? lane + by
                        : how == "bfly" ? lane ^ by
                                        : least | (by & ~segment);
      const bool valid = how == "up" ? other >= most : other <= most;
      in_bounds[static_cast<std::size_t>(lane)] = valid;
      result[static_cast<std::size_t>(lane)] = value[valid ? other : lane] & 0xffffffff;
    }
    std::copy(result.begin(), result.end(), w.values(i.registers[0]));
    if (first == 2) std::copy(in_bounds.begin(), in_bounds.end(), w.values(i.registers[1]));
  };
}

Meaning reduction(const std::string& how, Type t) {
  return [=](Warp& w, const Instruction& i, Lanes) {
    const std::uint64_t* value = w.values(i.registers[1]);
    std::uint64_t all = cut(value[0], t);
    for (int lane = 1; lane < warp_size; ++lane) all = combine(how, t, all, cut(value[lane], t));
    std::fill_n(w.values(i.registers[0]), warp_size, all);
  };
}

// The last operand of an instruction for several lanes must name them all: kernels here have no use for fewer.
Meaning with_all_lanes(Meaning meaning) {
  return [meaning = std::move(meaning)](Warp& w, const Instruction& i, Lanes lanes) {
    const std::uint64_t* mask = w.values(i.registers.back());
    for (int lane = 0; lane < warp_size; ++lane) {
      if (cut(mask[lane], {'b', 4}) != all_lanes) fail("a mask of fewer than 32 lanes");
    }
    meaning(w, i, lanes);
  };
}

bool starts_with(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

// What has its own place in the order of threads: barriers, copies, products, the launches before.
bool explain_order(Instruction& i) {
  const std::string& op = i.opcode;
  if (op == "bra" || op == "bra.uni") {
    i.flow = Flow::branch;
  } else if (op == "ret" || op == "exit") {
    i.flow = Flow::exit;
  } else if (op == "bar.sync") {
    if (i.text.substr(i.text.find_last_of(" \t") + 1) != "0") return false;    // other barriers, fewer threads
    i.flow = Flow::block_barrier;
  } else if (op == "bar.warp.sync") {
    i.flow = Flow::whole_warp;
    i.meaning = with_all_lanes(of_threads([](int t, std::uint64_t) { ++memory().thread(t).warp_syncs; }));
  } else if (starts_with(op, "barrier.cluster.arrive")) {
    const bool releases = op.find(".relaxed") == std::string::npos;
    i.meaning = of_threads([releases](int t, std::uint64_t) {
      Thread& thread = memory().thread(t);
      if (!releases) thread.relaxed.insert(thread.arrivals);
      ++thread.arrivals;
    });
  } else if (starts_with(op, "barrier.cluster.wait")) {
    i.flow = Flow::cluster_barrier;
  } else if (op == "griddepcontrol.wait") {
    i.meaning = of_threads([](int t, std::uint64_t) { memory().thread(t).launches_waited = true; });
  } else if (op == "griddepcontrol.launch_dependents") {
    i.meaning = of_threads([](int, std::uint64_t) {});    // they may begin at any time
  } else if (op == "cp.async.ca.shared.global" || op == "cp.async.cg.shared.global") {
    i.meaning = copy;
  } else if (op == "cp.async.commit_group") {
    i.meaning = of_threads([](int t, std::uint64_t) { memory().commit_copies(t); });
  } else if (op == "cp.async.wait_group") {
    i.meaning = of_threads([](int t, std::uint64_t pending) { memory().wait_copies(t, pending); });
  } else if (op == "fence.proxy.async" || op == "fence.proxy.async.shared::cta") {
    i.meaning = of_threads([](int t, std::uint64_t) { ++memory().thread(t).fences; });
  } else if (op == "wgmma.fence.sync.aligned") {
    i.flow = Flow::whole_warp;
    i.meaning = [](Warp& w, const Instruction&, Lanes) { w.products_fenced = true; };
  } else if (op == "wgmma.commit_group.sync.aligned") {
    i.flow = Flow::whole_warp;
    i.meaning = [](Warp& w, const Instruction&, Lanes) { memory().commit_products(w.thread(0)); };
  } else if (op == "wgmma.wait_group.sync.aligned") {
    i.flow = Flow::whole_warp;
    i.meaning = [](Warp& w, const Instruction& own, Lanes) {
      memory().wait_products(w.thread(0), w.values(own.registers[0])[0]);
      w.products_fenced = false;
    };
  } else {
    return false;
  }
  return true;
}

bool explain_whole_warp(Instruction& i) {
  const std::string& op = i.opcode;
  const std::string columns = "wgmma.mma_async.sync.aligned.m64n";
  if (op == "ldmatrix.sync.aligned.m8n8.x4.shared.b16") {
    i.meaning = load_matrices;
  } else if (op == "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32") {
    i.meaning = multiply(false, false);
  } else if (op == "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32") {
    i.meaning = multiply(false, true);
  } else if (op == "mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32") {
    i.meaning = multiply(true, false);
  } else if (op == "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32") {
    i.meaning = multiply(true, true);
  } else if (starts_with(op, columns.c_str()) && op.find("k32.s32.u8.s8") != std::string::npos) {
    i.meaning = multiply_asynchronously(std::stoul(op.substr(columns.size())));
  } else if (starts_with(op, "shfl.sync.") && op.size() > 14 && op.substr(op.size() - 4) == ".b32") {
    const std::optional<Meaning> meaning = shuffle(op.substr(10, op.size() - 14));
    if (!meaning) return false;
    i.meaning = with_all_lanes(*meaning);
  } else if (starts_with(op, "redux.sync.") && op.size() > 15) {
    const std::string how = op.substr(11, op.size() - 15);
    const std::optional<Type> t = type_of(op.substr(op.size() - 3));
    if (!t || !combines(how)) return false;
    i.meaning = with_all_lanes(reduction(how, *t));
  } else {
    return false;
  }
  i.flow = Flow::whole_warp;
  return true;
}

}    // namespace

bool explain(Instruction& i) {
  if (explain_order(i) || explain_whole_warp(i)) return true;
  const std::size_t dot = i.opcode.rfind('.');
  const std::string family = i.opcode.substr(0, dot);
  const std::optional<Type> t = dot == std::string::npos ? std::nullopt : type_of(i.opcode.substr(dot + 1));
  if (!t) return false;
  std::optional<Meaning> meaning;
  if (family == "mov" && i.text.find('{') != std::string::npos) {
    meaning = pair(*t);
  } else if (family == "mapa.shared::cluster") {
    meaning = raw([](std::uint64_t a, std::uint64_t rank) { return (a & 0xffffff) | (rank + 1) << 24; });
  } else if (starts_with(family, "ld") || starts_with(family, "st")) {
    meaning = access(family, *t);
  } else if (starts_with(family, "atom") || starts_with(family, "red.")) {
    meaning = atomic(family, *t);
  } else {
    meaning = arithmetic(family, *t);
  }
  if (meaning) i.meaning = *meaning;
  return meaning.has_value();
}

}    // namespace ptx
