// Threads for the CPU kernels: the OpenMP team that PyTorch already has.  A second pool of its own would spin against the first one for the same
// cores (measured: 20-100 times slower), so this looks the runtime up in the process instead of linking one.
#pragma once

#include <cstdint>
#include <functional>

namespace athanor::cpu {

// Call body(begin, end) on contiguous shares of 0..count, on at most `threads` threads; each share has at least `grain` items.  Shares depend on
// count and threads: a body's items must not depend on one another.  Runs on the calling thread alone where the process has no OpenMP runtime.
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const std::function<void(std::int64_t, std::int64_t)>& body);

// Whether an OpenMP runtime was found.
bool has_team();

}  // namespace athanor::cpu
