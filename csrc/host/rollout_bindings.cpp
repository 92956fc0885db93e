// Python's side of BlockPool and Scheduler.  Results are numpy views of memory that the object they come from owns.
#include "rollout_bindings.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>

#include "block_pool.hpp"
#include "rollout_docs.hpp"
#include "scheduler.hpp"

namespace py = pybind11;

namespace athanor {
namespace {

template <typename T>
py::array view(const std::vector<T>& of, const py::object& owner) {
    return py::array_t<T>({static_cast<py::ssize_t>(of.size())}, of.data(), owner);
}

template <std::size_t N>
py::array view(const std::vector<std::array<std::int32_t, N>>& of, const py::object& owner) {
    const auto* data = reinterpret_cast<const std::int32_t*>(of.data());
    return py::array_t<std::int32_t>({static_cast<py::ssize_t>(of.size()), static_cast<py::ssize_t>(N)}, data, owner);
}

py::array view(const std::vector<BlockCopy>& of, const py::object& owner) {
    static_assert(sizeof(BlockCopy) == 3 * sizeof(std::int32_t));
    const auto* data = reinterpret_cast<const std::int32_t*>(of.data());
    return py::array_t<std::int32_t>({static_cast<py::ssize_t>(of.size()), py::ssize_t{3}}, data, owner);
}

py::array flags(const std::vector<std::uint8_t>& of, const py::object& owner) {
    return py::array(py::dtype::of<bool>(), {static_cast<py::ssize_t>(of.size())}, of.data(), owner);
}

// Integers of any exact width as int64, in memory of the caller's choice.
std::vector<std::int64_t> integers(const char* who, const char* name, const py::object& given) {
    py::array array = py::array::ensure(given);
    if (!array) {
        PyErr_Clear();
        throw py::value_error(std::string(who) + ": " + name + " is no array, wanted integers");
    }
    if (array.ndim() != 1) {
        throw py::value_error(std::string(who) + ": " + name + " has " + std::to_string(array.ndim()) + " dimensions, wanted 1");
    }
    const char kind = array.dtype().kind();
    if (array.size() && kind != 'i' && !(kind == 'u' && array.itemsize() < 8)) {
        throw py::value_error(std::string(who) + ": " + name + " is " + py::str(array.dtype()).cast<std::string>() + ", wanted int64");
    }
    const py::array_t<std::int64_t, py::array::c_style | py::array::forcecast> exact(array);
    return {exact.data(), exact.data() + exact.size()};
}

std::vector<std::int32_t> block_list(const char* who, const py::object& given) {
    std::vector<std::int32_t> blocks;
    for (const std::int64_t block : integers(who, "blocks", given)) {
        require_range(who, "block", block, 0, BlockPool::kMaxBlocks - 1);
        blocks.push_back(static_cast<std::int32_t>(block));
    }
    return blocks;
}

template <typename T>
py::array owned(std::vector<T> values) {
    auto* kept = new std::vector<T>(std::move(values));
    const py::capsule owner(kept, [](void* at) { delete static_cast<std::vector<T>*>(at); });
    return view(*kept, owner);
}

Events advance(Scheduler& scheduler, const py::object& done, std::int64_t first, const py::object& appended) {
    const char* who = "Scheduler.advance";
    if (!py::isinstance<py::array>(done)) {
        throw py::value_error(std::string(who) + ": done is " + py::str(py::type::of(done)).cast<std::string>() + ", wanted a numpy array of bool");
    }
    const auto flags = py::reinterpret_borrow<py::array>(done);
    if (flags.ndim() != 1 || flags.dtype().kind() != 'b') {
        throw py::value_error(std::string(who) + ": done has " + std::to_string(flags.ndim()) + " dimensions of " +
                              py::str(flags.dtype()).cast<std::string>() + ", wanted 1 of bool");
    }
    const auto* data = static_cast<const std::uint8_t*>(flags.data());
    std::vector<std::uint8_t> gathered;
    if (flags.size() > 1 && flags.strides(0) != 1) {
        for (py::ssize_t i = 0; i < flags.size(); ++i) {
            gathered.push_back(data[i * flags.strides(0)]);
        }
        data = gathered.data();
    }
    std::vector<std::int64_t> counts;
    if (!appended.is_none()) {
        counts = integers(who, "appended", appended);
        if (static_cast<py::ssize_t>(counts.size()) != flags.size()) {
            refuse(who, "length of appended", static_cast<std::int64_t>(counts.size()), "that of done, " + std::to_string(flags.size()));
        }
    }
    return scheduler.advance(first, data, appended.is_none() ? nullptr : counts.data(), flags.size());
}

std::unique_ptr<Scheduler> make_scheduler(std::int64_t num_rows, std::int64_t max_length, std::int64_t num_blocks, std::int64_t block_size,
                                          const std::string& policy, bool split_groups, std::int64_t lookahead, std::int64_t refill_rows,
                                          std::int64_t aging, std::int64_t null_block) {
    if (policy != "reserve" && policy != "pause") {
        throw py::value_error("Scheduler: policy is '" + policy + "', wanted 'reserve' or 'pause'");
    }
    SchedulerConfig config;
    config.num_rows = num_rows;
    config.max_length = max_length;
    config.num_blocks = num_blocks;
    config.block_size = block_size;
    config.pause = policy == "pause";
    config.split_groups = split_groups;
    config.lookahead = lookahead;
    config.refill_rows = refill_rows;
    config.aging = aging;
    config.null_block = null_block;
    return std::make_unique<Scheduler>(config);
}

std::int64_t submit(Scheduler& scheduler, std::int64_t prompt_length, std::int64_t num_members, std::int64_t max_new_tokens, const py::object& seeds,
                    std::optional<std::int64_t> expected_new_tokens, std::int64_t priority, const py::object& generated) {
    Submission submission;
    submission.prompt_length = prompt_length;
    submission.num_members = num_members;
    submission.max_new_tokens = max_new_tokens;
    submission.expected_new_tokens = expected_new_tokens.value_or(max_new_tokens);
    submission.priority = priority;
    // An empty list is a wrong length here, not the default.
    const auto read = [num_members](const char* name, const py::object& given) {
        std::vector<std::int64_t> values = given.is_none() ? std::vector<std::int64_t>{} : integers("Scheduler.submit", name, given);
        if (!given.is_none() && static_cast<std::int64_t>(values.size()) != num_members) {
            refuse("Scheduler.submit", std::string("length of ") + name, static_cast<std::int64_t>(values.size()),
                   "num_members = " + std::to_string(num_members));
        }
        return values;
    };
    submission.seeds = read("seeds", seeds);
    submission.generated = read("generated", generated);
    return scheduler.submit(submission);
}

template <typename T>
py::array column(std::vector<T>& of, const py::object& owner) {
    return py::array_t<T>({static_cast<py::ssize_t>(of.size())}, of.data(), owner);
}

void bind_pool(py::module_& m) {
    // The interpreter keeps the type alive, as every type of an extension module.
    py::register_exception<OutOfBlocks>(m, "OutOfBlocks", PyExc_RuntimeError).attr("__doc__") = docs::out_of_blocks;
    py::class_<BlockPool>(m, "BlockPool", docs::block_pool)
        .def(py::init<std::int64_t, std::int64_t>(), py::arg("num_blocks"), py::arg("block_size"))
        .def_property_readonly("num_blocks", &BlockPool::num_blocks)
        .def_property_readonly("block_size", &BlockPool::block_size)
        .def_property_readonly("num_free", &BlockPool::num_free)
        .def_property_readonly("num_used", &BlockPool::num_used)
        .def_property_readonly("num_shared", &BlockPool::num_shared, "Blocks with two holders or more.")
        .def_property_readonly("ref_counts",
                               [](const py::object& self) {
                                   py::array counts = view(self.cast<const BlockPool&>().ref_counts(), self);
                                   counts.attr("flags").attr("writeable") = false;
                                   return counts;
                               },
                               "Holders of each block, (num_blocks,) int32: a read-only view.")
        .def("allocate",
             [](BlockPool& pool, std::int64_t count) {
                 // No more memory than the pool could fill; allocate() itself refuses what is out of range.
                 std::vector<std::int32_t> blocks(static_cast<std::size_t>(std::min<std::int64_t>(std::max<std::int64_t>(count, 0), pool.num_free())));
                 pool.allocate(count, blocks.data());
                 return owned(std::move(blocks));
             },
             py::arg("count"), docs::allocate)
        .def("retain",
             [](BlockPool& pool, const py::object& given) {
                 const auto blocks = block_list("BlockPool.retain", given);
                 pool.retain(blocks.data(), blocks.size());
             },
             py::arg("blocks"), docs::retain)
        .def("release",
             [](BlockPool& pool, const py::object& given) {
                 const auto blocks = block_list("BlockPool.release", given);
                 pool.release(blocks.data(), blocks.size());
             },
             py::arg("blocks"), docs::release)
        .def("fork",
             [](BlockPool& pool, const py::object& given, std::int64_t num_tokens, std::int64_t num_children) {
                 const auto parent = block_list("BlockPool.fork", given);
                 std::vector<BlockCopy> copies;
                 auto tables = owned(pool.fork(parent.data(), parent.size(), num_tokens, num_children, copies));
                 return py::make_tuple(tables.reshape({static_cast<py::ssize_t>(num_children), static_cast<py::ssize_t>(parent.size())}),
                                       owned(std::move(copies)));
             },
             py::arg("blocks"), py::arg("num_tokens"), py::arg("num_children"), docs::fork)
        .def("make_writable",
             [](BlockPool& pool, std::int64_t block, std::int64_t num_tokens) {
                 require_range("BlockPool.make_writable", "block", block, 0, pool.num_blocks() - 1);
                 std::vector<BlockCopy> copies;
                 const std::int32_t own = pool.make_writable(static_cast<std::int32_t>(block), num_tokens, copies);
                 return py::make_tuple(own, owned(std::move(copies)));
             },
             py::arg("block"), py::arg("num_tokens"), docs::make_writable);
}

// A property that is a view of a vector of the object.
template <typename Class, typename Member>
void viewed(py::class_<Class>& to, const char* name, Member Class::* member, const char* doc) {
    to.def_property_readonly(name, [member](const py::object& self) { return view(self.cast<const Class&>().*member, self); }, doc);
}

void bind_results(py::module_& m) {
    py::class_<Admission> admission(m, "Admission", docs::admission);
    admission.def_readonly("first_row", &Admission::first_row, "The admitted rows are first_row to num_active - 1.")
        .def("__len__", [](const Admission& a) { return a.requests.size(); })
        .def_property_readonly("needs_prefill", [](const py::object& self) { return flags(self.cast<const Admission&>().needs_prefill, self); },
                               "(q,) bool: False where the prompt is in the pool since an earlier part of the group was admitted.");
    viewed(admission, "requests", &Admission::requests, "(q,) int64, in the order of admission.");
    viewed(admission, "waited_steps", &Admission::waited_steps, "(q,) int64: steps from submission to this admission.");
    viewed(admission, "row_offsets", &Admission::row_offsets, "(q + 1,) int32 into rows, members and generated.");
    viewed(admission, "rows", &Admission::rows, "(m,) int32, ascending from first_row.");
    viewed(admission, "members", &Admission::members, "(m,) int32.");
    viewed(admission, "generated", &Admission::generated, "(m,) int32: tokens that a resumed member brings, to be prefilled behind the prompt.");
    viewed(admission, "block_offsets", &Admission::block_offsets, "(q + 1,) int32 into prompt_blocks; empty ranges where no prefill is needed.");
    viewed(admission, "prompt_blocks", &Admission::prompt_blocks, "int32: where the prompt's KV goes, token t to slot t % block_size of block t // block_size.");
    viewed(admission, "copies", &Admission::copies, "(c, 3) int32: source block, target block, tokens; to be made after the prompt's prefill.");
    viewed(admission, "blocks", &Admission::blocks, "(b, 3) int32: row, column, block; all entries of the admitted rows' block tables.");

    py::class_<Events> events(m, "Events", docs::events);
    events.attr("DONE") = static_cast<int>(FinishReason::done);
    events.attr("LENGTH") = static_cast<int>(FinishReason::length);
    events.attr("ABORTED") = static_cast<int>(FinishReason::aborted);
    events.def("__bool__", [](const Events& e) { return !(e.finished_rows.empty() && e.moves.empty() && e.cleared_rows.empty() && e.blocks.empty() &&
                                                          e.paused_rows.empty() && e.resumed_rows.empty()); },
               "Whether anything but lengths has changed.");
    viewed(events, "finished_rows", &Events::finished_rows, "(f,) int32: where their tokens lie, before the moves; -1: was waiting.");
    viewed(events, "finished_requests", &Events::finished_requests, "(f,) int64.");
    viewed(events, "finished_members", &Events::finished_members, "(f,) int32.");
    viewed(events, "finished_generated", &Events::finished_generated, "(f,) int32: tokens generated, those brought by a resumed member included.");
    viewed(events, "finished_reasons", &Events::finished_reasons, "(f,) uint8: Events.DONE, LENGTH or ABORTED.");
    viewed(events, "completed_requests", &Events::completed_requests, "int64: requests of which no member runs or waits any more.");
    viewed(events, "moves", &Events::moves, "(v, 2) int32: source row, target row.  All sources are read before any target is written.");
    viewed(events, "cleared_rows", &Events::cleared_rows, "int32: rows that hold nothing any more, after the moves.");
    viewed(events, "blocks", &Events::blocks, "(b, 3) int32: row (after the moves), column, block; new entries of the block table.");
    viewed(events, "paused_rows", &Events::paused_rows, "int32: rows (after the moves) that left the active ones.");
    viewed(events, "resumed_rows", &Events::resumed_rows, "int32: rows (after the moves) that joined them again.");
}

void bind_scheduler(py::module_& m) {
    py::class_<Scheduler> scheduler(m, "Scheduler", docs::scheduler);
    scheduler
        .def(py::init(&make_scheduler), py::arg("num_rows"), py::arg("max_length"), py::arg("num_blocks"), py::arg("block_size"), py::kw_only(),
             py::arg("policy") = "reserve", py::arg("split_groups") = false, py::arg("lookahead") = 1, py::arg("refill_rows") = 1, py::arg("aging") = 1,
             py::arg("null_block") = -1)
        .def("submit", &submit, py::arg("prompt_length"), py::arg("num_members"), py::arg("max_new_tokens"), py::kw_only(), py::arg("seeds") = py::none(),
             py::arg("expected_new_tokens") = py::none(), py::arg("priority") = 0, py::arg("generated") = py::none(), docs::submit)
        .def("set_expected", &Scheduler::set_expected, py::arg("request"), py::arg("expected_new_tokens"), docs::set_expected)
        .def("admit", [](Scheduler& s, std::optional<std::int64_t> tokens) {
                 if (tokens && *tokens < 1) {
                     refuse("Scheduler.admit", "max_prefill_tokens", *tokens, ">= 1, or None for no limit");
                 }
                 return s.admit(tokens.value_or(-1));
             },
             py::arg("max_prefill_tokens") = py::none(), docs::admit)
        .def("advance", &advance, py::arg("done"), py::arg("first") = 0, py::arg("appended") = py::none(), docs::advance)
        .def("abort", [](Scheduler& s, std::int64_t request, std::optional<std::int64_t> member) {
                 if (member && *member < 0) {
                     refuse("Scheduler.abort", "member", *member, ">= 0, or None for all");
                 }
                 return s.abort(request, member.value_or(-1));
             },
             py::arg("request"), py::arg("member") = py::none(), docs::abort)
        .def("abort_all", &Scheduler::abort_all, "Abort every request, in the order of their numbers.  Returns Events.")
        .def("groups",
             [](const Scheduler& s) {
                 std::vector<std::int32_t> offsets, rows, shared_blocks;
                 s.groups(offsets, rows, shared_blocks);
                 return py::make_tuple(owned(std::move(offsets)), owned(std::move(rows)), owned(std::move(shared_blocks)));
             },
             docs::groups)
        .def("waiting_members", &Scheduler::waiting_of, py::arg("request"), "Members of a request that are not admitted yet.  ValueError if unknown.")
        .def("__contains__", &Scheduler::knows, py::arg("request"), "Whether a member of the request waits or runs.")
        .def("audit", &Scheduler::audit, "Add the books up from scratch; RuntimeError where they do not balance.  Slow, for tests.");
    scheduler.def_property_readonly("num_active", &Scheduler::num_active, "Rows 0 to num_active - 1 decode.")
        .def_property_readonly("num_paused", &Scheduler::num_paused, "Rows num_rows to num_rows + num_paused - 1 are paused.")
        .def_property_readonly("num_requests", &Scheduler::num_requests, "Requests of which a member waits or runs.")
        .def_property_readonly("num_waiting", &Scheduler::num_waiting, "Members not admitted yet.")
        .def_property_readonly("num_table_rows", &Scheduler::num_table_rows, "num_rows, or twice that under 'pause'.")
        .def_property_readonly("max_blocks", &Scheduler::max_blocks, "Columns of block_table.")
        .def_property_readonly("num_rows", [](const Scheduler& s) { return s.config().num_rows; })
        .def_property_readonly("step", &Scheduler::step, "Calls of advance() with first = 0.")
        .def_property_readonly("num_blocks", [](const Scheduler& s) { return s.pool().num_blocks(); })
        .def_property_readonly("block_size", [](const Scheduler& s) { return s.pool().block_size(); })
        .def_property_readonly("num_free_blocks", [](const Scheduler& s) { return s.pool().num_free(); })
        .def_property_readonly("num_used_blocks", [](const Scheduler& s) { return s.pool().num_used(); })
        .def_property_readonly("num_shared_blocks", [](const Scheduler& s) { return s.pool().num_shared(); })
        .def_property_readonly("num_reserved_blocks", &Scheduler::reserved_blocks, "What the rows in flight may still ask for in the worst case.");
    const auto table = [&](const char* name, auto RowTable::* member, const char* doc) {
        scheduler.def_property_readonly(name, [member](const py::object& self) { return column(self.cast<Scheduler&>().table().*member, self); }, doc);
    };
    table("state", &RowTable::state, "(rows,) uint8: 0 free, 1 active, 2 paused.");
    table("lengths", &RowTable::lengths, "(rows,) int32: tokens, prompt + generated; 0 where the row is free.");
    table("prompt_lengths", &RowTable::prompt_lengths, "(rows,) int32.");
    table("max_lengths", &RowTable::max_lengths, "(rows,) int32: prompt + max_new_tokens.");
    table("requests", &RowTable::requests, "(rows,) int64, -1 where the row is free.");
    table("members", &RowTable::members, "(rows,) int32: which of its request's samples the row is.");
    table("seeds", &RowTable::seeds, "(rows,) int64.");
    table("row_blocks", &RowTable::num_blocks, "(rows,) int32: entries of block_table in use.");
    table("shared_blocks", &RowTable::shared_blocks, "(rows,) int32: leading entries of block_table that hold whole blocks of the prompt; never written.");
    scheduler.def_property_readonly("block_table",
                                    [](const py::object& self) {
                                        auto& s = self.cast<Scheduler&>();
                                        return py::array_t<std::int32_t>({py::ssize_t{s.num_table_rows()}, py::ssize_t{s.max_blocks()}},
                                                                         s.table().block_table.data(), self);
                                    },
                                    "(rows, max_blocks) int32: slot t of a row is slot t % block_size of block_table[row, t // block_size].");
}

}  // namespace

void bind_rollout(py::module_& m) {
    bind_pool(m);
    bind_results(m);
    bind_scheduler(m);
}

}  // namespace athanor
