// Decode attention: `attend` on the blocks of a paged cache, where they lie.  Work item = (kBatch neighbouring rows, key head): the rows of a group are
// neighbours, so the prefix that they share is read from memory once and then from the cache.

struct PagedKeys {
    const float* keys;  // of one head
    const std::int32_t* blocks;
    std::int64_t block_stride, stride;
    int shift;  // block_size = 2^shift
    ATHANOR_INLINE const float* tile(std::int64_t c) const {
        const std::int64_t token = c * kLanes, block = token >> shift;
        return keys + blocks[block] * block_stride + (token - (block << shift));
    }
};

struct PagedValues {
    const float* values;
    const std::int32_t* blocks;
    std::int64_t block_stride, stride, run;
    int shift;
    ATHANOR_INLINE const float* at(std::int64_t first) const { return values + blocks[first >> shift] * block_stride; }
};

// log x for 1 <= x < inf to 1 ulp or so (Cephes: the mantissa between sqrt(1/2) and sqrt(2), a polynomial of degree 8); NaN for NaN.
ATHANOR_INLINE v16 logarithm_above_one(v16 x) {
    const i16 bits = reinterpret_cast<i16>(x) - 0x3f3504f3;  // sqrt(1/2)
    const v16 e = __builtin_convertvector(bits >> 23, v16);
    const v16 f = reinterpret_cast<v16>((bits & 0x7fffff) + 0x3f3504f3) - splat(1), z = f * f;
    v16 p = splat(7.0376836292e-2f);
    p = p * f + splat(-1.1514610310e-1f);
    p = p * f + splat(1.1676998740e-1f);
    p = p * f + splat(-1.2420140846e-1f);
    p = p * f + splat(1.4249322787e-1f);
    p = p * f + splat(-1.6668057665e-1f);
    p = p * f + splat(2.0000714765e-1f);
    p = p * f + splat(-2.4999993993e-1f);
    p = p * f + splat(3.3333331174e-1f);
    p = p * f - splat(0.5f);
    v16 y = f - e * splat(2.12194440e-4f);
    y = y + e * splat(0.693359375f);
    y = y + p * z;
    return x != x ? x : y;
}

inline void paged_attention(const PagedAttention& a, float* out, float* lse) {
    constexpr std::int64_t kBatch = 8;
    const PagedCache& cache = a.cache;
    const std::int64_t repeat = a.H / cache.Hkv, d = cache.d, batches = (cache.R + kBatch - 1) / kBatch;
    std::int64_t longest = 0, tokens = 0;
    for (std::int64_t r = 0; r < cache.R; ++r) {
        longest = std::max<std::int64_t>(longest, a.seq_lens[r]);
        tokens += std::min<std::int64_t>(a.seq_lens[r], a.window);
    }
    int shift = 0;
    while (std::int64_t{1} << shift < cache.block_size) {
        ++shift;
    }
    // A quarter of a million multiply-adds, with their keys and values from L3, take longer than it takes to wake a thread.
    const std::int64_t grain = std::max<std::int64_t>(1, batches * cache.Hkv / (1 + tokens * a.H * d / (1 << 18)));
    parallel_for(batches * cache.Hkv, grain, a.threads, [&](std::int64_t begin, std::int64_t end) {
        Workspace workspace;
        float *q = workspace.take(kBlockRows * d + attend_scratch(longest)), *memory = q + kBlockRows * d;
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t head = item % cache.Hkv, first = item / cache.Hkv * kBatch;
            for (std::int64_t r = first; r < std::min(first + kBatch, cache.R); ++r) {
                const std::int32_t* blocks = cache.table + r * cache.table_stride;
                const PagedKeys keys{cache.keys + head * cache.key_strides[1], blocks, cache.key_strides[0], cache.key_strides[3], shift};
                const PagedValues values{cache.values + head * cache.value_strides[1], blocks, cache.value_strides[0], cache.value_strides[2],
                                         cache.block_size, shift};
                for (std::int64_t h = head * repeat; h < (head + 1) * repeat; h += kBlockRows) {
                    const std::int64_t count = std::min(kBlockRows, (head + 1) * repeat - h);
                    Query queries[kBlockRows];
                    float m[kBlockRows], l[kBlockRows];
                    for (std::int64_t i = 0; i < count; ++i) {
                        const std::int64_t at = r * a.H + h + i;
                        copy_row(a.q + r * a.q_row + (h + i) * a.q_head, d, a.scale, q + i * d);
                        queries[i] = {a.seq_lens[r], out + at * d, first_seen(a.seq_lens[r] - 1, a.window)};
                    }
                    if (a.seq_lens[r] > 0) {
                        attend_all(q, queries, count, d, keys, values, memory, m, l);
                        over_lanes(count, [&](std::int64_t i, auto n) {
                            n.store(lse + r * a.H + h + i, n.load(m + i) + logarithm_above_one(n.load(l + i, 1)));
                        });
                    } else {
                        over_lanes(count * d, [&](std::int64_t i, auto n) { n.store(queries[0].out + i, v16{}); });
                        over_lanes(count, [&](std::int64_t i, auto n) { n.store(lse + r * a.H + h + i, splat(-__builtin_inff())); });
                    }
                }
            }
        }
    });
}
