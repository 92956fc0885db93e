// athanor._host: what is host-side and hot, without torch headers, so that one build serves every torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "packing.hpp"
#include "rollout_bindings.hpp"

namespace py = pybind11;

namespace {

py::tuple best_fit_pack(const py::array& lengths, std::int64_t capacity) {
    if (lengths.ndim() != 1) {
        throw py::value_error("best_fit_pack: lengths has " + std::to_string(lengths.ndim()) + " dimensions, wanted 1");
    }
    // Only what int64 holds exactly; an empty list has no integer type of its own.
    const char kind = lengths.dtype().kind();
    const bool exact = kind == 'i' || (kind == 'u' && lengths.itemsize() < 8);
    if (!exact && lengths.size() > 0) {
        throw py::value_error("best_fit_pack: lengths is " + py::str(lengths.dtype()).cast<std::string>() + ", wanted int64");
    }
    const py::array_t<std::int64_t, py::array::c_style | py::array::forcecast> view(lengths);  // no copy where it is int64 and contiguous
    py::array_t<std::int32_t> bin_of_sequence(view.size());
    const std::int64_t* from = view.data();
    std::int32_t* to = bin_of_sequence.mutable_data();
    const auto num_sequences = static_cast<std::size_t>(view.size());
    std::int32_t num_bins = 0;
    {
        py::gil_scoped_release release;
        num_bins = athanor::best_fit_pack(from, num_sequences, capacity, to);
    }
    return py::make_tuple(bin_of_sequence, num_bins);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host-side C++ of Athanor: sequence packing, KV block pool, continuous-batching scheduler.";
    athanor::bind_rollout(m);
    m.def("best_fit_pack", &best_fit_pack, py::arg("lengths"), py::arg("capacity"),
          R"(Pack sequences into bins of `capacity` tokens by best fit decreasing: each into the fullest bin that still holds it.

lengths: (S,) int64, each in 1..capacity; narrower integers are copied.  The GIL is released: do not write to it meanwhile.
Returns (bin_of_sequence (S,) int32, num_bins).  Bins are numbered in the order in which they are opened; equal lengths go in index
order and equally full bins by the lower number, so the result depends on the arguments alone.
Raises ValueError on capacity <= 0, on a length that is <= 0 or > capacity, and on anything but a 1-d integer array.)");
}
