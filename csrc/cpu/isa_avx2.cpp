// The CPU kernels for AVX2 and FMA (x86-64-v3).
#include "headers.hpp"
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define ATHANOR_ISA avx2
#define ATHANOR_ISA_NAME "avx2"
#define ATHANOR_AVX2
#include "isa.inl"
#endif
