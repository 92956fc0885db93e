#include "block_pool.hpp"

#include <limits>

namespace athanor {

void refuse(const std::string& who, const std::string& name, std::int64_t value, const std::string& wanted) {
    throw std::invalid_argument(who + ": " + name + " is " + std::to_string(value) + ", wanted " + wanted);
}

void require_range(const char* who, const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high) {
        refuse(who, name, value, std::to_string(low) + " to " + std::to_string(high));
    }
}

BlockPool::BlockPool(std::int64_t num_blocks, std::int64_t block_size) {
    require_range("BlockPool", "num_blocks", num_blocks, 1, kMaxBlocks);
    require_range("BlockPool", "block_size", block_size, 1, kMaxBlockSize);
    block_size_ = static_cast<std::int32_t>(block_size);
    ref_counts_.assign(static_cast<std::size_t>(num_blocks), 0);
    free_.reserve(ref_counts_.size());
    for (std::int64_t block = num_blocks - 1; block >= 0; --block) {
        free_.push_back(static_cast<std::int32_t>(block));
    }
}

void BlockPool::require_held(const char* who, std::int32_t block) const {
    if (block < 0 || block >= num_blocks()) {
        refuse(who, "block", block, "0 to " + std::to_string(num_blocks() - 1));
    }
    if (ref_counts_[static_cast<std::size_t>(block)] == 0) {
        throw std::invalid_argument(std::string(who) + ": block " + std::to_string(block) + " has no holder left, wanted one that is in use");
    }
}

void BlockPool::allocate(std::int64_t count, std::int32_t* to) {
    if (count < 0) {
        refuse("BlockPool.allocate", "count", count, ">= 0");
    }
    if (count > num_free()) {
        throw OutOfBlocks("BlockPool.allocate: " + std::to_string(count) + " blocks asked for, " + std::to_string(num_free()) + " of " +
                          std::to_string(num_blocks()) + " are free");
    }
    for (std::int64_t i = 0; i < count; ++i) {
        to[i] = free_.back();
        free_.pop_back();
        ref_counts_[static_cast<std::size_t>(to[i])] = 1;
    }
}

void BlockPool::retain(const std::int32_t* blocks, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        require_held("BlockPool.retain", blocks[i]);
        const std::int64_t holders = ref_counts_[static_cast<std::size_t>(blocks[i])];
        if (holders + static_cast<std::int64_t>(count) > std::numeric_limits<std::int32_t>::max()) {
            throw std::invalid_argument("BlockPool.retain: block " + std::to_string(blocks[i]) + " has " + std::to_string(holders) +
                                        " holders, wanted at most 2147483647 after the call");
        }
    }
    for (std::size_t i = 0; i < count; ++i) {
        num_shared_ += ref_counts_[static_cast<std::size_t>(blocks[i])]++ == 1;
    }
}

void BlockPool::release(const std::int32_t* blocks, std::size_t count) {
    const std::size_t num_free_before = free_.size();
    const std::int32_t num_shared_before = num_shared_;
    // From the end, so that the next allocation hands the blocks out in the order of the table that held them.
    for (std::size_t i = count; i-- > 0;) {
        try {
            require_held("BlockPool.release", blocks[i]);
        } catch (const std::invalid_argument&) {
            for (std::size_t j = i + 1; j < count; ++j) {
                ++ref_counts_[static_cast<std::size_t>(blocks[j])];
            }
            free_.resize(num_free_before);
            num_shared_ = num_shared_before;
            throw;
        }
        const std::int32_t left = --ref_counts_[static_cast<std::size_t>(blocks[i])];
        num_shared_ -= left == 1;
        if (left == 0) {
            free_.push_back(blocks[i]);
        }
    }
}

std::vector<std::int32_t> BlockPool::fork(const std::int32_t* parent, std::size_t count, std::int64_t tokens, std::int64_t num_children,
                                          std::vector<BlockCopy>& copies) {
    require_range("BlockPool.fork", "num_children", num_children, 0, kMaxTableEntries / static_cast<std::int64_t>(count ? count : 1));
    if (tokens < 0 || tokens > static_cast<std::int64_t>(count) * block_size_ || blocks_for(tokens) != static_cast<std::int64_t>(count)) {
        refuse("BlockPool.fork", "num_tokens", tokens, "a number that needs all of the " + std::to_string(count) + " blocks given and no more");
    }
    for (std::size_t i = 0; i < count; ++i) {
        require_held("BlockPool.fork", parent[i]);
        if (ref_counts_[static_cast<std::size_t>(parent[i])] + num_children > std::numeric_limits<std::int32_t>::max()) {
            refuse("BlockPool.fork", "num_children", num_children, "at most 2147483647 holders of block " + std::to_string(parent[i]));
        }
    }
    const auto partial = static_cast<std::int32_t>(tokens % block_size_);
    if (partial && num_children > num_free()) {
        throw OutOfBlocks("BlockPool.fork: " + std::to_string(num_children) + " children need a block each, " + std::to_string(num_free()) + " of " +
                          std::to_string(num_blocks()) + " are free");
    }
    const std::size_t num_full = count - (partial ? 1 : 0);
    std::vector<std::int32_t> tables(static_cast<std::size_t>(num_children) * count);
    for (std::int64_t child = 0; child < num_children; ++child) {
        std::int32_t* table = tables.data() + static_cast<std::size_t>(child) * count;
        retain(parent, num_full);
        for (std::size_t i = 0; i < num_full; ++i) {
            table[i] = parent[i];
        }
        if (partial) {
            allocate(1, table + num_full);
            copies.push_back({parent[num_full], table[num_full], partial});
        }
    }
    return tables;
}

std::int32_t BlockPool::make_writable(std::int32_t block, std::int64_t tokens, std::vector<BlockCopy>& copies) {
    require_held("BlockPool.make_writable", block);
    require_range("BlockPool.make_writable", "num_tokens", tokens, 0, block_size_);
    if (ref_counts_[static_cast<std::size_t>(block)] == 1) {
        return block;
    }
    std::int32_t own = 0;
    allocate(1, &own);
    release(&block, 1);
    if (tokens) {
        copies.push_back({block, own, static_cast<std::int32_t>(tokens)});
    }
    return own;
}

}  // namespace athanor
