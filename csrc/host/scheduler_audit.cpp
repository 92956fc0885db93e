// The books of the scheduler, added up a second time from scratch.
#include <algorithm>

#include "scheduler.hpp"

namespace athanor {
namespace {

void require(bool holds, const std::string& what) {
    if (!holds) {
        throw std::logic_error("Scheduler.audit: " + what);
    }
}

}  // namespace

void Scheduler::audit() const {
    std::vector<std::int32_t> holders(static_cast<std::size_t>(pool_.num_blocks()), 0);
    std::int64_t reserved = 0, waiting = 0;
    std::int32_t active = 0, paused = 0, partly = 0;
    for (std::size_t row = 0; row < entry_at_.size(); ++row) {
        const std::int32_t index = entry_at_[row];
        const auto num_rows = static_cast<std::size_t>(config_.num_rows);
        const bool used = row < num_rows ? row < static_cast<std::size_t>(num_active_) : row - num_rows < static_cast<std::size_t>(num_paused_);
        const std::string name = "row " + std::to_string(row);
        require(used == (index >= 0), name + " is in use where it should be free, or the reverse");
        if (!used) {
            continue;
        }
        const Entry& entry = entries_[static_cast<std::size_t>(index)];
        const Request& request = *entry.request;
        require(entry.row == static_cast<std::int32_t>(row), name + " and its entry disagree");
        require(entry.state == (row < num_rows ? RowState::active : RowState::paused), name + " lies in the wrong part of the table");
        require(requests_.count(request.id) && &requests_.at(request.id) == &request, name + " belongs to no request");
        require(std::count(request.running.begin(), request.running.end(), index) == 1, name + " is not among its request's rows");
        require(entry.length < entry.max_length, name + " has no token left to draw");
        const std::int64_t ahead = pool_.blocks_for(slots_ahead(entry.length, entry.max_length));
        require(entry.num_blocks <= worst_blocks(request), name + " holds more than its worst case");
        require(entry.state == RowState::paused || entry.num_blocks >= ahead, name + " decodes without room for its next steps");
        const std::int32_t* table = blocks_of(index);
        for (std::int32_t column = 0; column < entry.num_blocks; ++column) {
            ++holders[static_cast<std::size_t>(table[column])];
            if (column >= full_blocks(request)) {
                require(pool_.ref_counts()[static_cast<std::size_t>(table[column])] == 1, name + " may write to a shared block");
            }
        }
        reserved += worst_blocks(request) - entry.num_blocks;
        (entry.state == RowState::active ? active : paused) += 1;
    }
    for (const auto& [id, request] : requests_) {
        waiting += static_cast<std::int64_t>(request.waiting.size());
        for (const std::int32_t block : request.prompt_blocks) {
            ++holders[static_cast<std::size_t>(block)];
        }
        const std::string name = "request " + std::to_string(id);
        require(!request.waiting.empty() || !request.running.empty(), name + " has finished and is still known");
        require(request.prompt_blocks.empty() || !request.waiting.empty(), name + " holds its prompt for nobody");
        require((queue_.count({-request.key, id}) != 0) == (!request.waiting.empty() && !request.prefilled), name + " is queued wrongly");
        partly += request.prefilled && !request.waiting.empty();
        require(!(request.prefilled && !request.waiting.empty()) || partly_admitted_ == id, name + " was left half admitted");
    }
    require(holders == pool_.ref_counts(), "reference counts are not what rows and prompts hold");
    require(std::count(holders.begin(), holders.end(), 0) == pool_.num_free(), "free blocks are miscounted");
    require(std::count_if(holders.begin(), holders.end(), [](std::int32_t n) { return n > 1; }) == pool_.num_shared(), "shared blocks are miscounted");
    require(active == num_active_ && paused == num_paused_ && by_age_.size() == static_cast<std::size_t>(active + paused), "rows are miscounted");
    require(free_entries_.size() + by_age_.size() == entries_.size(), "an entry is lost");
    require(waiting == num_waiting_ && reserved == reserved_ && partly == (partly_admitted_ >= 0), "waiting members or reservations are miscounted");
    require(config_.pause || reserved_ <= pool_.num_free(), "more is reserved than is free");
    std::int64_t available = pool_.num_free();
    for (const std::int32_t index : by_age_) {
        const Entry& entry = entries_[static_cast<std::size_t>(index)];
        require(worst_blocks(*entry.request) - entry.num_blocks <= available, "row " + std::to_string(entry.row) + " could wait for ever");
        for (std::int32_t column = 0; column < entry.num_blocks; ++column) {  // as if it had finished
            available += --holders[static_cast<std::size_t>(blocks_of(index)[column])] == 0;
        }
    }
    require(by_age_.empty() || entries_[static_cast<std::size_t>(by_age_.front())].state == RowState::active, "the oldest row is paused");
}

}  // namespace athanor
