// athanor.kernels._native: the CPU kernels for kernels/_cpu.py, which passes addresses; nobody else calls them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "team.hpp"

namespace py = pybind11;

namespace athanor::cpu {
namespace base {
const Kernels& table();
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ATHANOR_X86 1
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
#endif

namespace {
const Kernels& choose() {
    const char* asked = std::getenv("ATHANOR_CPU_ISA");
    const std::string isa = asked ? asked : "";
    if (!isa.empty() && isa != "avx512" && isa != "avx2" && isa != "base") {
        throw std::invalid_argument("ATHANOR_CPU_ISA is " + isa + ", wanted avx512, avx2 or base");
    }
#ifdef ATHANOR_X86
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4 && (isa.empty() || isa == "avx512")) {
        return avx512::table();
    }
    if (v3 && isa != "base") {
        return avx2::table();
    }
#endif
    return base::table();
}

template <typename T = float>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
using Address = std::uintptr_t;
using Size = std::int64_t;
template <std::size_t N>
using Sizes = std::array<Size, N>;  // a tensor's shape or strides

PackedAttention packed(Address q, Address k, Address v, Sizes<3> q_strides, Sizes<3> k_strides, Sizes<3> v_strides, Address cu_seqlens, Size S, Size H,
                       Sizes<3> k_shape, float scale, int threads) {
    return {at(q), at(k), at(v), q_strides[0], q_strides[1], k_strides[0], k_strides[1], v_strides[0], v_strides[1], at<std::int32_t>(cu_seqlens),
            S, H, k_shape[1], k_shape[2], scale, threads};
}

PagedCache paged(Address keys, Address values, Sizes<4> shape, Sizes<4> key_strides, Sizes<4> value_strides, Address table, Sizes<2> table_shape,
                 Size table_stride) {
    return {at(keys), at(values), key_strides, value_strides, shape[0], shape[1], shape[2], shape[3], at<std::int32_t>(table), table_shape[0],
            table_shape[1], table_stride};
}
}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

PYBIND11_MODULE(_native, m) {
    m.doc() = "C++ kernels for CPU tensors; kernels/_cpu.py is their only caller.";
    m.def("isa", [] { return kernels().isa; }, "Instruction set in use: avx512, avx2 or base.");
    m.def("has_team", &has_team, "Whether the kernels found an OpenMP runtime in this process to share.");
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("swiglu_fwd", [](Address gate_up, Address y, Size T, Size F, Size stride, int threads) {
        kernels().swiglu_fwd(at(gate_up), at(y), T, F, stride, threads);
    }, release);
    m.def("swiglu_bwd", [](Address gate_up, Address dy, Address dgate_up, Size T, Size F, Size stride, int threads) {
        kernels().swiglu_bwd(at(gate_up), at(dy), at(dgate_up), T, F, stride, threads);
    }, release);

    py::class_<PackedAttention>(m, "PackedAttention").def(py::init(&packed));
    m.def("attention_fwd", [](const PackedAttention& call, Address out, Address stats) { kernels().attention_fwd(call, at(out), at(stats)); }, release);
    m.def("attention_bwd", [](const PackedAttention& call, Address out, Address stats, Address dout, Address dq, Address dk, Address dv) {
        kernels().attention_bwd(call, at(out), at(stats), at(dout), at(dq), at(dk), at(dv));
    }, release);
    py::class_<PagedCache>(m, "PagedCache").def(py::init(&paged));
    m.attr("BAD_LENGTHS") = static_cast<int>(kBadLengths);
    m.def("paged_attention", [](const PagedCache& cache, Address q, Sizes<3> q_strides, Size H, Address seq_lens, Address group_offsets,
                                Address prefix_lens, Size P, Size limit, float scale, Address out, Address lse, int threads) {
        const PagedAttention call{cache, at(q), q_strides[0], q_strides[1], H, at<std::int32_t>(seq_lens), at<std::int32_t>(group_offsets),
                                  at<std::int32_t>(prefix_lens), P, limit, scale, threads};
        const Fault fault = paged_attention_fault(call);
        if (fault == kNoFault) {
            kernels().paged_attention(call, at(out), at(lse));
        }
        return static_cast<int>(fault);
    }, release);
    m.def("kv_append", [](const PagedCache& cache, Address k, Address v, Sizes<3> k_strides, Sizes<3> v_strides, Address positions, int threads) {
        return static_cast<int>(kv_append(cache, at(k), at(v), {k_strides[0], k_strides[1]}, {v_strides[0], v_strides[1]},
                                          at<std::int32_t>(positions), threads));
    }, release);
}

}  // namespace athanor::cpu
