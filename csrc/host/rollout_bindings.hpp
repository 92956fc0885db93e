// BlockPool and Scheduler in a Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace athanor {

void bind_rollout(pybind11::module_& m);

}  // namespace athanor
