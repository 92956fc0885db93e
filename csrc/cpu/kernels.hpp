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

// (T, V) with what logprob wants of each row.
struct Logits {
    const float* at;
    std::int64_t stride, T, V;
    const std::int64_t* targets;  // (T,), outside [0, V): skip
    const float* thresholds;      // (T,), with last_kept the support; null: none
    const std::int64_t* last_kept;
    float inverse_temperature;

    const float* row(std::int64_t t) const { return at + t * stride; }
    std::int64_t target(std::int64_t t) const { return targets[t] >= 0 && targets[t] < V ? targets[t] : -1; }
    float threshold(std::int64_t t) const { return thresholds ? thresholds[t] : -__builtin_inff(); }
    std::int64_t last(std::int64_t t) const { return thresholds ? last_kept[t] : V - 1; }
};

// A parameter of sample: one number, or one for each row.
template <typename T>
struct PerRow {
    T value;
    const T* rows;  // null: value
    T operator[](std::int64_t row) const { return rows ? rows[row] : value; }
};
struct Sampling {
    PerRow<float> temperature;  // 0: greedy
    PerRow<std::int64_t> top_k;
    PerRow<double> top_p, min_p;
};
struct Sampled {
    std::int64_t *tokens, *last_kept;
    float *logps, *full_logps, *entropy, *thresholds;
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
    // logprob.inl: argmax may be null
    void (*logprob_fwd)(const Logits& logits, float* logps, float* entropy, float* largest, float* inverse_sum, std::int64_t* argmax, int threads);
    void (*logprob_bwd)(const Logits& logits, const float* dlogps, const float* largest, const float* inverse_sum, float* dlogits,
                        std::int64_t dlogits_stride, int threads);
    // sample.inl: uniforms (B,) in [0, 1)
    void (*sample)(const float* logits, std::int64_t stride, std::int64_t B, std::int64_t V, const Sampling& sampling, const double* uniforms,
                   const Sampled& out, int threads);
    void (*philox_uniform)(const std::int64_t* seeds, const std::int64_t* positions, double* uniforms, std::int64_t count);
};

// ATHANOR_CPU_ISA (avx512, avx2 or base) asks for less than the machine has.
const Kernels& kernels();

}  // namespace athanor::cpu
