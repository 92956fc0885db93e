// The CPU kernels for whatever the compiler targets by default.
#include "headers.hpp"
#define ATHANOR_ISA base
#define ATHANOR_ISA_NAME "base"
#include "isa.inl"
