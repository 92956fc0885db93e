// What concerns a paged KV cache and computes nothing: whether a call's lengths and blocks are there, and appending to it.
#include <algorithm>
#include <cstring>

#include "attention.hpp"
#include "team.hpp"

namespace athanor::cpu {
namespace {

bool bad_lengths(const PagedAttention& a) {
    const PagedCache& cache = a.cache;
    if (std::any_of(a.seq_lens, a.seq_lens + cache.R, [&](std::int32_t n) { return n < 0 || n > a.limit; })) {
        return true;
    }
    if (a.P && (a.group_offsets[0] < 0 || a.group_offsets[a.P] > cache.R || !std::is_sorted(a.group_offsets, a.group_offsets + a.P + 1))) {
        return true;
    }
    for (std::int64_t p = 0; p < a.P; ++p) {
        const std::int32_t* leader = nullptr;
        for (std::int64_t r = a.group_offsets[p]; r < a.group_offsets[p + 1]; ++r) {
            const std::int32_t* blocks = cache.table + r * cache.table_stride;
            if (a.seq_lens[r] == 0) {
                continue;
            }
            if (a.seq_lens[r] < a.prefix_lens[p]) {
                return true;
            }
            leader = leader ? leader : blocks;
            if (!std::equal(blocks, blocks + std::max<std::int64_t>(0, a.prefix_lens[p] / cache.block_size), leader)) {
                return true;
            }
        }
    }
    return false;
}

void copy_head(const float* x, std::int64_t d, float* y, std::int64_t stride) {
    for (std::int64_t i = 0; i < d; ++i) {
        y[i * stride] = x[i];
    }
}

}  // namespace

bool in_order(const PagedAttention& a) {
    if (bad_lengths(a)) {
        return false;
    }
    for (std::int64_t r = 0; r < a.cache.R; ++r) {
        for (std::int64_t column = 0; column * a.cache.block_size < a.seq_lens[r]; ++column) {
            if (!a.cache.names(r, column)) {
                return false;
            }
        }
    }
    return true;
}

bool kv_append(const PagedCache& cache, const float* k, const float* v, const std::array<std::int64_t, 2>& k_strides,
                const std::array<std::int64_t, 2>& v_strides, const std::int32_t* positions, int threads) {
    for (std::int64_t r = 0; r < cache.R; ++r) {
        const std::int64_t column = positions[r] / cache.block_size;
        if (positions[r] >= 0 && (column >= cache.columns || !cache.names(r, column))) {
            return false;
        }
    }
    parallel_for(cache.R, 16384 / (cache.Hkv * cache.d + 1) + 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
            if (positions[r] < 0) {
                continue;
            }
            const std::int64_t block = cache.table[r * cache.table_stride + positions[r] / cache.block_size], slot = positions[r] % cache.block_size;
            const auto &ks = cache.key_strides, &vs = cache.value_strides;
            for (std::int64_t h = 0; h < cache.Hkv; ++h) {
                copy_head(k + r * k_strides[0] + h * k_strides[1], cache.d, cache.keys + block * ks[0] + h * ks[1] + slot * ks[2], ks[3]);
                copy_head(v + r * v_strides[0] + h * v_strides[1], cache.d, cache.values + block * vs[0] + h * vs[1] + slot * vs[2], vs[3]);
            }
        }
    });
    return true;
}

}  // namespace athanor::cpu
