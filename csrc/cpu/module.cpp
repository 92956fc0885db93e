// athanor.kernels._native: the CPU kernels for kernels/_cpu.py, which passes addresses; nobody else calls them.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "calls.hpp"
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
}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

PYBIND11_MODULE(_native, m) {
    m.doc() = "C++ kernels for CPU tensors; kernels/_cpu.py is their only caller.";
    m.def("isa", [] { return kernels().isa; }, "Instruction set in use: avx512, avx2 or base.");
    m.def("has_team", &has_team, "Whether the kernels found an OpenMP runtime in this process to share.");
    bind_calls(m);
    bind_attention(m);
    define(m, "swiglu_fwd", [](Address gate_up, Address y, Size T, Size F, Size stride, int threads) {
        return [=] { kernels().swiglu_fwd(at(gate_up), at(y), T, F, stride, threads); };
    });
    define(m, "swiglu_bwd", [](Address gate_up, Address dy, Address dgate_up, Address y, Size T, Size F, Size stride, int threads) {
        return [=] { kernels().swiglu_bwd(at(gate_up), at(dy), at(dgate_up), at(y), T, F, stride, threads); };
    });
    bind_rows(m);
}

}  // namespace athanor::cpu
