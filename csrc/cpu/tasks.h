// Independent tasks on all threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace thought_kernels {

// Runs task(0, worker) ... task(count - 1, worker), each on whichever thread is free next, with that thread's number.
// Every result has one owner and a fixed order of additions, so nothing depends on who runs what.
template <typename Task>
void for_each_task(int64_t count, const Task& task) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t worker, int64_t) {
        at::AutoDispatchBelowADInplaceOrView no_autograd;  // thread-local, so once for every worker
        for (int64_t index = next++; index < count; index = next++) task(index, worker);
    });
}

}  // namespace thought_kernels
