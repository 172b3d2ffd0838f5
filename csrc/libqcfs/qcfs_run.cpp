// qcfs-run NETWORK IMAGE.npy: runs a saved network on images from a numpy file and prints the answers, one line for
// each image. Uses nothing but qcfs.h, so it is also an example of that.
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <system_error>
#include <vector>

#include "libqcfs/qcfs.h"

namespace {

constexpr const char* usage =
    "usage: qcfs-run NETWORK IMAGES.npy [options]\n"
    "       qcfs-run NETWORK              describes the network\n"
    "\n"
    "  IMAGES.npy    float32 or float64 [N, C, H, W] or [C, H, W] ([N, C] or [C] for a network of vectors);\n"
    "                with an axis of time in front, [T, N, ...], also uint8, such as event counts\n"
    "  --steps T     time steps; default: the network's, or those of the images\n"
    "  --skip K      leave the first K steps out of the answer\n"
    "  --threads K   default: 1\n"
    "  --out F.npy   write the answers, float32, in place of printing them\n";

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "qcfs-run: %s\n", what.c_str());
  std::exit(1);
}

struct Array {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// Reads an array that numpy.save wrote. The file may be anything, and a pipe: what its header says is read as strictly
// as Python reads it, and memory is taken for values that are there, not for those that the header promises.
class NpyReader {
 public:
  explicit NpyReader(const char* path) : path_(path), file_(std::fopen(path, "rb"), std::fclose) {
    if (file_ == nullptr) fail(path_ + " cannot be opened: " + std::strerror(errno));
  }

  Array read() {
    const std::string header = read_header();
    if (field(header, "fortran_order").rfind("False", 0) != 0) refuse("it is not in C order");
    Array found;
    const std::uint64_t count = read_shape(field(header, "shape"), found.shape);
    const std::string type = field(header, "descr").substr(0, 5);
    if (type == "'<f4'") {
      read_values<float>(count, found.values);
    } else if (type == "'<f8'") {
      read_values<double>(count, found.values);
    } else if (type == "'|u1'") {
      read_values<std::uint8_t>(count, found.values);
    } else {
      refuse("it must be float32, float64 or uint8, and is " + type);
    }
    return found;
  }

 private:
  [[noreturn]] void refuse(const std::string& why) const {
    fail(path_ + " holds no array of images (" + why +
         "); write it with numpy.save(path, numpy.ascontiguousarray(images, numpy.float32))");
  }

  void read_bytes(void* to, std::size_t count) {
    if (std::fread(to, 1, count, file_.get()) != count) refuse("its header is cut off");
  }

  // The text of a dictionary.
  std::string read_header() {
    unsigned char start[12] = {};
    if (std::fread(start, 1, 10, file_.get()) != 10 || std::memcmp(start, "\x93NUMPY", 6) != 0) {
      refuse("it is no npy file");
    }
    if (start[6] < 1 || start[6] > 3) refuse("its version of the npy format is " + std::to_string(start[6]));
    if (start[6] >= 2) read_bytes(start + 10, 2);    // four bytes of length
    const std::size_t length = start[8] + 256u * start[9] + 65536u * start[10] + 16777216u * start[11];
    if (length > (1u << 20)) refuse("its header is too long");
    std::string header(length, '\0');
    read_bytes(header.data(), length);
    const std::size_t last = header.find_last_not_of(" \n");
    if (header[0] != '{' || last == std::string::npos || header[last] != '}') refuse("its header is cut off");
    return header;
  }

  // What follows `name` in the dictionary.
  std::string field(const std::string& header, const std::string& name) const {
    const std::size_t at = header.find("'" + name + "':");
    if (at == std::string::npos) refuse("its header lacks " + name);
    return header.substr(header.find_first_not_of(' ', at + name.size() + 3));    // a } at least
  }

  // A tuple of sizes, as (2, 3) or (2,); their product.
  std::uint64_t read_shape(const std::string& text, std::vector<std::int64_t>& shape) const {
    std::uint64_t count = 1;
    const char* at = text.c_str();
    bool sound = *at++ == '(';
    while (sound && *at >= '0' && *at <= '9') {
      char* end = nullptr;
      const unsigned long long size = std::strtoull(at, &end, 10);
      if (size > (1u << 24) || (count *= size) > (std::uint64_t{1} << 36)) refuse("it is too large");
      shape.push_back(static_cast<std::int64_t>(size));
      sound = *end == ',' || *end == ')';
      at = end + std::strspn(end, ", ");
    }
    if (!sound || *at != ')') refuse("its shape is damaged");
    return count;
  }

  template <typename T>
  void read_values(std::uint64_t count, std::vector<float>& to) {
    T part[1 << 13];
    while (to.size() < count) {
      const std::size_t wanted = static_cast<std::size_t>(std::min<std::uint64_t>(count - to.size(), std::size(part)));
      const std::size_t found = std::fread(part, sizeof(T), wanted, file_.get());
      for (std::size_t i = 0; i < found; ++i) to.push_back(static_cast<float>(part[i]));
      if (found < wanted) {
        refuse("its header promises " + std::to_string(count) + " values, and " + std::to_string(to.size()) +
               " follow");
      }
    }
  }

  const std::string path_;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

// Beside its place and then renamed, so that no reader meets half of a file; into a pipe or a device as it is.
void write_npy(const char* path, const qcfs_shape& shape, const std::vector<float>& values) {
  std::string sizes;
  for (int i = 0; i < shape.rank; ++i) sizes += std::to_string(shape.sizes[i]) + ", ";
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + sizes + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';

  namespace fs = std::filesystem;
  std::error_code error;
  const bool beside = !fs::exists(path, error) || fs::is_regular_file(path, error);
  const fs::path target = beside ? fs::weakly_canonical(path, error) : fs::path(path);    // a link stays a link
  fs::path to = target;
  if (beside) to += "." + std::to_string(std::random_device{}()) + ".part";
  const auto failed = [&](int reason) {
    if (beside) fs::remove(to, error);
    fail(std::string(path) + " cannot be written: " + std::strerror(reason));
  };
  std::FILE* file = std::fopen(to.c_str(), "wb");
  if (file == nullptr) failed(errno);
  const unsigned char start[] = {0x93,
                                 'N',
                                 'U',
                                 'M',
                                 'P',
                                 'Y',
                                 1,
                                 0,
                                 static_cast<unsigned char>(header.size() % 256),
                                 static_cast<unsigned char>(header.size() / 256)};
  const bool written = std::fwrite(start, 1, sizeof(start), file) == sizeof(start) &&
                       std::fwrite(header.data(), 1, header.size(), file) == header.size() &&
                       std::fwrite(values.data(), sizeof(float), values.size(), file) == values.size() &&
                       std::fflush(file) == 0;
  if (!written || std::fclose(file) != 0) failed(errno);
  if (!beside) return;
  fs::rename(to, target, error);
  if (error) failed(error.value());
}

// The images as the library takes them: with a batch, and vectors as maps of one pixel.
qcfs_images images_of(const Array& array, const qcfs_info& info, const std::string& path) {
  std::vector<std::int64_t> shape = array.shape;
  const std::size_t rank = info.is_vector ? 2 : 4;
  if (shape.size() == rank - 1) shape.insert(shape.begin(), 1);
  if (shape.size() != rank && shape.size() != rank + 1) {
    fail(path + ": the images have " + std::to_string(array.shape.size()) + " axes, the network takes " +
         std::to_string(rank) + ", or one more in front for time");
  }
  qcfs_images images{};
  images.data = array.values.data();
  const std::size_t first = shape.size() - rank;
  if (first == 1) images.steps = shape[0];
  images.batch = shape[first];
  images.channels = shape[first + 1];
  images.height = info.is_vector ? 1 : shape[first + 2];
  images.width = info.is_vector ? 1 : shape[first + 3];
  return images;
}

void print_answers(const qcfs_shape& shape, const std::vector<float>& values) {
  const std::size_t rows = static_cast<std::size_t>(shape.sizes[0]), each = rows == 0 ? 0 : values.size() / rows;
  for (std::size_t n = 0; n < rows; ++n) {
    const float* row = &values[n * each];
    std::size_t largest = 0;
    for (std::size_t i = 1; i < each; ++i) largest = row[i] > row[largest] ? i : largest;
    std::printf("%zu:", largest);
    for (std::size_t i = 0; i < each; ++i) std::printf(" %.9g", static_cast<double>(row[i]));
    std::printf("\n");
  }
}

std::int64_t whole(const char* text) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0 || value > 1000000000) fail(std::string(text) + " is no whole number");
  return value;
}

}    // namespace

int main(int count, char** arguments) try {
#ifdef SIGXFSZ
  std::signal(SIGXFSZ, SIG_IGN);    // past a limit on a file's size, writing fails and says why
#endif
  std::vector<const char*> files;
  const char* out = nullptr;
  qcfs_options options{};
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    if (word.rfind("--", 0) != 0) {
      files.push_back(arguments[i]);
      continue;
    }
    if (word == "--help" || i + 1 == count) {
      std::fputs(usage, word == "--help" ? stdout : stderr);
      return word == "--help" ? 0 : 1;
    }
    const char* value = arguments[++i];
    if (word == "--out") {
      out = value;
    } else if (word == "--steps") {
      options.steps = whole(value);
    } else if (word == "--skip") {
      options.skip = whole(value);
    } else if (word == "--threads") {
      options.threads = static_cast<int>(whole(value));
    } else {
      fail("unknown option " + word + "; see qcfs-run --help");
    }
  }
  if (files.empty() || files.size() > 2) {
    std::fputs(usage, stderr);
    return 1;
  }
  qcfs_error error;
  const auto check = [&error](qcfs_status status) {
    if (status != QCFS_OK) fail(error.text);
  };
  const auto check_images = [&](qcfs_status status) {
    if (status != QCFS_OK) fail(std::string(files[1]) + ": " + error.text);
  };
  qcfs_network* network = nullptr;
  qcfs_info info;
  check(qcfs_load_file(files[0], &network, &error));
  check(qcfs_describe(network, &info, &error));
  if (files.size() == 1) {
    std::printf("channels %lld, classes %lld, spiking layers %lld, %d-bit weights, %s neurons, T=%lld (up to %lld)\n",
                static_cast<long long>(info.channels), static_cast<long long>(info.classes),
                static_cast<long long>(info.layers), info.weight_bits, info.neuron, static_cast<long long>(info.steps),
                static_cast<long long>(info.max_steps));
  } else {
    const Array array = NpyReader(files[1]).read();
    const qcfs_images images = images_of(array, info, files[1]);
    qcfs_shape shape;
    check_images(qcfs_answer_shape(network, &images, &options, &shape, &error));
    std::vector<float> answers(shape.count);
    check_images(qcfs_run(network, &images, &options, answers.data(), answers.size(), &error));
    if (out != nullptr) {
      write_npy(out, shape, answers);
    } else {
      print_answers(shape, answers);
    }
  }
  qcfs_free(network);
  if (std::fflush(stdout) != 0) fail(std::string("the answers cannot be written: ") + std::strerror(errno));
  return 0;
} catch (const std::bad_alloc&) {
  fail("no memory; run fewer images at a time");
}
