// One token per row by inverse CDF, and the support it was drawn from.  Compare kernels/sample.py for the rules.
//
// What the filters keep is a prefix of the tokens in falling order (logit, then the lower index).  Its end is found without sorting the row: for
// top-k among the tokens that a bound does not rule out, for top-p in the one bin of logits where the mass is reached.  Probabilities are the e of
// logprob.inl over their fp64 sum.

typedef double d8 __attribute__((vector_size(64)));
typedef float v8_unaligned __attribute__((vector_size(32), aligned(4)));

// Philox4x32-10 with key = seed, counter = (position, 0, 0): 53 random bits.  Compare kernels/_philox.py.
inline void philox_uniform(const std::int64_t* seeds, const std::int64_t* positions, double* uniforms, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const auto seed = static_cast<std::uint64_t>(seeds[i]), position = static_cast<std::uint64_t>(positions[i]);
        auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
        auto c0 = static_cast<std::uint32_t>(position), c1 = static_cast<std::uint32_t>(position >> 32);
        std::uint32_t c2 = 0, c3 = 0;
        for (int round = 0; round < 10; ++round) {
            const std::uint64_t a = std::uint64_t{c0} * 0xD2511F53u, b = std::uint64_t{c2} * 0xCD9E8D57u;
            c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
            c1 = static_cast<std::uint32_t>(b);
            c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
            c3 = static_cast<std::uint32_t>(a);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        uniforms[i] = ((c0 >> 5) * 67108864.0 + (c1 >> 6)) * 0x1p-53;
    }
}

// A token as one number: larger = earlier in falling order.
ATHANOR_INLINE std::uint64_t rank_of(float x, std::int64_t i) {
    x = x == 0 ? 0 : x;  // -0 equals 0
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
    return std::uint64_t{bits} << 32 | static_cast<std::uint32_t>(~i);
}
ATHANOR_INLINE std::int64_t token_of(std::uint64_t rank) { return static_cast<std::uint32_t>(~rank); }
struct Falling {
    template <typename T>
    bool operator()(T a, T b) const {
        return a > b;
    }
};

// The memory of one thread: e of the row, with zeros up to a multiple of kBlock; the tokens that may be kept, and the ranks of some of them; their
// mass by the distance of their logits from the largest.
constexpr std::int64_t kBlock = 64, kBins = 256;
struct Workspace {
    Scratch<float> weights;
    Scratch<std::int32_t> candidates;
    Scratch<std::uint64_t> ranks;
    Scratch<float> maxima;
    Scratch<double> masses{kBins};
    explicit Workspace(std::int64_t V) : weights((V + kBlock - 1) / kBlock * kBlock), candidates(V + 1), ranks(V + 1), maxima(V) {
        std::fill(weights.get(), weights.get() + (V + kBlock - 1) / kBlock * kBlock, 0.0f);
    }
};

ATHANOR_INLINE double block_mass(const float* weights) {
    d8 total{};
    for (std::int64_t i = 0; i < kBlock; i += 8) {
        total += __builtin_convertvector(*reinterpret_cast<const v8_unaligned*>(weights + i), d8);
    }
    return ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]));
}
ATHANOR_INLINE double row_mass(const float* weights, std::int64_t V) {
    double total = 0;
    for (std::int64_t i = 0; i < V; i += kBlock) {
        total += block_mass(weights + i);
    }
    return total;
}

// The first token, in vocabulary order, whose cumulative mass exceeds u of the whole.
ATHANOR_INLINE std::int64_t draw(const float* weights, std::int64_t V, double u) {
    const double total = row_mass(weights, V);
    // below the total even when the product rounds up to it
    const double goal = std::min(u * total, total * (1 - 0x1p-52));
    double before = 0;
    std::int64_t block = 0;
    for (double mass; before + (mass = block_mass(weights + block)) <= goal; block += kBlock) {
        before += mass;
    }
    std::int64_t token = block;
    for (std::int64_t i = block; i < block + kBlock; ++i) {
        token = weights[i] > 0 ? i : token;  // the last one where the sum from left to right falls short of the block's by a rounding error
        before += weights[i];
        if (before > goal) {
            break;
        }
    }
    return token;
}

// How many of `count` tokens, in falling order, come before the mass in front of the next one has reached goal, one at least; ranks[result - 1] is
// then the last of them.  A run at a time is selected and added up; only the one in which the goal lies is sorted.
ATHANOR_INLINE std::int64_t prefix_of_mass(std::uint64_t* ranks, std::int64_t count, const float* weights, double goal) {
    double before = 0;
    for (std::int64_t begin = 0, size = 32;; size *= 4) {
        const std::int64_t end = std::min(count, begin + size);
        if (end < count) {
            std::nth_element(ranks + begin, ranks + end - 1, ranks + count, Falling{});
        }
        double mass = 0;
        for (std::int64_t i = begin; i < end; ++i) {
            mass += weights[token_of(ranks[i])];
        }
        if (end == count || before + mass >= goal) {
            std::sort(ranks + begin, ranks + end, Falling{});
            std::int64_t i = begin;
            do {
                before += weights[token_of(ranks[i++])];
            } while (i < end && before < goal);
            return i;
        }
        before += mass;
        begin = end;
    }
}

ATHANOR_INLINE float smallest_of_weight(const float* x, const float* weights, std::int64_t V, float least) {
    const v16 none = splat(std::numeric_limits<float>::infinity());
    v16 smallest = none;
    over_lanes(V, [&](std::int64_t i, auto n) {
        const v16 a = n.load(x + i, kForbidden);
        const v16 kept = (n.load(weights + i) >= splat(least)) & (a > splat(kForbidden)) ? a : none;
        smallest = kept < smallest ? kept : smallest;
    });
    return -largest(-smallest);
}

// Writes the ranks of the first k tokens, or of all that are allowed where they are fewer, the last one at the end; returns their number.
inline std::int64_t first_k(const float* x, std::int64_t V, std::int64_t k, const Workspace& space) {
    // the k-th largest of the maxima of 4 k groups of tokens or more is no larger than the k-th logit
    const std::int64_t groups = (4 * k + kLanes - 1) / kLanes;
    float bound = kLowest;
    if (2 * groups * kLanes <= V) {
        float* maxima = space.maxima.get();
        std::fill(maxima, maxima + groups * kLanes, kForbidden);
        std::int64_t group = 0;
        over_lanes(V, [&](std::int64_t i, auto n) {
            float* at = maxima + group * kLanes;
            const v16 a = n.load(x + i, kForbidden), b = load(at);
            store(at, a > b ? a : b);
            group = group + 1 == groups ? 0 : group + 1;
        });
        std::nth_element(maxima, maxima + k - 1, maxima + groups * kLanes, Falling{});
        bound = std::max(maxima[k - 1], kLowest);
    }
    std::int32_t* list = space.candidates.get();
    std::int64_t candidates = 0;
    for (std::int64_t i = 0; i < V; ++i) {
        list[candidates] = static_cast<std::int32_t>(i);
        candidates += x[i] >= bound;
    }
    std::uint64_t* ranks = space.ranks.get();
    for (std::int64_t c = 0; c < candidates; ++c) {
        ranks[c] = rank_of(x[list[c]], list[c]);
    }
    const std::int64_t count = std::min(k, candidates);
    std::nth_element(ranks, ranks + count - 1, ranks + candidates, Falling{});
    return count;
}

// The last token, in falling order, in front of which less than p of the mass of all tokens lies.
inline std::int64_t last_of_mass(const float* x, std::int64_t V, float largest, double p, const Workspace& space) {
    const float* weights = space.weights.get();
    const double mass = row_mass(weights, V), goal = p * mass, spare = std::max(0.0, (1 - p) * (1 - 0x1p-10) - 0x1p-40);
    // V tokens as light as this, or lighter, are not the share of 1 - p that may go; the margins cover the rounding of the sums
    const auto bound = static_cast<float>(spare * mass / static_cast<double>(V));
    std::int32_t* list = space.candidates.get();
    std::int64_t candidates = 0;
    for (std::int64_t i = 0; i < V; ++i) {
        list[candidates] = static_cast<std::int32_t>(i);
        candidates += weights[i] > bound;
    }
    // bins of falling logits: a token of a lower bin comes before one of a higher bin
    const float width = largest - smallest_of_weight(x, weights, V, bound), scale = width > 1e-30f && width < 1e30f ? kBins / width : 0;
    const auto bin_of = [=](float logit) { return std::min<std::int64_t>(kBins - 1, static_cast<std::int32_t>((largest - logit) * scale)); };
    double* masses = space.masses.get();
    std::fill(masses, masses + kBins, 0.0);
    for (std::int64_t c = 0; c < candidates; ++c) {
        masses[bin_of(x[list[c]])] += weights[list[c]];
    }
    std::int64_t bin = 0;
    double before = 0, through = 0;
    for (std::int64_t b = 0; b < kBins && through < goal; ++b) {
        if (masses[b] > 0) {  // the last that holds a token, should the sum fall short of the goal by a rounding error
            bin = b;
            before = through;
            through += masses[b];
        }
    }
    std::uint64_t* ranks = space.ranks.get();
    std::int64_t count = 0;
    for (std::int64_t c = 0; c < candidates; ++c) {
        ranks[count] = rank_of(x[list[c]], list[c]);
        count += bin_of(x[list[c]]) == bin;
    }
    return token_of(ranks[prefix_of_mass(ranks, count, weights, goal - before) - 1]);
}

// The last token, in falling order, that top-k and then top-p of what is left keep.
inline std::int64_t last_token(const float* x, std::int64_t V, float largest, std::int64_t k, double p, const Workspace& space) {
    if (k == 0 || k >= V) {
        return last_of_mass(x, V, largest, p, space);
    }
    std::uint64_t* ranks = space.ranks.get();
    std::int64_t count = first_k(x, V, k, space);
    if (p < 1) {
        double mass = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            mass += space.weights.get()[token_of(ranks[i])];
        }
        count = prefix_of_mass(ranks, count, space.weights.get(), p * mass);
    }
    return token_of(ranks[count - 1]);
}

// What top-k, then top-p of what is left, then min-p keep of a row that allows something.
inline Kept filtered(const float* x, std::int64_t V, float largest, std::int64_t k, double p, double min_p, const Workspace& space) {
    const float *weights = space.weights.get(), least = static_cast<float>(min_p);
    Kept kept{kForbidden, V - 1};
    float lightest = 0;
    if ((k > 0 && k < V) || p < 1) {
        const std::int64_t last = last_token(x, V, largest, k, p, space), rest = V - last - 1;
        kept.threshold = x[last];
        lightest = weights[last];
        const std::int64_t next = last + 1 + first_equal(x + last + 1, rest, x[last]);
        kept.last = rest && x[next] == x[last] ? last : V - 1;
    }
    if (min_p > 0 && lightest < least) {
        const float threshold = smallest_of_weight(x, weights, V, least);
        if (threshold > kept.threshold) {
            return {threshold, V - 1};
        }
    }
    return kept;
}

inline void sample_row(const float* x, std::int64_t V, std::int64_t b, const Sampling& sampling, double u, const Sampled& out,
                       const Workspace& space) {
    const float nan = std::numeric_limits<float>::quiet_NaN(), temperature = sampling.temperature[b];
    const bool greedy = temperature == 0;
    const float inverse_temperature = greedy ? 1 : 1 / temperature;
    const Kept everything{kForbidden, V - 1};
    float* weights = space.weights.get();
    const Softmax full = softmax_row(x, V, inverse_temperature, everything, -1, weights);
    if (!(full.sum > 0)) {  // a NaN, or nothing allowed
        out.tokens[b] = out.last_kept[b] = V - 1;
        out.logps[b] = out.full_logps[b] = out.entropy[b] = out.thresholds[b] = nan;
        return;
    }
    const std::int64_t k = sampling.top_k[b];
    const double p = sampling.top_p[b], min_p = sampling.min_p[b];
    Kept kept = everything;
    Softmax row = full;
    std::int64_t token;
    if (greedy) {
        token = first_equal(x, V, full.largest);
        kept = {full.largest, token};
    } else {
        if ((k > 0 && k < V) || p < 1 || min_p > 0) {
            kept = filtered(x, V, full.largest, k, p, min_p, space);
            row = softmax_row(x, V, inverse_temperature, kept, -1, weights);
        }
        token = draw(weights, V, u);
    }
    out.tokens[b] = token;
    out.full_logps[b] = full.logp(x[token], inverse_temperature);
    out.logps[b] = greedy ? 0 : row.logp(x[token], inverse_temperature);
    out.entropy[b] = full.entropy(inverse_temperature);
    out.thresholds[b] = kept.threshold;
    out.last_kept[b] = kept.last;
}

inline void sample(const float* logits, std::int64_t stride, std::int64_t B, std::int64_t V, const Sampling& sampling, const double* uniforms,
                   const Sampled& out, int threads) {
    parallel_for(B, 8192 / (V + 1) + 1, threads, [=, &sampling, &out](std::int64_t begin, std::int64_t end) {
        const Workspace space(V);
        for (std::int64_t b = begin; b < end; ++b) {
            sample_row(logits + b * stride, V, b, sampling, uniforms[b], out, space);
        }
    });
}
