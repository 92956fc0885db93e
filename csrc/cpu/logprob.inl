// logp = (x_target - m) / temperature - log S,  H = log S - U / (S temperature)  with m = largest kept logit, e = exp((x - m) / temperature),
// S = sum of e, U = sum of (x - m) e;  dlogits = dlogp (onehot - e / S) / temperature.  Compare kernels/logprob.py.
//
// sample.inl calls the same softmax_row, which is no inline function: the log-prob of a draw and that of the trainer come from the same instructions.

// What top-k, top-p or min-p left of a row: logit > threshold, or logit == threshold and index <= last.  A NaN counts as kept: it must show.
struct Kept {
    float threshold;
    std::int64_t last;
    bool all() const { return threshold == -std::numeric_limits<float>::infinity(); }
};
constexpr float kForbidden = -std::numeric_limits<float>::infinity(), kLowest = std::numeric_limits<float>::lowest();
constexpr std::int64_t kChunk = 1024;  // logits whose e are added in fp32 before they join an fp64 sum

ATHANOR_INLINE i16 lane_numbers() { return i16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
ATHANOR_INLINE i16 splat_int(std::int64_t x) {
    return static_cast<std::int32_t>(std::clamp<std::int64_t>(x, -1, std::numeric_limits<std::int32_t>::max())) - i16{};
}
ATHANOR_INLINE i16 kept_lanes(v16 x, std::int64_t i, const Kept& kept) {
    const v16 t = splat(kept.threshold);
    return ~((x < t) | ((x == t) & (lane_numbers() + splat_int(i) > splat_int(kept.last))));
}
ATHANOR_INLINE bool keeps(float x, std::int64_t i, const Kept& kept) { return !(x < kept.threshold || (x == kept.threshold && i > kept.last)); }
ATHANOR_INLINE bool any(i16 mask) {
    std::int64_t a[8];
    std::memcpy(a, &mask, sizeof a);
    return (a[0] | a[1] | a[2] | a[3] | a[4] | a[5] | a[6] | a[7]) != 0;
}

// e^x for x <= 0, half the steps of `exponential`: 0 below -87.3, NaN for NaN.
ATHANOR_INLINE v16 decay(v16 x) {
    const v16 low = splat(-87.3f), clamped = x < low ? low : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the lowest bits
    const v16 shifted = clamped * splat(1.44269504088896341f) + splat(magic), n = shifted - splat(magic);
    v16 r = clamped - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    v16 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
    const i16 power = (reinterpret_cast<i16>(shifted) + (127 - 0x4B400000)) << 23;
    return x < low ? v16{} : p * reinterpret_cast<v16>(power);
}
// e of 16 logits; d = x - m, of a forbidden one the lowest float: its part of U is -0 and not NaN.
ATHANOR_INLINE v16 distance(v16 x, float largest) {
    const v16 d = x - splat(largest);
    return d < splat(kLowest) ? splat(kLowest) : d;
}
ATHANOR_INLINE v16 weight_of(v16 d, float inverse_temperature) { return decay(rounded(d * splat(inverse_temperature))); }
ATHANOR_INLINE float weight_of(float x, float largest, float inverse_temperature) {
    return weight_of(distance(splat(x), largest), inverse_temperature)[0];
}

struct Softmax {
    float largest;
    double sum, slope;  // S and U; S is 0 where everything is forbidden, NaN where a logit is NaN or +inf

    double log_sum() const { return std::log(sum); }
    float logp(float x, float inverse_temperature) const {
        return sum == 0 ? kForbidden : static_cast<float>((x - largest) * inverse_temperature - log_sum());
    }
    float entropy(float inverse_temperature) const { return sum == 0 ? 0 : static_cast<float>(log_sum() - slope / sum * inverse_temperature); }
};

// The statistics of a row; with kRestricted of kept + {target} alone, target < 0: no such token.  weights (null: not wanted) receives e, 0 where not
// kept.
template <bool kRestricted>
__attribute__((noinline)) Softmax softmax_row(const float* x, std::int64_t V, float inverse_temperature, Kept kept, std::int64_t target,
                                              float* weights) {
    v16 best = splat(kForbidden);
    i16 seen{};
    over_lanes(V, [&](std::int64_t i, auto n) {
        v16 a = n.load(x + i, kForbidden);
        if constexpr (kRestricted) {
            const i16 keep = kept_lanes(a, i, kept);
            seen |= keep;
            a = keep ? a : splat(kForbidden);
        }
        best = a > best ? a : best;  // a NaN shows in the sum
    });
    float m = largest(best);
    const bool outside = kRestricted && target >= 0 && !keeps(x[target], target, kept);
    if constexpr (kRestricted) {
        if (target < 0 && !any(seen)) {
            return softmax_row<false>(x, V, inverse_temperature, kept, target, weights);
        }
        m = outside && x[target] > m ? x[target] : m;
    }
    m = std::max(m, kLowest);
    Softmax row{m, 0, 0};
    for (std::int64_t begin = 0; begin < V; begin += kChunk) {
        v16 sums{}, slopes{};
        over_lanes(std::min(kChunk, V - begin), [&](std::int64_t i, auto n) {
            const v16 a = n.load(x + begin + i, kForbidden), d = distance(a, m);
            v16 e = weight_of(d, inverse_temperature);
            if constexpr (kRestricted) {
                e = kept_lanes(a, begin + i, kept) ? e : v16{};
            }
            sums += e;
            slopes += d * e;
            if (weights) {
                n.store(weights + begin + i, e);
            }
        });
        row.sum += sum(sums);
        row.slope += sum(slopes);
    }
    if (outside) {
        const v16 d = distance(splat(x[target]), m), e = weight_of(d, inverse_temperature);
        row.sum += e[0];
        row.slope += (d * e)[0];
    }
    return row;
}
ATHANOR_INLINE Softmax softmax_row(const float* x, std::int64_t V, float inverse_temperature, Kept kept, std::int64_t target, float* weights) {
    return (kept.all() ? softmax_row<false> : softmax_row<true>)(x, V, inverse_temperature, kept, target, weights);
}

// A NaN is passed over.
ATHANOR_INLINE float largest_logit(const float* x, std::int64_t V) {
    v16 best = splat(kForbidden);
    over_lanes(V, [&](std::int64_t i, auto n) {
        const v16 a = n.load(x + i, kForbidden);
        best = a > best ? a : best;
    });
    return largest(best);
}
// The lowest index of the logit m; V - 1 where there is none.
ATHANOR_INLINE std::int64_t first_equal(const float* x, std::int64_t V, float m) {
    std::int64_t i = 0;
    while (i + kLanes <= V && !any(load(x + i) == splat(m))) {
        i += kLanes;
    }
    while (i < V && x[i] != m) {
        ++i;
    }
    return std::min(i, V - 1);
}

inline void logprob_fwd(const Logits& logits, float* logps, float* entropy, float* largest, float* inverse_sum, std::int64_t* argmax, int threads) {
    const std::int64_t V = logits.V;
    parallel_for(logits.T, 16384 / (V + 1) + 1, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            const float* x = logits.row(t);
            const std::int64_t target = logits.target(t);
            const Softmax row = softmax_row(x, V, logits.inverse_temperature, Kept{logits.threshold(t), logits.last(t)}, target, nullptr);
            logps[t] = target < 0 ? 0 : row.logp(x[target], logits.inverse_temperature);
            entropy[t] = row.entropy(logits.inverse_temperature);
            largest[t] = row.largest;
            inverse_sum[t] = row.sum == 0 ? 0 : static_cast<float>(1 / row.sum);
            if (argmax) {
                argmax[t] = first_equal(x, V, largest_logit(x, V));
            }
        }
    });
}

// dlogits may be the logits.
template <bool kRestricted>
ATHANOR_INLINE void logprob_row_bwd(const float* x, std::int64_t V, float inverse_temperature, Kept kept, std::int64_t target, float m,
                                    float inverse_sum, float c, float* dx) {
    const float at_target = c * (1 - weight_of(x[target], m, inverse_temperature) * inverse_sum);
    const v16 factor = splat(-c * inverse_sum);
    over_lanes(V, [&](std::int64_t i, auto n) {
        const v16 a = n.load(x + i, kForbidden);
        v16 g = weight_of(distance(a, m), inverse_temperature) * factor;
        if constexpr (kRestricted) {
            g = kept_lanes(a, i, kept) ? g : v16{};
        }
        n.store(dx + i, g);
    });
    dx[target] = at_target;
}

inline void logprob_bwd(const Logits& logits, const float* dlogps, const float* largest, const float* inverse_sum, float* dlogits,
                        std::int64_t dlogits_stride, int threads) {
    const std::int64_t V = logits.V;
    parallel_for(logits.T, 16384 / (V + 1) + 1, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            const std::int64_t target = logits.target(t);
            const float c = target < 0 ? 0 : dlogps[t] * logits.inverse_temperature;
            float* dx = dlogits + t * dlogits_stride;
            if (c == 0 || inverse_sum[t] == 0) {  // nothing flows back, whatever the logits
                std::fill(dx, dx + V, 0.0f);
                continue;
            }
            const Kept kept{logits.threshold(t), logits.last(t)};
            (kept.all() ? logprob_row_bwd<false> : logprob_row_bwd<true>)(logits.row(t), V, logits.inverse_temperature, kept, target, largest[t],
                                                                          inverse_sum[t], c, dx);
        }
    });
}
