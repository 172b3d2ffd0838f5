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

// Lends the threads of the caller's framework, which are awake when its own operators have just run and would otherwise
// compete with the pool's for the cores: a function that calls body(begin, end, context) for parts of [begin, end) in
// parallel and returns 0 (torch_parallel_for of libtorch_cpu). Null gives them back. A forked child never uses them.
using PartBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = int (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, PartBody body, void* context);

void use_threads_of(ParallelFor parallel_for);

}    // namespace qcfs::cpu
