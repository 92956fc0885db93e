// The attention of one token, for the packed forward and for decoding over a paged cache: same function, same bits.  For keys first..n-1 of head size d
//     s_j = sum_i (scale q_i) k_ji,  m = max_j s_j,  p_j = e^(s_j - m),  l = sum_j p_j,  o = (1 / l) sum_j p_j v_j,  lse = m + log l.
// s_j is one chain of multiply-adds over ascending i, 16 keys at a time.  p_j is 0 to the bit outside of them, l adds key j to lane j % 16 and then the
// lanes; o is two chains, over ascending even and odd j, added at the end.  Nothing of it depends on how many queries (R) or keys (C) a register tile
// holds, on where the keys lie, or on what is before key `first` and behind key n-1, which is not even read as a value: it may be NaN.

#ifdef ATHANOR_AVX512
constexpr int kRows = 4, kTiles = 4;  // queries, and vectors of 16 keys, to a tile of registers
#else
constexpr int kRows = 2, kTiles = 2;  // a vector of 16 takes two registers or more
#endif

struct Query {
    std::int64_t n;  // keys first..n-1, n > 0
    float* out;
    std::int64_t first;  // of a sliding window, else 0
};

// Of some queries together: the first and the last key that any of them begins with, and where the first and the last of them end.
struct Span {
    std::int64_t earliest, latest, shortest, longest;
};

constexpr std::int64_t kBlockRows = 32;  // queries that are prepared at a time

// Keys as panels: 16 tokens side by side, dimension after dimension.
struct PanelKeys {
    const float* panels;
    std::int64_t d;
    static constexpr std::int64_t stride = kLanes;  // from one dimension to the next
    ATHANOR_INLINE const float* tile(std::int64_t c) const { return panels + c * kLanes * d; }
};

struct RowValues {
    const float* rows;
    std::int64_t stride;  // from one token to the next
    static constexpr std::int64_t run = std::int64_t{1} << 40;  // tokens at that stride
    ATHANOR_INLINE const float* at(std::int64_t) const { return rows; }
};

template <int N>
struct Count {
    static constexpr int value = N;
};
// Call f(Count<n>) for 1 <= n <= Most.
template <int Most, typename F>
ATHANOR_INLINE void with_count(std::int64_t n, F&& f) {
    if constexpr (Most > 1) {
        if (n < Most) {
            return with_count<Most - 1>(n, f);
        }
    }
    f(Count<Most>{});
}

// x, in a register: left to itself GCC may load it again for every use.
ATHANOR_INLINE v16 held(v16 x) {
#ifdef ATHANOR_AVX512
    asm("" : "+v"(x));
#endif
    return x;
}

ATHANOR_INLINE v16 larger(v16 a, v16 b) { return a > b ? a : b; }

// The lanes below n (any number), the others `fill`.
ATHANOR_INLINE v16 keep_below(v16 x, std::int64_t n, float fill) {
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < static_cast<std::int32_t>(n) - i16{} ? x : splat(fill);
}

// The lanes from n on.
ATHANOR_INLINE v16 keep_from(v16 x, std::int64_t n, float fill) {
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < static_cast<std::int32_t>(n) - i16{} ? splat(fill) : x;
}

// e^x for x <= 0, rounding errors above it included: the polynomial of `exponential`, 2^n added to the exponent.  0 below -87.3, NaN for NaN.
ATHANOR_INLINE v16 exponential_below_one(v16 x) {
    const v16 magic = splat(12582912.0f);
    const v16 shifted = x * splat(1.44269504088896341f) + magic;
    const v16 n = shifted - magic;
    v16 r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    v16 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
    const v16 y = reinterpret_cast<v16>(reinterpret_cast<i16>(p) + (reinterpret_cast<i16>(shifted) << 23));
    return x < splat(-87.33654f) ? v16{} : y;
}

// Scores of R queries (R x d, scaled) and keys 16 tile .. 16 (tile + C) - 1, and the largest so far in each lane.
template <int R, int C, typename Keys>
ATHANOR_INLINE void score(const float* q, std::int64_t d, const Keys& keys, std::int64_t tile, const Query* queries, const Span& span, float* s,
                          std::int64_t ld, v16* top) {
    const float* k[C];
    v16 sum[R][C] = {};
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        k[c] = keys.tile(tile + c);
    }
    for (std::int64_t i = 0; i < d; ++i) {
        v16 key[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            key[c] = held(load(k[c] + i * keys.stride));
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const v16 a = splat(q[r * d + i]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                sum[r][c] += a * key[c];
            }
        }
    }
    const bool cut = (tile + C) * kLanes > span.shortest, late = tile * kLanes < span.latest;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            v16 x = cut ? keep_below(sum[r][c], queries[r].n - (tile + c) * kLanes, -__builtin_inff()) : sum[r][c];
            x = late ? keep_from(x, queries[r].first - (tile + c) * kLanes, -__builtin_inff()) : x;
            top[r] = larger(x, top[r]);
            store(s + r * ld + (tile + c) * kLanes, x);
        }
    }
}

// C vectors of R outputs, from dimension `first` on: p (R x ld) times the values, over l.
template <int R, int C, typename Values, typename Lanes>
ATHANOR_INLINE void mix(const float* p, std::int64_t ld, const Values& values, std::int64_t first, Lanes lanes, const Query* queries,
                        const Span& span, const float* l) {
    v16 even[R][C] = {}, odd[R][C] = {};
    const std::int64_t lead = (span.latest + 1) & ~std::int64_t{1}, pairs = span.shortest & ~std::int64_t{1};
    for (std::int64_t begin = span.earliest - span.earliest % values.run; begin < span.longest; begin += values.run) {
        const float *v = values.at(begin) + first, *w = p + begin;
        const std::int64_t common = std::min(pairs - begin, values.run), end = std::min(span.longest - begin, values.run);
        // Keys t .. to - 1 that not all of the queries see, query by query: 0 x NaN would be NaN.
        const auto own = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                std::int64_t t = std::max(from, queries[r].first - begin);
                const std::int64_t stop = std::min(queries[r].n - begin, to);
                if (t % 2 && t < stop) {
                    const v16 y = splat(w[r * ld + t]);
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) {
                        odd[r][c] += y * lanes.load(v + t * values.stride + c * kLanes);
                    }
                    ++t;
                }
                for (; t < stop; t += 2) {
                    const v16 x = splat(w[r * ld + t]);
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) {
                        even[r][c] += x * lanes.load(v + t * values.stride + c * kLanes);
                    }
                    if (t + 1 < stop) {
                        const v16 y = splat(w[r * ld + t + 1]);
#pragma GCC unroll 4
                        for (int c = 0; c < C; ++c) {
                            odd[r][c] += y * lanes.load(v + (t + 1) * values.stride + c * kLanes);
                        }
                    }
                }
            }
        };
        std::int64_t j = std::max<std::int64_t>(0, std::min(lead - begin, end));
        if (j > 0) {
            own(0, j);
        }
        for (; j < common; j += 2) {
            v16 a[C], b[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                a[c] = held(lanes.load(v + j * values.stride + c * kLanes));
                b[c] = held(lanes.load(v + (j + 1) * values.stride + c * kLanes));
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const v16 x = splat(w[r * ld + j]), y = splat(w[r * ld + j + 1]);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    even[r][c] += x * a[c];
                    odd[r][c] += y * b[c];
                }
            }
        }
        own(j, end);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const v16 share = splat(1 / l[r]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            lanes.store(queries[r].out + first + c * kLanes, (even[r][c] + odd[r][c]) * share);
        }
    }
}

// The first key that the token at `position` sees.
inline std::int64_t first_seen(std::int64_t position, std::int64_t window) { return std::max<std::int64_t>(0, position + 1 - window); }

inline std::int64_t whole_tiles(std::int64_t n) { return (n + kLanes - 1) / kLanes; }

// Floats that `attend` needs for scores over at most n keys.
inline std::int64_t attend_scratch(std::int64_t n) { return kRows * whole_tiles(n) * kLanes; }

// R queries (q: R x d, scaled) over the same keys and values, each over its own first n; m and l of each.
template <int R, typename Keys, typename Values>
void attend(const float* q, const Query* queries, std::int64_t d, const Keys& keys, const Values& values, float* s, float* m,
            float* l) {
    Span span{queries[0].first, queries[0].first, queries[0].n, queries[0].n};
    for (int r = 1; r < R; ++r) {
        span = {std::min(span.earliest, queries[r].first), std::max(span.latest, queries[r].first), std::min(span.shortest, queries[r].n),
                std::max(span.longest, queries[r].n)};
    }
    const std::int64_t tiles = whole_tiles(span.longest), ld = tiles * kLanes;
    v16 top[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        top[r] = splat(-__builtin_inff());
    }
    std::int64_t tile = span.earliest / kLanes;
    for (; tile + kTiles <= tiles; tile += kTiles) {
        score<R, kTiles>(q, d, keys, tile, queries, span, s, ld, top);
    }
    if (tile < tiles) {
        with_count<kTiles - 1>(tiles - tile, [&](auto C) { score<R, C.value>(q, d, keys, tile, queries, span, s, ld, top); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        m[r] = largest(top[r]);
        v16 total = {};
        for (std::int64_t j = queries[r].first / kLanes * kLanes; j < queries[r].n; j += kLanes) {
            const v16 p = exponential_below_one(load(s + r * ld + j) - splat(m[r]));
            total += p;
            store(s + r * ld + j, p);
        }
        l[r] = sum(total);
    }
    if (d < kLanes) {
        return mix<R, 1>(s, ld, values, 0, FirstLanes{d}, queries, span, l);
    }
    std::int64_t first = 0;
    for (; first + 2 * kLanes <= d; first += 2 * kLanes) {
        mix<R, 2>(s, ld, values, first, WholeLanes{}, queries, span, l);
    }
    for (; first < d; first += kLanes) {  // the last vector overlaps the one before it where d is no multiple of 16
        mix<R, 1>(s, ld, values, std::min(first, d - kLanes), WholeLanes{}, queries, span, l);
    }
}

// Ask for a row that is wanted soon; it need not exist.
ATHANOR_INLINE void prefetch(const float* x, std::int64_t d) {
    for (std::int64_t i = 0; i < d; i += kLanes) {
        __builtin_prefetch(x + i);
    }
}

// Any number of queries over the same keys and values.
template <typename Keys, typename Values>
void attend_all(const float* q, const Query* queries, std::int64_t count, std::int64_t d, const Keys& keys, const Values& values, float* scratch,
                float* m, float* l) {
    for (std::int64_t r = 0; r < count; r += kRows) {
        with_count<kRows>(std::min<std::int64_t>(kRows, count - r), [&](auto R) {
            attend<R.value>(q + r * d, queries + r, d, keys, values, scratch, m + r, l + r);
        });
    }
}

ATHANOR_INLINE void copy_row(const float* x, std::int64_t d, float scale, float* y) {
    over_lanes(d, [&](std::int64_t i, auto n) { n.store(y + i, n.load(x + i) * splat(scale)); });
}
