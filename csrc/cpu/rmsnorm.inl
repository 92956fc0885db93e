// y = s / sqrt(mean(s^2) + eps) * weight, s = x + residual; with n = s rstd and g = dy weight:
// dx = rstd (g - n mean(g n)) + ds,  dweight = sum of dy n.  Compare kernels/rmsnorm.py.

// What is normed is read(i, n), the lanes from element i on: a row as it lies, or a sum that another loop need not store first.
template <typename Read>
ATHANOR_INLINE float rstd_of(Read&& read, std::int64_t D, float eps) {
    v16 squares{};
    over_lanes(D, [&](std::int64_t i, auto n) {
        const v16 x = read(i, n);
        squares += x * x;
    });
    return 1 / std::sqrt(sum(squares) / static_cast<float>(D) + eps);
}
ATHANOR_INLINE auto reader(const float* x) {
    return [x](std::int64_t i, auto n) { return n.load(x + i); };
}

// The gradient of one row, plus ds unless that is null, and its part of dweight (null: not wanted) added.  dx may be dy.
ATHANOR_INLINE void norm_row_bwd(const float* s, const float* dy, const float* ds, const float* weight, float* dx, float* dweight, std::int64_t D,
                                 float rstd) {
    v16 products{};
    over_lanes(D, [&](std::int64_t i, auto n) { products += n.load(dy + i) * n.load(weight + i) * (n.load(s + i) * splat(rstd)); });
    const v16 mean = splat(sum(products) / static_cast<float>(D));
    over_lanes(D, [&](std::int64_t i, auto n) {
        const v16 normed = n.load(s + i) * splat(rstd), upstream = n.load(dy + i);
        if (dweight) {
            n.store(dweight + i, n.load(dweight + i) + upstream * normed);
        }
        // rounded: the bits are those of the two gradients added by another hand
        const v16 gradient = rounded((rounded(upstream * n.load(weight + i)) - normed * mean) * splat(rstd));
        n.store(dx + i, ds ? gradient + n.load(ds + i) : gradient);
    });
}

// dweight is added in an order that N alone fixes: at most kShares runs of rows, each of 16 or more, then the runs one after the other.
constexpr std::int64_t kShares = 64;
struct Shares {
    std::int64_t rows, count;
    explicit Shares(std::int64_t N) : rows(std::max<std::int64_t>(16, (N + kShares - 1) / kShares)), count((N + rows - 1) / rows) {}
};

// Call body(row, dweight of its run or null) for all rows, the runs in parallel; then dweight (null: not wanted) = the sum.
template <typename Body>
inline void over_shares(std::int64_t N, std::int64_t D, float* dweight, int threads, Body&& body) {
    const Shares shares(N);
    Scratch<float> partial(dweight ? shares.count * D : 0);
    parallel_for(shares.count, 16384 / (shares.rows * D + 1) + 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t share = begin; share < end; ++share) {
            float* sum_of_run = dweight ? partial.get() + share * D : nullptr;
            if (dweight) {
                std::fill(sum_of_run, sum_of_run + D, 0.0f);
            }
            for (std::int64_t row = share * shares.rows; row < std::min(N, (share + 1) * shares.rows); ++row) {
                body(row, sum_of_run);
            }
        }
    });
    if (dweight) {
        std::fill(dweight, dweight + D, 0.0f);
        for (std::int64_t share = 0; share < shares.count; ++share) {
            over_lanes(D, [&](std::int64_t i, auto n) { n.store(dweight + i, n.load(dweight + i) + n.load(partial.get() + share * D + i)); });
        }
    }
}

// Returns rstd.
template <typename Read>
ATHANOR_INLINE float norm_row(Read&& read, const float* weight, float* y, std::int64_t D, float eps) {
    const float rstd = rstd_of(read, D, eps);
    over_lanes(D, [&](std::int64_t i, auto n) { n.store(y + i, read(i, n) * splat(rstd) * n.load(weight + i)); });
    return rstd;
}

inline void rmsnorm_fwd(Rows x, Rows residual, const float* weight, float* s, float* y, float* rstd, std::int64_t N, std::int64_t D, float eps,
                        int threads) {
    parallel_for(N, 16384 / (D + 1) + 1, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const float* a = x.row(row);
            if (!residual.at) {
                rstd[row] = norm_row(reader(a), weight, y + row * D, D, eps);
                continue;
            }
            const float* b = residual.row(row);
            float* out = s + row * D;
            rstd[row] = norm_row([=](std::int64_t i, auto n) {
                const v16 x = n.load(a + i) + n.load(b + i);
                n.store(out + i, x);
                return x;
            }, weight, y + row * D, D, eps);
        }
    });
}

inline void rmsnorm_bwd(Rows s, Rows dy, Rows ds, const float* weight, const float* rstd, float* dx, float* dweight, std::int64_t N, std::int64_t D,
                        int threads) {
    over_shares(N, D, dweight, threads, [=](std::int64_t row, float* sum_of_run) {
        norm_row_bwd(s.row(row), dy.row(row), ds.at ? ds.row(row) : nullptr, weight, dx + row * D, sum_of_run, D, rstd[row]);
    });
}
