// What a decode step does to its rows once their tokens are drawn: kernels/advance_rows.py, row by row; and the embedding of these tokens.
#include <cmath>
#include <cstring>

#include "kernels.hpp"

namespace athanor::cpu {
namespace {
enum Status : std::int64_t { kRunning, kHeld, kLength, kStop, kRepetition, kError };
}

void advance_rows(const DecodeRows& rows, std::int64_t count) {
    for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t token = rows.tokens[r];
        const float logp = rows.logps[r];
        rows.token_ring[rows.slots[r] * rows.ring_stride + r] = token;
        rows.logp_ring[rows.slots[r] * rows.ring_stride + r] = logp;
        if (rows.status[r] != kRunning || (rows.drawing && !rows.drawing[r])) {
            continue;
        }
        std::int64_t became = rows.lengths[r] + 1 >= rows.max_lengths[r] ? kLength : kRunning;
        if (rows.streaks) {
            rows.streaks[r] = rows.full_logps[r] > rows.streak_logps[r] ? rows.streaks[r] + 1 : 0;
            became = rows.streak_limits[r] > 0 && rows.streaks[r] >= rows.streak_limits[r] ? kRepetition : became;
        }
        for (std::int64_t e = 0; e < rows.num_eos; ++e) {
            became = token == rows.eos[r * rows.num_eos + e] ? kStop : became;
        }
        rows.status[r] = std::isnan(logp) ? kError : became;
        rows.last[r] = token;
        ++rows.slots[r];
        ++rows.generated[r];
        ++rows.lengths[r];
    }
}

void row_positions(const std::int64_t* status, const std::int32_t* lengths, std::int32_t* positions, std::int32_t* ends, std::int64_t count) {
    for (std::int64_t r = 0; r < count; ++r) {
        ends[r] = status[r] == kRunning ? lengths[r] : 0;
        positions[r] = ends[r] - 1;
    }
}

bool take_rows(const float* table, std::int64_t num_rows, std::int64_t width, const std::int64_t* indices, std::int64_t count, float* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (indices[i] < 0 || indices[i] >= num_rows) {
            return false;
        }
        std::memcpy(out + i * width, table + indices[i] * width, static_cast<std::size_t>(width) * sizeof(float));
    }
    return true;
}

}  // namespace athanor::cpu
