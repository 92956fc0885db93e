// y = silu(gate) * up, silu(g) = g / (1 + e^-g); dup = dy silu(g), dgate = dy up s (1 + g (1 - s)), s = 1 / (1 + e^-g).  Compare kernels/swiglu.py.

ATHANOR_INLINE v16 sigmoid(v16 g) { return splat(1) / (splat(1) + exponential(-g)); }

inline void swiglu_fwd(const float* gate_up, float* y, std::int64_t T, std::int64_t F, std::int64_t stride, int threads) {
    parallel_for(T, 16384 / (F + 1) + 1, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            const float *gate = gate_up + t * stride, *up = gate + F;
            over_lanes(F, [&](std::int64_t i, auto n) {
                const v16 g = n.load(gate + i);
                n.store(y + t * F + i, g * sigmoid(g) * n.load(up + i));
            });
        }
    });
}

// y (null: not wanted) is that of the forward, to the bit.
inline void swiglu_bwd(const float* gate_up, const float* dy, float* dgate_up, float* y, std::int64_t T, std::int64_t F, std::int64_t stride,
                       int threads) {
    parallel_for(T, 16384 / (F + 1) + 1, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            const float *gate = gate_up + t * stride, *up = gate + F;
            float* out = dgate_up + t * 2 * F;
            over_lanes(F, [&](std::int64_t i, auto n) {
                const v16 g = n.load(gate + i), u = n.load(up + i), d = n.load(dy + t * F + i), s = sigmoid(g);
                n.store(out + i, d * u * s * (splat(1) + g * (splat(1) - s)));
                n.store(out + F + i, d * g * s);
                if (y) {
                    n.store(y + t * F + i, g * s * u);
                }
            });
        }
    });
}
