// Continuous batching with explicit groups: which samples decode, in which rows, on which blocks.  Nothing is ever recomputed: either the worst
// case is reserved when a group is admitted, or a row that finds no block pauses with its KV and goes on later.
//
// Tokens of a row = prompt + generated.  The last drawn token has no KV yet: a decode step writes slot tokens - 1 and reads `tokens` slots, a
// prefill writes the slots of the tokens that are there.  So the next `lookahead` steps of a row need tokens + lookahead - 1 slots, and a row
// never needs more than prompt + max_new_tokens - 1: what is drawn last is never fed in.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "block_pool.hpp"

namespace athanor {

enum class FinishReason : std::uint8_t { done = 0, length = 1, aborted = 2 };
enum class RowState : std::uint8_t { free = 0, active = 1, paused = 2 };

struct SchedulerConfig {
    std::int64_t num_rows = 0;
    std::int64_t max_length = 0;
    std::int64_t num_blocks = 0;
    std::int64_t block_size = 0;
    bool pause = false;
    bool split_groups = false;
    std::int64_t lookahead = 1;
    std::int64_t refill_rows = 1;
    std::int64_t aging = 1;
    std::int64_t null_block = -1;
};

struct Submission {
    std::int64_t prompt_length = 0;
    std::int64_t num_members = 0;
    std::int64_t max_new_tokens = 0;
    std::int64_t expected_new_tokens = 0;
    std::int64_t priority = 0;
    std::vector<std::int64_t> seeds;      // empty: zeros
    std::vector<std::int64_t> generated;  // empty: zeros
};

// What a prefill has to do.  Request i has rows[row_offsets[i]:row_offsets[i + 1]] and, where its prompt is not in the pool yet,
// prompt_blocks[block_offsets[i]:block_offsets[i + 1]].
struct Admission {
    std::int32_t first_row = 0;
    std::vector<std::int64_t> requests, waited_steps;
    std::vector<std::uint8_t> needs_prefill;
    std::vector<std::int32_t> row_offsets{0}, rows, members, generated;
    std::vector<std::int32_t> block_offsets{0}, prompt_blocks;
    std::vector<BlockCopy> copies;
    std::vector<std::array<std::int32_t, 3>> blocks;  // row, column, block
};

struct Events {
    std::vector<std::int32_t> finished_rows;  // before the moves; -1: was waiting
    std::vector<std::int64_t> finished_requests;
    std::vector<std::int32_t> finished_members, finished_generated;
    std::vector<std::uint8_t> finished_reasons;
    std::vector<std::int64_t> completed_requests;     // no member runs or waits any more
    std::vector<std::array<std::int32_t, 2>> moves;   // source row, target row; all sources are read before any target is written
    std::vector<std::int32_t> cleared_rows;           // hold nothing any more
    std::vector<std::array<std::int32_t, 3>> blocks;  // row (after the moves), column, block
    std::vector<std::int32_t> paused_rows, resumed_rows;  // where they lie after the moves
};

// What Python sees, one entry per row.  The scheduler writes it and never reads it: whoever scribbles here deceives himself alone.
struct RowTable {
    std::vector<std::uint8_t> state;
    std::vector<std::int32_t> lengths, prompt_lengths, max_lengths, members, num_blocks, shared_blocks, block_table;
    std::vector<std::int64_t> requests, seeds;
};

class Scheduler {
  public:
    explicit Scheduler(const SchedulerConfig& config);

    std::int64_t submit(const Submission& submission);
    void set_expected(std::int64_t request, std::int64_t expected_new_tokens);
    // max_prefill_tokens < 0: no limit.
    Admission admit(std::int64_t max_prefill_tokens);
    // done and appended: one entry for each of the rows first..num_active; appended may be null, which is one token each.
    Events advance(std::int64_t first, const std::uint8_t* done, const std::int64_t* appended, std::int64_t count);
    // member -1: all of them.
    Events abort(std::int64_t request, std::int64_t member);
    Events abort_all();

    const SchedulerConfig& config() const { return config_; }
    const BlockPool& pool() const { return pool_; }
    RowTable& table() { return table_; }
    std::int32_t num_table_rows() const { return static_cast<std::int32_t>(entry_at_.size()); }
    std::int32_t max_blocks() const { return max_blocks_; }
    std::int32_t num_active() const { return num_active_; }
    std::int32_t num_paused() const { return num_paused_; }
    std::int64_t num_requests() const { return static_cast<std::int64_t>(requests_.size()); }
    std::int64_t num_waiting() const { return num_waiting_; }  // members
    std::int64_t reserved_blocks() const { return reserved_; }
    std::int64_t step() const { return step_; }
    bool knows(std::int64_t request) const { return requests_.count(request) != 0; }
    std::int64_t waiting_of(std::int64_t request) const;

    // Active rows by group: rows[offsets[i]:offsets[i + 1]] share their first shared_blocks[i] blocks.  Groups by request, rows by member.
    void groups(std::vector<std::int32_t>& offsets, std::vector<std::int32_t>& rows, std::vector<std::int32_t>& shared_blocks) const;
    // Throws std::logic_error where the books do not balance.  O(everything); for tests.
    void audit() const;

  private:
    struct Request {
        std::int64_t id = 0;
        std::int32_t prompt_length = 0, max_new_tokens = 0;
        std::int64_t expected = 0, priority = 0, submitted_step = 0, key = 0;
        std::vector<std::int64_t> seeds;
        std::vector<std::int32_t> generated;
        std::vector<std::int32_t> waiting;        // members not admitted yet, ascending
        std::vector<std::int32_t> running;        // their entries, oldest first
        std::vector<std::int32_t> prompt_blocks;  // held for the waiting members, from the first admission to the last
        bool prefilled = false;
    };

    // A sample in flight.  Entries keep their index while their row changes.
    struct Entry {
        Request* request = nullptr;
        std::int32_t member = 0, row = -1, length = 0, max_length = 0, num_blocks = 0;
        RowState state = RowState::free;
    };

    // What admitting `members` of a request costs.
    struct Cost {
        std::int64_t now = 0;        // blocks taken at once
        std::int64_t worst = 0;      // blocks in the end
        std::int64_t expected = 0;   // blocks at the expected length
        std::int64_t prefill = 0;    // tokens
    };

    Request& find(const char* who, std::int64_t request);
    std::int64_t ordering_key(const Request& request) const;
    std::int64_t slots_ahead(std::int64_t length, std::int64_t max_length) const;
    std::int64_t worst_blocks(const Request& request) const;
    std::int64_t expected_blocks(const Request& request) const;
    std::int32_t full_blocks(const Request& request) const { return request.prompt_length / pool_.block_size(); }
    // Blocks that come back for certain once this entry and all older ones have finished.
    std::int64_t releases(const Entry& entry, std::int32_t index) const;
    Cost cost_of(const Request& request, std::size_t members) const;
    // Blocks that `members` of a request need in a pool that holds nothing else than what the request holds already.
    std::int64_t blocks_alone(const Request& request, std::size_t members, const Cost& cost) const;
    bool fits(const Request& request, std::size_t members, const Cost& cost) const;
    std::size_t admissible(const Request& request, std::int64_t free_rows, std::int64_t prefill_left, bool first) const;
    void start(Request& request, std::size_t members, Admission& admission);
    void leave_queue(Request& request);
    void append_block(std::int32_t index);
    void finish(std::int32_t index, FinishReason reason, Events& events);
    void finish_waiting(Request& request, std::size_t position, Events& events);
    void drop_if_complete(Request& request, Events& events);
    void abort_request(Request& request, Events& events);
    void grow_reserved();
    void grow_or_pause();
    void compact(Events& events);
    void settle(Events& events);
    void write_row(std::int32_t index);
    void clear_row(std::int32_t row);
    std::int32_t* blocks_of(std::int32_t index) { return blocks_.data() + static_cast<std::size_t>(index) * static_cast<std::size_t>(max_blocks_); }
    const std::int32_t* blocks_of(std::int32_t index) const { return blocks_.data() + static_cast<std::size_t>(index) * static_cast<std::size_t>(max_blocks_); }

    SchedulerConfig config_;
    BlockPool pool_;
    RowTable table_;
    std::int32_t max_blocks_ = 0, num_active_ = 0, num_paused_ = 0;
    std::int64_t num_waiting_ = 0, reserved_ = 0, step_ = 0, next_request_ = 0;
    std::map<std::int64_t, Request> requests_;                    // nodes stay where they are, entries point to them
    std::set<std::pair<std::int64_t, std::int64_t>> queue_;       // (-key, request) of those with waiting members; the front is next
    std::int64_t partly_admitted_ = -1;                           // goes before the queue
    std::vector<Entry> entries_;                                  // num_rows of them
    std::vector<std::int32_t> blocks_;                            // (num_rows, max_blocks), by entry
    std::vector<std::int32_t> free_entries_;
    std::vector<std::int32_t> by_age_;                            // entries in flight, oldest first
    std::vector<std::int32_t> entry_at_;                          // by row, -1 where there is none
    std::int32_t active_extent_ = 0, paused_extent_ = 0;          // rows in use: [0, active_extent_) and num_rows + [0, paused_extent_)
    // Of the call in progress, kept to reuse their memory.
    std::vector<std::int32_t> needy_;                 // entries that need a block, in row order
    std::vector<std::array<std::int32_t, 3>> grown_;  // entry, column, block
    std::vector<std::int32_t> pausing_, resuming_;    // entries
};

}  // namespace athanor
