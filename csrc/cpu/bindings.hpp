// What the files that bind the CPU kernels to Python share: tensors come as addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace athanor::cpu {

using Address = std::uintptr_t;
using Size = std::int64_t;

template <typename T = float>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_rows(pybind11::module_& m);  // rmsnorm, rope, logprob, sample

}  // namespace athanor::cpu
