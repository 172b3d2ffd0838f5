#include "cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace qcfs::cpu {
namespace {

constexpr auto spin_time = std::chrono::microseconds(50);

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Pool {
 public:
  Pool() : owner_(process_id()) {}

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
  }

  long owner() const { return owner_; }

  void run(std::int64_t tasks, int threads, Body body, const void* context) {
    std::unique_lock<std::mutex> job(job_mutex_, std::try_to_lock);
    if (job.owns_lock()) grow(threads - 1);
    // A second caller at the same time, or a system without threads to give, works alone.
    if (!job.owns_lock() || threads_.empty()) {
      for (std::int64_t i = 0; i < tasks; ++i) body(context, i, 0);
      return;
    }
    const int helpers = std::min(threads - 1, static_cast<int>(threads_.size()));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = helpers;
      pending_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    while (pending_.load(std::memory_order_acquire) != 0) relax();
  }

 private:
  void grow(int wanted) {
    while (static_cast<int>(threads_.size()) < wanted) {
      const int index = static_cast<int>(threads_.size()) + 1;
      const std::uint64_t seen = generation_.load(std::memory_order_relaxed);
      try {
        threads_.emplace_back([this, index, seen] { serve(index, seen); });
      } catch (const std::system_error&) {
        return;    // fewer threads than asked for: slower, never different
      }
    }
  }

  void work(int worker) {
    for (;;) {
      const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      body_(context_, task, worker);
    }
  }

  void serve(int worker, std::uint64_t seen) {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + spin_time;
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {
        relax();
      }
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_) return;
      if (worker <= helpers_) work(worker);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  const long owner_;
  std::mutex job_mutex_;    // one job at a time
  std::mutex mutex_;        // guards sleeping
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stopping_{false};
  Body body_ = nullptr;
  const void* context_ = nullptr;
  std::int64_t tasks_ = 0;
  int helpers_ = 0;
};

// The pool is never destroyed: joining threads while the process exits, or in a forked child that
// does not have them, would hang.
std::atomic<Pool*> current_pool{nullptr};
std::mutex create_mutex;

Pool* pool() {
  Pool* p = current_pool.load(std::memory_order_acquire);
  if (p != nullptr && p->owner() == process_id()) return p;
  std::lock_guard<std::mutex> lock(create_mutex);
  p = current_pool.load(std::memory_order_acquire);
  if (p != nullptr && p->owner() == process_id()) return p;
  p = new (std::nothrow) Pool();
  if (p != nullptr) current_pool.store(p, std::memory_order_release);
  return p;
}

}    // namespace

void parallel_for(std::int64_t tasks, int threads, Body body, const void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  Pool* p = threads > 1 ? pool() : nullptr;
  if (p == nullptr) {
    for (std::int64_t i = 0; i < tasks; ++i) body(context, i, 0);
    return;
  }
  p->run(tasks, threads, body, context);
}

}    // namespace qcfs::cpu
