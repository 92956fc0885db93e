// Best-fit-decreasing sequence packing (D. S. Johnson, "Near-optimal bin packing algorithms", MIT 1973; for language-model training
// arXiv 2404.10830): sequences in order of falling length, each into the fullest bin that still holds it.  No bin count of this rule
// exceeds 11/9 of the optimum + 4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace athanor {

// Writes the bin of sequence i to bin_of_sequence[i] and returns the number of bins.
//
// lengths: num_sequences token counts, each in 1..capacity, owned by the caller and copied before use.  Bins are numbered in the order
// in which they are opened.  Ties: equal lengths go in index order, equally full bins by the lower number, so the result depends on the
// arguments alone.  O(n log n) time, 16 bytes of extra memory per sequence and one set node per open bin.
// Throws std::invalid_argument on a capacity or length out of range, before anything is written.
std::int32_t best_fit_pack(const std::int64_t* lengths, std::size_t num_sequences, std::int64_t capacity, std::int32_t* bin_of_sequence);

}  // namespace athanor
