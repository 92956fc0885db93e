// Block pool and scheduler under random calls, good and bad, built with the address and undefined-behaviour sanitizers by
// test_host_sanitizers.py.  Every call ends in an audit; what is right in detail is tested from Python.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block_pool.hpp"
#include "scheduler.hpp"

namespace {

using athanor::BlockCopy;
using athanor::BlockPool;

std::mt19937_64 generator(1);

std::int64_t draw(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(high - low + 1));
}

void require(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "test_scheduler: %s\n", what);
        std::exit(1);
    }
}

// Whether the call was answered; a refusal has to be one of the documented kinds.
template <typename Call>
bool answered(Call&& call) {
    try {
        call();
        return true;
    } catch (const std::invalid_argument&) {
    } catch (const athanor::OutOfBlocks&) {
    }
    return false;
}

void pool_rounds() {
    for (int round = 0; round < 300; ++round) {
        BlockPool pool(draw(1, 40), draw(1, 6));
        std::vector<std::pair<std::vector<std::int32_t>, std::int64_t>> sequences;  // blocks, tokens
        for (int step = 0; step < 60; ++step) {
            std::vector<BlockCopy> copies;
            const std::int64_t action = draw(0, 4);
            const auto which = sequences.empty() ? 0 : static_cast<std::size_t>(draw(0, static_cast<std::int64_t>(sequences.size()) - 1));
            if (action == 0 || sequences.empty()) {
                const std::int64_t tokens = draw(0, 20);
                std::vector<std::int32_t> blocks(static_cast<std::size_t>(pool.blocks_for(tokens)));
                if (answered([&] { pool.allocate(static_cast<std::int64_t>(blocks.size()), blocks.data()); })) {
                    sequences.emplace_back(blocks, tokens);
                }
            } else if (action == 1) {
                const auto [parent, tokens] = sequences[which];
                const std::int64_t children = draw(-1, 4);
                std::vector<std::int32_t> tables;
                if (answered([&] { tables = pool.fork(parent.data(), parent.size(), tokens, children, copies); })) {
                    for (std::size_t child = 0; child < static_cast<std::size_t>(children); ++child) {
                        const auto begin = tables.begin() + static_cast<std::ptrdiff_t>(child * parent.size());
                        sequences.emplace_back(std::vector<std::int32_t>(begin, begin + static_cast<std::ptrdiff_t>(parent.size())), tokens);
                    }
                }
            } else if (action == 2) {
                pool.release(sequences[which].first.data(), sequences[which].first.size());
                sequences.erase(sequences.begin() + static_cast<std::ptrdiff_t>(which));
            } else if (action == 3) {
                pool.retain(sequences[which].first.data(), sequences[which].first.size());
                sequences.push_back(sequences[which]);
            } else if (!sequences[which].first.empty()) {
                auto& last = sequences[which].first.back();
                answered([&] { last = pool.make_writable(last, draw(0, pool.block_size()), copies); });
                for (const BlockCopy& copy : copies) {
                    require(copy.target == last && pool.ref_counts()[static_cast<std::size_t>(last)] == 1, "a block was left shared for writing");
                }
            }
            const auto wild = static_cast<std::int32_t>(draw(-3, 50));
            if (wild < 0 || wild >= pool.num_blocks() || pool.ref_counts()[static_cast<std::size_t>(wild)] == 0) {
                require(!answered([&] { pool.release(&wild, 1); }), "a block that nobody holds was released");
            }
        }
        std::vector<std::int32_t> holders(static_cast<std::size_t>(pool.num_blocks()), 0);
        for (const auto& sequence : sequences) {
            for (const std::int32_t block : sequence.first) ++holders[static_cast<std::size_t>(block)];
        }
        require(holders == pool.ref_counts(), "reference counts are not those of the sequences");
        for (const auto& sequence : sequences) pool.release(sequence.first.data(), sequence.first.size());
        require(pool.num_free() == pool.num_blocks() && pool.num_shared() == 0, "a block leaked");
    }
}

void scheduler_round() {
    athanor::SchedulerConfig config;
    config.num_rows = draw(1, 12);
    config.max_length = draw(2, 40);
    config.num_blocks = draw(1, 60);
    config.block_size = draw(1, 6);
    config.pause = draw(0, 1) != 0;
    config.split_groups = draw(0, 1) != 0;
    config.lookahead = draw(1, 5);
    config.refill_rows = draw(1, config.num_rows);
    config.aging = draw(0, 2);
    athanor::Scheduler scheduler(config);
    std::map<std::pair<std::int64_t, std::int32_t>, bool> alive;
    const auto account = [&](const athanor::Events& events) {
        for (std::size_t i = 0; i < events.finished_rows.size(); ++i) {
            require(alive.erase({events.finished_requests[i], events.finished_members[i]}) == 1, "a sample ended twice");
        }
    };
    const auto advance = [&](std::int64_t first, bool all) {
        const auto count = static_cast<std::size_t>(scheduler.num_active() - first);
        std::vector<std::uint8_t> done(count);
        std::vector<std::int64_t> appended(count);
        for (std::size_t i = 0; i < count; ++i) {
            const auto row = static_cast<std::size_t>(first) + i;
            done[i] = all || draw(0, 9) == 0;
            const std::int64_t left = scheduler.table().max_lengths[row] - scheduler.table().lengths[row];
            appended[i] = draw(all ? 1 : 0, std::min(config.lookahead, left));
        }
        account(scheduler.advance(first, done.data(), appended.data(), static_cast<std::int64_t>(count)));
    };
    for (int step = 0; step < 80; ++step) {
        const std::int64_t action = draw(0, 9);
        if (action < 3) {
            athanor::Submission submission;
            submission.prompt_length = draw(0, 30);
            submission.num_members = draw(0, 7);
            submission.max_new_tokens = draw(0, 20);
            submission.expected_new_tokens = draw(0, std::max<std::int64_t>(1, submission.max_new_tokens));
            for (std::int64_t i = 0; i < submission.num_members; ++i) submission.generated.push_back(draw(0, std::max<std::int64_t>(0, submission.max_new_tokens - 1)));
            std::int64_t request = -1;
            if (answered([&] { request = scheduler.submit(submission); })) {
                for (std::int64_t i = 0; i < submission.num_members; ++i) alive[{request, static_cast<std::int32_t>(i)}] = true;
            }
        } else if (action < 5) {
            const athanor::Admission admission = scheduler.admit(draw(0, 1) ? -1 : draw(1, 30));
            advance(admission.first_row, false);
        } else if (action < 8) {
            advance(0, false);
        } else if (action == 8 && !alive.empty()) {
            const auto& [request, member] = std::next(alive.begin(), static_cast<std::ptrdiff_t>(generator() % alive.size()))->first;
            account(scheduler.abort(request, draw(0, 1) ? -1 : member));
        } else {
            const std::vector<std::uint8_t> done(3);
            answered([&] { scheduler.set_expected(draw(-1, 20), draw(-1, 20)); });
            require(!answered([&] { scheduler.abort(-5, -1); }), "an unknown request was aborted");
            require(scheduler.num_active() == 3 || !answered([&] { scheduler.advance(0, done.data(), nullptr, 3); }), "a mask of another length was taken");
        }
        scheduler.audit();
    }
    // Half of the rounds run dry, the others are cut off.
    if (draw(0, 1)) {
        account(scheduler.abort_all());
    }
    for (int step = 0; !alive.empty(); ++step) {
        require(step < 20000, "the samples that are left do not finish");
        const athanor::Admission admission = scheduler.admit(-1);
        advance(admission.first_row, false);
        advance(0, step > 100);
        scheduler.audit();
    }
    require(scheduler.pool().num_free() == scheduler.pool().num_blocks() && scheduler.num_requests() == 0, "a block or a request leaked");
}

}  // namespace

int main() {
    pool_rounds();
    for (int round = 0; round < 1500; ++round) {
        scheduler_round();
    }
    std::puts("ok");
}
