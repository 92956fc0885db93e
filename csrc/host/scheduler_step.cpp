// What happens between two decode steps: rows grow, end, pause, go on and close up.
#include <algorithm>

#include "scheduler.hpp"

namespace athanor {

Events Scheduler::advance(std::int64_t first, const std::uint8_t* done, const std::int64_t* appended, std::int64_t count) {
    const char* who = "Scheduler.advance";
    require_range(who, "first", first, 0, num_active_);
    if (count != num_active_ - first) {
        refuse(who, "length of done", count, "num_active - first = " + std::to_string(num_active_ - first));
    }
    for (std::int64_t i = 0; i < count; ++i) {  // everything is checked before anything changes
        const Entry& entry = entries_[static_cast<std::size_t>(entry_at_[static_cast<std::size_t>(first + i)])];
        const std::int64_t most = std::min<std::int64_t>(config_.lookahead, entry.max_length - entry.length);
        if (appended && (appended[i] < 0 || appended[i] > most)) {
            refuse(who, "appended[" + std::to_string(i) + "]", appended[i],
                   "0 to " + std::to_string(most) + " (lookahead " + std::to_string(config_.lookahead) + ", " +
                       std::to_string(entry.max_length - entry.length) + " tokens left to row " + std::to_string(first + i) + ")");
        }
    }
    Events events;
    step_ += first == 0;
    needy_.clear();
    const std::int64_t block_size = pool_.block_size();
    for (std::int64_t i = 0; i < count; ++i) {
        const auto row = static_cast<std::size_t>(first + i);
        const std::int32_t index = entry_at_[row];
        Entry& entry = entries_[static_cast<std::size_t>(index)];
        entry.length += appended ? static_cast<std::int32_t>(appended[i]) : 1;
        table_.lengths[row] = entry.length;
        if (done[i] || entry.length == entry.max_length) {
            finish(index, done[i] ? FinishReason::done : FinishReason::length, events);
        } else if (entry.num_blocks * block_size < slots_ahead(entry.length, entry.max_length)) {
            needy_.push_back(index);
        }
    }
    settle(events);
    return events;
}

void Scheduler::finish(std::int32_t index, FinishReason reason, Events& events) {
    Entry& entry = entries_[static_cast<std::size_t>(index)];
    Request& request = *entry.request;
    events.finished_rows.push_back(entry.row);
    events.finished_requests.push_back(request.id);
    events.finished_members.push_back(entry.member);
    events.finished_generated.push_back(entry.length - request.prompt_length);
    events.finished_reasons.push_back(static_cast<std::uint8_t>(reason));
    pool_.release(blocks_of(index), static_cast<std::size_t>(entry.num_blocks));
    reserved_ -= worst_blocks(request) - entry.num_blocks;
    (entry.state == RowState::active ? num_active_ : num_paused_) -= 1;
    request.running.erase(std::find(request.running.begin(), request.running.end(), index));
    entry_at_[static_cast<std::size_t>(entry.row)] = -1;
    entry.state = RowState::free;
    entry.request = nullptr;
    free_entries_.push_back(index);
    drop_if_complete(request, events);
}

void Scheduler::finish_waiting(Request& request, std::size_t position, Events& events) {
    const std::int32_t member = request.waiting[position];
    events.finished_rows.push_back(-1);
    events.finished_requests.push_back(request.id);
    events.finished_members.push_back(member);
    events.finished_generated.push_back(request.generated[static_cast<std::size_t>(member)]);
    events.finished_reasons.push_back(static_cast<std::uint8_t>(FinishReason::aborted));
    request.waiting.erase(request.waiting.begin() + static_cast<std::ptrdiff_t>(position));
    --num_waiting_;
    if (request.waiting.empty()) {
        leave_queue(request);
        pool_.release(request.prompt_blocks.data(), request.prompt_blocks.size());
        request.prompt_blocks.clear();
        drop_if_complete(request, events);
    }
}

void Scheduler::drop_if_complete(Request& request, Events& events) {
    if (request.waiting.empty() && request.running.empty()) {
        events.completed_requests.push_back(request.id);
        requests_.erase(request.id);
    }
}

Events Scheduler::abort(std::int64_t id, std::int64_t member) {
    Request& request = find("Scheduler.abort", id);
    Events events;
    needy_.clear();
    if (member == -1) {
        abort_request(request, events);
        settle(events);
        return events;
    }
    const auto waiting = std::find(request.waiting.begin(), request.waiting.end(), member);
    const auto running = std::find_if(request.running.begin(), request.running.end(),
                                      [&](std::int32_t index) { return entries_[static_cast<std::size_t>(index)].member == member; });
    if (waiting != request.waiting.end()) {
        finish_waiting(request, static_cast<std::size_t>(waiting - request.waiting.begin()), events);
    } else if (running != request.running.end()) {
        finish(*running, FinishReason::aborted, events);
    } else {
        refuse("Scheduler.abort", "member", member, "one of request " + std::to_string(id) + " that waits or runs");
    }
    settle(events);
    return events;
}

void Scheduler::abort_request(Request& request, Events& events) {
    // The request is gone with its last member.
    for (std::size_t left = request.running.size() + request.waiting.size(); left > 0; --left) {
        if (!request.running.empty()) {
            finish(request.running.front(), FinishReason::aborted, events);
        } else {
            finish_waiting(request, 0, events);
        }
    }
}

Events Scheduler::abort_all() {
    Events events;
    needy_.clear();
    while (!requests_.empty()) {
        abort_request(requests_.begin()->second, events);
    }
    settle(events);
    return events;
}

void Scheduler::settle(Events& events) {
    if (!events.finished_rows.empty()) {
        by_age_.erase(std::remove_if(by_age_.begin(), by_age_.end(),
                                     [&](std::int32_t index) { return entries_[static_cast<std::size_t>(index)].state == RowState::free; }),
                      by_age_.end());
    }
    grown_.clear();
    pausing_.clear();
    resuming_.clear();
    if (!config_.pause) {
        grow_reserved();
    } else if (!needy_.empty() || num_paused_) {
        grow_or_pause();
    }
    if (events.finished_rows.empty() && pausing_.empty() && resuming_.empty()) {
        for (const auto& [index, column, block] : grown_) {
            const std::int32_t row = entries_[static_cast<std::size_t>(index)].row;
            table_.block_table[static_cast<std::size_t>(row) * static_cast<std::size_t>(max_blocks_) + static_cast<std::size_t>(column)] = block;
            table_.num_blocks[static_cast<std::size_t>(row)] = column + 1;
        }
    } else {
        compact(events);
    }
    for (const auto& [index, column, block] : grown_) {
        events.blocks.push_back({entries_[static_cast<std::size_t>(index)].row, column, block});
    }
}

void Scheduler::append_block(std::int32_t index) {
    Entry& entry = entries_[static_cast<std::size_t>(index)];
    std::int32_t* block = blocks_of(index) + entry.num_blocks;
    pool_.allocate(1, block);
    grown_.push_back({index, entry.num_blocks, *block});
    ++entry.num_blocks;
    --reserved_;
}

void Scheduler::grow_reserved() {
    for (const std::int32_t index : needy_) {
        const Entry& entry = entries_[static_cast<std::size_t>(index)];
        const std::int64_t wanted = pool_.blocks_for(slots_ahead(entry.length, entry.max_length));
        while (entry.num_blocks < wanted) {
            append_block(index);
        }
    }
}

void Scheduler::grow_or_pause() {
    // (S) of scheduler.cpp, oldest row first.  `available` is F + sum of h over older rows: what an older row takes from F it adds to h, so its
    // growth in this pass does not change the sum.  `slack` is the least of available - r over the older rows.
    std::int64_t available = pool_.num_free(), slack = available;
    for (const std::int32_t index : by_age_) {
        Entry& entry = entries_[static_cast<std::size_t>(index)];
        const std::int64_t may_ask = worst_blocks(*entry.request) - entry.num_blocks, released = releases(entry, index);
        const std::int64_t wanted = std::max<std::int64_t>(0, pool_.blocks_for(slots_ahead(entry.length, entry.max_length)) - entry.num_blocks);
        const bool granted = wanted <= slack && wanted <= pool_.num_free();
        if (granted) {
            for (std::int64_t i = 0; i < wanted; ++i) {
                append_block(index);
            }
            slack -= wanted;
        }
        const RowState state = granted ? RowState::active : RowState::paused;
        if (state != entry.state) {
            (granted ? resuming_ : pausing_).push_back(index);
            entry.state = state;
            num_active_ += granted ? 1 : -1;
            num_paused_ += granted ? -1 : 1;
        }
        slack = std::min(slack, available - may_ask);
        available += released;
    }
}

void Scheduler::compact(Events& events) {
    const auto num_rows = static_cast<std::int32_t>(config_.num_rows);
    const auto state_at = [&](std::int32_t row) {
        const std::int32_t index = entry_at_[static_cast<std::size_t>(row)];
        return index < 0 ? RowState::free : entries_[static_cast<std::size_t>(index)].state;
    };
    // Rows keep their place where they can; the others fill the holes in order.
    std::vector<std::pair<std::int32_t, std::int32_t>> placed;  // entry, target row
    const auto close_up = [&](RowState state, std::int32_t begin, std::int32_t count) {
        std::int32_t hole = begin;
        const auto take = [&](std::int32_t from, std::int32_t to) {
            for (std::int32_t row = from; row < to; ++row) {
                if (state_at(row) == state && (row < begin || row >= begin + count)) {
                    while (state_at(hole) == state) {
                        ++hole;
                    }
                    placed.emplace_back(entry_at_[static_cast<std::size_t>(row)], hole++);
                }
            }
        };
        take(0, active_extent_);
        take(num_rows, num_rows + paused_extent_);
    };
    close_up(RowState::active, 0, num_active_);
    close_up(RowState::paused, num_rows, num_paused_);

    for (const auto& [index, row] : placed) {
        const std::int32_t from = entries_[static_cast<std::size_t>(index)].row;
        events.moves.push_back({from, row});
        entry_at_[static_cast<std::size_t>(from)] = -1;
    }
    for (const auto& [index, row] : placed) {
        entry_at_[static_cast<std::size_t>(row)] = index;
        entries_[static_cast<std::size_t>(index)].row = row;
        write_row(index);
    }
    const auto clear = [&](std::int32_t from, std::int32_t to) {
        for (std::int32_t row = from; row < to; ++row) {
            if (entry_at_[static_cast<std::size_t>(row)] < 0) {
                clear_row(row);
                events.cleared_rows.push_back(row);
            }
        }
    };
    clear(num_active_, active_extent_);
    clear(num_rows + num_paused_, num_rows + paused_extent_);
    active_extent_ = num_active_;
    paused_extent_ = num_paused_;
    for (const auto& [index, column, block] : grown_) {  // of rows that stayed; the others are written already
        const auto row = static_cast<std::size_t>(entries_[static_cast<std::size_t>(index)].row);
        table_.block_table[row * static_cast<std::size_t>(max_blocks_) + static_cast<std::size_t>(column)] = block;
        table_.num_blocks[row] = column + 1;
    }
    for (const std::int32_t index : pausing_) {
        events.paused_rows.push_back(entries_[static_cast<std::size_t>(index)].row);
    }
    for (const std::int32_t index : resuming_) {
        events.resumed_rows.push_back(entries_[static_cast<std::size_t>(index)].row);
    }
}

void Scheduler::write_row(std::int32_t index) {
    const Entry& entry = entries_[static_cast<std::size_t>(index)];
    const Request& request = *entry.request;
    const auto row = static_cast<std::size_t>(entry.row);
    table_.state[row] = static_cast<std::uint8_t>(entry.state);
    table_.lengths[row] = entry.length;
    table_.prompt_lengths[row] = request.prompt_length;
    table_.max_lengths[row] = entry.max_length;
    table_.requests[row] = request.id;
    table_.members[row] = entry.member;
    table_.seeds[row] = request.seeds[static_cast<std::size_t>(entry.member)];
    table_.shared_blocks[row] = full_blocks(request);
    table_.num_blocks[row] = entry.num_blocks;
    std::int32_t* table = table_.block_table.data() + row * static_cast<std::size_t>(max_blocks_);
    std::copy_n(blocks_of(index), entry.num_blocks, table);
    std::fill(table + entry.num_blocks, table + max_blocks_, static_cast<std::int32_t>(config_.null_block));
}

void Scheduler::clear_row(std::int32_t at) {
    const auto row = static_cast<std::size_t>(at);
    table_.state[row] = static_cast<std::uint8_t>(RowState::free);
    for (auto* column : {&table_.lengths, &table_.prompt_lengths, &table_.max_lengths, &table_.members, &table_.num_blocks, &table_.shared_blocks}) {
        (*column)[row] = 0;
    }
    table_.requests[row] = -1;
    table_.seeds[row] = 0;
    std::int32_t* table = table_.block_table.data() + row * static_cast<std::size_t>(max_blocks_);
    std::fill(table, table + max_blocks_, static_cast<std::int32_t>(config_.null_block));
}

void Scheduler::groups(std::vector<std::int32_t>& offsets, std::vector<std::int32_t>& rows, std::vector<std::int32_t>& shared_blocks) const {
    std::vector<std::array<std::int64_t, 3>> active;  // request, member, row
    for (std::int32_t row = 0; row < num_active_; ++row) {
        const Entry& entry = entries_[static_cast<std::size_t>(entry_at_[static_cast<std::size_t>(row)])];
        active.push_back({entry.request->id, entry.member, row});
    }
    std::sort(active.begin(), active.end());
    offsets.assign(1, 0);
    for (std::size_t i = 0; i < active.size(); ++i) {
        rows.push_back(static_cast<std::int32_t>(active[i][2]));
        if (i + 1 == active.size() || active[i + 1][0] != active[i][0]) {
            offsets.push_back(static_cast<std::int32_t>(i + 1));
            shared_blocks.push_back(full_blocks(*entries_[static_cast<std::size_t>(entry_at_[static_cast<std::size_t>(rows.back())])].request));
        }
    }
}

}  // namespace athanor
