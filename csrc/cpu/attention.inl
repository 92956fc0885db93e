// Packed causal attention; the equations are in attention_row.inl and kernels/attention.py.
//
// Forward: work item = (sequence, key head, at most kSpan positions).  It turns the keys it needs into panels and takes the rows (position by position,
// the query heads of the key head side by side) kRows at a time.
//
// Backward: work item = (sequence, key head).  With p_ij = e^(s_ij - m_i) / l_i, recomputed (from m and l: a rounded lse would be felt in every
// weight), and delta_i = do_i . o_i:
//     dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - delta_i),  dq_i = scale sum_j ds_ij k_j,  dk_j = sum_i ds_ij (scale q_i),
// i running over the rows of all query heads of the key head, kBlockRows of them and kBlockKeys keys at a time so that p and ds stay in the first
// cache.  A sum is one chain of multiply-adds in each block, counted from the start of the sequence, and the blocks are added in ascending order.

// Tokens 0..n-1 of x (any stride, d neighbours) as panels of 16 tokens, the last one filled up with zeros.
inline void to_panels(const float* x, std::int64_t stride, std::int64_t n, std::int64_t d, float* panels) {
    for (std::int64_t first = 0; first < n; first += kLanes, panels += kLanes * d) {
        over_lanes(d, [&](std::int64_t i, auto lanes) {
            v16 tile[kLanes];
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) {
                tile[t] = first + t < n ? lanes.load(x + (first + t) * stride + i) : v16{};
            }
            transpose(tile);
            for (int t = 0; t < std::min(kLanes, d - i); ++t) {
                store(panels + (i + t) * kLanes, tile[t]);
            }
        });
    }
}

struct AttentionItem {
    std::int64_t query, key;  // where the query of position 0 would be, and the first key
    std::int64_t from, to;    // positions whose rows are wanted
    std::int64_t head;        // key head
    std::int64_t cost;        // twice the keys that its rows see
};

// Items of at most `span` positions, the most expensive first.
inline std::vector<AttentionItem> attention_items(const PackedAttention& a, std::int64_t span) {
    std::vector<AttentionItem> items;
    for (std::int64_t s = 0; s < a.S; ++s) {
        const std::int64_t begin = a.cu_seqlens[s], key = a.cu_seqlens_k[s], n = a.cu_seqlens_k[s + 1] - key, before = n - (a.cu_seqlens[s + 1] - begin);
        for (std::int64_t from = before; from < n; from += span) {
            for (std::int64_t head = 0; head < a.Hkv; ++head) {
                const std::int64_t to = std::min(n, from + span);
                items.push_back({begin - before, key, from, to, head, (to - from) * std::min(from + to, 2 * a.window)});
            }
        }
    }
    std::stable_sort(items.begin(), items.end(), [](const AttentionItem& x, const AttentionItem& y) { return x.cost > y.cost; });
    return items;
}

// Call work(item, workspace) for all items, each thread taking the next one when it is free.
template <typename Work>
void over_items(const std::vector<AttentionItem>& items, const PackedAttention& a, const Work& work) {
    double cost = 0;
    for (const AttentionItem& item : items) {
        cost += static_cast<double>(item.cost * (a.H / a.Hkv) * a.d);
    }
    constexpr double kGrain = 1 << 20;  // multiply-adds, some 10 us, for which another thread is worth waking
    const std::int64_t shares = std::min(std::min<std::int64_t>(a.threads, static_cast<std::int64_t>(items.size())), 1 + static_cast<std::int64_t>(cost / kGrain));
    std::atomic<std::size_t> next{0};
    parallel_for(shares, 1, a.threads, [&](std::int64_t, std::int64_t) {
        Workspace workspace;
        for (std::size_t i = next++; i < items.size(); i = next++) {
            work(items[i], workspace);
        }
    });
}

// Rows first .. first + count - 1 of an item: position by position, at each the query heads of the key head.
struct AttentionRow {
    std::int64_t token, head, position;
};
inline void attention_rows(const AttentionItem& item, std::int64_t repeat, std::int64_t first, std::int64_t count, AttentionRow* rows) {
    std::int64_t position = first / repeat, head = first % repeat;
    for (std::int64_t r = 0; r < count; ++r) {
        rows[r] = {item.query + position, item.head * repeat + head, position};
        if (++head == repeat) {
            head = 0;
            ++position;
        }
    }
}

inline void attention_fwd(const PackedAttention& a, float* out, float* stats) {
    constexpr std::int64_t kSpan = 256;
    const std::int64_t repeat = a.H / a.Hkv, d = a.d, ahead = kBlockRows / repeat;
    over_items(attention_items(a, kSpan), a, [&](const AttentionItem& item, Workspace& workspace) {
        const std::int64_t floats = whole_tiles(item.to) * kLanes * d;
        float *panels = workspace.take(floats + kBlockRows * d + attend_scratch(item.to)), *q = panels + floats;
        const std::int64_t first = first_seen(item.from, a.window) / kLanes * kLanes;
        to_panels(a.k + (item.key + first) * a.k_token + item.head * a.k_head, a.k_token, item.to - first, d, panels + first * d);
        const PanelKeys keys{panels, d};
        const RowValues values{a.v + item.key * a.v_token + item.head * a.v_head, a.v_token};
        for (std::int64_t row = item.from * repeat; row < item.to * repeat; row += kBlockRows) {
            const std::int64_t count = std::min(kBlockRows, item.to * repeat - row);
            AttentionRow rows[kBlockRows];
            attention_rows(item, repeat, row, count, rows);
            Query queries[kBlockRows];
            float m[kBlockRows], l[kBlockRows];
            for (std::int64_t r = 0; r < count; ++r) {
                const auto [token, head, position] = rows[r];
                copy_row(a.q + token * a.q_token + head * a.q_head, d, a.scale, q + r * d);
                prefetch(a.q + (token + ahead) * a.q_token + head * a.q_head, d);
                queries[r] = {position + 1, out + (token * a.H + head) * d, first_seen(position, a.window)};
            }
            attend_all(q, queries, count, d, keys, values, q + kBlockRows * d, m, l);
            for (std::int64_t r = 0; r < count; ++r) {
                float* of_row = stats + 2 * (rows[r].token * a.H + rows[r].head);
                of_row[0] = m[r];
                of_row[1] = l[r];
            }
        }
    });
}
