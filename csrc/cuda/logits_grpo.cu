/* Row statistics of logits, the loss's coefficient and the logits' gradient from one read and one write: row, coefficient and gradient as in
logits_grpo_triton.py, whose second read this saves (measured there on an H200: 3.07 ms for T = 8192, V = 151936 in bf16; one read and one write take
1.16 ms at 4.3 TB/s).

A block keeps a whole row on the chip, packed as it came: 224 KB in shared memory and up to 96 KB in registers hold 163840 bf16.  The row lies in
granules of 16 bytes, granule g with the thread g % THREADS, in `slots` or in `held`.  A thread reads only what it fetched itself, so no barrier orders
the copies: once a granule's gradient is formed, the same thread fetches the next row's granule to the same place.  The only barrier of a row stands
between its statistics and its gradient.

On an H200 T = 8192 takes 1.36 ms.  Predicted: of a row of 152k bf16 an SM's share of 4.3 TB/s is 19 us; the statistics and the gradient take 5.5 us each (one
ex2 and about 8 instructions per logit), the first while the row arrives and the second while it leaves and the next one comes, and between them lies
about 0.7 us in which the SM asks for nothing.  So memory is the limit, and T = 8192 takes 1.19 to 1.25 ms.

A masked row is never read; a row with coefficient 0 is written without an exponential. */

#include "policy_loss.cuh"
#include "ptx.cuh"

/* Compile-time, from logits_grpo_cuda.py.  FP32: logits are fp32 (1) or bf16 (0).  THREADS; BLOCKS per SM.  SLOTS, HELD: granules per thread in shared
memory and in registers, multiples of GROUP.  SURROGATE, KL, WEIGHT: functions of policy_loss.cuh.  HAS_OLD, HAS_REF, HAS_RHO, SEQUENCE_WEIGHT: 0, 1. */
#if FP32
typedef float Logit;
__device__ __forceinline__ Logit logit_of(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float value_of(Logit x) { return x; }
#else
typedef unsigned short Logit;
__device__ __forceinline__ Logit logit_of(unsigned bits) { return static_cast<Logit>(bits); }
__device__ __forceinline__ float value_of(Logit x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
#endif
constexpr int GROUP = 4, WIDTH = 16 / sizeof(Logit), WARPS = THREADS / 32;
constexpr float LOG2E = 1.4426950408889634f, LOWEST = -3.4028234663852886e38f;  // a finite start for the maximum, since -inf minus -inf is NaN
constexpr unsigned NOTHING = FP32 ? 0xff800000 : 0xff80;                        // -inf
static_assert(SLOTS % GROUP == 0 && SLOTS > 0 && HELD % GROUP == 0 && SLOTS / GROUP <= 8, "");

__device__ __forceinline__ void unpack(uint4 g, float (&x)[WIDTH]) {
    unsigned words[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if FP32
        x[i] = __uint_as_float(words[i]);
#else
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#endif
    }
}

__device__ __forceinline__ uint4 pack(const float (&x)[WIDTH]) {
#if FP32
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
#else
    return make_uint4(bf16_rounded(x[0], x[1]), bf16_rounded(x[2], x[3]), bf16_rounded(x[4], x[5]), bf16_rounded(x[6], x[7]));
#endif
}

__device__ __forceinline__ float largest(uint4 g) {
#if FP32
    return fmaxf(fmaxf(__uint_as_float(g.x), __uint_as_float(g.y)), fmaxf(__uint_as_float(g.z), __uint_as_float(g.w)));
#else
    unsigned pair = bf16_max(bf16_max(g.x, g.y), bf16_max(g.z, g.w));
    return fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
}

/* Granule g of a row holds its logits v .. v + WIDTH - 1 with v = g WIDTH - phase, where phase makes the address of each a multiple of 16.  Only the
first and the last granule may stick out of the row: what lies outside is neither read nor written. */
struct Row {
    const Logit* x;
    Logit* dx;
    int phase, V;
    bool together;  // dx has the phase of x

    __device__ __forceinline__ int granules() const { return (phase + V + WIDTH - 1) / WIDTH; }
    __device__ __forceinline__ int first(int g) const { return g * WIDTH - phase; }
    __device__ __forceinline__ bool whole(int v) const { return v >= 0 && v + WIDTH <= V; }

    __device__ __forceinline__ void fetch(int g, uint4* slot) const {
        int v = first(g);
        if (whole(v)) return copy_async(slot, x + v);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) reinterpret_cast<Logit*>(slot)[j] = v + j >= 0 && v + j < V ? x[v + j] : logit_of(NOTHING);
    }

    __device__ __forceinline__ void store(int g, uint4 packed) const {
        int v = first(g);
        if (together && whole(v)) return store_streaming(dx + v, packed);
        unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            unsigned bits = FP32 ? words[j % 4] : words[j / 2] >> (j % 2 * 16);
            if (v + j >= 0 && v + j < V) dx[v + j] = logit_of(bits);
        }
    }
};

// The first slot and the slots after the held granules: held ones lie within the row and are whole.
__device__ __forceinline__ int granule_of_slot(int slot) { return (slot ? slot + HELD : 0) * THREADS + threadIdx.x; }
__device__ __forceinline__ int granule_of_held(int i) { return (1 + i) * THREADS + threadIdx.x; }

// m: largest logit;  S: sum of e = exp((x - m) / temperature);  U: sum of (x - m) e.  c = log2(e) / temperature.
struct Softmax {
    float m, S, U;
};

__device__ __forceinline__ Softmax rescaled(Softmax a, float m, float c) {
    float shift = fmaxf(a.m - m, -1e38f);  // may overflow, and inf * 0 is NaN
    float factor = exp2_fast(shift * c);
    return {m, a.S * factor, a.U * factor + shift * factor * a.S};
}

template <int N>
__device__ __forceinline__ void absorb(Softmax& a, const uint4 (&x)[N], float c) {
    float m = a.m;
#pragma unroll
    for (int i = 0; i < N; ++i) m = fmaxf(m, largest(x[i]));
    a = rescaled(a, m, c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float logits[WIDTH];
        unpack(x[i], logits);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            float d = max_or_nan(logits[j] - m, LOWEST);  // finite, so that a forbidden token adds 0 and not 0 * inf
            float e = exp2_fast(d * c);
            a.S += e;
            a.U = fmaf(d, e, a.U);
        }
    }
}

// The same bits in every lane: x + y and y + x are equal.
__device__ __forceinline__ Softmax over_warp(Softmax a, float c) {
    float m = a.m;
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, lanes));
    a = rescaled(a, m, c);
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
        a.S += __shfl_xor_sync(0xffffffffu, a.S, lanes);
        a.U += __shfl_xor_sync(0xffffffffu, a.U, lanes);
    }
    return a;
}

// `parts` is another one for the next row: a slow warp may still be reading this one's.
__device__ __forceinline__ Softmax over_block(Softmax a, float c, Softmax* parts) {
    int lane = threadIdx.x % 32;
    a = over_warp(a, c);
    if (lane == 0) parts[threadIdx.x / 32] = a;
    __syncthreads();
    a = {LOWEST, 0.0f, 0.0f};
    if (lane < WARPS) a = parts[lane];
    return over_warp(a, c);
}

// coef = coef_S e for one granule, and coef more at the target
__device__ __forceinline__ uint4 gradient(uint4 x, int first, int target, float coef, float minus_coef_S, float m, float c) {
    if (coef == 0.0f) return make_uint4(0, 0, 0, 0);
    float dx[WIDTH];
    unpack(x, dx);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) dx[j] = minus_coef_S * exp2_fast((dx[j] - m) * c);
    if (target >= first && target < first + WIDTH) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) dx[j] += first + j == target ? coef : 0.0f;
    }
    return pack(dx);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    logits_grpo_kernel(const Logit* logits, Logit* dlogits, const long long* targets, const float* scales, const float* advantages, const float* olds,
                       const float* refs, const float* rhos, float* logps, float* entropies, float* ms, float* Ss, float* coefs, int T,
                       int V, long long stride, long long dstride, float inv_temperature, float lo, float hi, float cap, float tau_positive,
                       float tau_negative, float beta, float weight_low, float weight_high) {
    __shared__ Softmax parts[2][WARPS];
    uint4* slots = dynamic_shared();
    uint4 held[HELD ? HELD / GROUP : 1][GROUP];
    const Bounds bounds = {lo, hi, cap, tau_positive, tau_negative};
    const float c = inv_temperature * LOG2E;

    auto row_at = [&](int t) {
        const Logit* x = logits + t * stride;
        Logit* dx = dlogits + t * dstride;
        int phase = reinterpret_cast<unsigned long long>(x) / sizeof(Logit) % WIDTH;
        return Row{x, dx, phase, V, reinterpret_cast<unsigned long long>(dx) / sizeof(Logit) % WIDTH == (unsigned)phase};
    };
    auto scale_of = [&](int t) { return t < T ? scales[t] : 1.0f; };
    auto live_from = [&](int t, float scale) {
        for (; scale == 0.0f; scale = scale_of(t)) t += gridDim.x;
        return t;
    };

    int ahead = live_from(blockIdx.x, scale_of(blockIdx.x));  // the row whose logits are on their way
    if (ahead < T) {
        const Row row = row_at(ahead);
#pragma unroll
        for (int i = 0; i < HELD; ++i) held[i / GROUP][i % GROUP] = *reinterpret_cast<const uint4*>(row.x + row.first(granule_of_held(i)));
#pragma unroll 1
        for (int slot = 0; slot < SLOTS; ++slot) {
            row.fetch(granule_of_slot(slot), slots + slot * THREADS + threadIdx.x);
            if (slot % GROUP == GROUP - 1) end_copy_group();
        }
    }

    int turn = 0;
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        const Row row = row_at(t);
        if (t != ahead) {  // masked
            for (int g = threadIdx.x; g < row.granules(); g += THREADS) row.store(g, make_uint4(0, 0, 0, 0));
            if (threadIdx.x == 0) {
                logps[t] = entropies[t] = ms[t] = coefs[t] = 0.0f;
                Ss[t] = 1.0f;
            }
            continue;
        }
        const int target = static_cast<int>(targets[t]);

        Softmax sums = {LOWEST, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < HELD / GROUP; ++i) absorb(sums, held[i], c);
#pragma unroll 1
        for (int group = 0; group < SLOTS / GROUP; ++group) {
            wait_for_copies(SLOTS / GROUP - 1 - group);
            uint4 x[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) x[i] = slots[(group * GROUP + i) * THREADS + threadIdx.x];
            absorb(sums, x, c);
        }
        // here and not at the row's start, where registers are scarce; before the barrier, after which the target's logit may be overwritten
        const Logit target_logit = row.x[target];
        const float scale = scales[t], A = advantages[t], ref = HAS_REF ? refs[t] : 0.0f, log_rho = HAS_RHO ? rhos[t] : 0.0f;
        const float next_scale = scale_of(t + gridDim.x);
        float old = HAS_OLD ? olds[t] : 0.0f;
        sums = over_block(sums, c, parts[turn]);
        turn ^= 1;

        const bool nothing = sums.S == 0.0f;
        const float S = nothing ? 1.0f : sums.S, m = sums.m, log_S = logf(S);
        const float logp = (value_of(target_logit) - m) * inv_temperature - log_S;
        if (!HAS_OLD) old = logp;
        const float log_ratio = logp - old;
        const float unclamped = fabsf(log_ratio) <= 20.0f ? 1.0f : 0.0f;
        float coef = SURROGATE(clamped_exp(log_ratio), A, unclamped, bounds);
        if (HAS_RHO) coef *= WEIGHT(SEQUENCE_WEIGHT ? log_rho : old - log_rho, weight_low, weight_high);
        if (HAS_REF) coef += beta * KL(ref - logp);
        // fminf and fmaxf drop a NaN, so it is put back; a row that forbids every token has no gradient
        coef = nothing ? 0.0f : log_ratio == log_ratio ? scale * coef : log_ratio;
        if (threadIdx.x == 0) {
            logps[t] = logp;
            entropies[t] = log_S - sums.U / S * inv_temperature;
            ms[t] = nothing ? -__uint_as_float(0x7f800000) : m;
            Ss[t] = S;
            coefs[t] = coef;
        }

        const float k = coef * inv_temperature, minus_k_S = -k / S;
        ahead = live_from(t + gridDim.x, next_scale);
        const bool more = ahead < T;
        const Row next = row_at(more ? ahead : t);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int g = granule_of_held(i);
            const uint4 x = held[i / GROUP][i % GROUP];
            if (more) held[i / GROUP][i % GROUP] = *reinterpret_cast<const uint4*>(next.x + next.first(g));
            row.store(g, gradient(x, row.first(g), target, k, minus_k_S, m, c));
        }
#pragma unroll 1
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int g = granule_of_slot(slot);
            uint4* place = slots + slot * THREADS + threadIdx.x;
            const uint4 x = *place;
            if (more) next.fetch(g, place);
            if (slot % GROUP == GROUP - 1) end_copy_group();
            if (row.first(g) < V) row.store(g, gradient(x, row.first(g), target, k, minus_k_S, m, c));
        }
    }
}
