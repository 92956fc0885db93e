// Kept calls in athanor.kernels._native.
#include "calls.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "team.hpp"

namespace py = pybind11;

namespace athanor::cpu {
namespace {

void refused(const std::string* name) {
    if (name) {
        throw std::runtime_error(*name + ": a captured call was refused");
    }
}

// Every share's steps in their order, each share on a thread of its own; the longest seconds of each step.
std::vector<double> side_by_side(const std::vector<std::vector<const Calls*>>& shares) {
    const auto count = static_cast<std::int64_t>(shares.size());
    std::vector<const std::string*> failures(shares.size());
    std::vector<std::vector<double>> seconds(shares.size());
    parallel_for(count, 1, static_cast<int>(count), [&](std::int64_t begin, std::int64_t end) {
        for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
            for (const Calls* calls : shares[i]) {
                const auto start = std::chrono::steady_clock::now();
                failures[i] = failures[i] ? failures[i] : calls->run();
                seconds[i].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
            }
        }
    });
    std::vector<double> longest;
    for (std::size_t i = 0; i < shares.size(); ++i) {
        refused(failures[i]);
        longest.resize(std::max(longest.size(), seconds[i].size()));
        for (std::size_t step = 0; step < seconds[i].size(); ++step) {
            longest[step] = std::max(longest[step], seconds[i][step]);
        }
    }
    return longest;
}

}  // namespace

void bind_calls(py::module_& m) {
    m.def_submodule("later", "The kernels' calls, kept.");
    py::class_<Calls>(m, "Calls")
        .def(py::init<>())
        .def("extend", &Calls::extend)
        .def("__len__", &Calls::size)
        .def("__call__", [](const Calls& calls) {
            const std::string* name = nullptr;
            {
                py::gil_scoped_release released;
                name = calls.run();
            }
            refused(name);
        });
    m.def("side_by_side", &side_by_side, py::call_guard<py::gil_scoped_release>());
}

}  // namespace athanor::cpu
