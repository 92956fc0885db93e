// Products of matrices: y = x w^T + bias, dx = dy w, dw = dy^T x.  All three are out[j, l] = sum over s of scalar(j, s) * panel(s, l), where a panel
// has 64 of the lanes l, packed in a thread's own memory (for y: rows of w, transposed; else columns of w or x).  Few rows of x go the other way
// round: then they are the lanes, transposed, and w is read where it lies.
//
// A sum starts anew every kDepth terms, each run in ascending order, and the runs are added in theirs: its bits depend neither on which of these ways
// it goes, nor on where in a panel the lane is, nor on the other rows, nor on the number of threads.

constexpr std::int64_t kPanel = 64, kGroup = 48, kDepth = 512;
constexpr std::int64_t kPackedFloats = 96 * 1024;  // of panels that a thread goes through for each group of rows: they stay in its L2
constexpr std::int64_t kFewRows = 192;             // for each thread: with fewer, transposing w would show
// One tile fills the registers: kTileJ x kTileV sums of 16 lanes, and kTileV lanes of the panel.
#if defined(ATHANOR_AVX512)
constexpr int kTileJ = 6, kTileV = 4;
#elif defined(ATHANOR_AVX2)
constexpr int kTileJ = 6, kTileV = 1;
#else
constexpr int kTileJ = 2, kTileV = 1;
#endif

// scalar(j, s) = at[j * j_stride + s * s_stride].
struct Scalars {
    const float* at;
    std::int64_t j_stride, s_stride;
    Scalars from(std::int64_t j, std::int64_t s) const { return {at + j * j_stride + s * s_stride, j_stride, s_stride}; }
};

// Where sums go: at[j * stride + l], of `lanes` lanes; the first run of a sum replaces what is there unless `add`, the last one adds bias[l] (null: 0).
struct Sums {
    float* at;
    std::int64_t stride, lanes;
    bool add;
    const float* bias = nullptr;
};

// The sums of `depth` terms, for J rows and V vectors.
template <int J, int V>
inline void product_tile(const float* panel, Scalars scalars, std::int64_t depth, Sums out) {
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            __builtin_prefetch(out.at + j * out.stride + v * kLanes, 1);
        }
    }
    v16 sum[J][V]{};
    for (std::int64_t s = 0; s < depth; ++s) {
        // Scalars seldom lie in L2, and no prefetcher of the machine follows short rows: ask for the next tile's once a cache line, or for those of a
        // later term.
        if (scalars.s_stride != 1) {
            __builtin_prefetch(scalars.at + (s + 2 * kLanes) * scalars.s_stride);
        } else if (s % kLanes == 0) {
#pragma GCC unroll 6
            for (int j = 0; j < J; ++j) {
                __builtin_prefetch(scalars.at + (j + J) * scalars.j_stride + s);
            }
        }
        v16 lanes[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            lanes[v] = load(panel + s * kPanel + v * kLanes);
        }
#pragma GCC unroll 6
        for (int j = 0; j < J; ++j) {
            const v16 factor = splat(scalars.at[j * scalars.j_stride + s * scalars.s_stride]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                sum[j][v] += factor * lanes[v];
            }
        }
    }
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
        float* row = out.at + j * out.stride;
        if (out.lanes >= V * kLanes) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const v16 whole = out.add ? load(row + v * kLanes) + sum[j][v] : sum[j][v];
                store(row + v * kLanes, out.bias ? whole + load(out.bias + v * kLanes) : whole);
            }
        } else {
            v16 left[V];  // in memory: which of them is the last is not known before
            std::memcpy(left, sum[j], sizeof left);
            for (std::int64_t v = 0; v < V; ++v) {
                const std::int64_t n = std::min(kLanes, out.lanes - v * kLanes);
                const v16 whole = out.add ? load_first(row + v * kLanes, n) + left[v] : left[v];
                store_first(row + v * kLanes, n, out.bias ? whole + load_first(out.bias + v * kLanes, n) : whole);
            }
        }
    }
}

template <int J>
inline void product_tiles(const float* panel, Scalars scalars, std::int64_t depth, Sums out) {
    while (out.lanes > 0) {
        const int now = static_cast<int>(std::min<std::int64_t>((out.lanes + kLanes - 1) / kLanes, kTileV));
        switch (now) {
            case 1: product_tile<J, 1>(panel, scalars, depth, out); break;
            case 2: product_tile<J, std::min(2, kTileV)>(panel, scalars, depth, out); break;
            case 3: product_tile<J, std::min(3, kTileV)>(panel, scalars, depth, out); break;
            default: product_tile<J, std::min(4, kTileV)>(panel, scalars, depth, out);
        }
        panel += now * kLanes;
        out.at += now * kLanes;
        out.lanes -= now * kLanes;
        out.bias = out.bias ? out.bias + now * kLanes : nullptr;
    }
}

// All `depth` terms of num_j rows by one panel.
inline void product_rows(const float* panel, Scalars scalars, std::int64_t num_j, std::int64_t depth, Sums out) {
    for (std::int64_t s = 0; s < depth || s == 0; s += kDepth) {
        const std::int64_t run = std::min(kDepth, depth - s);
        const bool add = out.add || s > 0;
        for (std::int64_t j = 0; j < num_j;) {
            const Sums here{out.at + j * out.stride, out.stride, out.lanes, add, s + run == depth ? out.bias : nullptr};
            if (num_j - j >= kTileJ) {
                product_tiles<kTileJ>(panel + s * kPanel, scalars.from(j, s), run, here);
                j += kTileJ;
            } else {
                product_tiles<1>(panel + s * kPanel, scalars.from(j, s), run, here);
                j += 1;
            }
        }
    }
}

// out (num_j, num_l), with a thread's share of the rows.  pack(panels, distance from panel to panel, first lane, number of lanes, first term, number of
// terms) fills panels; what lies behind their last lane may be anything.
template <typename Pack>
inline void product(Scalars scalars, std::int64_t num_j, std::int64_t num_l, std::int64_t depth, Sums out, int threads, Pack&& pack) {
    const std::int64_t tiles = (num_j + kTileJ - 1) / kTileJ;
    const std::int64_t slab = depth <= 2 * kDepth ? depth : kDepth, panel = slab * kPanel;
    const std::int64_t panels = std::clamp<std::int64_t>(kPackedFloats / std::max<std::int64_t>(panel, 1), 1, (num_l + kPanel - 1) / kPanel);
    parallel_for(tiles, 100000 / (kTileJ * num_l * depth + 1) + 1, threads, [&](std::int64_t begin, std::int64_t end) {
        Workspace workspace;
        float* packed = workspace.take(panels * panel);
        const std::int64_t first = begin * kTileJ, last = std::min(end * kTileJ, num_j);
        for (std::int64_t s = 0; s < depth || s == 0; s += std::max<std::int64_t>(slab, 1)) {
            const std::int64_t terms = std::min(slab, depth - s);
            for (std::int64_t l = 0; l < num_l; l += panels * kPanel) {
                const std::int64_t lanes = std::min(panels * kPanel, num_l - l);
                pack(packed, panel, l, lanes, s, terms);
                for (std::int64_t j = first; j < last; j += kGroup) {
                    for (std::int64_t p = 0; p < lanes; p += kPanel) {
                        float* at = out.at + j * out.stride + l + p;
                        const float* bias = out.bias && s + terms == depth ? out.bias + l + p : nullptr;
                        product_rows(packed + p * slab, scalars.from(j, s), std::min(kGroup, last - j), terms,
                                     {at, out.stride, std::min(kPanel, lanes - p), out.add || s > 0, bias});
                    }
                }
            }
        }
    });
}

// 16 x 16 floats from `from`, transposed; num_rows of it are there, num_columns of each are wanted, the rest is 0.
ATHANOR_INLINE void transpose_block(const float* from, std::int64_t from_stride, std::int64_t num_rows, std::int64_t num_columns, v16 (&block)[kLanes]) {
    if (num_rows >= kLanes && num_columns >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            block[i] = load(from + i * from_stride);
        }
    } else {
        for (int i = 0; i < kLanes; ++i) {
            block[i] = i < num_rows ? load_first(from + i * from_stride, std::min(num_columns, kLanes)) : v16{};
        }
    }
    transpose(block);
}

// Lanes are rows of `rows`.
inline void pack_transposed(Matrix rows, float* panels, std::int64_t distance, std::int64_t l, std::int64_t num_lanes, std::int64_t from,
                            std::int64_t terms) {
    for (std::int64_t v = 0; v < num_lanes; v += kLanes) {
        float* to = panels + v / kPanel * distance + v % kPanel;
        for (std::int64_t k = 0; k < terms; k += kLanes) {
            v16 block[kLanes];
            transpose_block(rows.at + (l + v) * rows.stride + from + k, rows.stride, num_lanes - v, terms - k, block);
            for (std::int64_t i = 0; i < std::min(kLanes, terms - k); ++i) {
                store(to + (k + i) * kPanel, block[i]);
            }
        }
    }
}

// y of few rows: lanes are rows of x, j rows of w.
inline void linear_few(Matrix x, Matrix w, const float* bias, float* y, std::int64_t T, std::int64_t N, std::int64_t K, int threads) {
    const std::int64_t chunks = (N + kGroup - 1) / kGroup, panels = (T + kPanel - 1) / kPanel;
    for (std::int64_t s = 0; s < K || s == 0; s += kDepth) {
        const std::int64_t terms = std::min(kDepth, K - s);
        const std::int64_t grain = 100000 / (std::min(N, kGroup) * std::min(T, kPanel) * terms + 1) + 1;
        parallel_for(chunks * panels, grain, threads, [&](std::int64_t begin, std::int64_t end) {
            Workspace workspace;
            float* sums = workspace.take(kGroup * kPanel + terms * kPanel);
            float* panel = sums + kGroup * kPanel;
            for (std::int64_t unit = begin; unit < end; ++unit) {
                const std::int64_t t = unit / chunks * kPanel, n = unit % chunks * kGroup;
                const std::int64_t num_rows = std::min(kPanel, T - t), num_columns = std::min(kGroup, N - n);
                if (unit == begin || n == 0) {
                    pack_transposed(x, panel, 0, t, num_rows, s, terms);
                }
                const std::int64_t lanes = (num_rows + kLanes - 1) / kLanes * kLanes;
                product_rows(panel, Scalars{w.at, w.stride, 1}.from(n, s), num_columns, terms, {sums, kPanel, lanes, false});
                for (std::int64_t c = 0; c < num_columns; c += kLanes) {
                    const std::int64_t columns = std::min(kLanes, num_columns - c);
                    const v16 added = bias && s + terms == K ? load_first(bias + n + c, columns) : v16{};
                    for (std::int64_t v = 0; v < num_rows; v += kLanes) {
                        v16 block[kLanes];
                        transpose_block(sums + c * kPanel + v, kPanel, columns, kLanes, block);
                        for (std::int64_t i = 0; i < std::min(kLanes, num_rows - v); ++i) {
                            float* out = y + (t + v + i) * N + n + c;
                            v16 row = s == 0 ? block[i] : load_first(out, columns) + block[i];
                            row = bias && s + terms == K ? row + added : row;
                            columns == kLanes ? store(out, row) : store_first(out, columns, row);
                        }
                    }
                }
            }
        });
    }
}

inline void linear_fwd(Matrix x, Matrix w, const float* bias, float* y, std::int64_t T, std::int64_t N, std::int64_t K, int threads) {
    if (T < kFewRows * threads) {
        linear_few(x, w, bias, y, T, N, K, threads);
        return;
    }
    product({x.at, x.stride, 1}, T, N, K, {y, N, N, false, bias}, threads,
            [=](float* panels, std::int64_t distance, std::int64_t n, std::int64_t num_columns, std::int64_t from, std::int64_t terms) {
                pack_transposed(w, panels, distance, n, num_columns, from, terms);
            });
}

// Lanes are columns of `columns` (depth, num_l), out is (num_j, num_l): dx from w, dw from x.
inline void product_of_columns(Scalars scalars, Matrix columns, float* out, std::int64_t num_j, std::int64_t num_l, std::int64_t depth, bool add,
                               int threads) {
    product(scalars, num_j, num_l, depth, {out, num_l, num_l, add}, threads,
            [=](float* panels, std::int64_t distance, std::int64_t l, std::int64_t num_lanes, std::int64_t from, std::int64_t terms) {
                for (std::int64_t s = 0; s < terms; ++s) {
                    const float* row = columns.at + (from + s) * columns.stride + l;
                    over_lanes(num_lanes, [&](std::int64_t i, auto n) {
                        store(panels + i / kPanel * distance + s * kPanel + i % kPanel, n.load(row + i));
                    });
                }
            });
}

inline void linear_dx(Matrix dy, Matrix w, float* dx, std::int64_t T, std::int64_t N, std::int64_t K, int threads) {
    product_of_columns({dy.at, dy.stride, 1}, w, dx, T, K, N, false, threads);
}

inline void linear_dw(Matrix dy, Matrix x, float* dw, std::int64_t T, std::int64_t N, std::int64_t K, bool add, int threads) {
    product_of_columns({dy.at, 1, dy.stride}, x, dw, N, K, T, add, threads);
}

// Call body(expert, first row, number of rows) for all groups that have any, and set to 0 what of out (T, width) lies in none.
template <typename Body>
inline void over_groups(const Groups& groups, float* out, std::int64_t width, Body&& body) {
    const std::int64_t first = groups.at(0), end = groups.at(groups.E);
    std::fill(out, out + first * width, 0.0f);
    std::fill(out + end * width, out + groups.T * width, 0.0f);
    for (std::int64_t e = 0; e < groups.E; ++e) {
        const std::int64_t from = groups.at(e), count = groups.at(e + 1) - from;
        if (count > 0) {
            body(e, from, count);
        }
    }
}

inline void grouped_fwd(Matrix x, const float* w, float* y, const Groups& groups, std::int64_t N, std::int64_t K, int threads) {
    over_groups(groups, y, N, [=](std::int64_t e, std::int64_t from, std::int64_t count) {
        linear_fwd({x.at + from * x.stride, x.stride}, {w + e * N * K, K}, nullptr, y + from * N, count, N, K, threads);
    });
}

inline void grouped_dx(Matrix dy, const float* w, float* dx, const Groups& groups, std::int64_t N, std::int64_t K, int threads) {
    over_groups(groups, dx, K, [=](std::int64_t e, std::int64_t from, std::int64_t count) {
        linear_dx({dy.at + from * dy.stride, dy.stride}, {w + e * N * K, K}, dx + from * K, count, N, K, threads);
    });
}

inline void grouped_dw(Matrix dy, Matrix x, float* dw, const Groups& groups, std::int64_t N, std::int64_t K, int threads) {
    for (std::int64_t e = 0; e < groups.E; ++e) {
        const std::int64_t from = groups.at(e);
        linear_dw({dy.at + from * dy.stride, dy.stride}, {x.at + from * x.stride, x.stride}, dw + e * N * K, groups.at(e + 1) - from, N, K, false, threads);
    }
}
