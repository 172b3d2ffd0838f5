// A small pool: parallel_for runs body(context, task, worker) for every task, in any order.
//
// Tasks write disjoint memory and use integers only, so results do not depend on the number of
// threads. Workers are numbered 0 .. threads-1 and each has a workspace of its own. Workers spin for a
// moment after a job, because the layers of a network follow each other within microseconds, and then
// sleep. After fork the child builds a pool of its own.
#pragma once

#include <cstdint>

namespace qcfs::cpu {

using Body = void (*)(const void* context, std::int64_t task, int worker);

void parallel_for(std::int64_t tasks, int threads, Body body, const void* context);

}    // namespace qcfs::cpu
