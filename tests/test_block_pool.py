"""The KV block pool against a model in Python that keeps a list of holders per block: no leak, no double free, no block shared for writing."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from athanor._host import BlockPool, OutOfBlocks

NUM_BLOCKS, BLOCK_SIZE = 24, 4  # few and small: forks, partial blocks and exhaustion all happen within a few rules


class PoolMachine(RuleBasedStateMachine):
    """Sequences of tokens on the pool.  The model is the content of every slot: a block that is written while shared corrupts a neighbour."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.memory = np.full((NUM_BLOCKS, BLOCK_SIZE), -1)
        self.tables, self.tokens = [], []  # per sequence: its blocks, its tokens
        self.next_token = 0

    def holders(self) -> list[int]:
        return [sum(table.count(block) for table in self.tables) for block in range(NUM_BLOCKS)]

    def copy(self, copies):
        for source, target, tokens in copies.tolist():
            self.memory[target] = -1
            self.memory[target, :tokens] = self.memory[source, :tokens]

    @rule()
    def begin(self):
        self.tables.append([])
        self.tokens.append([])

    @precondition(lambda self: self.tables)
    @rule(which=st.randoms(use_true_random=False), count=st.integers(1, 9))
    def append(self, which, count):
        i = which.randrange(len(self.tables))
        table, tokens = self.tables[i], self.tokens[i]
        for _ in range(count):
            used = len(tokens) % BLOCK_SIZE
            free = self.holders().count(0)
            try:
                if used == 0:
                    table.append(int(self.pool.allocate(1)[0]))
                else:
                    held = self.holders()[table[-1]]
                    block, copies = self.pool.make_writable(table[-1], used)
                    assert (block == table[-1]) == (held == 1) == (len(copies) == 0)
                    self.copy(copies)
                    table[-1] = block
            except OutOfBlocks as error:
                assert free == 0 and "1 blocks asked for, 0 of 24 are free" in str(error)
                return
            self.memory[table[-1], used] = self.next_token
            tokens.append(self.next_token)
            self.next_token += 1

    @precondition(lambda self: self.tables)
    @rule(which=st.randoms(use_true_random=False), num_children=st.integers(0, 6))
    def fork(self, which, num_children):
        i = which.randrange(len(self.tables))
        table, tokens = self.tables[i], self.tokens[i]
        needed = num_children if len(tokens) % BLOCK_SIZE else 0
        free = self.holders().count(0)
        if needed > free:
            with pytest.raises(OutOfBlocks, match=f"{num_children} children need a block each, {free} of 24 are free"):
                self.pool.fork(table, len(tokens), num_children)
            return
        tables, copies = self.pool.fork(table, len(tokens), num_children)
        assert tables.shape == (num_children, len(table)) and copies.shape == (needed, 3)
        self.copy(copies)
        self.tables += [child.tolist() for child in tables]
        self.tokens += [list(tokens) for _ in tables]

    @precondition(lambda self: self.tables)
    @rule(which=st.randoms(use_true_random=False))
    def share(self, which):
        """A second holder of every block, the partial one too: the next append has to copy it."""
        i = which.randrange(len(self.tables))
        self.pool.retain(self.tables[i])
        self.tables.append(list(self.tables[i]))
        self.tokens.append(list(self.tokens[i]))

    @precondition(lambda self: self.tables)
    @rule(which=st.randoms(use_true_random=False))
    def free(self, which):
        i = which.randrange(len(self.tables))
        self.pool.release(self.tables.pop(i))
        self.tokens.pop(i)

    @precondition(lambda self: 0 in self.holders())
    @rule(which=st.randoms(use_true_random=False))
    def free_twice(self, which):
        block = which.choice([block for block, n in enumerate(self.holders()) if n == 0])
        inside = [block for table in self.tables for block in table][:2]
        with pytest.raises(ValueError, match=f"BlockPool.release: block {block} has no holder left"):
            self.pool.release([*inside, block])  # the ones that could be released are not

    @invariant()
    def counts_are_the_models(self):
        holders = self.holders()
        assert self.pool.ref_counts.tolist() == holders
        assert self.pool.num_free == holders.count(0) and self.pool.num_used == NUM_BLOCKS - holders.count(0)
        assert self.pool.num_shared == sum(n > 1 for n in holders)

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for table, tokens in zip(self.tables, self.tokens, strict=True):
            assert self.memory[table].ravel()[: len(tokens)].tolist() == tokens

    def teardown(self):
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.num_free == NUM_BLOCKS and not self.pool.ref_counts.any()


PoolMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
TestRandomSequences = PoolMachine.TestCase


def test_children_share_full_blocks_and_copy_the_partial_one():
    pool = BlockPool(10, 4)
    parent = pool.allocate(3)
    tables, copies = pool.fork(parent, 10, 2)
    assert tables.tolist() == [[0, 1, 3], [0, 1, 4]] and copies.tolist() == [[2, 3, 2], [2, 4, 2]]
    assert tables.dtype == copies.dtype == np.int32
    assert pool.ref_counts[:5].tolist() == [3, 3, 1, 1, 1] and (pool.num_used, pool.num_shared) == (5, 2)


@pytest.mark.parametrize("num_tokens, num_blocks", [(8, 2), (4, 1), (0, 0)])
def test_an_aligned_prompt_needs_no_copy(num_tokens, num_blocks):
    pool = BlockPool(4, 4)
    tables, copies = pool.fork(pool.allocate(num_blocks), num_tokens, 5)
    assert tables.shape == (5, num_blocks) and copies.shape == (0, 3) and pool.num_used == num_blocks


def test_what_was_released_last_is_handed_out_first_and_in_order():
    pool = BlockPool(8, 4)
    first, second = pool.allocate(3), pool.allocate(2)
    pool.release(first)
    pool.release(second)
    assert pool.allocate(5).tolist() == [3, 4, 0, 1, 2]


def test_a_shared_block_is_copied_before_it_is_written():
    pool = BlockPool(3, 4)
    (block,) = pool.allocate(1)
    assert pool.make_writable(block, 2)[0] == block
    pool.retain([block])
    own, copies = pool.make_writable(block, 2)
    assert own != block and copies.tolist() == [[block, own, 2]] and pool.ref_counts.tolist() == [1, 1, 0]
    pool.retain([own])
    assert pool.make_writable(own, 0)[1].shape == (0, 3)  # nothing in it yet, nothing to copy


def test_reference_counts_cannot_be_written():
    counts = BlockPool(3, 4).ref_counts
    with pytest.raises(ValueError):
        counts[0] = 1
    with pytest.raises(ValueError):
        counts.flags.writeable = True


def test_results_outlive_the_pool():
    pool = BlockPool(3, 4)
    blocks, counts = pool.allocate(2), pool.ref_counts
    del pool
    assert blocks.tolist() == [0, 1] and counts.tolist() == [1, 1, 0]


def in_use() -> BlockPool:
    pool = BlockPool(8, 4)
    pool.allocate(3)
    return pool


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pool: BlockPool(0, 4), "BlockPool: num_blocks is 0, wanted 1 to 67108864"),
        (lambda pool: BlockPool(1 << 40, 4), "BlockPool: num_blocks is 1099511627776"),
        (lambda pool: BlockPool(4, 0), "BlockPool: block_size is 0"),
        (lambda pool: pool.allocate(-1), "BlockPool.allocate: count is -1, wanted >= 0"),
        (lambda pool: pool.release([0, 0]), "BlockPool.release: block 0 has no holder left"),
        (lambda pool: pool.release([0, 1, 8]), "BlockPool.release: block is 8, wanted 0 to 7"),
        (lambda pool: pool.release([-1]), "BlockPool.release: block is -1"),
        (lambda pool: pool.release([1 << 40]), "BlockPool.release: block is 1099511627776"),
        (lambda pool: pool.retain([5]), "BlockPool.retain: block 5 has no holder left, wanted one that is in use"),
        (lambda pool: pool.retain([1.5]), "BlockPool.retain: blocks is float64, wanted int64"),
        (lambda pool: pool.retain([[1]]), "BlockPool.retain: blocks has 2 dimensions, wanted 1"),
        (lambda pool: pool.retain("ab"), "BlockPool.retain: blocks has 0 dimensions"),
        (lambda pool: pool.retain([None]), "BlockPool.retain: blocks is object"),
        (lambda pool: pool.fork([0, 1], 9, 1), "BlockPool.fork: num_tokens is 9, wanted a number that needs all of the 2 blocks"),
        (lambda pool: pool.fork([0, 1], 4, 1), "BlockPool.fork: num_tokens is 4"),
        (lambda pool: pool.fork([0], -1, 1), "BlockPool.fork: num_tokens is -1"),
        (lambda pool: pool.fork([0], 3, -1), "BlockPool.fork: num_children is -1, wanted 0 to 268435456"),
        (lambda pool: pool.fork([0], 4, 1 << 50), "BlockPool.fork: num_children is 1125899906842624"),
        (lambda pool: pool.fork([6], 4, 1), "BlockPool.fork: block 6 has no holder left"),
        (lambda pool: pool.make_writable(7, 1), "BlockPool.make_writable: block 7 has no holder left"),
        (lambda pool: pool.make_writable(8, 1), "BlockPool.make_writable: block is 8, wanted 0 to 7"),
        (lambda pool: pool.make_writable(0, 5), "BlockPool.make_writable: num_tokens is 5, wanted 0 to 4"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, message):
    pool = in_use()
    with pytest.raises(ValueError, match=message):
        call(pool)
    assert pool.ref_counts.tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and pool.allocate(5).tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pool: pool.allocate(6), "BlockPool.allocate: 6 blocks asked for, 5 of 8 are free"),
        (lambda pool: pool.allocate(1 << 60), "1152921504606846976 blocks asked for, 5 of 8"),
        (lambda pool: pool.fork([0], 3, 6), "BlockPool.fork: 6 children need a block each, 5 of 8 are free"),
    ],
)
def test_an_exhausted_pool_says_what_was_asked_and_what_is_free(call, message):
    pool = in_use()
    with pytest.raises(OutOfBlocks, match=message):
        call(pool)
    assert pool.num_used == 3 and issubclass(OutOfBlocks, RuntimeError)
