// What the attention kernels take: packed sequences, or rows that decode over a paged KV cache.
#pragma once

#include <array>
#include <cstdint>

namespace athanor::cpu {

// Packed causal attention: sequence s has the queries cu_seqlens[s] .. cu_seqlens[s + 1] - 1, and the keys that cu_seqlens_k says; where there are more
// keys, the queries are those of the last ones.  Outputs, gradients and
// stats (T, H, 2: largest score, sum of e^(score - largest)) are contiguous.
struct PackedAttention {
    const float *q, *k, *v;  // (T, H, d), (U, Hkv, d) twice; the strides of their tokens and heads
    std::int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    const std::int32_t *cu_seqlens, *cu_seqlens_k;
    std::int64_t S, H, Hkv, d;
    float scale;
    std::int64_t window;  // a token sees so many: itself and those before it
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
    std::int64_t window;  // last tokens that a row sees
    int threads;
};

// Whether lengths, groups and the blocks that they need are in order; if not, nothing must be read.
bool in_order(const PagedAttention&);
// Write k and v (R, Hkv, d) at the rows' positions; nothing at all, and false, where a position or its block is not there.
bool kv_append(const PagedCache&, const float* k, const float* v, const std::array<std::int64_t, 2>& k_strides,
                const std::array<std::int64_t, 2>& v_strides, const std::int32_t* positions, int threads);

}  // namespace athanor::cpu
