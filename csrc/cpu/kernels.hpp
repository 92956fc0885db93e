// What the CPU kernels look like from Python's side: one table of functions per instruction set, the best one chosen at run time.
//
// All take contiguous fp32 rows unless a stride says otherwise (in floats), and a largest number of threads.  A row's bits depend on that row alone:
// not on the other rows, not on the number of threads.  Shapes and dtypes were checked in Python.
#pragma once

#include <cstdint>

#include "attention.hpp"
#include "rows.hpp"

namespace athanor::cpu {

struct Kernels {
    const char* isa;
    void (*swiglu_fwd)(const float* gate_up, float* y, std::int64_t T, std::int64_t F, std::int64_t stride, int threads);
    // y may be null
    void (*swiglu_bwd)(const float* gate_up, const float* dy, float* dgate_up, float* y, std::int64_t T, std::int64_t F, std::int64_t stride,
                       int threads);
    // linear.inl: x (T, K), w (N, K), dy (T, N); bias may be null; add: to what dw has
    void (*linear_fwd)(Matrix x, Matrix w, const float* bias, float* y, std::int64_t T, std::int64_t N, std::int64_t K, int threads);
    void (*linear_dx)(Matrix dy, Matrix w, float* dx, std::int64_t T, std::int64_t N, std::int64_t K, int threads);
    void (*linear_dw)(Matrix dy, Matrix x, float* dw, std::int64_t T, std::int64_t N, std::int64_t K, bool add, int threads);
    // The rows of x (T, K) from ends[e - 1] (0 for e = 0) to ends[e] by w[e] (N, K) of E, and the other way round; what lies in no group is 0
    void (*grouped_fwd)(Matrix x, const float* w, float* y, const Groups& groups, std::int64_t N, std::int64_t K, int threads);
    void (*grouped_dx)(Matrix dy, const float* w, float* dx, const Groups& groups, std::int64_t N, std::int64_t K, int threads);
    void (*grouped_dw)(Matrix dy, Matrix x, float* dw, const Groups& groups, std::int64_t N, std::int64_t K, int threads);
    // rmsnorm.inl: s is written where there is a residual; dweight may be null
    void (*rmsnorm_fwd)(Rows x, Rows residual, const float* weight, float* s, float* y, float* rstd, std::int64_t N, std::int64_t D, float eps,
                        int threads);
    void (*rmsnorm_bwd)(Rows s, Rows dy, Rows ds, const float* weight, const float* rstd, float* dx, float* dweight, std::int64_t N, std::int64_t D,
                        int threads);
    // rope.inl; rotation: positions int64 if wide, else int32, cos and sin (T, half)
    void (*rotation)(const void* positions, bool wide, const float* frequencies, float factor, float* cos, float* sin, std::int64_t T,
                     std::int64_t half, int threads);
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
    // attention.inl, attention_bwd.inl, paged_attention.inl
    void (*attention_fwd)(const PackedAttention&, float* out, float* stats);
    void (*attention_bwd)(const PackedAttention&, const float* out, const float* stats, const float* dout, float* dq, float* dk, float* dv);
    void (*paged_attention)(const PagedAttention&, float* out, float* lse);
};

// What a decode step has of each of its rows; kernels/advance_rows.py says what becomes of it.
struct DecodeRows {
    std::int64_t *status, *generated, *slots, *last;
    std::int32_t* lengths;
    const std::int32_t* max_lengths;
    const std::int64_t* eos;
    std::int64_t num_eos;
    const bool* drawing;    // null: all
    std::int64_t* streaks;  // null: nothing stops by repetition
    const std::int64_t* streak_limits;
    const float *streak_logps, *full_logps;
    const std::int64_t* tokens;
    const float* logps;
    std::int64_t* token_ring;  // slot s of row r at s * ring_stride + r
    float* logp_ring;
    std::int64_t ring_stride;
};
void advance_rows(const DecodeRows& rows, std::int64_t count);
void row_positions(const std::int64_t* status, const std::int32_t* lengths, std::int32_t* positions, std::int32_t* ends, std::int64_t count);
// out (count, width) = table (num_rows, width)[indices]; false, at the first index that is not there.
bool take_rows(const float* table, std::int64_t num_rows, std::int64_t width, const std::int64_t* indices, std::int64_t count, float* out);

// ATHANOR_CPU_ISA (avx512, avx2 or base) asks for less than the machine has.
const Kernels& kernels();

}  // namespace athanor::cpu
