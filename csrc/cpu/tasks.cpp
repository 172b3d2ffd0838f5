// Workspaces, and how rows are cut; see tasks.h.
#include "cpu/tasks.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>

namespace qcfs::cpu {
namespace {

class Workspace {
 public:
  ~Workspace() { std::free(data_); }

  void* reserve(std::size_t bytes) {
    if (data_ == nullptr || bytes > size_) {
      std::free(data_);
      size_ =
          static_cast<std::size_t>(round_up(static_cast<std::int64_t>(std::max<std::size_t>(bytes, 1)), cache_line));
      data_ = std::aligned_alloc(cache_line, size_);
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// The thread that makes a call also runs tasks of it, hence two.
thread_local Workspace of_call, of_task;

}    // namespace

void* call_workspace(std::size_t bytes) { return of_call.reserve(bytes); }
void* task_workspace(std::size_t bytes) { return of_task.reserve(bytes); }

int useful_threads(std::int64_t work, int threads) { return work < min_parallel_work ? 1 : threads; }

RowCut cut_rows(std::int64_t rows, std::int64_t images, int threads) {
  assert(rows > 0 && images > 0 && threads > 0);
  const std::int64_t wanted = threads > 1 ? ceil_div(tasks_per_thread * threads, images) : 1;
  const std::int64_t each = ceil_div(rows, std::min(wanted, rows));
  return {each, ceil_div(rows, each)};
}

RowSpan row_span(const RowCut& cut, const Wave& wave, std::int64_t i) {
  const std::int64_t row0 = wave.row0 + i % cut.spans * cut.rows_each;
  return {wave.sample0 + i / cut.spans, row0, std::min(wave.row1, row0 + cut.rows_each)};
}

}    // namespace qcfs::cpu
