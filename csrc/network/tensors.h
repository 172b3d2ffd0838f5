// Named tensors, and the container of a saved network: a safetensors file (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace qcfs::network {

enum class Dtype { i8, i16, i32, i64, f32, f64 };

std::size_t size_of(Dtype dtype);

// A dense tensor in C order, aligned as its dtype asks. Whoever made it keeps the memory.
struct Tensor {
  Dtype dtype = Dtype::i8;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;

  std::int64_t count() const;
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

using Tensors = std::map<std::string, Tensor>;

// A file's header (the JSON text of its metadata's `qcfs_fast`) and tensors, with their memory.
struct File {
  std::string header;
  Tensors tensors;
  std::vector<std::unique_ptr<std::uint64_t[]>> memory;
};

// Copies what it needs: the bytes may go. Raises Error (format).
File read_file(const void* bytes, std::size_t size);

}    // namespace qcfs::network
