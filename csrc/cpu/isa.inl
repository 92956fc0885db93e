// All CPU kernels for one instruction set.  Included by isa_*.cpp after the pragma that names it; ATHANOR_ISA is its namespace.
namespace athanor::cpu::ATHANOR_ISA {

#include "simd.inl"

#include "attention_row.inl"
#include "attention.inl"
#include "attention_bwd.inl"
#include "linear.inl"
#include "logprob.inl"
#include "paged_attention.inl"
#include "rmsnorm.inl"
#include "rope.inl"
#include "sample.inl"
#include "swiglu.inl"

const Kernels& table() {
    static const Kernels all = [] {
        Kernels k{};
        k.isa = ATHANOR_ISA_NAME;
        k.swiglu_fwd = swiglu_fwd;
        k.swiglu_bwd = swiglu_bwd;
        k.linear_fwd = linear_fwd;
        k.linear_dx = linear_dx;
        k.linear_dw = linear_dw;
        k.grouped_fwd = grouped_fwd;
        k.grouped_dx = grouped_dx;
        k.grouped_dw = grouped_dw;
        k.rmsnorm_fwd = rmsnorm_fwd;
        k.rmsnorm_bwd = rmsnorm_bwd;
        k.rotation = rotation;
        k.rope = rope;
        k.rope_norm_bwd = rope_norm_bwd;
        k.logprob_fwd = logprob_fwd;
        k.logprob_bwd = logprob_bwd;
        k.sample = sample;
        k.philox_uniform = philox_uniform;
        k.attention_fwd = attention_fwd;
        k.attention_bwd = attention_bwd;
        k.paged_attention = paged_attention;
        return k;
    }();
    return all;
}

}  // namespace athanor::cpu::ATHANOR_ISA
