// What the CPU kernels look like from Python's side: one table of functions per instruction set, the best one chosen at run time.
//
// All take contiguous fp32 rows unless a stride says otherwise (in floats), and a largest number of threads.  A row's bits depend on that row alone:
// not on the other rows, not on the number of threads.  Shapes and dtypes were checked in Python.
#pragma once

#include <array>
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

// Packed causal attention: sequence s is tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1.  Outputs, gradients and
// stats (T, H, 2: largest score, sum of e^(score - largest)) are contiguous.
struct PackedAttention {
    const float *q, *k, *v;  // (T, H, d), (T, Hkv, d) twice; the strides of their tokens and heads
    std::int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    const std::int32_t* cu_seqlens;
    std::int64_t S, H, Hkv, d;
    float scale;
    int threads;
};

// A paged KV cache: keys (num_blocks, Hkv, block_size, d), and the rows' tables.
struct PagedCache {
    float *keys, *values;
    std::array<std::int64_t, 4> key_strides, value_strides;
    std::int64_t num_blocks, Hkv, block_size, d;
    const std::int32_t* table;  // (R, columns)
    std::int64_t R, columns, table_stride;
    bool names(std::int64_t row, std::int64_t column) const {  // a block that is there
        const std::int32_t block = table[row * table_stride + column];
        return block >= 0 && block < num_blocks;
    }
};

struct PagedAttention {
    PagedCache cache;  // keys with neighbouring tokens, values with neighbouring dimensions, block_size a power of two and a multiple of 16
    const float* q;    // (R, H, d)
    std::int64_t q_row, q_head, H;
    const std::int32_t *seq_lens, *group_offsets, *prefix_lens;  // (R,), (P + 1,), (P,)
    std::int64_t P, limit;
    float scale;
    int threads;
};

// Why a call must not run.
enum Fault { kNoFault = 0, kBadLengths = 1, kBadBlock = 2 };
Fault paged_attention_fault(const PagedAttention&);
// Writes k and v (R, Hkv, d) at the rows' positions, or nothing at all where there is a fault.
Fault kv_append(const PagedCache&, const float* k, const float* v, const std::array<std::int64_t, 2>& k_strides,
                const std::array<std::int64_t, 2>& v_strides, const std::int32_t* positions, int threads);

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

    void (*attention_fwd)(const PackedAttention&, float* out, float* stats);
    void (*attention_bwd)(const PackedAttention&, const float* out, const float* stats, const float* dout, float* dq, float* dk, float* dv);
    void (*paged_attention)(const PagedAttention&, float* out, float* lse);
};

// ATHANOR_CPU_ISA (avx512, avx2 or base) asks for less than the machine has.
const Kernels& kernels();

}  // namespace athanor::cpu
