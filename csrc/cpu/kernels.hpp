// What the CPU kernels look like from Python's side: one table of functions per instruction set, the best one chosen at run time.
//
// All take contiguous fp32 rows unless a stride says otherwise (in floats), and a largest number of threads.  A row's bits depend on that row alone:
// not on the other rows, not on the number of threads.  Shapes and dtypes were checked in Python.
#pragma once

#include <cstdint>

namespace athanor::cpu {

// Row r of a tensor whose last axis lies in neighbours and whose other axes form two strides at most.
struct Rows {
    const float* at;  // null: there is no such tensor
    std::int64_t inner, outer_stride, inner_stride;
    const float* row(std::int64_t r) const { return at + r / inner * outer_stride + r % inner * inner_stride; }
};

// (T, count, d): row t * count + h is head h of token t.
struct Heads {
    Rows rows;
    std::int64_t count;
    const float* weight;  // (d,) of the norm; null: none
    float* out;           // (T, count, d) contiguous
};

// (T, d / 2) each.
struct Angles {
    const float *cos, *sin;
    std::int64_t cos_stride, sin_stride;
};

struct Kernels {
    const char* isa;
    void (*swiglu_fwd)(const float* gate_up, float* y, std::int64_t T, std::int64_t F, std::int64_t stride, int threads);
    void (*swiglu_bwd)(const float* gate_up, const float* dy, float* dgate_up, std::int64_t T, std::int64_t F, std::int64_t stride, int threads);

    // rmsnorm.inl: s is written where there is a residual; dweight may be null
    void (*rmsnorm_fwd)(Rows x, Rows residual, const float* weight, float* s, float* y, float* rstd, std::int64_t N, std::int64_t D, float eps,
                        int threads);
    void (*rmsnorm_bwd)(Rows s, Rows dy, Rows ds, const float* weight, const float* rstd, float* dx, float* dweight, std::int64_t N, std::int64_t D,
                        int threads);
    // rope.inl
    void (*rope)(const Heads& q, const Heads& k, const Angles& angles, std::int64_t T, std::int64_t d, float eps, bool inverse, int threads);
    void (*rope_norm_bwd)(const Heads& x, Rows dy, const Angles& angles, float* dweight, std::int64_t T, std::int64_t d, float eps, int threads);
};

// ATHANOR_CPU_ISA (avx512, avx2 or base) asks for less than the machine has.
const Kernels& kernels();

}  // namespace athanor::cpu
