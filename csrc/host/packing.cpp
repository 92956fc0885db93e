#include "packing.hpp"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace athanor {
namespace {

struct Sequence {
    std::int64_t length;
    std::int32_t index;
};

std::vector<Sequence> checked_copy(const std::int64_t* lengths, std::size_t num_sequences, std::int64_t capacity) {
    if (capacity <= 0) {
        throw std::invalid_argument("best_fit_pack: capacity is " + std::to_string(capacity) + ", wanted > 0");
    }
    if (num_sequences > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
        throw std::invalid_argument("best_fit_pack: " + std::to_string(num_sequences) + " sequences, wanted at most 2147483647 (bins are int32)");
    }
    std::vector<Sequence> sequences(num_sequences);
    for (std::size_t i = 0; i < num_sequences; ++i) {
        // Read once: the caller's thread may write to the array while the GIL is released, and a comparison whose outcome changes
        // in the middle of std::sort is undefined behaviour.
        const std::int64_t length = lengths[i];
        if (length <= 0 || length > capacity) {
            throw std::invalid_argument("best_fit_pack: lengths[" + std::to_string(i) + "] is " + std::to_string(length) + ", wanted 1 to capacity = " +
                                        std::to_string(capacity));
        }
        sequences[i] = {length, static_cast<std::int32_t>(i)};
    }
    return sequences;
}

}  // namespace

std::int32_t best_fit_pack(const std::int64_t* lengths, std::size_t num_sequences, std::int64_t capacity, std::int32_t* bin_of_sequence) {
    std::vector<Sequence> sequences = checked_copy(lengths, num_sequences, capacity);
    std::sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
        return a.length != b.length ? a.length > b.length : a.index < b.index;
    });

    std::set<std::pair<std::int64_t, std::int32_t>> open;  // (tokens still free, bin): its first element >= (length, 0) is the best fit
    std::int32_t num_bins = 0;
    for (const Sequence& sequence : sequences) {
        const auto fit = open.lower_bound({sequence.length, 0});
        std::int64_t free = capacity;
        std::int32_t bin = num_bins;
        if (fit == open.end()) {
            ++num_bins;
        } else {
            free = fit->first;
            bin = fit->second;
            open.erase(fit);
        }
        bin_of_sequence[sequence.index] = bin;
        if (free > sequence.length) {
            open.emplace(free - sequence.length, bin);
        }
    }
    return num_bins;
}

}  // namespace athanor
