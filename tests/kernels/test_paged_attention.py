"""The reference of paged_attention against fp64 softmax attention on the gathered keys, row by row; bits are compared where they must be equal."""

from dataclasses import dataclass

import pytest
import torch

from athanor.kernels import paged_attention
from athanor.kernels.paged_attention import CHUNK, paged_attention_reference

INT_MAX = 2**31 - 1
nan, inf = torch.nan, torch.inf


@dataclass
class Pool:
    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    groups: dict  # group_offsets and prefix_lens
    keys: list  # of each row, (Hkv, n, d)
    values: list

    def call(self, rows=slice(None), **options):
        tables = self.block_table[rows], self.seq_lens[rows]
        return paged_attention(self.q[rows], self.key_cache, self.value_cache, *tables, return_lse=True, **options)


def make(groups, H, Hkv, d, block_size, generator, dtype=torch.float32, poison=nan, width=0):
    """groups: (prefix, lengths of its rows) each.  Blocks in random order; what must not be read holds poison or INT_MAX."""
    rn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)  # noqa: E731
    lens = [n for _, rows in groups for n in rows]
    width = max([width, *(-(-n // block_size) for n in lens)])
    free = torch.randperm(3 + sum(-(-n // block_size) for n in (*lens, *(prefix for prefix, _ in groups))), generator=generator).tolist()
    key_cache, value_cache = (torch.full((len(free), Hkv, block_size, d), poison, dtype=dtype) for _ in range(2))
    table = torch.full((len(lens), width), INT_MAX, dtype=torch.int32)
    keys, values, row = [], [], 0
    for prefix, rows in groups:
        shared = rn(Hkv, prefix, d), rn(Hkv, prefix, d)
        blocks = [free.pop() for _ in range(prefix // block_size)]
        for n in rows:
            k, v = (torch.cat((x, rn(Hkv, max(0, n - prefix), d)), 1)[:, :n] for x in shared)
            own = blocks + [free.pop() for _ in range(-(-n // block_size) - len(blocks))] if n else []
            for i, block in enumerate(own):
                piece = slice(i * block_size, min(n, (i + 1) * block_size))
                key_cache[block, :, : piece.stop - piece.start], value_cache[block, :, : piece.stop - piece.start] = k[:, piece], v[:, piece]
            table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
            keys.append(k), values.append(v)
            row += 1
    sizes = torch.tensor([0, *(len(rows) for _, rows in groups)])
    described = {"group_offsets": sizes.cumsum(0).int(), "prefix_lens": torch.tensor([p for p, _ in groups], dtype=torch.int32)}
    return Pool(rn(len(lens), H, d), key_cache, value_cache, table, torch.tensor(lens, dtype=torch.int32), described, keys, values)


def alone(lens):
    return [(0, [n]) for n in lens]


def oracle(pool, scale=None):
    """Output and lse in fp64."""
    (_, H, d), out, lse = pool.q.shape, [], []
    for q, k, v in zip(pool.q.double(), pool.keys, pool.values, strict=True):
        k, v = (x.double().repeat_interleave(H // len(k), 0) for x in (k, v))
        s = (k @ q[:, :, None]).squeeze(2) * (d**-0.5 if scale is None else scale)
        out.append((s.softmax(1)[:, None] @ v).squeeze(1) if s.shape[1] else torch.zeros(H, d, dtype=torch.float64))
        lse.append(s.logsumexp(1) if s.shape[1] else torch.full((H,), -inf, dtype=torch.float64))
    return torch.stack(out), torch.stack(lse)


def textbook(pool):
    """PyTorch's attention in the dtype of the input, row by row: what else a caller would write."""
    out = []
    for q, k, v in zip(pool.q, pool.keys, pool.values, strict=True):
        x = torch.nn.functional.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]
        out.append(x if k.shape[1] else torch.zeros_like(x))
    return torch.stack(out)


def same(a, b, rows=slice(None)):
    return all(torch.equal(x, y[rows]) for x, y in zip(a, b, strict=True))


def edges(block):
    return [0, 1, block - 1, block, block + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 77, 33, 128]


# widths of heads: small, aligned, odd; grouped queries 1, 4, 5, 8; block sizes up to the chunk
@pytest.mark.parametrize("H, Hkv, d, block", [(2, 2, 16, 16), (8, 2, 64, 64), (5, 1, 128, 1), (8, 1, 24, 256), (34, 2, 8, 32)])
def test_matches_fp64_attention_at_every_edge_of_block_and_chunk(H, Hkv, d, block, close64, within_rule, generator):
    pool = make(alone(edges(block)), H, Hkv, d, block, generator, torch.float64, width=1 + (3 * CHUNK + 77) // block | 1)
    want = oracle(pool)
    got = pool.call()
    close64(got[0], want[0])
    live = pool.seq_lens > 0
    close64(got[1][live], want[1][live])
    assert not got[0][~live].any() and (got[1][~live] == -inf).all()
    for scale in (0.01, 1.0):
        close64(pool.call(scale=scale)[0], oracle(pool, scale)[0])
    for dtype in (torch.float32, torch.bfloat16):
        pool = make(alone(edges(block)), H, Hkv, d, block, generator, dtype)
        got, want = pool.call(), oracle(pool)
        within_rule(got[0], textbook(pool), want[0], dtype)
        assert got[1].dtype == torch.float32 and torch.allclose(got[1].double(), want[1], atol=1e-5)


GROUPS = [
    [(300, [301])],  # a group of one
    [(2 * CHUNK, [2 * CHUNK, 2 * CHUNK + 1])],  # an empty suffix, whole chunks
    [(CHUNK + 13, [CHUNK + 13 + n for n in range(8)])],  # the last block is each row's own copy
    [(0, [5, 1, 300]), (777, [800] * 16), (0, []), (CHUNK, [CHUNK + 300 + n for n in range(17)])],  # no prefix, an empty group, odd sizes
    [(600, [0, 700, 0, 613, 900])],  # finished rows, the first among them
    [(600, [0, 0]), (CHUNK - 1, [400, 500])],  # nothing but finished rows; a prefix one token short of a chunk
]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("H, Hkv, block", [(2, 2, 16), (4, 1, 64), (10, 2, 32), (16, 2, 8)])
def test_sharing_the_prefix_changes_no_bit(groups, H, Hkv, block, generator):
    pool = make(groups, H, Hkv, 16, block, generator)
    shared, unshared = pool.call(**pool.groups), pool.call()
    assert same(shared, unshared)
    want = oracle(pool)
    assert torch.allclose(shared[0].double(), want[0], atol=1e-6) and torch.allclose(shared[1].double(), want[1], atol=1e-5)


def test_rows_outside_of_all_groups(generator):
    pool = make([(0, [300]), (CHUNK + 5, [400, 500]), (0, [600, 0])], 4, 2, 16, 16, generator)
    some = {"group_offsets": torch.tensor([1, 3], dtype=torch.int32), "prefix_lens": torch.tensor([CHUNK + 5], dtype=torch.int32)}
    none = {"group_offsets": torch.tensor([2], dtype=torch.int32), "prefix_lens": torch.tensor([], dtype=torch.int32)}
    assert same(pool.call(**some), pool.call()) and same(pool.call(**none), pool.call())


def test_a_shared_chunk_is_read_through_one_row_of_the_group(generator):
    """The others' tables may say anything there: what shows that the prefix is read once."""
    pool = make([(2 * CHUNK + 5, [2 * CHUNK + 5 + 40 * n for n in range(5)])], 4, 2, 16, 64, generator)
    want = pool.call()
    pool.block_table[1:, : 2 * CHUNK // 64] = INT_MAX
    call = (pool.q, pool.key_cache, pool.value_cache, pool.block_table, pool.seq_lens, 0.25)
    assert same(paged_attention_reference(*call, **pool.groups, limit=10**6), want)


@pytest.mark.parametrize("H, Hkv, d", [(4, 2, 24), (32, 8, 128), (7, 1, 64)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(H, Hkv, d, generator):
    lens = torch.randint(0, 900, (37,), generator=generator).tolist()
    lens[:10] = [1, 15, 31, 32, 33, 127, 129, CHUNK, 0, 5]
    pool = make(alone(lens), H, Hkv, d, 16, generator)
    whole = pool.call()
    for i in range(37):
        assert same(pool.call(slice(i, i + 1)), whole, slice(i, i + 1)), lens[i]
    order = torch.randperm(37, generator=generator)
    assert same(pool.call(order), whole, order)
    assert same(pool.call(slice(3, 20), max_seq_len=900), whole, slice(3, 20))
    assert same(pool.call(), whole)  # and again


def test_a_group_has_the_same_bits_beside_others(generator):
    groups = [(n, [n + k for k in range(1, 6)]) for n in (700, 100, 520)]
    pool = make(groups, 4, 1, 32, 16, generator)
    whole = pool.call(**pool.groups)
    for p in range(3):
        described = {"group_offsets": torch.tensor([0, 5], dtype=torch.int32), "prefix_lens": pool.groups["prefix_lens"][p : p + 1]}
        assert same(pool.call(slice(5 * p, 5 * p + 5), **described), whole, slice(5 * p, 5 * p + 5))


@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_what_lies_in_unused_slots_has_no_influence(poison, generator):
    groups = [(CHUNK + 3, [CHUNK + 3, CHUNK + 9, 600]), (0, [0, 1, 20])]
    clean, dirty = (make(groups, 4, 2, 16, 16, torch.Generator().manual_seed(3), poison=x) for x in (0.0, poison))
    assert dirty.key_cache.isfinite().logical_not().any()
    assert same(dirty.call(**dirty.groups), clean.call()) and same(dirty.call(), clean.call())


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_broken_query_breaks_its_own_row_alone(bad, generator):
    pool = make([(CHUNK, [CHUNK + n for n in (1, 2, 3, 4)])], 4, 2, 16, 16, generator)
    want = pool.call(**pool.groups)
    pool.q[2] = bad
    out, lse = pool.call(**pool.groups)
    assert out[2].isnan().all() and same((out[[0, 1, 3]], lse[[0, 1, 3]]), want, [0, 1, 3])


def test_caches_may_be_views_of_one_allocation_and_q_a_slice(generator):
    pool = make([(CHUNK, [300, 400])], 4, 2, 16, 16, generator)
    both = torch.stack((pool.key_cache, pool.value_cache), 2)
    wide = torch.cat((pool.q, pool.q + 1), 1)
    want = pool.call()
    pool.q, pool.key_cache, pool.value_cache = wide[:, :4], both[:, :, 0], both[:, :, 1]
    assert same(pool.call(**pool.groups), want)


def test_empty_batches(generator):
    pool = make(alone([0, 0]), 4, 2, 16, 16, generator, width=3)
    assert not pool.call()[0].any()
    out, lse = pool.call(slice(0, 0))
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
    pool.block_table = pool.block_table[:, :0]
    assert not pool.call()[0].any()


def test_wrong_calls_are_named(generator):
    pool = make([(40, [41, 50])], 4, 2, 16, 16, generator)
    groups = pool.groups

    def refused(message, **change):
        options = groups | {key: change.pop(key) for key in list(change) if key in ("group_offsets", "prefix_lens", "max_seq_len")}
        call = {name: getattr(pool, name) for name in ("q", "key_cache", "value_cache", "block_table", "seq_lens")} | change
        with pytest.raises(ValueError, match="paged_attention: " + message):
            paged_attention(**call, **options)

    def i32(*x):
        return torch.tensor(x, dtype=torch.int32)

    refused("3 query heads are not a multiple of 2", q=pool.q[:, :3])
    refused(r"q is \(2, 4, 16\) torch.float64", q=pool.q.double())
    refused(r"seq_lens run from 41 to 65; wanted \[0, 64\]", seq_lens=i32(41, 65))
    refused(r"seq_lens run from 41 to 50; wanted \[0, 48\]", max_seq_len=48)
    refused(r"seq_lens is \(2,\) torch.int64", seq_lens=pool.seq_lens.long())
    refused(r"block_table is \(1, 4\)", block_table=pool.block_table[:1])
    refused("block_size is 12; wanted a divisor of 256", key_cache=pool.key_cache[:, :, :12], value_cache=pool.value_cache[:, :, :12])
    refused("the elements of a head are not neighbours", key_cache=torch.stack((pool.key_cache,) * 2, 4)[..., 0])
    refused("group_offsets and prefix_lens are given together or not at all", prefix_lens=None)
    refused(r"group_offsets is \(3,\)", group_offsets=i32(0, 1, 2))
    refused("group_offsets runs from 0 to 3", group_offsets=i32(0, 3))
    refused("a row is shorter than the prefix", seq_lens=i32(41, 39))
    pool.block_table = pool.block_table.flip(0)
    pool.block_table[1, 1] += 1
    refused("the rows of a group have different blocks in their prefix")
