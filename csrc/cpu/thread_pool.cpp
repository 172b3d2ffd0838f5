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

constexpr auto spin_time = std::chrono::microseconds(100);    // of a worker that waits for the next job
constexpr int spins_before_yield = 4000;                      // of a caller that waits for its workers

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
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = std::min(threads - 1, static_cast<int>(threads_.size()));
      open_.store(true);
      generation_.fetch_add(1, std::memory_order_release);
      if (sleeping_ > 0) wake_.notify_all();
    }
    work(0);
    // Close the job: workers that have not joined are turned away, so a late wake-up cannot delay us. A worker that has
    // joined may have been preempted by this spinning thread, so yield to it after a while.
    open_.store(false);
    for (int spins = 0; running_.load() != 0; ++spins) {
      if (spins < spins_before_yield) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
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
        ++sleeping_;
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        --sleeping_;
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_) return;
      // In this order, and the reverse in run(): either the job counts this worker or the worker sees it closed.
      running_.fetch_add(1);
      if (open_.load() && worker <= helpers_) work(worker);
      running_.fetch_sub(1);
    }
  }

  const long owner_;
  std::mutex job_mutex_;    // one job at a time
  std::mutex mutex_;        // guards sleeping
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<bool> open_{false};    // the job may be joined
  std::atomic<int> running_{0};      // workers inside it, or looking whether it is open
  std::atomic<bool> stopping_{false};
  Body body_ = nullptr;
  const void* context_ = nullptr;
  std::int64_t tasks_ = 0;
  int helpers_ = 0;
  int sleeping_ = 0;    // guarded by mutex_
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

std::atomic<ParallelFor> lent{nullptr};
std::atomic<long> lent_to{0};    // process

bool run_on_lent(std::int64_t tasks, int threads, Body body, const void* context) {
  const ParallelFor run = lent.load(std::memory_order_acquire);
  if (run == nullptr || lent_to.load(std::memory_order_relaxed) != process_id()) return false;
  struct Job {
    std::int64_t tasks;
    Body body;
    const void* context;
    std::atomic<std::int64_t> next;
  };
  Job job{tasks, body, context, {0}};
  const PartBody part = [](std::int64_t begin, std::int64_t, void* shared) {
    Job& j = *static_cast<Job*>(shared);
    for (;;) {
      const std::int64_t task = j.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= j.tasks) return;
      j.body(j.context, task, static_cast<int>(begin));
    }
  };
  if (run(0, threads, 1, part, &job) == 0) return true;
  part(0, 1, &job);    // whatever it did not do
  return true;
}

}    // namespace

void use_threads_of(ParallelFor parallel_for) {
  lent_to.store(process_id(), std::memory_order_relaxed);
  lent.store(parallel_for, std::memory_order_release);
}

void parallel_for(std::int64_t tasks, int threads, Body body, const void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1 && run_on_lent(tasks, threads, body, context)) return;
  Pool* p = threads > 1 ? pool() : nullptr;
  if (p == nullptr) {
    for (std::int64_t i = 0; i < tasks; ++i) body(context, i, 0);
    return;
  }
  p->run(tasks, threads, body, context);
}

}    // namespace qcfs::cpu
