// A head of two halves (a, b), turned by the angle of its token:  a' = a cos - b sin,  b' = b cos + a sin;  normed first where there is a weight.
// Compare kernels/rope.py.  Other kernels take normed_head and rotate_head from here: a head has the same bits wherever it is normed and turned.

// factor cos a and factor sin a of a = position * frequency, an fp32 product, for |a| < 2^30: in fp64 by the nearest multiple of pi / 2 and Taylor's
// series up to r^11 and r^10, so right to the last bit of fp32 but for ties.
inline void rotation(const void* positions, bool wide, const float* frequencies, float factor, float* cos, float* sin, std::int64_t T,
                     std::int64_t half, int threads) {
    parallel_for(T, 2048 / (half + 1) + 1, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            const std::int64_t at = wide ? static_cast<const std::int64_t*>(positions)[t] : static_cast<const std::int32_t*>(positions)[t];
            const auto position = static_cast<float>(at);
            for (std::int64_t i = 0; i < half; ++i) {
                const double angle = position * frequencies[i], magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
                const double n = (angle * 0.63661977236758134308 + magic) - magic;
                const double r = (angle - n * 1.5707963267948966192) - n * 6.123233995736766036e-17, z = r * r;
                const double s = r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z / 39916800)))));
                const double c = 1 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 - z / 3628800))));
                const auto quarter = static_cast<std::int32_t>(n);
                const double x = quarter & 1 ? s : c, y = quarter & 1 ? c : s;
                cos[t * half + i] = static_cast<float>((quarter + 1) & 2 ? -x : x) * factor;
                sin[t * half + i] = static_cast<float>(quarter & 2 ? -y : y) * factor;
            }
        }
    });
}

// read(i, n) of the normed head, with the bits of norm_row.
ATHANOR_INLINE auto normed_head(const float* x, const float* weight, std::int64_t d, float eps) {
    const v16 rstd = splat(rstd_of(reader(x), d, eps));
    return [=](std::int64_t i, auto n) { return n.load(x + i) * rstd * n.load(weight + i); };
}

// y may be what is read.
template <bool kInverse = false, typename Read>
ATHANOR_INLINE void rotate_head(Read&& read, const float* cos, const float* sin, float* y, std::int64_t half) {
    over_lanes(half, [&](std::int64_t i, auto n) {
        const v16 a = read(i, n), b = read(half + i, n), c = n.load(cos + i), s = kInverse ? -n.load(sin + i) : n.load(sin + i);
        n.store(y + i, a * c - rounded(b * s));
        n.store(y + half + i, b * c + rounded(a * s));
    });
}

// All heads of one token.
template <bool kInverse>
ATHANOR_INLINE void rotate_heads(const Heads& x, std::int64_t token, const float* cos, const float* sin, std::int64_t d, float eps) {
    for (std::int64_t row = token * x.count; row < (token + 1) * x.count; ++row) {
        const float* head = x.rows.row(row);
        float* y = x.out + row * d;
        if (x.weight) {
            rotate_head<kInverse>(normed_head(head, x.weight, d, eps), cos, sin, y, d / 2);
        } else {
            rotate_head<kInverse>(reader(head), cos, sin, y, d / 2);
        }
    }
}

template <bool kInverse>
inline void rope_tokens(const Heads& q, const Heads& k, const Angles& angles, std::int64_t T, std::int64_t d, float eps, int threads) {
    parallel_for(T, 16384 / ((q.count + k.count) * d + 1) + 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            const float *cos = angles.cos + t * angles.cos_stride, *sin = angles.sin + t * angles.sin_stride;
            rotate_heads<kInverse>(q, t, cos, sin, d, eps);
            rotate_heads<kInverse>(k, t, cos, sin, d, eps);
        }
    });
}

inline void rope(const Heads& q, const Heads& k, const Angles& angles, std::int64_t T, std::int64_t d, float eps, bool inverse, int threads) {
    (inverse ? rope_tokens<true> : rope_tokens<false>)(q, k, angles, T, d, eps, threads);
}

// The gradient through rotation and norm, of queries or of keys; x.out receives dx.
inline void rope_norm_bwd(const Heads& x, Rows dy, const Angles& angles, float* dweight, std::int64_t T, std::int64_t d, float eps, int threads) {
    over_shares(T * x.count, d, dweight, threads, [&](std::int64_t row, float* sum_of_run) {
        const std::int64_t t = row / x.count;
        const float* head = x.rows.row(row);
        float* dx = x.out + row * d;
        rotate_head<true>(reader(dy.row(row)), angles.cos + t * angles.cos_stride, angles.sin + t * angles.sin_stride, dx, d / 2);
        norm_row_bwd(head, dx, nullptr, x.weight, dx, sum_of_run, d, rstd_of(reader(head), d, eps));
    });
}
