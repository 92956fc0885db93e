// Requests, their order and their admission.  What happens step by step is in scheduler_step.cpp.
//
// Order: key = expected_new_tokens + priority - aging * (step of submission), highest first, then the lower request number.  Waiting requests
// all age alike, so their order never changes, and whoever is submitted more than (spread of expected + priority) / aging steps later comes
// later: nothing starves where aging > 0.  Nobody overtakes a front that does not fit yet.
//
// Policy "reserve" admits what fits with its worst case; a row then never finds the pool empty.
//
// Policy "pause" admits by expected length and keeps the state safe in the sense of Dijkstra's banker, with age as the order.  Let F be the
// free blocks, h_i what comes back for certain when row i and all older ones have finished, r_i what row i may still ask for.  Invariant:
//     r_j <= F + sum of h_i over older rows i < j,   for every row j.                                                                      (S)
// - The oldest row has r_1 <= F by (S): it always gets its block, so it is never paused, and it finishes after at most max_new_tokens steps.
// - A row j that takes a block lowers F by one and raises h_j by one: (S) changes only for older rows, each of which loses one.  So row j may
//   grow while every older row has one block of slack in (S); otherwise it pauses.
// - A row that ends returns at least h to F: younger rows keep their sum, older ones gain.
// - Admission appends the youngest rows and is refused where (S) would break.
// So some row always advances and every row is the oldest one day: no deadlock, no starvation, no recomputation.  A group's shared blocks
// count in h of its youngest row, since they return with its last one; while members wait, the group itself holds them and they count nowhere.
// With nothing in flight only the partly admitted group (there is at most one: it goes before the queue) holds blocks, and submit() has
// refused what would not fit beside them.
#include "scheduler.hpp"

#include <algorithm>

namespace athanor {
namespace {

constexpr std::int64_t kMaxRows = std::int64_t{1} << 20;
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 30;
constexpr std::int64_t kMaxPriority = std::int64_t{1} << 40;
constexpr std::int64_t kMaxAging = std::int64_t{1} << 20;

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config) : config_(config), pool_(config.num_blocks, config.block_size) {
    const char* who = "Scheduler";
    require_range(who, "num_rows", config.num_rows, 1, kMaxRows);
    require_range(who, "max_length", config.max_length, 2, kMaxTokens);
    require_range(who, "lookahead", config.lookahead, 1, 65536);
    require_range(who, "refill_rows", config.refill_rows, 1, config.num_rows);
    require_range(who, "aging", config.aging, 0, kMaxAging);
    if (config.null_block != -1 && (config.null_block < config.num_blocks || config.null_block > 2147483647)) {
        refuse(who, "null_block", config.null_block, "-1 or a block outside the pool, " + std::to_string(config.num_blocks) + " to 2147483647");
    }
    // Paused rows lie behind the rows that decode, so that a step whose row count is padded never touches them.
    const std::int64_t table_rows = config.pause ? 2 * config.num_rows : config.num_rows;
    const std::int64_t max_blocks = pool_.blocks_for(config.max_length - 1);
    if (table_rows * max_blocks > BlockPool::kMaxTableEntries) {
        throw std::invalid_argument("Scheduler: max_length " + std::to_string(config.max_length) + " in blocks of " + std::to_string(config.block_size) +
                                    " and " + std::to_string(table_rows) + " rows make a block table of " + std::to_string(table_rows * max_blocks) +
                                    " entries, wanted at most " + std::to_string(BlockPool::kMaxTableEntries));
    }
    max_blocks_ = static_cast<std::int32_t>(max_blocks);
    const auto num_rows = static_cast<std::size_t>(config.num_rows), rows = static_cast<std::size_t>(table_rows);
    table_.state.assign(rows, 0);
    for (auto* column : {&table_.lengths, &table_.prompt_lengths, &table_.max_lengths, &table_.members, &table_.num_blocks, &table_.shared_blocks}) {
        column->assign(rows, 0);
    }
    table_.requests.assign(rows, -1);
    table_.seeds.assign(rows, 0);
    table_.block_table.assign(rows * static_cast<std::size_t>(max_blocks), static_cast<std::int32_t>(config.null_block));
    entry_at_.assign(rows, -1);
    entries_.resize(num_rows);
    blocks_.resize(num_rows * static_cast<std::size_t>(max_blocks));
    for (auto* list : {&free_entries_, &by_age_, &needy_, &pausing_, &resuming_}) {
        list->reserve(num_rows);
    }
    for (std::size_t i = num_rows; i-- > 0;) {
        free_entries_.push_back(static_cast<std::int32_t>(i));
    }
}

std::int64_t Scheduler::ordering_key(const Request& request) const {
    return request.expected + request.priority - config_.aging * request.submitted_step;
}

std::int64_t Scheduler::slots_ahead(std::int64_t length, std::int64_t max_length) const {
    return std::min(length + config_.lookahead - 1, max_length - 1);
}

std::int64_t Scheduler::worst_blocks(const Request& request) const {
    return pool_.blocks_for(std::int64_t{request.prompt_length} + request.max_new_tokens - 1);
}

std::int64_t Scheduler::expected_blocks(const Request& request) const {
    return pool_.blocks_for(std::int64_t{request.prompt_length} + request.expected - 1);
}

std::int64_t Scheduler::submit(const Submission& submission) {
    const char* who = "Scheduler.submit";
    const auto& [prompt_length, num_members, max_new_tokens, expected, priority, seeds, generated] = submission;
    require_range(who, "prompt_length", prompt_length, 1, config_.max_length - 1);
    require_range(who, "max_new_tokens", max_new_tokens, 1, config_.max_length);
    if (prompt_length + max_new_tokens > config_.max_length) {
        refuse(who, "prompt_length + max_new_tokens", prompt_length + max_new_tokens, "at most max_length = " + std::to_string(config_.max_length));
    }
    require_range(who, "num_members", num_members, 1, config_.split_groups ? kMaxRows : config_.num_rows);
    require_range(who, "expected_new_tokens", expected, 1, max_new_tokens);
    require_range(who, "priority", priority, -kMaxPriority, kMaxPriority);
    const auto n = static_cast<std::size_t>(num_members);
    if (!seeds.empty() && seeds.size() != n) {
        refuse(who, "length of seeds", static_cast<std::int64_t>(seeds.size()), "num_members = " + std::to_string(n));
    }
    if (!generated.empty() && generated.size() != n) {
        refuse(who, "length of generated", static_cast<std::int64_t>(generated.size()), "num_members = " + std::to_string(n));
    }
    for (std::size_t i = 0; i < generated.size(); ++i) {
        const std::string name = "generated[" + std::to_string(i) + "]";
        require_range(who, name.c_str(), generated[i], 0, max_new_tokens - 1);
    }

    Request request;
    request.id = next_request_;
    request.prompt_length = static_cast<std::int32_t>(prompt_length);
    request.max_new_tokens = static_cast<std::int32_t>(max_new_tokens);
    request.expected = expected;
    request.priority = priority;
    request.submitted_step = step_;
    request.key = ordering_key(request);
    request.seeds = seeds.empty() ? std::vector<std::int64_t>(n, 0) : seeds;
    request.generated.assign(generated.begin(), generated.end());
    request.generated.resize(n, 0);
    for (std::size_t i = 0; i < n; ++i) {
        request.waiting.push_back(static_cast<std::int32_t>(i));
    }
    const std::size_t together = config_.split_groups ? 1 : n;
    const std::int64_t needed = blocks_alone(request, together, cost_of(request, together));
    if (needed > config_.num_blocks) {
        throw std::invalid_argument("Scheduler.submit: prompt_length " + std::to_string(prompt_length) + ", max_new_tokens " + std::to_string(max_new_tokens) +
                                    " and " + std::to_string(together) + " of " + std::to_string(n) + " members at once need " + std::to_string(needed) +
                                    " blocks of " + std::to_string(config_.block_size) + " tokens, wanted at most num_blocks = " +
                                    std::to_string(config_.num_blocks));
    }
    num_waiting_ += num_members;
    queue_.emplace(-request.key, request.id);
    requests_.emplace(request.id, std::move(request));
    return next_request_++;
}

Scheduler::Request& Scheduler::find(const char* who, std::int64_t request) {
    const auto found = requests_.find(request);
    if (found == requests_.end()) {
        refuse(who, "request", request, "one that waits or runs (it was never submitted, or all of it has finished)");
    }
    return found->second;
}

std::int64_t Scheduler::waiting_of(std::int64_t request) const {
    return static_cast<std::int64_t>(const_cast<Scheduler*>(this)->find("Scheduler.waiting_members", request).waiting.size());
}

void Scheduler::set_expected(std::int64_t id, std::int64_t expected_new_tokens) {
    Request& request = find("Scheduler.set_expected", id);
    require_range("Scheduler.set_expected", "expected_new_tokens", expected_new_tokens, 1, request.max_new_tokens);
    const bool queued = queue_.erase({-request.key, id}) != 0;
    request.expected = expected_new_tokens;
    request.key = ordering_key(request);
    if (queued) {
        queue_.emplace(-request.key, id);
    }
}

Scheduler::Cost Scheduler::cost_of(const Request& request, std::size_t members) const {
    const std::int64_t full = full_blocks(request), prompt = pool_.blocks_for(request.prompt_length);
    const std::int64_t worst = worst_blocks(request), expected = expected_blocks(request);
    const std::int64_t max_length = std::int64_t{request.prompt_length} + request.max_new_tokens;
    Cost cost;
    if (!request.prefilled) {
        cost = {prompt, prompt, prompt, request.prompt_length};
    }
    for (std::size_t i = 0; i < members; ++i) {
        const std::int64_t generated = request.generated[static_cast<std::size_t>(request.waiting[i])];
        const std::int64_t first = pool_.blocks_for(slots_ahead(request.prompt_length + generated, max_length));
        cost.now += first - full;
        cost.worst += worst - full;
        cost.expected += std::max(first, expected) - full;
        cost.prefill += generated;
    }
    if (members == request.waiting.size()) {  // the last one takes the prompt's own partial block instead of a copy
        cost.now -= prompt - full;
        cost.worst -= prompt - full;
        cost.expected -= prompt - full;
    }
    return cost;
}

std::int64_t Scheduler::blocks_alone(const Request& request, std::size_t members, const Cost& cost) const {
    if (!config_.pause) {
        return cost.worst;
    }
    // The smallest pool in which (S) holds after the admission.
    const std::int64_t full = full_blocks(request), max_length = std::int64_t{request.prompt_length} + request.max_new_tokens;
    std::int64_t needed = cost.now, released = 0;
    for (std::size_t i = 0; i < members; ++i) {
        const std::int64_t length = std::int64_t{request.prompt_length} + request.generated[static_cast<std::size_t>(request.waiting[i])];
        const std::int64_t first = pool_.blocks_for(slots_ahead(length, max_length));
        needed = std::max(needed, cost.now + worst_blocks(request) - first - released);
        released += first - full;
    }
    return needed;
}

std::int64_t Scheduler::releases(const Entry& entry, std::int32_t index) const {
    const Request& request = *entry.request;
    const bool carries_shared = request.prompt_blocks.empty() && request.running.back() == index;
    return entry.num_blocks - (carries_shared ? 0 : full_blocks(request));
}

bool Scheduler::fits(const Request& request, std::size_t members, const Cost& cost) const {
    const std::int64_t free = pool_.num_free();
    if (!config_.pause) {
        return cost.worst <= free - reserved_;
    }
    std::int64_t available = free, expected = cost.expected;
    if (cost.now > free) {
        return false;
    }
    for (const std::int32_t index : by_age_) {
        const Entry& entry = entries_[static_cast<std::size_t>(index)];
        if (available - (worst_blocks(*entry.request) - entry.num_blocks) < cost.now) {
            return false;
        }
        available += releases(entry, index);
        expected += std::max<std::int64_t>(0, expected_blocks(*entry.request) - entry.num_blocks);
    }
    return blocks_alone(request, members, cost) <= available && (by_age_.empty() || expected <= free);
}

std::size_t Scheduler::admissible(const Request& request, std::int64_t free_rows, std::int64_t prefill_left, bool first) const {
    const auto possible = [&](std::size_t members) {
        const Cost cost = cost_of(request, members);
        const bool affordable = prefill_left < 0 || cost.prefill <= prefill_left || (first && (!config_.split_groups || members == 1));
        return affordable && fits(request, members, cost);
    };
    const std::size_t most = std::min(request.waiting.size(), static_cast<std::size_t>(free_rows));
    if (most == 0 || (!config_.split_groups && most < request.waiting.size())) {
        return 0;
    }
    if (possible(most)) {
        return most;
    }
    if (!config_.split_groups) {
        return 0;
    }
    // More members never cost less, the last one apart, which was tried.
    std::size_t low = 0, high = most;
    while (high - low > 1) {
        const std::size_t middle = low + (high - low) / 2;
        (possible(middle) ? low : high) = middle;
    }
    return low;
}

Admission Scheduler::admit(std::int64_t max_prefill_tokens) {
    if (max_prefill_tokens < -1 || max_prefill_tokens == 0) {
        refuse("Scheduler.admit", "max_prefill_tokens", max_prefill_tokens, ">= 1, or None for no limit");
    }
    Admission admission;
    admission.first_row = num_active_;
    const std::int64_t in_flight = num_active_ + num_paused_;
    std::int64_t free_rows = config_.num_rows - in_flight, prefill_left = max_prefill_tokens;
    if (num_paused_ || (in_flight && free_rows < std::min(config_.refill_rows, num_waiting_))) {
        return admission;  // what is paused is older than what waits and goes on first
    }
    while (partly_admitted_ >= 0 || !queue_.empty()) {
        Request& request = requests_.at(partly_admitted_ >= 0 ? partly_admitted_ : queue_.begin()->second);
        const std::size_t members = admissible(request, free_rows, prefill_left, admission.requests.empty());
        if (members == 0) {
            break;
        }
        if (prefill_left >= 0) {
            prefill_left = std::max<std::int64_t>(0, prefill_left - cost_of(request, members).prefill);
        }
        free_rows -= static_cast<std::int64_t>(members);
        start(request, members, admission);
    }
    if (num_active_ == 0 && num_waiting_) {
        throw std::logic_error("Scheduler.admit: nothing runs and request " + std::to_string(queue_.empty() ? partly_admitted_ : queue_.begin()->second) +
                               " does not fit, although submit took it");
    }
    return admission;
}

void Scheduler::leave_queue(Request& request) {
    queue_.erase({-request.key, request.id});
    if (partly_admitted_ == request.id) {
        partly_admitted_ = -1;
    }
}

void Scheduler::start(Request& request, std::size_t members, Admission& admission) {
    leave_queue(request);
    const bool last = members == request.waiting.size();
    admission.requests.push_back(request.id);
    admission.waited_steps.push_back(step_ - request.submitted_step);
    admission.needs_prefill.push_back(!request.prefilled);
    if (!request.prefilled) {
        request.prompt_blocks.resize(static_cast<std::size_t>(pool_.blocks_for(request.prompt_length)));
        pool_.allocate(static_cast<std::int64_t>(request.prompt_blocks.size()), request.prompt_blocks.data());
        request.prefilled = true;
        admission.prompt_blocks.insert(admission.prompt_blocks.end(), request.prompt_blocks.begin(), request.prompt_blocks.end());
    }
    admission.block_offsets.push_back(static_cast<std::int32_t>(admission.prompt_blocks.size()));

    const std::size_t width = request.prompt_blocks.size(), children = last ? members - 1 : members;
    const std::vector<std::int32_t> tables = pool_.fork(request.prompt_blocks.data(), width, request.prompt_length, static_cast<std::int64_t>(children),
                                                        admission.copies);
    for (std::size_t i = 0; i < members; ++i) {
        const std::int32_t index = free_entries_.back();
        free_entries_.pop_back();
        Entry& entry = entries_[static_cast<std::size_t>(index)];
        const std::int32_t* table = i < children ? tables.data() + i * width : request.prompt_blocks.data();
        std::copy(table, table + width, blocks_of(index));
        entry.request = &request;
        entry.member = request.waiting[i];
        entry.row = num_active_++;
        entry.length = request.prompt_length + request.generated[static_cast<std::size_t>(entry.member)];
        entry.max_length = request.prompt_length + request.max_new_tokens;
        entry.num_blocks = static_cast<std::int32_t>(width);
        entry.state = RowState::active;
        const std::int64_t first = pool_.blocks_for(slots_ahead(entry.length, entry.max_length));
        pool_.allocate(first - entry.num_blocks, blocks_of(index) + entry.num_blocks);
        entry.num_blocks = static_cast<std::int32_t>(first);
        reserved_ += worst_blocks(request) - first;
        request.running.push_back(index);
        by_age_.push_back(index);
        entry_at_[static_cast<std::size_t>(entry.row)] = index;
        write_row(index);
        admission.rows.push_back(entry.row);
        admission.members.push_back(entry.member);
        admission.generated.push_back(entry.length - request.prompt_length);
        for (std::int32_t column = 0; column < entry.num_blocks; ++column) {
            admission.blocks.push_back({entry.row, column, blocks_of(index)[column]});
        }
    }
    admission.row_offsets.push_back(static_cast<std::int32_t>(admission.rows.size()));
    active_extent_ = num_active_;
    num_waiting_ -= static_cast<std::int64_t>(members);
    request.waiting.erase(request.waiting.begin(), request.waiting.begin() + static_cast<std::ptrdiff_t>(members));
    if (last) {
        request.prompt_blocks.clear();
    } else {
        partly_admitted_ = request.id;
    }
}

}  // namespace athanor
