#include "team.hpp"

#include <dlfcn.h>

#include <algorithm>

namespace athanor::cpu {
namespace {

// The entry points that gcc's own `#pragma omp parallel` calls; LLVM's and Intel's runtimes export them too.
struct Runtime {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Number = int (*)();
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Number thread = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    Number team = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    bool there() const { return parallel && thread && team; }
};

const Runtime& runtime() {
    static const Runtime found;  // first used after torch was imported: kernels get torch tensors
    return found;
}

struct Job {
    std::int64_t count, shares;
    const std::function<void(std::int64_t, std::int64_t)>* body;
};

void run_shares(void* data) {
    const Job& job = *static_cast<const Job*>(data);
    // A runtime may give fewer threads than were asked for: every thread takes its shares in turn.
    for (std::int64_t share = runtime().thread(), step = runtime().team(); share < job.shares; share += step) {
        (*job.body)(job.count * share / job.shares, job.count * (share + 1) / job.shares);
    }
}

}  // namespace

bool has_team() { return runtime().there(); }

void parallel_for(std::int64_t count, std::int64_t grain, int threads, const std::function<void(std::int64_t, std::int64_t)>& body) {
    if (count <= 0) {
        return;
    }
    const std::int64_t shares = std::min<std::int64_t>(threads, std::max<std::int64_t>(1, count / std::max<std::int64_t>(grain, 1)));
    if (shares <= 1 || !has_team()) {
        body(0, count);
        return;
    }
    Job job{count, shares, &body};
    runtime().parallel(&run_shares, &job, static_cast<unsigned>(shares), 0);
}

}  // namespace athanor::cpu
