// Products of matrices: y = x w^T + bias, dx = dy w, dw = dy^T x.  All three are out[j, l] = sum over s of scalar(j, s) * panel(s, l), where a panel
// has 64 of the lanes l for all s, packed in a thread's own memory (for y: rows of x, transposed; else columns of w or x).
//
// A sum starts anew every kDepth terms, each run in ascending order, and the runs are added in theirs, first those of kMostDepth terms, which is as deep
// as a panel gets: its bits depend neither on where in a panel the lane is, nor on the other rows, nor on the number of threads.

constexpr std::int64_t kPanel = 64, kGroup = 48, kDepth = 512, kMostDepth = 8 * kDepth;
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
};

// sums[j, v] (+)= those of `depth` terms, for J rows and V vectors.
template <int J, int V>
inline void product_tile(const float* panel, Scalars scalars, std::int64_t depth, float* sums, bool first) {
    v16 sum[J][V]{};
    for (std::int64_t s = 0; s < depth; ++s) {
        // Scalars seldom lie in L2, and no prefetcher of the machine follows short rows: ask for the next tile's once a cache line, or for those of a
        // later term.
        if (scalars.s_stride != 1) {
            __builtin_prefetch(scalars.at + (s + kLanes) * scalars.s_stride);
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
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* out = sums + j * kPanel + v * kLanes;
            store(out, first ? sum[j][v] : load(out) + sum[j][v]);
        }
    }
}

template <int J>
inline void product_tile_of(int num_vectors, const float* panel, Scalars scalars, std::int64_t depth, float* sums, bool first) {
    while (num_vectors > 0) {
        const int now = std::min(num_vectors, kTileV);
        switch (now) {
            case 1: product_tile<J, 1>(panel, scalars, depth, sums, first); break;
            case 2: product_tile<J, std::min(2, kTileV)>(panel, scalars, depth, sums, first); break;
            case 3: product_tile<J, std::min(3, kTileV)>(panel, scalars, depth, sums, first); break;
            default: product_tile<J, std::min(4, kTileV)>(panel, scalars, depth, sums, first);
        }
        panel += now * kLanes;
        sums += now * kLanes;
        num_vectors -= now;
    }
}

// sums (num_j, 64) = all `depth` terms of up to kGroup rows.
inline void product_chunk(const float* panel, Scalars scalars, std::int64_t num_j, std::int64_t num_lanes, std::int64_t depth, float* sums) {
    const int num_vectors = static_cast<int>((num_lanes + kLanes - 1) / kLanes);
    for (std::int64_t s = 0; s < depth || s == 0; s += kDepth) {
        const std::int64_t run = std::min(kDepth, depth - s);
        for (std::int64_t j = 0; j < num_j;) {
            const Scalars here{scalars.at + j * scalars.j_stride + s * scalars.s_stride, scalars.j_stride, scalars.s_stride};
            if (num_j - j >= kTileJ) {
                product_tile_of<kTileJ>(num_vectors, panel + s * kPanel, here, run, sums + j * kPanel, s == 0);
                j += kTileJ;
            } else {
                product_tile_of<1>(num_vectors, panel + s * kPanel, here, run, sums + j * kPanel, s == 0);
                j += 1;
            }
        }
    }
}

// Call flush(chunk's first j, its number of j, first lane, number of lanes, sums (kGroup, 64), first, last) for all num_j x num_l results, once for
// every kMostDepth terms of their sums, in that order.  pack(panel, first lane, number of lanes, first term, number of terms) fills a panel, zeros behind
// its last lane.
template <typename Pack, typename Flush>
inline void product(Scalars scalars, std::int64_t num_j, std::int64_t num_l, std::int64_t depth, int threads, Pack&& pack, Flush&& flush) {
    const std::int64_t chunks = (num_j + kGroup - 1) / kGroup, panels = (num_l + kPanel - 1) / kPanel;
    for (std::int64_t s = 0; s < depth || s == 0; s += kMostDepth) {
        const std::int64_t terms = std::min(kMostDepth, depth - s);
        const std::int64_t grain = 100000 / (std::min(num_j, kGroup) * std::min(num_l, kPanel) * terms + 1) + 1;
        parallel_for(chunks * panels, grain, threads, [&](std::int64_t begin, std::int64_t end) {
            Workspace workspace;
            float* sums = workspace.take(kGroup * kPanel + terms * kPanel);
            float* panel = sums + kGroup * kPanel;
            for (std::int64_t unit = begin; unit < end; ++unit) {
                const std::int64_t l = unit / chunks * kPanel, j = unit % chunks * kGroup;
                const std::int64_t num_lanes = std::min(kPanel, num_l - l), rows = std::min(kGroup, num_j - j);
                if (unit == begin || j == 0) {
                    pack(panel, l, num_lanes, s, terms);
                }
                const float* at = scalars.at + j * scalars.j_stride + s * scalars.s_stride;
                product_chunk(panel, {at, scalars.j_stride, scalars.s_stride}, rows, num_lanes, terms, sums);
                flush(j, rows, l, num_lanes, sums, s == 0, s + terms == depth);
            }
        });
    }
}

// 16 x 16 floats from `from` to `to`, transposed; num_rows of it are there, num_columns of each are wanted, the rest is 0.
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

// Lanes are rows of x, j rows of w.
inline void linear_fwd(Matrix x, Matrix w, const float* bias, float* y, std::int64_t T, std::int64_t N, std::int64_t K, int threads) {
    const auto pack = [=](float* panel, std::int64_t t, std::int64_t num_rows, std::int64_t from, std::int64_t terms) {
        for (std::int64_t v = 0; v < num_rows; v += kLanes) {
            for (std::int64_t k = 0; k < terms; k += kLanes) {
                v16 block[kLanes];
                transpose_block(x.at + (t + v) * x.stride + from + k, x.stride, num_rows - v, terms - k, block);
                for (std::int64_t i = 0; i < std::min(kLanes, terms - k); ++i) {
                    store(panel + (k + i) * kPanel + v, block[i]);
                }
            }
        }
    };
    const auto flush = [=](std::int64_t n, std::int64_t num_columns, std::int64_t t, std::int64_t num_rows, const float* sums, bool first, bool last) {
        for (std::int64_t c = 0; c < num_columns; c += kLanes) {
            const std::int64_t columns = std::min(kLanes, num_columns - c);
            const v16 added = bias && last ? load_first(bias + n + c, columns) : v16{};
            for (std::int64_t v = 0; v < num_rows; v += kLanes) {
                v16 block[kLanes];
                transpose_block(sums + c * kPanel + v, kPanel, columns, kLanes, block);
                for (std::int64_t i = 0; i < std::min(kLanes, num_rows - v); ++i) {
                    float* out = y + (t + v + i) * N + n + c;
                    v16 row = first ? block[i] : load_first(out, columns) + block[i];
                    row = bias && last ? row + added : row;
                    columns == kLanes ? store(out, row) : store_first(out, columns, row);
                }
            }
        }
    };
    product({w.at, w.stride, 1}, N, T, K, threads, pack, flush);
}

// Lanes are columns of `columns` (depth, num_l), out is (num_j, num_l): dx from w, dw from x.
inline void product_of_columns(Scalars scalars, Matrix columns, float* out, std::int64_t num_j, std::int64_t num_l, std::int64_t depth, bool add,
                               int threads) {
    const auto pack = [=](float* panel, std::int64_t l, std::int64_t num_lanes, std::int64_t from, std::int64_t terms) {
        for (std::int64_t s = 0; s < terms; ++s) {
            const float* row = columns.at + (from + s) * columns.stride + l;
            over_lanes(num_lanes, [&](std::int64_t i, auto n) { store(panel + s * kPanel + i, n.load(row + i)); });
        }
    };
    const auto flush = [=](std::int64_t j, std::int64_t rows, std::int64_t l, std::int64_t num_lanes, const float* sums, bool first, bool) {
        for (std::int64_t r = 0; r < rows; ++r) {
            float* to = out + (j + r) * num_l + l;
            over_lanes(num_lanes, [&](std::int64_t i, auto n) {
                const v16 sum = load(sums + r * kPanel + i);
                n.store(to + i, add || !first ? n.load(to + i) + sum : sum);
            });
        }
    };
    product(scalars, num_j, num_l, depth, threads, pack, flush);
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
