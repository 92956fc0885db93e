// What the CPU kernels look like from Python's side: one table of functions per instruction set, the best one chosen at run time.
//
// All take contiguous fp32 rows unless a stride says otherwise (in floats), and a largest number of threads.  A row's bits depend on that row alone:
// not on the other rows, not on the number of threads.  Shapes and dtypes were checked in Python.
#pragma once

#include <cstdint>

#include "attention.hpp"

namespace athanor::cpu {

struct Kernels {
    const char* isa;

    void (*attention_fwd)(const PackedAttention&, float* out, float* stats);
    void (*attention_bwd)(const PackedAttention&, const float* out, const float* stats, const float* dout, float* dq, float* dk, float* dv);
    void (*paged_attention)(const PagedAttention&, float* out, float* lse);

    void (*swiglu_fwd)(const float* gate_up, float* y, std::int64_t T, std::int64_t F, std::int64_t stride, int threads);
    void (*swiglu_bwd)(const float* gate_up, const float* dy, float* dgate_up, std::int64_t T, std::int64_t F, std::int64_t stride, int threads);
};

// ATHANOR_CPU_ISA (avx512, avx2 or base) asks for less than the machine has.
const Kernels& kernels();

}  // namespace athanor::cpu
