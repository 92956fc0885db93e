// The CPU kernels for AVX-512 (x86-64-v4).
#include "headers.hpp"
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define ATHANOR_ISA avx512
#define ATHANOR_ISA_NAME "avx512"
#define ATHANOR_AVX512  // __AVX512F__ is not defined yet: g++ 12 reads all macros of a file before it obeys the pragma
#include "isa.inl"
#endif
