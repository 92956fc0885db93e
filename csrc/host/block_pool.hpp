// Reference-counted blocks of KV-cache slots.  A group's members hold the full blocks of their prompt together and one copy each of the block
// that the prompt fills in part, so no block that is still written to has two holders.  Only numbers live here; the bytes are the device's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace athanor {

// Copy the first `tokens` slots of block `source` to block `target`.
struct BlockCopy {
    std::int32_t source;
    std::int32_t target;
    std::int32_t tokens;
};

class OutOfBlocks : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// "who: name is value, wanted wanted"
[[noreturn]] void refuse(const std::string& who, const std::string& name, std::int64_t value, const std::string& wanted);
void require_range(const char* who, const char* name, std::int64_t value, std::int64_t low, std::int64_t high);

class BlockPool {
  public:
    static constexpr std::int64_t kMaxBlocks = std::int64_t{1} << 26;
    static constexpr std::int64_t kMaxBlockSize = std::int64_t{1} << 20;
    static constexpr std::int64_t kMaxTableEntries = std::int64_t{1} << 28;  // of one fork or row table: 1 GiB

    // Throws std::invalid_argument on a number out of range, as every function here does; a refused call changes nothing.
    BlockPool(std::int64_t num_blocks, std::int64_t block_size);

    std::int32_t num_blocks() const { return static_cast<std::int32_t>(ref_counts_.size()); }
    std::int32_t block_size() const { return block_size_; }
    std::int32_t num_free() const { return static_cast<std::int32_t>(free_.size()); }
    std::int32_t num_used() const { return num_blocks() - num_free(); }
    std::int32_t num_shared() const { return num_shared_; }  // blocks with two holders or more
    const std::vector<std::int32_t>& ref_counts() const { return ref_counts_; }
    std::int64_t blocks_for(std::int64_t tokens) const { return (tokens + block_size_ - 1) / block_size_; }

    // Write `count` blocks of one holder each to `to`, the most recently freed first.  Throws OutOfBlocks where fewer are free.
    void allocate(std::int64_t count, std::int32_t* to);
    // One more holder for each block; a block named twice gets two.
    void retain(const std::int32_t* blocks, std::size_t count);
    // One holder less for each block; without any left it is free.  Throws where a block has fewer holders than it is named times.
    void release(const std::int32_t* blocks, std::size_t count);
    // Tables (num_children, count) of children that continue a parent with `tokens` tokens in `count` blocks: its full blocks by reference, its
    // partial one as a new block with a copy to be made.  The parent keeps its blocks.  Throws OutOfBlocks where the copies have no room.
    std::vector<std::int32_t> fork(const std::int32_t* parent, std::size_t count, std::int64_t tokens, std::int64_t num_children,
                                   std::vector<BlockCopy>& copies);
    // The block to write behind `tokens` tokens of `block`: itself where it has one holder; otherwise a new one, for which this holder gives its
    // reference up and `copies` gets the copy to be made first.
    std::int32_t make_writable(std::int32_t block, std::int64_t tokens, std::vector<BlockCopy>& copies);

  private:
    void require_held(const char* who, std::int32_t block) const;

    std::int32_t block_size_;
    std::int32_t num_shared_ = 0;
    std::vector<std::int32_t> ref_counts_;
    std::vector<std::int32_t> free_;  // a stack: what was used last is handed out first, while it is still in the caches
};

}  // namespace athanor
