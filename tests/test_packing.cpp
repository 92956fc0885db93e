// Best-fit packing against a plain O(n * bins) search, built with the address and undefined-behaviour sanitizers by test_packing.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "packing.hpp"

namespace {

void require(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "test_packing: %s\n", what);
        std::exit(1);
    }
}

std::int32_t pack(const std::vector<std::int64_t>& lengths, std::int64_t capacity, std::vector<std::int32_t>& bins) {
    bins.assign(lengths.size(), -1);
    return athanor::best_fit_pack(lengths.data(), lengths.size(), capacity, bins.data());
}

std::int32_t search(const std::vector<std::int64_t>& lengths, std::int64_t capacity, std::vector<std::int32_t>& bins) {
    std::vector<std::size_t> order(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return lengths[a] > lengths[b]; });
    std::vector<std::int64_t> free;
    bins.assign(lengths.size(), -1);
    for (const std::size_t i : order) {
        std::size_t best = free.size();
        for (std::size_t bin = 0; bin < free.size(); ++bin) {
            if (free[bin] >= lengths[i] && (best == free.size() || free[bin] < free[best])) best = bin;
        }
        if (best == free.size()) free.push_back(capacity);
        free[best] -= lengths[i];
        bins[i] = static_cast<std::int32_t>(best);
    }
    return static_cast<std::int32_t>(free.size());
}

void refuses(std::vector<std::int64_t> lengths, std::int64_t capacity, const char* what) {
    std::vector<std::int32_t> bins;
    try {
        pack(lengths, capacity, bins);
    } catch (const std::invalid_argument&) {
        require(std::all_of(bins.begin(), bins.end(), [](std::int32_t bin) { return bin == -1; }), "a refused call wrote to its output");
        return;
    }
    require(false, what);
}

}  // namespace

int main() {
    constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    std::mt19937_64 random(1);
    std::vector<std::int32_t> bins, wanted;

    for (int round = 0; round < 2000; ++round) {
        const auto capacity = static_cast<std::int64_t>(1 + random() % 40);
        std::vector<std::int64_t> lengths(random() % 60);
        for (auto& length : lengths) length = static_cast<std::int64_t>(1 + random() % static_cast<std::uint64_t>(capacity));
        const std::int32_t num_bins = pack(lengths, capacity, bins);
        require(num_bins == search(lengths, capacity, wanted) && bins == wanted, "not the plain search's packing");
    }

    require(athanor::best_fit_pack(nullptr, 0, 1, nullptr) == 0, "no sequences need no bins");
    require(pack({kMax, 1, kMax - 1}, kMax, bins) == 2 && bins == std::vector<std::int32_t>({0, 1, 1}), "lengths near the int64 limit");
    refuses({1, 2, 9}, 8, "a sequence above the capacity was taken");
    refuses({1, 0}, 8, "an empty sequence was taken");
    refuses({-1}, 8, "a negative length was taken");
    refuses({1}, 0, "capacity 0 was taken");
    refuses({}, -1, "a negative capacity was taken");
    std::puts("ok");
}
