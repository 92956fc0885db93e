// CUDA's words in host C++, to run a kernel of csrc/cuda where there is no GPU.  Blocks run one after the other; a block's threads are coroutines that
// take turns at barriers and shuffles.  Included before the kernel's source, it stands in for csrc/cuda/ptx.cuh, whose guard it defines.
//
// The order that a GPU leaves open is chosen by `mode`: 0 = copies are done at once and threads take turns upwards, 1 = copies are done when they are
// waited for, at the last moment, and threads take turns downwards.  A kernel is right if both give the reference's result.
#pragma once
#define ATHANOR_PTX
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

struct Copy {
    uint4* to;
    const void* from;
};
struct Barrier {
    int members = 0, arrived = 0, turn = 0;
};
struct Coroutine {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    std::deque<std::vector<Copy>> groups;  // of copies that are under way; the last one is open
    bool done = false;
};
struct Block {
    std::vector<Coroutine> threads;
    std::vector<Barrier> warps;
    std::vector<float> exchanged;
    std::vector<uint4> shared;
    Barrier all;
    ucontext_t scheduler;
    bool late = false, moved = false;  // moved: some thread passed a barrier or ended in this round
};
static Block block;
static Index threadIdx, blockIdx, blockDim, gridDim;

inline Coroutine& self() { return block.threads[threadIdx.x]; }
inline void meet(Barrier& barrier) {
    int turn = barrier.turn;
    if (++barrier.arrived == barrier.members) barrier.arrived = 0, ++barrier.turn;
    while (barrier.turn == turn) swapcontext(&self().context, &block.scheduler);
    block.moved = true;
}
inline void __syncthreads() { meet(block.all); }
inline float __shfl_xor_sync(unsigned, float x, int lanes) {
    Barrier& warp = block.warps[threadIdx.x / 32];
    block.exchanged[threadIdx.x] = x;
    meet(warp);
    x = block.exchanged[threadIdx.x ^ lanes];
    meet(warp);
    return x;
}

inline uint4* dynamic_shared() { return block.shared.data(); }
inline void copy(const Copy& c) { std::memcpy(c.to, c.from, 16); }
inline void copy_async(uint4* to, const void* from) {
    if (reinterpret_cast<size_t>(from) % 16) std::abort();
    block.late ? self().groups.back().push_back({to, from}) : copy({to, from});
}
inline void end_copy_group() { self().groups.emplace_back(); }
inline void wait_for_copies(int but) {
    auto& groups = self().groups;
    for (; static_cast<int>(groups.size()) > but + 1; groups.pop_front())
        for (const Copy& c : groups.front()) copy(c);
}
inline void store_streaming(void* to, uint4 x) {
    if (reinterpret_cast<size_t>(to) % 16) std::abort();
    std::memcpy(to, &x, 16);
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline unsigned bf16_of(float x) {
    unsigned bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned bf16_rounded(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline unsigned bf16_max(unsigned a, unsigned b) {
    float low = std::fmax(__uint_as_float(a << 16), __uint_as_float(b << 16));
    return bf16_rounded(low, std::fmax(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u)));
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A>
void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}

inline void start(Coroutine& thread, void (*body)()) {
    thread.groups.emplace_back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &block.scheduler;
    makecontext(&thread.context, body, 0);
}

// Run the grid; `body` calls the kernel.  Returns 0, or 1 when threads wait for each other for ever.
inline int run_grid(int blocks, int threads, int shared, int mode, void (*body)()) {
    gridDim = {unsigned(blocks), 1, 1}, blockDim = {unsigned(threads), 1, 1};
    for (int b = 0; b < blocks; ++b) {
        block.threads = std::vector<Coroutine>(threads);
        block.warps = std::vector<Barrier>((threads + 31) / 32);
        block.exchanged.assign(threads, NAN);
        block.shared.assign(shared / 16, {~0u, ~0u, ~0u, ~0u});  // NaN
        block.all = {threads, 0, 0};
        block.late = mode;
        blockIdx.x = b;
        for (int t = 0; t < threads; ++t) {
            ++block.warps[t / 32].members;
            start(block.threads[t], body);
        }
        for (int left = threads; left;) {
            block.moved = false;
            for (int i = 0; i < threads; ++i) {
                threadIdx.x = mode ? threads - 1 - i : i;
                Coroutine& thread = block.threads[threadIdx.x];
                if (thread.done) continue;
                swapcontext(&block.scheduler, &thread.context);
                left -= thread.done;
            }
            if (!block.moved) return 1;
        }
    }
    return 0;
}

// In the file that includes the kernel's source: arguments[i] points to the kernel's i-th argument.
#define EMULATE(kernel)                                                                                  \
    static void** kernel_arguments;                                                                      \
    static void run_thread() {                                                                           \
        call(kernel, kernel_arguments);                                                                  \
        self().done = block.moved = true;                                                                \
    }                                                                                                    \
    extern "C" int emulate(int blocks, int threads, int shared, int mode, void** arguments) {            \
        kernel_arguments = arguments;                                                                    \
        return run_grid(blocks, threads, shared, mode, run_thread);                                      \
    }
