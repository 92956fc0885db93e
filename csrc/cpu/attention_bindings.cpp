// The attention kernels and the paged KV cache in athanor.kernels._native.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "calls.hpp"
#include "kernels.hpp"

namespace py = pybind11;

namespace athanor::cpu {
namespace {

template <std::size_t N>
using Sizes = std::array<Size, N>;  // a tensor's shape or strides

PackedAttention packed(Address q, Address k, Address v, Sizes<3> q_strides, Sizes<3> k_strides, Sizes<3> v_strides, Address cu_seqlens, Address cu_seqlens_k,
                       Size S, Size H, Sizes<3> k_shape, float scale, Size window, int threads) {
    return {at(q), at(k), at(v), q_strides[0], q_strides[1], k_strides[0], k_strides[1], v_strides[0], v_strides[1], at<std::int32_t>(cu_seqlens),
            at<std::int32_t>(cu_seqlens_k), S, H, k_shape[1], k_shape[2], scale, window, threads};
}

PagedCache paged(Address keys, Address values, Sizes<4> shape, Sizes<4> key_strides, Sizes<4> value_strides, Address table, Sizes<2> table_shape,
                 Size table_stride) {
    return {at(keys), at(values), key_strides, value_strides, shape[0], shape[1], shape[2], shape[3], at<std::int32_t>(table), table_shape[0],
            table_shape[1], table_stride};
}

}  // namespace

void bind_attention(py::module_& m) {
    py::class_<PackedAttention>(m, "PackedAttention").def(py::init(&packed));
    define(m, "attention_fwd", [](const PackedAttention& call, Address out, Address stats) {
        return [=] { kernels().attention_fwd(call, at(out), at(stats)); };
    });
    define(m, "attention_bwd", [](const PackedAttention& call, Address out, Address stats, Address dout, Address dq, Address dk, Address dv) {
        return [=] { kernels().attention_bwd(call, at(out), at(stats), at(dout), at(dq), at(dk), at(dv)); };
    });
    py::class_<PagedCache>(m, "PagedCache").def(py::init(&paged));
    define(m, "paged_attention", [](const PagedCache& cache, Address q, Sizes<3> q_strides, Size H, Address seq_lens, Address group_offsets,
                                    Address prefix_lens, Size P, Size limit, float scale, Size window, Address out, Address lse, int threads) {
        const PagedAttention call{cache, at(q), q_strides[0], q_strides[1], H, at<std::int32_t>(seq_lens), at<std::int32_t>(group_offsets),
                                  at<std::int32_t>(prefix_lens), P, limit, scale, window, threads};
        return [=] {
            const bool served = in_order(call);
            if (served) {
                kernels().paged_attention(call, at(out), at(lse));
            }
            return served;
        };
    });
    define(m, "kv_append", [](const PagedCache& cache, Address k, Address v, Sizes<3> k_strides, Sizes<3> v_strides, Address positions, int threads) {
        return [=] {
            return kv_append(cache, at(k), at(v), {k_strides[0], k_strides[1]}, {v_strides[0], v_strides[1]}, at<std::int32_t>(positions), threads);
        };
    });
}

}  // namespace athanor::cpu
