// Feeds libqcfs with files that somebody damaged, under sanitizers: it must refuse them, or run them, and touch no
// memory that is not its own.
//
//     hostile_files SEED CASES FILE...    cuts each file off at every length, then damages it CASES times
//
// Three kinds of damage, after which a file is damaged again or handed over: bytes anywhere; numbers and words of the
// header, which is where sizes stand, with its length put right again; parts of the header repeated or left out. With
// Clang, -DQCFS_FAST_SANITIZE=fuzzer,address,undefined makes a libFuzzer target of the same file; `make fuzz-native`
// builds it and lets it begin with tests/native/corpus (made by tests/fuzz/corpus.py).
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "libqcfs/qcfs.h"

namespace {

struct Seen {
  long loaded = 0, ran = 0;
};

// Loads and, where that succeeds, runs on a small image and as a stream.
void feed(const std::string& bytes, Seen& seen) {
  qcfs_error error;
  qcfs_network* network = nullptr;
  if (qcfs_load_memory(bytes.data(), bytes.size(), &network, &error) != QCFS_OK) {
    if (error.text[0] == '\0' || network != nullptr) std::abort();
    return;
  }
  ++seen.loaded;
  qcfs_info info;
  if (qcfs_describe(network, &info, &error) != QCFS_OK) std::abort();
  if (info.channels <= 64) {
    const auto side = [&info](std::int64_t settled) {
      return info.is_vector != 0 ? std::int64_t{1} : settled > 0 && settled <= 64 ? settled : std::int64_t{12};
    };
    const std::int64_t height = side(info.height), width = side(info.width);
    std::vector<float> pixels(static_cast<std::size_t>(2 * info.channels * height * width));
    for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<float>(i * 37 % 101) / 25 - 2;
    const qcfs_images images{pixels.data(), 0, 2, info.channels, height, width};
    qcfs_options options{};
    options.steps = std::min<std::int64_t>(info.max_steps, 3);
    options.max_bytes = 1 << 20;
    qcfs_shape shape;
    if (qcfs_answer_shape(network, &images, &options, &shape, &error) == QCFS_OK && shape.count < 100000) {
      std::vector<float> out(shape.count);
      if (qcfs_run(network, &images, &options, out.data(), out.size(), &error) == QCFS_OK) ++seen.ran;
      qcfs_stream* stream = nullptr;
      if (qcfs_stream_new(network, &stream, &error) == QCFS_OK) {
        options.steps = 1;
        qcfs_stream_run(stream, &images, &options, out.data(), out.size(), &error);
        qcfs_stream_run(stream, nullptr, &options, out.data(), out.size(), &error);
      }
      qcfs_stream_free(stream);
    }
  }
  qcfs_free(network);
}

}    // namespace

namespace {

using Random = std::mt19937;

std::size_t below(Random& random, std::size_t n) { return n == 0 ? 0 : random() % n; }

std::size_t header_length(const std::string& file) {
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(file[static_cast<std::size_t>(i)]);
  return static_cast<std::size_t>(std::min<std::uint64_t>(length, file.size() - 8));
}

// The file with another header.
std::string with_header(const std::string& file, const std::string& header) {
  std::string found(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) found[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  return found + header + file.substr(8 + header_length(file));
}

// A number or a word in the header replaced by another value.
std::string with_other_value(const std::string& file, Random& random) {
  static const char* const values[] = {"0",          "1",
                                       "2",          "3",
                                       "7",          "8",
                                       "24",         "64",
                                       "65",         "255",
                                       "256",        "-1",
                                       "1.5",        "1e9",
                                       "16777216",   "16777217",
                                       "2147483647", "2147483648",
                                       "4294967296", "9223372036854775807",
                                       "null",       "true",
                                       "[]",         "{}",
                                       "false",      "99999999999999999999"};
  std::string header = file.substr(8, header_length(file));
  if (header.empty()) return file;
  const auto is_part = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z'); };
  std::size_t at = below(random, header.size());
  while (at < header.size() && !is_part(header[at])) ++at;
  std::size_t end = at;
  while (end < header.size() && is_part(header[end])) ++end;
  while (at > 0 && is_part(header[at - 1])) --at;
  header.replace(at, end - at, values[below(random, sizeof(values) / sizeof(values[0]))]);
  return with_header(file, header);
}

// A part of the header left out, or repeated somewhere else.
std::string with_other_parts(const std::string& file, Random& random) {
  std::string header = file.substr(8, header_length(file));
  if (header.empty()) return file;
  const std::size_t at = below(random, header.size()), count = 1 + below(random, 40);
  const std::string part = header.substr(at, count);
  if (random() % 2 == 0) {
    header.erase(at, count);
  } else {
    header.insert(below(random, header.size()), part);
  }
  return with_header(file, header);
}

std::string damaged(std::string file, Random& random) {
  do {
    switch (random() % 4) {
      case 0:
        file[below(random, file.size())] ^= static_cast<char>(1u << random() % 8);
        break;
      case 1:
        file[below(random, 8 + header_length(file))] = static_cast<char>(random() % 256);
        break;
      case 2:
        file = with_other_parts(file, random);
        break;
      default:
        file = with_other_value(file, random);
    }
  } while (random() % 3 == 0 && file.size() > 16);
  return file;
}

}    // namespace

#if defined(QCFS_LIBFUZZER)

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

// Half of the changes are libFuzzer's own, which know what the code compares with; half keep the container whole.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  Random random(seed);
  if (size > 16 && random() % 2 == 0) {
    const std::string changed = damaged(std::string(reinterpret_cast<const char*>(data), size), random);
    if (changed.size() <= most) {
      std::memcpy(data, changed.data(), changed.size());
      return changed.size();
    }
  }
  return LLVMFuzzerMutate(data, size, most);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Seen seen;
  feed(std::string(reinterpret_cast<const char*>(data), size), seen);
  return 0;
}

#else

namespace {

std::string read(const char* path) {
  std::string bytes;
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr) return bytes;
  char part[1 << 16];
  for (std::size_t n; (n = std::fread(part, 1, sizeof(part), file)) > 0;) bytes.append(part, n);
  std::fclose(file);
  return bytes;
}

}    // namespace

int main(int count, char** arguments) {
  if (count < 4) return 2;
  Random random(static_cast<unsigned>(std::strtoul(arguments[1], nullptr, 10)));
  const long cases = std::strtol(arguments[2], nullptr, 10);
  for (int i = 3; i < count; ++i) {
    const std::string file = read(arguments[i]);
    Seen whole, cut, changed;
    feed(file, whole);
    for (std::size_t length = 0; length < file.size(); ++length) feed(file.substr(0, length), cut);
    for (long k = 0; k < cases; ++k) feed(damaged(file, random), changed);
    std::printf("whole %ld %ld cut %ld changed %ld %ld\n", whole.loaded, whole.ran, cut.loaded, changed.loaded,
                changed.ran);
  }
  return 0;
}

#endif
