// Threads. torch's CPU work runs on an OpenMP team whose idle workers spin for a while; a second pool would fight them
// for the cores. So the loop runs on that same team where one is loaded (found by symbol, never linked), else on
// threads of our own.
#pragma once
#include <cstdint>
#include <functional>

namespace tq {

// body(task, worker) for 0 <= task < tasks in any order, on at most `threads` workers (0 <= worker < threads)
void parallel(int64_t tasks, int threads, const std::function<void(int64_t, int)>& body);

const char* pool_name();

}  // namespace tq
