"""The C++ kernel of paged_attention: the bits of the packed attention's rows, whatever the blocks, the group, the batch and the threads."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from athanor.kernels import attention, empty_kv_cache, paged_attention
from athanor.kernels._dispatch import OPS
from athanor.kernels.paged_attention import check_cache

INT_MAX = 2**31 - 1
nan, inf = torch.nan, torch.inf


@dataclass
class Cache:
    """Sequences of keys and values (n, Hkv, d) in blocks of random order; what must not be read holds poison or INT_MAX."""

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor  # one row per sequence
    seq_lens: torch.Tensor
    groups: dict = field(default_factory=dict)

    def rows(self, index):
        return Cache(self.key_cache, self.value_cache, self.block_table[index], self.seq_lens[index])

    def __call__(self, q, backend="cpu", **options):
        return paged_attention(q, self.key_cache, self.value_cache, self.block_table, self.seq_lens, return_lse=True, backend=backend, **options)


def make(keys, values, block_size, generator, poison=nan, prefix=0):
    """prefix: whole blocks of so many first tokens are those of the first sequence, which must hold the same keys there."""
    lens, shared = [len(k) for k in keys], prefix // block_size
    width = max(-(-n // block_size) for n in lens) + 1
    free = torch.randperm(len(lens) * width + 3, generator=generator).tolist()
    _, Hkv, d = keys[0].shape
    key_cache, value_cache = empty_kv_cache(len(free), Hkv, block_size, d, dtype=torch.float32, device="cpu")
    key_cache.fill_(poison), value_cache.fill_(poison)
    table = torch.full((len(lens), width), INT_MAX, dtype=torch.int32)
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        for i in range(-(-len(k) // block_size)):
            block = int(table[0, i]) if row and i < shared else free.pop()
            piece = slice(i * block_size, (i + 1) * block_size)
            key_cache[block, :, : len(k[piece])], value_cache[block, :, : len(k[piece])] = k[piece].transpose(0, 1), v[piece].transpose(0, 1)
            table[row, i] = block
    groups = {"group_offsets": torch.tensor([0, len(lens)], dtype=torch.int32), "prefix_lens": torch.tensor([prefix], dtype=torch.int32)}
    return Cache(key_cache, value_cache, table, torch.tensor(lens, dtype=torch.int32), groups)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def oracle(q, keys, values):
    """Output and lse in fp64 for q (R, H, d)."""
    out, lse = [], []
    for x, k, v in zip(q.double(), keys, values, strict=True):
        k, v = (y.double().repeat_interleave(len(x) // y.shape[1], 1) for y in (k, v))
        s = torch.einsum("hd,jhd->hj", x, k) / math.sqrt(x.shape[1])
        out.append(torch.einsum("hj,jhd->hd", s.softmax(1), v))
        lse.append(s.logsumexp(1))
    return torch.stack(out), torch.stack(lse)


def textbook(q, keys, values):
    return torch.stack([torch.nn.functional.scaled_dot_product_attention(x[:, None], k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True)[:, 0]
                        for x, k, v in zip(q, keys, values, strict=True)])  # fmt: skip


def ragged(lens, Hkv, d, generator):
    return [[torch.randn(n, Hkv, d, generator=generator) for n in lens] for _ in range(2)]


@pytest.mark.parametrize("d", [8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("H, Hkv", [(2, 2), (4, 2), (3, 1), (8, 2), (8, 1)])  # 1, 2, 3, 4 and 8 query heads to a key head
def test_a_row_has_the_bits_of_the_packed_attention(H, Hkv, d, generator):
    """Every token of three sequences, alone in the cache and in the middle of a packing; lengths 1 to 300 in the longest."""
    lens = [37, 300, 64]
    q, k, v = (torch.randn(sum(lens), h, d, generator=generator) for h in (H, Hkv, Hkv))
    packed = attention(q, k, v, torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32), backend="cpu")
    before = torch.get_num_threads()
    try:
        for threads, block_size in ((1, 16), (2, 32), (3, 64), (7, 16), (1, 256)):
            torch.set_num_threads(threads)
            cache = make(k.split(lens), v.split(lens), block_size, generator)
            sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lens))
            cache = cache.rows(sequence)  # a row for each token
            cache.seq_lens = torch.cat([torch.arange(1, n + 1, dtype=torch.int32) for n in lens])
            out, lse = cache(q)
            assert torch.equal(out, packed)
            order = torch.randperm(len(q), generator=generator)
            assert same(cache.rows(order)(q[order]), (out[order], lse[order]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("H, Hkv, d, block_size", [(4, 2, 32, 16), (2, 2, 24, 64), (5, 1, 128, 32), (40, 1, 8, 16)])
def test_errs_no_more_than_the_textbook(H, Hkv, d, block_size, within_rule, generator):
    lens = [1, 15, 16, 17, 33, 128, 129, 300]
    keys, values = ragged(lens, Hkv, d, generator)
    q = torch.randn(len(lens), H, d, generator=generator)
    out, lse = make(keys, values, block_size, generator)(q)
    want = oracle(q, keys, values)
    within_rule(out, textbook(q, keys, values), want[0])
    within_rule(lse, want[1].float(), want[1], "lse")


def test_the_scale_is_honoured(generator):
    keys, values = ragged([40, 20], 2, 16, generator)
    q = torch.randn(2, 4, 16, generator=generator)
    cache = make(keys, values, 16, generator)
    assert same(cache(q, scale=0.5), cache(2 * q)) and not same(cache(q), cache(2 * q))  # 1 / sqrt(16) = 1/4: powers of two round nothing


def test_sharing_a_prefix_and_empty_rows_change_no_bit(generator):
    lens = [100, 0, 130, 97, 161, 0, 300, 96, 101, 99, 140]
    keys, values = ragged(lens, 2, 32, generator)
    for x in (keys, values):
        x[:] = [torch.cat((x[0][:96], y[96:])) if len(y) else y for y in x]
    q = torch.randn(len(lens), 4, 32, generator=generator)
    shared, alone = make(keys, values, 16, generator, prefix=96), make(keys, values, 16, generator)
    want = alone(q)
    assert (shared.block_table[0, :6] == shared.block_table[2, :6]).all()
    assert same(shared(q, **shared.groups), want) and same(shared(q), want)
    empty = torch.tensor(lens) == 0
    assert not want[0][empty].any() and (want[1][empty] == -inf).all() and want[1][~empty].isfinite().all()


@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_what_lies_in_unused_slots_has_no_influence(poison, generator):
    keys, values = ragged([1, 16, 31, 33, 100], 2, 24, generator)
    q = torch.randn(5, 4, 24, generator=generator)
    clean, dirty = (make(keys, values, 32, torch.Generator().manual_seed(3), poison=x) for x in (0.0, poison))
    assert same(dirty(q), clean(q)) and clean(q)[0].isfinite().all()


def test_a_broken_row_breaks_no_other(generator):
    keys, values = ragged([50] * 4, 2, 16, generator)
    q = torch.randn(4, 4, 16, generator=generator)
    cache = make(keys, values, 16, generator)
    out, lse = cache(q)
    q[2] = nan
    got = cache(q)
    assert got[0][2].isnan().all() and got[1][2].isnan().all()
    assert same([x[[0, 1, 3]] for x in got], (out[[0, 1, 3]], lse[[0, 1, 3]]))


def test_strided_queries_values_and_tables_give_the_same_bits(generator):
    keys, values = ragged([50, 20, 70], 2, 16, generator)
    q = torch.randn(3, 8, 16, generator=generator)
    cache = make(keys, values, 16, generator)
    want = cache(q[:, :4].contiguous())
    assert same(cache(q[:, :4]), want)
    cache.value_cache = torch.stack((cache.value_cache, cache.value_cache), 2)[:, :, 1]
    cache.block_table, cache.seq_lens = cache.block_table.T.contiguous().T, torch.stack((cache.seq_lens,) * 2, 1)[:, 0]
    assert same(cache(q[:, :4]), want)


def test_the_reference_reads_the_same_caches(within_rule, generator):
    """Keys with neighbouring tokens go through its general path: same contract, and its own bits with and without a shared prefix."""
    lens = [270, 300, 0, 513]
    keys, values = ragged(lens, 2, 24, generator)
    for x in (keys, values):
        x[:] = [torch.cat((x[0][:256], y[256:])) if len(y) else y for y in x]
    q = torch.randn(4, 4, 24, generator=generator)
    cache = make(keys, values, 16, generator, prefix=256)
    out, lse = cache(q, backend="reference")
    assert same(cache(q, backend="reference", **cache.groups), (out, lse))
    live = [0, 1, 3]
    keys, values = ([x[i] for i in live] for x in (keys, values))
    want = oracle(q[live], keys, values)
    within_rule(out[live], textbook(q[live], keys, values), want[0])
    within_rule(lse[live], want[1].float(), want[1], "lse")


def test_caches_are_allocated_as_the_device_reads_them():
    for dtype, block_size, strides in ((torch.float32, 32, (1536, 768, 1, 32)), (torch.bfloat16, 32, (1536, 768, 24, 1)),
                                       (torch.float32, 8, (384, 192, 24, 1))):  # fmt: skip
        caches = empty_kv_cache(5, 2, block_size, 24, dtype=dtype, device="cpu")
        assert all(x.shape == (5, 2, block_size, 24) and x.dtype == dtype and not x.any() for x in caches)
        assert caches[0].stride() == strides and caches[1].is_contiguous()
        check_cache("test", *caches, torch.zeros(1, 1, dtype=torch.int32), 1)


def test_serves_its_layout_by_default_and_says_what_it_cannot_do(generator, monkeypatch):
    keys, values = ragged([40], 1, 16, generator)
    q = torch.randn(1, 2, 16, generator=generator)
    cache = make(keys, values, 16, generator)
    call = {"q": q, "key_cache": cache.key_cache, "value_cache": cache.value_cache, "block_table": cache.block_table, "seq_lens": cache.seq_lens,
            "scale": 1.0, "group_offsets": None, "prefix_lens": None, "limit": 48}  # fmt: skip
    assert OPS["paged_attention"].resolve(call)[0] == "cpu"
    for message, change in (
        ("the keys of a block are not neighbours", {"key_cache": cache.key_cache.contiguous()}),
        ("block_size is 8, no multiple of 16", {"key_cache": cache.key_cache[:, :, :8], "value_cache": cache.value_cache[:, :, :8]}),
        ("q is torch.float64; the C.. kernels compute in fp32", {"q": q.double()}),
    ):
        with pytest.raises(ValueError, match=message):
            OPS["paged_attention"].resolve(call | change, "cpu")
        assert OPS["paged_attention"].resolve(call | change)[0] == "reference"
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "the elements of a key are not neighbours" in OPS["paged_attention"].why_not("triton", **call)
    assert OPS["paged_attention"].why_not("triton", **call | {"key_cache": cache.key_cache.contiguous()}) is None


def test_wrong_calls_are_named_before_anything_is_read(generator):
    keys, values = ragged([41, 50], 2, 16, generator)
    q = torch.randn(2, 4, 16, generator=generator)
    cache = make(keys, values, 16, generator)

    def refused(message, groups=None, **change):
        with pytest.raises(ValueError, match="paged_attention: " + message):
            Cache(**{name: getattr(cache, name) for name in ("key_cache", "value_cache", "block_table", "seq_lens")} | change)(q, **groups or {})

    def i32(*x):
        return torch.tensor(x, dtype=torch.int32)

    refused(r"seq_lens run from 41 to 81; wanted \[0, 80\]", seq_lens=i32(41, 81))
    refused(r"seq_lens run from -1 to 41; wanted \[0, 80\]", seq_lens=i32(-1, 41))
    refused(r"seq_lens run from 41 to 50; wanted \[0, 48\]", groups={"max_seq_len": 48})
    refused("block_table names a block outside of the cache; it has 13 blocks", seq_lens=i32(41, 70))
    refused("block_table names a block outside of the cache", block_table=-1 - cache.block_table)
    refused("group_offsets runs from 0 to 3", groups={"group_offsets": i32(0, 3), "prefix_lens": i32(0)})
    refused("group_offsets runs from 0 to 1", groups={"group_offsets": i32(0, 2, 1), "prefix_lens": i32(0, 0)})
    refused("a row is shorter than the prefix", groups={"group_offsets": i32(0, 2), "prefix_lens": i32(45)})
    refused("the rows of a group have different blocks in their prefix", groups={"group_offsets": i32(0, 2), "prefix_lens": i32(16)})
    assert same(cache(q, group_offsets=i32(0, 2), prefix_lens=i32(15)), cache(q))  # less than a block is shared: nothing to compare


def test_no_rows():
    key_cache, value_cache = empty_kv_cache(2, 2, 16, 16, dtype=torch.float32, device="cpu")
    out, lse = Cache(key_cache, value_cache, torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))(torch.empty(0, 4, 16))
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
