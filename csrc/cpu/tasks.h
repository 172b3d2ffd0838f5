// Tools of the plans: tasks in parallel, and memory for calls and tasks.
//
// Tasks write disjoint output and read shared input. Each thread keeps two blocks of memory that only grow, so that a
// network of many layers does not go back to the system for each: one for the call it makes (what all its tasks read)
// and one for the task it runs.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/contract.h"
#include "cpu/layout.h"
#include "cpu/thread_pool.h"

namespace qcfs::cpu {

// Memory of this thread's call or task, aligned to cache lines; null where the system has none. Valid until the next
// request for the same one.
void* call_workspace(std::size_t bytes);
void* task_workspace(std::size_t bytes);

// A bump allocator: hands out parts of one block of memory, cache lines each. Without a block (null) it only adds up.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(std::int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), cache_line));
    return reinterpret_cast<T*>(at);
  }

  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// Bytes that lay_out(arena) takes.
template <typename LayOut>
std::int64_t bytes_of(const LayOut& lay_out) {
  Arena arena(nullptr);
  lay_out(arena);
  return static_cast<std::int64_t>(arena.used());
}

// Places the arrays of a call. lay_out(arena) runs twice, once to add up the bytes and once to take them, so that sizes
// stand in one place; it must take the same both times and write through no pointer of the first.
template <typename LayOut>
Status place_in_call_workspace(const LayOut& lay_out) {
  void* memory = call_workspace(static_cast<std::size_t>(bytes_of(lay_out)));
  if (memory == nullptr) return Status::out_of_memory;
  Arena arena(memory);
  lay_out(arena);
  return Status::ok;
}

// Runs task(index) in parallel. A task returns nothing or a Status, of which one that is not ok is the result.
template <typename Task>
Status run_parallel(std::int64_t tasks, int threads, const Task& task) {
  struct Job {
    const Task& task;
    std::atomic<int> status;
  };
  Job job{task, {static_cast<int>(Status::ok)}};
  parallel_for(
      tasks, threads,
      [](const void* context, std::int64_t index, int) {
        // The pool hands the context on as const; the status is the one thing tasks share.
        Job* j = const_cast<Job*>(static_cast<const Job*>(context));
        if constexpr (std::is_void_v<decltype(j->task(index))>) {
          j->task(index);
        } else {
          const Status s = j->task(index);
          if (s != Status::ok) j->status.store(static_cast<int>(s), std::memory_order_relaxed);
        }
      },
      &job);
  return static_cast<Status>(job.status.load(std::memory_order_relaxed));
}

// The same for task(index, workspace), each with a workspace of `bytes`.
template <typename Task>
Status run_with_workspace(std::int64_t tasks, int threads, std::size_t bytes, const Task& task) {
  return run_parallel(tasks, threads, [&](std::int64_t i) {
    void* workspace = task_workspace(bytes);
    if (workspace == nullptr) return Status::out_of_memory;
    task(i, workspace);
    return Status::ok;
  });
}

// Waking other threads takes about 30 us, as long as so many elementary operations (4.4 GHz Zen 5).
constexpr double min_parallel_nanoseconds = 40e3;
constexpr std::int64_t min_parallel_work = 1 << 17;

// 1 where the work (in elementary operations) is too small for waking other threads to pay.
int useful_threads(std::int64_t work, int threads);

// Tasks for each thread: a few, so that threads end at about the same time.
constexpr int tasks_per_thread = 4;

// Elementary operations of a task of run_rows, at least.
constexpr std::int64_t min_task_work = 1 << 15;

// Cuts `rows` of `row_work` elementary operations each into tasks and runs range(row0, row1).
template <typename Range>
Status run_rows(std::int64_t rows, std::int64_t row_work, int threads, const Range& range) {
  if (rows == 0) return Status::ok;
  const std::int64_t least = ceil_div(min_task_work, row_work > 0 ? row_work : 1);
  const std::int64_t per_task = least > ceil_div(rows, 8 * threads) ? least : ceil_div(rows, 8 * threads);
  return run_parallel(ceil_div(rows, per_task), useful_threads(rows * row_work, threads), [&](std::int64_t i) {
    const std::int64_t end = (i + 1) * per_task;
    return range(i * per_task, end < rows ? end : rows);
  });
}

// Output rows in `spans` spans of `rows_each` (the last may have fewer), so that there is work for all threads.
struct RowCut {
  std::int64_t rows_each, spans;
};

RowCut cut_rows(std::int64_t rows, std::int64_t images, int threads);

// Row span i of a wave, samples in turn.
RowSpan row_span(const RowCut& cut, const Wave& wave, std::int64_t i);

}    // namespace qcfs::cpu
