// The backward of attention.inl; see there.

constexpr std::int64_t kBlockKeys = 128;
constexpr int kPairs = kRows / 2;  // vectors in a tile of two products at once
constexpr std::int64_t kWeightsStride = kBlockKeys + kLanes;  // not a power of two: a column of p does not fall on few sets of the cache

// p and ds of R rows and keys 16 tile .. 16 (tile + C) - 1, 0 but for keys first[r] .. n[r] - 1 of row r: q, dout (R x d each); m, 1 / l and delta of each.
template <int R, int C>
ATHANOR_INLINE void weigh(const float* q, const float* dout, std::int64_t width, std::int64_t d, const PanelKeys& keys, const PanelKeys& values,
                          std::int64_t tile, const std::int64_t* first, const std::int64_t* n, const float* m, const float* share,
                          const float* delta, float* p, float* ds) {
    v16 s[R][C] = {}, dp[R][C] = {};
    const float *k[C], *v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        k[c] = keys.tile(tile + c);
        v[c] = values.tile(tile + c);
    }
    for (std::int64_t i = 0; i < d; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const v16 a = splat(q[r * width + i]), b = splat(dout[r * width + i]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                s[r][c] += a * load(k[c] + i * kLanes);
                dp[r][c] += b * load(v[c] + i * kLanes);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const std::int64_t seen = n[r] - (tile + c) * kLanes, unseen = first[r] - (tile + c) * kLanes;
            v16 weight = exponential_below_one(s[r][c] - splat(m[r])) * splat(share[r]), slope = weight * (dp[r][c] - splat(delta[r]));
            if (unseen > 0) {
                weight = keep_from(weight, unseen, 0);
                slope = keep_from(slope, unseen, 0);
            }
            store(p + r * kWeightsStride + c * kLanes, seen < kLanes ? keep_below(weight, seen, 0) : weight);
            store(ds + r * kWeightsStride + c * kLanes, seen < kLanes ? keep_below(slope, seen, 0) : slope);
        }
    }
}

// y[r][..] += sum_j w[r * w_row + j * w_step] x[j][..] for R rows and C vectors, j = from .. to - 1; x and y have rows of `width`.  Twice, for two
// w, x and y: the loads of one hide behind the products of the other.
template <int R, int C, int N>
ATHANOR_INLINE void accumulate(const float* const (&w)[N], std::int64_t w_row, std::int64_t w_step, const float* const (&x)[N], float* const (&y)[N],
                               std::int64_t width, std::int64_t from, std::int64_t to) {
    v16 sum[N][R][C] = {};
    for (std::int64_t j = from; j < to; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            v16 b[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                b[c] = load(x[i] + j * width + c * kLanes);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const v16 a = splat(w[i][r * w_row + j * w_step]);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    sum[i][r][c] += a * b[c];
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                float* at = y[i] + r * width + c * kLanes;
                store(at, load(at) + sum[i][r][c]);
            }
        }
    }
}

// All vectors of rows of `width`: pairs of them as far as they go.
template <int N>
ATHANOR_INLINE void accumulate_rows(const float* const (&w)[N], std::int64_t w_row, std::int64_t w_step, const float* const (&x)[N],
                                    float* const (&y)[N], std::int64_t width, std::int64_t from, std::int64_t to) {
    for (std::int64_t i = 0; i < width; i += kPairs * kLanes) {
        const float* from_x[N];
        float* to_y[N];
        for (int k = 0; k < N; ++k) {
            from_x[k] = x[k] + i;
            to_y[k] = y[k] + i;
        }
        with_count<kPairs>(std::min<std::int64_t>(kPairs, (width - i) / kLanes), [&](auto C) {
            accumulate<kRows, C.value, N>(w, w_row, w_step, from_x, to_y, width, from, to);
        });
    }
}

// One sequence and key head.  Within it a NaN may reach the gradients of tokens that did not see it: weights are 0 there, and 0 x NaN is NaN.
inline void attention_bwd_item(const PackedAttention& a, const AttentionItem& item, Workspace& workspace, const float* out, const float* stats,
                               const float* dout, float* dq, float* dk, float* dv) {
    const std::int64_t repeat = a.H / a.Hkv, d = a.d, n = item.to, tiles = whole_tiles(n), width = whole_tiles(d) * kLanes, ahead = kBlockRows / repeat;
    const std::int64_t start = item.from * repeat, rows = n * repeat, panel = tiles * kLanes * d, table = tiles * kLanes * width, block = kBlockRows * width;
    float* memory = workspace.take(2 * panel + 3 * table + 3 * block + 2 * kBlockRows * kWeightsStride);
    const auto part = [&](std::int64_t floats) { return (memory += floats) - floats; };
    float *k_rows = part(table), *dk_rows = part(table), *dv_rows = part(table), *q = part(block), *g = part(block), *dq_rows = part(block);
    float *k_panels = part(panel), *v_panels = part(panel), *p = part(kBlockRows * kWeightsStride), *ds = part(kBlockRows * kWeightsStride);
    std::memset(k_rows, 0, sizeof(float) * static_cast<std::size_t>(3 * table + 3 * block));  // the lanes beyond d stay 0
    const float *k = a.k + item.key * a.k_token + item.head * a.k_head, *v = a.v + item.key * a.v_token + item.head * a.v_head;
    to_panels(k, a.k_token, n, d, k_panels);
    to_panels(v, a.v_token, n, d, v_panels);
    for (std::int64_t j = 0; j < n; ++j) {
        copy_row(k + j * a.k_token, d, 1, k_rows + j * width);
    }
    const PanelKeys keys{k_panels, d}, values{v_panels, d};

    for (std::int64_t first = start; first < rows; first += kBlockRows) {
        const std::int64_t count = std::min(kBlockRows, rows - first);
        AttentionRow at[kBlockRows];
        attention_rows(item, repeat, first, count, at);
        float m[kBlockRows] = {}, share[kBlockRows] = {}, delta[kBlockRows] = {};
        std::int64_t begins[kBlockRows] = {}, sees[kBlockRows] = {};  // keys; none for the rows that fill up the last tile
        for (std::int64_t r = 0; r < count; ++r) {
            const auto [token, head, position] = at[r];
            const float *grad = dout + (token * a.H + head) * d, *o = out + (token * a.H + head) * d;
            copy_row(a.q + token * a.q_token + head * a.q_head, d, a.scale, q + r * width);
            copy_row(grad, d, 1, g + r * width);
            prefetch(a.q + (token + ahead) * a.q_token + head * a.q_head, d);
            prefetch(grad + ahead * a.H * d, d);
            prefetch(o + ahead * a.H * d, d);
            v16 product = {};
            over_lanes(d, [&](std::int64_t i, auto n) { product += n.load(grad + i) * n.load(o + i); });
            delta[r] = sum(product);
            m[r] = stats[2 * (token * a.H + head)];
            share[r] = 1 / stats[2 * (token * a.H + head) + 1];
            begins[r] = first_seen(position, a.window);
            sees[r] = position + 1;
        }
        std::memset(dq_rows, 0, sizeof(float) * static_cast<std::size_t>(block));
        const std::int64_t seen = sees[count - 1];
        for (std::int64_t from = begins[0] / kBlockKeys * kBlockKeys; from < seen; from += kBlockKeys) {
            const std::int64_t to = std::min(seen, from + kBlockKeys);
            for (std::int64_t r = 0; r < count; r += kRows) {
                const std::int64_t end = std::min(to, sees[std::min(r + kRows, count) - 1]), last_tile = whole_tiles(end);
                float *p_tile = p + r * kWeightsStride - from, *ds_tile = ds + r * kWeightsStride - from;
                for (std::int64_t tile = from / kLanes; tile < last_tile; tile += kPairs) {
                    with_count<kPairs>(std::min<std::int64_t>(kPairs, last_tile - tile), [&](auto C) {
                        weigh<kRows, C.value>(q + r * width, g + r * width, width, d, keys, values, tile, begins + r, sees + r, m + r, share + r, delta + r,
                                              p_tile + tile * kLanes, ds_tile + tile * kLanes);
                    });
                }
                accumulate_rows<1>({ds_tile}, kWeightsStride, 1, {k_rows}, {dq_rows + r * width}, width, from, end);
            }
            for (std::int64_t j = from; j < to; j += kRows) {  // kRows keys, and the rows that see the first of them
                accumulate_rows<2>({p + j - from, ds + j - from}, 1, kWeightsStride, {g, q}, {dv_rows + j * width, dk_rows + j * width}, width,
                                   std::max<std::int64_t>(0, j * repeat - first), count);
            }
        }
        for (std::int64_t r = 0; r < count; ++r) {
            copy_row(dq_rows + r * width, d, a.scale, dq + (at[r].token * a.H + at[r].head) * d);
        }
    }
    for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t at = ((item.key + j) * a.Hkv + item.head) * d;
        copy_row(dk_rows + j * width, d, 1, dk + at);
        copy_row(dv_rows + j * width, d, 1, dv + at);
    }
}

inline void attention_bwd(const PackedAttention& a, const float* out, const float* stats, const float* dout, float* dq, float* dk, float* dv) {
    over_items(attention_items(a, std::numeric_limits<std::int64_t>::max() / 2), a, [&](const AttentionItem& item, Workspace& workspace) {
        attention_bwd_item(a, item, workspace, out, stats, dout, dq, dk, dv);
    });
}
