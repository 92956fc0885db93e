// Calls of kernels from Python: made at once, or kept with their arguments to be made again without Python.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace athanor::cpu {

// Kept calls in their order.  Whoever keeps them keeps the tensors whose addresses they have.
class Calls {
  public:
    void add(std::string name, std::function<bool()> call) { calls_.emplace_back(std::move(name), std::move(call)); }
    void extend(const Calls& more) { calls_.insert(calls_.end(), more.calls_.begin(), more.calls_.end()); }
    std::size_t size() const { return calls_.size(); }
    // Without the interpreter's lock; the name of the first call that was refused, which is the last one made, or null.
    const std::string* run() const {
        for (const auto& [name, call] : calls_) {
            if (!call()) {
                return &name;
            }
        }
        return nullptr;
    }

  private:
    std::vector<std::pair<std::string, std::function<bool()>>> calls_;
};

template <typename Prepare, typename Run, typename... Arguments>
void define_as(pybind11::module_& m, const char* name, Prepare prepare, Run (Prepare::*)(Arguments...) const) {
    m.def(name, [prepare](Arguments... arguments) {
        const auto run = prepare(std::forward<Arguments>(arguments)...);
        pybind11::gil_scoped_release released;
        return run();
    });
    m.attr("later").cast<pybind11::module_>().def(name, [prepare, name](Arguments... arguments) {
        const auto run = prepare(std::forward<Arguments>(arguments)...);
        Calls kept;
        if constexpr (std::is_void_v<decltype(run())>) {
            kept.add(name, [run] { return run(), true; });
        } else {
            kept.add(name, run);
        }
        return kept;
    });
}

// m.name(arguments...) makes a call, m.later.name(arguments...) keeps it.  prepare(arguments...) returns what makes it, with no Python object in it;
// that returns nothing, or whether the call was served.
template <typename Prepare>
void define(pybind11::module_& m, const char* name, Prepare prepare) {
    define_as(m, name, prepare, &Prepare::operator());
}

void bind_calls(pybind11::module_& m);  // before anything is defined

}  // namespace athanor::cpu
