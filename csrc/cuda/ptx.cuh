// The instructions that C++ has no word for.  tests/kernels/cuda_emulation.hpp says the same in host C++ and defines the guard.
#ifndef ATHANOR_PTX
#define ATHANOR_PTX

__device__ __forceinline__ uint4* dynamic_shared() {
    extern __shared__ uint4 dynamic_shared_memory[];
    return dynamic_shared_memory;
}

// Copy 16 bytes to shared memory in the background, past the registers; both addresses are multiples of 16.  The thread that issued a copy sees it
// after waiting for its group; other threads need a barrier besides.
__device__ __forceinline__ void copy_async(uint4* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// End the group of the copies issued since the last one ended.
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Wait for all groups but the n newest; beyond 7 it waits for more than it must.
__device__ __forceinline__ void wait_for_copies(int but) {
    switch (but) {
        case 0: return wait_for_copies_but<0>();
        case 1: return wait_for_copies_but<1>();
        case 2: return wait_for_copies_but<2>();
        case 3: return wait_for_copies_but<3>();
        case 4: return wait_for_copies_but<4>();
        case 5: return wait_for_copies_but<5>();
        case 6: return wait_for_copies_but<6>();
        default: return wait_for_copies_but<7>();
    }
}

// 16 bytes that nobody reads again soon
__device__ __forceinline__ void store_streaming(void* to, uint4 x) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float max_or_nan(float a, float b) {  // NaN if either is, where fmaxf drops it
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// Two bf16 in a word, the first in the low half.
__device__ __forceinline__ unsigned bf16_max(unsigned a, unsigned b) {
    unsigned y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ __forceinline__ unsigned bf16_rounded(float low, float high) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

#endif
