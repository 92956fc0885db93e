// Slopes of the policy losses in the new log-prob: the equations of kernels/policy_loss.py, named as in policy_loss_triton.py.
#ifndef ATHANOR_POLICY_LOSS
#define ATHANOR_POLICY_LOSS

struct Bounds {
    float lo, hi, cap, tau_positive, tau_negative;
};

// Surrogates: (ratio, advantage, 1 where the ratio was not clamped) -> d surrogate / d logp.
__device__ __forceinline__ float surrogate_clip(float r, float A, float unclamped, const Bounds& b) {
    bool cut = (A < 0 && r < b.lo) || (A > 0 && r > b.hi);
    return cut ? 0.0f : -r * A * unclamped;
}

__device__ __forceinline__ float surrogate_capped(float r, float A, float unclamped, const Bounds& b) {  // dual_clip and two_sided
    bool cut = (A < 0 && (r < b.lo || r > b.cap)) || (A > 0 && r > b.hi);
    return cut ? 0.0f : -r * A * unclamped;
}

__device__ __forceinline__ float surrogate_cispo(float r, float A, float, const Bounds& b) { return -fminf(fmaxf(r, b.lo), b.hi) * A; }

__device__ __forceinline__ float surrogate_sapo(float r, float A, float unclamped, const Bounds& b) {
    float tau = A > 0 ? b.tau_positive : b.tau_negative;
    float gate = 1.0f / (1.0f + expf(-tau * (r - 1.0f)));
    float closed = 1.0f / (1.0f + expf(tau * (r - 1.0f)));  // 1 - gate loses everything once gate rounds to 1
    return -4.0f * gate * closed * r * A * unclamped;
}

__device__ __forceinline__ float surrogate_reinforce(float, float A, float, const Bounds&) { return -A; }

// KL: e = ref - logp -> d KL / d logp.
__device__ __forceinline__ float kl_none(float) { return 0.0f; }
__device__ __forceinline__ float kl_k1(float) { return 1.0f; }
__device__ __forceinline__ float kl_k2(float e) { return -e; }
__device__ __forceinline__ float kl_k3(float e) { return fabsf(e) <= 20.0f ? -expm1f(e) : 0.0f; }

// Correction: log rho -> weight.
__device__ __forceinline__ float clamped_exp(float x) { return expf(fminf(fmaxf(x, -20.0f), 20.0f)); }
__device__ __forceinline__ float weight_none(float, float, float) { return 1.0f; }
__device__ __forceinline__ float weight_truncated(float log_rho, float, float high) { return fminf(clamped_exp(log_rho), high); }
__device__ __forceinline__ float weight_masked(float log_rho, float low, float high) {
    float rho = clamped_exp(log_rho);
    return rho >= low && rho <= high ? rho : 0.0f;
}

#endif
