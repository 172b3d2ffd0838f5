// See memory.h.
#include "memory.h"

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "cuda/emulation/emulation.h"
#include "machine.h"
#include "program.h"

namespace ptx {

namespace {

std::string name(std::size_t byte) { return "shared byte " + std::to_string(byte); }

}    // namespace

// -------------------------------------------------------------------------------------- launches and clusters

// A launch that is not dependent begins when all before it are complete. Nothing they wrote matters any more.
void Memory::begin_launch(bool dependent) {
  if (!dependent) {
    pages_.clear();
    last_page_ = 0;
  }
  dependent_ = dependent;
  ++launch_;
}

void Memory::begin_cluster(int blocks, int threads, std::size_t shared_bytes) {
  blocks_.resize(static_cast<std::size_t>(blocks));
  for (Block& b : blocks_) {
    b.data.assign(shared_bytes, 0xa5);
    b.bytes.assign(shared_bytes, {});
    b.ended = false;
  }
  threads_.assign(static_cast<std::size_t>(blocks * threads), {});
  const int warps = (threads + warp_size - 1) / warp_size;
  for (int i = 0; i < blocks * threads; ++i) {
    thread(i).rank = i / threads;
    thread(i).warp = i / threads * warps + i % threads / warp_size;
  }
  products_.clear();
}

// ------------------------------------------------------------------------------------------------ the race detector

Access Memory::access(int number) const {
  const Thread& t = threads_[static_cast<std::size_t>(number)];
  return {number, Access::one_thread, t.warp_syncs, t.barriers, t.arrivals, t.fences};
}

// Whether a past access came before whatever `number` does now.
bool Memory::ordered(const Access& past, int number) const {
  if (past.thread < 0 || (past.of == Access::one_thread && past.thread == number)) return true;
  const Thread& now = threads_[static_cast<std::size_t>(number)];
  const Thread& then = threads_[static_cast<std::size_t>(past.thread)];
  if (past.of <= Access::one_warp && then.warp == now.warp && past.warp_syncs < now.warp_syncs) return true;
  if (past.of <= Access::one_block && then.rank == now.rank && past.barriers < now.barriers) return true;
  std::uint32_t arrival = past.arrivals;
  while (then.relaxed.count(arrival) != 0) ++arrival;
  return arrival < now.waits;
}

// Keeps the reads that a later write must come after: this one, and of those before it what is not ordered before this.
void Memory::note_read(Access& reads, int number) {
  Access read = access(number);
  if (!ordered(reads, number)) {
    const Thread& then = thread(reads.thread);
    const Thread& now = thread(number);
    const Access::Of both = then.warp == now.warp   ? Access::one_warp
                            : then.rank == now.rank ? Access::one_block
                                                    : Access::cluster;
    read.of = std::max(both, reads.of);
    read.warp_syncs = std::max(read.warp_syncs, reads.warp_syncs);
    read.barriers = std::max(read.barriers, reads.barriers);
    read.arrivals = std::max(read.arrivals, reads.arrivals);
  }
  reads = read;
}

void Memory::check_read(const Place& p, std::size_t bytes, int number) {
  checked_bytes += bytes;
  const bool own = thread(number).rank == p.rank;
  for (std::size_t i = 0; i < bytes; ++i) {
    Byte& b = byte(p, i);
    if (b.copying >= 0) fail("reads " + name(p.at + i) + ", which a copy may still write");
    if (!b.written) fail("reads " + name(p.at + i) + ", which nobody wrote");
    if (!ordered(b.write, number)) fail("a race: reads " + name(p.at + i) + ", not ordered after its write");
    note_read(own ? b.own_read : b.other_read, number);
  }
}

void Memory::check_write(const Place& p, std::size_t bytes, int number) {
  checked_bytes += bytes;
  for (std::size_t i = 0; i < bytes; ++i) {
    const Byte& b = byte(p, i);
    if (b.copying >= 0) fail("writes " + name(p.at + i) + ", which a copy may still write");
    if (b.products > 0) fail("writes " + name(p.at + i) + ", which an asynchronous product may still read");
    if (!ordered(b.write, number)) fail("a race: writes " + name(p.at + i) + ", not ordered after another write");
    if (!ordered(b.own_read, number) || !ordered(b.other_read, number)) {
      fail("a race: writes " + name(p.at + i) + ", not ordered after a read");
    }
  }
}

void Memory::note_write(const Place& p, std::size_t bytes, int number) {
  for (std::size_t i = 0; i < bytes; ++i) {
    Byte& b = byte(p, i);
    b.write = access(number);
    b.written = true;
    b.copying = -1;
  }
}

// A block's own addresses begin at shared_base; those that mapa makes carry the rank, plus one, in their high byte.
Memory::Place Memory::place(std::uint64_t address, std::size_t bytes, Space space, int number) const {
  if (address % bytes != 0) fail("a misaligned access to shared memory");
  const auto mapped = static_cast<int>(address >> 24);
  const int own = threads_[static_cast<std::size_t>(number)].rank;
  if (mapped != 0 && space != Space::cluster_shared) fail("an address of the cluster in an access to the block's own");
  const int rank = mapped == 0 ? own : mapped - 1;
  if (static_cast<std::size_t>(rank) >= blocks_.size()) fail("shared memory of a block outside the cluster");
  const Block& block = blocks_[static_cast<std::size_t>(rank)];
  if (block.ended) fail("shared memory of a block that has ended");
  const std::uint64_t at = (address & 0xffffff) - shared_base;    // wraps below the base
  if (at + bytes > block.data.size() || at > block.data.size()) fail("an access beyond shared memory");
  return {rank, static_cast<std::size_t>(at)};
}

const unsigned char* Memory::read(int number, Space space, std::uint64_t address, std::size_t bytes, bool is_volatile) {
  if (space == Space::global) {
    if (address % bytes != 0) fail("a misaligned access to global memory");
    check_global_read(number, address, bytes, is_volatile);
    return reinterpret_cast<const unsigned char*>(address);
  }
  const Place p = place(address, bytes, space, number);
  check_read(p, bytes, number);
  return blocks_[static_cast<std::size_t>(p.rank)].data.data() + p.at;
}

void Memory::write(int number, Space space, std::uint64_t address, const void* value, std::size_t bytes) {
  if (space == Space::global) {
    check_global_write(number, address, value, bytes);
    std::memcpy(reinterpret_cast<void*>(address), value, bytes);
    return;
  }
  const Place p = place(address, bytes, space, number);
  check_write(p, bytes, number);
  note_write(p, bytes, number);
  std::memcpy(blocks_[static_cast<std::size_t>(p.rank)].data.data() + p.at, value, bytes);
}

// ---------------------------------------------------------------------------------------------- asynchronous copies

// Carried out at once or by the wait that guarantees it, as drawn; until then the bytes may not be touched.
void Memory::copy(int number, std::uint64_t to, std::uint64_t from, std::size_t bytes, std::size_t source_bytes) {
  if (from % bytes != 0) fail("a misaligned global address of a copy");    // also where nothing is read
  if (source_bytes > bytes) fail("a copy of more bytes than its size");
  if (source_bytes > 0) check_global_read(number, from, source_bytes, false);
  const Place p = place(to, bytes, Space::own_shared, number);
  check_write(p, bytes, number);
  for (std::size_t i = 0; i < bytes; ++i) byte(p, i).copying = number;
  Copy c{p.rank, p.at, reinterpret_cast<const unsigned char*>(from), bytes, source_bytes, false};
  if (qcfs::cuda::emulation::random() % 2 == 0) finish(c);
  thread(number).copies.push_back(c);
}

void Memory::finish(Copy& c) {
  if (c.done) return;
  c.done = true;
  unsigned char* to = blocks_[static_cast<std::size_t>(c.rank)].data.data() + c.to;
  if (c.source_bytes > 0) std::memcpy(to, c.from, c.source_bytes);
  std::memset(to + c.source_bytes, 0, c.bytes - c.source_bytes);
}

void Memory::commit_copies(int number) {
  Thread& t = thread(number);
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}

void Memory::wait_copies(int number, std::size_t pending) {
  auto& groups = thread(number).groups;
  while (groups.size() > pending) {
    for (Copy& c : groups.front()) {
      finish(c);
      note_write({c.rank, c.to}, c.bytes, number);
    }
    groups.erase(groups.begin());
  }
}

// --------------------------------------------------------------------------------------------- asynchronous products

unsigned char Memory::read_for_product(int number, std::uint64_t address) {
  const Place p = place(address, 1, Space::own_shared, number);
  Byte& b = byte(p, 0);
  ++checked_bytes;
  if (b.copying >= 0) fail("reads " + name(p.at) + ", which a copy may still write");
  if (!b.written) fail("reads " + name(p.at) + ", which nobody wrote");
  const Thread& now = thread(number);
  if (b.write.barriers >= now.barriers) fail("a race: reads " + name(p.at) + ", not ordered after its write");
  if (thread(b.write.thread).fences_at_barrier <= b.write.fences) {
    fail("reads " + name(p.at) +
         " by another proxy, whose writer has not passed a fence.proxy.async before the barrier");
  }
  ++b.products;
  products_[now.warp].bytes.push_back(p);
  return blocks_[static_cast<std::size_t>(p.rank)].data[p.at];
}

void Memory::commit_products(int number) {
  Products& p = products_[thread(number).warp];
  p.groups.push_back(std::move(p.bytes));
  p.bytes.clear();
}

void Memory::wait_products(int number, std::size_t pending) {
  auto& groups = products_[thread(number).warp].groups;
  while (groups.size() > pending) {
    for (const Place& p : groups.front()) {
      --byte(p, 0).products;
      note_read(byte(p, 0).own_read, number);
    }
    groups.erase(groups.begin());
  }
}

// ----------------------------------------------------------------------------------------------------- global memory

void Memory::check_global(std::uint64_t address, std::size_t bytes) const {
  if (__asan_region_is_poisoned(reinterpret_cast<void*>(address), bytes) != nullptr) {
    fail("an access beyond an operand: " + std::to_string(bytes) + " bytes");
  }
}

// The record of a byte, or none where its page has none and none is to be made.
Memory::Writer* Memory::writer(std::uint64_t address, bool make) {
  if (address / page_bytes != last_page_) {
    const auto entry = pages_.find(address / page_bytes);
    if (entry == pages_.end() && !make) return nullptr;
    auto& page = entry == pages_.end() ? pages_[address / page_bytes] : entry->second;
    if (page == nullptr) page = std::make_unique<Page>();
    last_page_ = address / page_bytes;
    last_writers_ = page.get();
  }
  return &(*last_writers_)[address % page_bytes];
}

void Memory::check_global_read(int number, std::uint64_t address, std::size_t bytes, bool is_volatile) {
  check_global(address, bytes);
  if (pages_.empty()) return;
  for (std::size_t i = 0; i < bytes; ++i) {
    const Writer* w = writer(address + i, false);
    if (w == nullptr || w->launch == 0) continue;
    if (w->launch == launch_) {
      if (w->thread != launch_thread(number) && !is_volatile) fail("reads what another thread of the launch writes");
    } else if (!thread(number).launches_waited) {
      fail("reads what an earlier launch writes before griddepcontrol.wait");
    }
  }
}

void Memory::check_global_write(int number, std::uint64_t address, const void* value, std::size_t bytes) {
  if (address % bytes != 0) fail("a misaligned access to global memory");
  check_global(address, bytes);
  if (dependent_ && !thread(number).launches_waited) fail("writes global memory before griddepcontrol.wait");
  for (std::size_t i = 0; i < bytes; ++i) {
    Writer& w = *writer(address + i, true);
    const std::uint64_t self = launch_thread(number);
    const auto* now = reinterpret_cast<const unsigned char*>(address);
    if (w.launch == launch_ && w.thread != self && now[i] != static_cast<const unsigned char*>(value)[i]) {
      fail("writes another value where another thread of the launch wrote");
    }
    w = {launch_, self};
  }
}

unsigned char* Memory::update(int number, std::uint64_t address, std::size_t bytes) {
  if (address % bytes != 0) fail("a misaligned access to global memory");
  check_global(address, bytes);
  if (dependent_ && !thread(number).launches_waited) fail("writes global memory before griddepcontrol.wait");
  for (std::size_t i = 0; i < bytes; ++i) {
    Writer& w = *writer(address + i, true);
    if (w.launch == launch_ && w.thread != any) fail("an atomic update of what a thread of the launch wrote plainly");
    w = {launch_, any};
  }
  return reinterpret_cast<unsigned char*>(address);
}

}    // namespace ptx
