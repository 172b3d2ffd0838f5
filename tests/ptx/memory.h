// The memory that PTX reads and writes, with a check of every access.
//
// Shared memory has a race detector. Each byte remembers its last write and the reads since. An access must come after
// those it conflicts with by an order that the program made, whatever order the threads happened to run in here:
//
//     the same thread                     program order
//     two threads of a warp               a bar.warp.sync between
//     two threads of a block              a bar.sync between
//     two threads of a cluster            a barrier.cluster between, whose arrival released
//     a copy by cp.async                  for its own thread from cp.async.wait_group on, for others like a write then
//     wgmma, which reads asynchronously   after the writer's fence.proxy.async and a bar.sync, until wgmma.wait_group
//
// Threads count the barriers they have passed, and an access keeps the counts of its thread: it came before a barrier
// that another thread has passed if it counts fewer.
//
// Global memory is the host's, and AddressSanitizer is asked about every access: it has red zones around operands. A
// launch must not depend on its own writes by other threads; and a dependent launch (griddepcontrol) must not touch
// what the launches before it wrote, nor write anything, before it has waited. Reads are not kept: a write after
// another thread's read of the same launch goes unseen.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

// Ends the process with the instruction and thread at which it happened (machine.cpp).
[[noreturn]] void fail(const std::string& what);

enum class Space { global, own_shared, cluster_shared };

struct Access {
  enum Of { one_thread, one_warp, one_block, cluster };    // one of them, or several of that
  int thread = -1;
  Of of = one_thread;
  std::uint32_t warp_syncs, barriers, arrivals, fences;
};

struct Copy {
  int rank;
  std::size_t to;
  const unsigned char* from;
  std::size_t bytes, source_bytes;
  bool done;
};

struct Thread {
  int rank, warp;                                     // of its block in the cluster; in the cluster
  std::uint32_t warp_syncs = 0, barriers = 0;         // passed
  std::uint32_t arrivals = 0, waits = 0;              // at the cluster's barrier
  std::set<std::uint32_t> relaxed;                    // arrivals that did not release
  std::uint32_t fences = 0, fences_at_barrier = 0;    // of the asynchronous proxy
  bool launches_waited = false;
  std::vector<Copy> copies;                 // not yet in a group
  std::vector<std::vector<Copy>> groups;    // of copies, under way
};

class Memory {
 public:
  void begin_launch(bool dependent);
  void begin_cluster(int blocks, int threads, std::size_t shared_bytes);
  void end_block(int rank) { blocks_[static_cast<std::size_t>(rank)].ended = true; }

  // The memory behind an address, after its checks.
  const unsigned char* read(int thread, Space space, std::uint64_t address, std::size_t bytes, bool is_volatile);
  void write(int thread, Space space, std::uint64_t address, const void* value, std::size_t bytes);
  // One of a kind that any number of threads may do to the same word of global memory.
  unsigned char* update(int thread, std::uint64_t address, std::size_t bytes);

  void copy(int thread, std::uint64_t to, std::uint64_t from, std::size_t bytes, std::size_t source_bytes);
  void commit_copies(int thread);
  void wait_copies(int thread, std::size_t pending);

  // A byte that an asynchronous product of the thread's warp reads, until the wait for its group.
  unsigned char read_for_product(int thread, std::uint64_t address);
  void commit_products(int thread);
  void wait_products(int thread, std::size_t pending);

  Thread& thread(int number) { return threads_[static_cast<std::size_t>(number)]; }
  std::size_t checked_bytes = 0;

 private:
  struct Byte {
    Access write, own_read, other_read;    // reads by the byte's own block and by others of its cluster
    int copying = -1;                      // the thread of a copy under way
    std::uint32_t products = 0;            // that read it and may not be finished
    bool written = false;
  };
  struct Block {
    std::vector<unsigned char> data;
    std::vector<Byte> bytes;
    bool ended;
  };
  struct Place {
    int rank;
    std::size_t at;
  };
  struct Products {
    std::vector<Place> bytes;                  // not yet in a group
    std::vector<std::vector<Place>> groups;    // under way
  };
  struct Writer {
    std::uint32_t launch = 0;
    std::uint64_t thread = 0;    // of the launch, or `any`
  };
  static constexpr std::size_t page_bytes = 4096;
  static constexpr std::uint64_t any = ~std::uint64_t{0};

  Place place(std::uint64_t address, std::size_t bytes, Space space, int thread) const;
  Byte& byte(const Place& p, std::size_t i) { return blocks_[static_cast<std::size_t>(p.rank)].bytes[p.at + i]; }
  bool ordered(const Access& past, int thread) const;
  Access access(int thread) const;
  void check_read(const Place& p, std::size_t bytes, int thread);
  void check_write(const Place& p, std::size_t bytes, int thread);
  void note_read(Access& reads, int thread);
  void note_write(const Place& p, std::size_t bytes, int thread);
  void finish(Copy& copy);
  void check_global(std::uint64_t address, std::size_t bytes) const;
  void check_global_read(int thread, std::uint64_t address, std::size_t bytes, bool is_volatile);
  void check_global_write(int thread, std::uint64_t address, const void* value, std::size_t bytes);
  Writer* writer(std::uint64_t address, bool make);

  std::vector<Block> blocks_;
  std::vector<Thread> threads_;
  std::unordered_map<int, Products> products_;    // by warp
  using Page = std::array<Writer, page_bytes>;
  std::unordered_map<std::uint64_t, std::unique_ptr<Page>> pages_;    // of global memory: who wrote each byte
  std::uint64_t last_page_ = 0;                                       // whose writers were asked for last
  Page* last_writers_ = nullptr;
  std::uint32_t launch_ = 0;
  bool dependent_ = false;
};

}    // namespace ptx
