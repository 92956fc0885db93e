"""paged_attention in Triton against fp64 attention row by row, and what only a kernel can get wrong: far offsets, recompilation, reading once."""

import mmap
from dataclasses import dataclass

import pytest
import torch

from athanor.kernels import paged_attention
from athanor.kernels.paged_attention import CHUNK

triton = pytest.importorskip("triton")

from athanor.kernels.paged_attention_triton import paged_attention_triton  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
INT_MAX = 2**31 - 1
nan, inf, LN2 = torch.nan, torch.inf, 0.6931471805599453
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


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

    def call(self, rows=slice(None), device="cpu", backend="triton", **options):
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        call = (x.to(device) for x in (self.q[rows], self.key_cache, self.value_cache, self.block_table[rows], self.seq_lens[rows]))
        return [x.cpu() for x in paged_attention(*call, return_lse=True, backend=backend, **options)]


def make(groups, H, Hkv, d, block_size, generator, dtype=torch.float32, poison=nan, width=0, exact=False):
    """groups: (prefix, lengths of its rows) each.  Blocks in random order; what must not be read holds poison or INT_MAX.

    exact: keys and values are small integers and a query picks one of them, so that with scale = ln 2 every weight is a power of two and no sum is
    ever rounded.  The interpreter's products are those of numpy's BLAS, where a row's rounding depends on its place in the matrix, unlike on a GPU.
    """

    def rn(*shape):
        normal = torch.randn(shape, dtype=torch.float64, generator=generator)
        return torch.randint(-3, 4, shape, generator=generator).to(dtype) if exact else normal.to(dtype)

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
    q = torch.nn.functional.one_hot(torch.randint(0, d, (len(lens), H), generator=generator), d).to(dtype) if exact else rn(len(lens), H, d)
    return Pool(q, key_cache, value_cache, table, torch.tensor(lens, dtype=torch.int32), described, keys, values)


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


EDGES = [0, 1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77]


# heads: small, aligned, odd; grouped queries 1, 4, 5, 8; blocks shorter and longer than the 64 keys of a step
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("H, Hkv, d, block", [(2, 2, 16, 16), (4, 1, 64, 64), (5, 1, 128, 1), (8, 1, 24, 256)])
def test_errs_no_more_than_pytorchs_attention(H, Hkv, d, block, dtype, triton_device, within_rule, generator):
    pool = make(alone(EDGES), H, Hkv, d, block, generator, dtype, width=1 + (3 * CHUNK + 77) // block | 1)
    got, want = pool.call(device=triton_device), oracle(pool)
    within_rule(got[0], textbook(pool), want[0], dtype)
    assert got[1].dtype == torch.float32 and torch.allclose(got[1].double(), want[1], atol=1e-4)
    assert not got[0][0].any() and (got[1][0] == -inf).all()


GROUPS = [
    [(300, [301])],  # a group of one
    [(2 * CHUNK, [2 * CHUNK, 2 * CHUNK + 1])],  # an empty suffix, whole chunks
    [(CHUNK + 13, [CHUNK + 13 + n for n in range(8)])],  # the last block is each row's own copy
    [(0, [5, 1, 300]), (263, [270] * 16), (0, []), (CHUNK, [CHUNK] * 16 + [CHUNK + 1])],  # no prefix, an empty group, odd sizes
    [(600, [0, 0, 0, 0, 700, 0, 613])],  # finished rows: a whole tile of them with 4 heads to a key head, and the first of the next one
    [(600, [0, 0]), (CHUNK - 1, [400, 500])],  # nothing but finished rows; a prefix one token short of a chunk
]

# All of them with 4 query heads to a key head; 1, 5 and 8 where a tile of 16 query rows holds 16, 3 and 2 rows of a group.  On a GPU all with all.
SHARED = [*((groups, 4, 1, 64) for groups in GROUPS), (GROUPS[3], 1, 1, 16), (GROUPS[2], 5, 1, 32), (GROUPS[3], 5, 1, 32), (GROUPS[2], 16, 2, 8)]
SHARED += [pytest.param(groups, *shape, marks=pytest.mark.gpu) for groups in GROUPS for shape in ((1, 1, 16), (5, 1, 32), (16, 2, 8))]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.gpu), BF16])
@pytest.mark.parametrize("groups, H, Hkv, block", SHARED, ids=str)
def test_sharing_the_prefix_changes_no_bit(groups, H, Hkv, block, dtype, triton_device, within_rule, generator):
    pool = make(groups, H, Hkv, 16, block, generator, dtype, exact=True)
    shared, unshared = (pool.call(device=triton_device, scale=LN2, **options) for options in (pool.groups, {}))
    assert same(shared, unshared)
    assert torch.allclose(shared[1].double(), oracle(pool, LN2)[1], atol=1e-5)
    pool = make(groups, H, Hkv, 16, block, generator, dtype)
    shared = pool.call(device=triton_device, **pool.groups)
    within_rule(shared[0], textbook(pool), oracle(pool)[0])
    assert triton_device.type == "cpu" or same(shared, pool.call(device=triton_device))


@pytest.mark.gpu
def test_sharing_the_prefix_changes_no_bit_at_full_size():
    g = torch.Generator().manual_seed(7)
    pool = make([(1000, [1000 + 37 * n for n in range(16)]), (513, [2100] * 17)], 32, 8, 128, 64, g, torch.bfloat16)
    whole = pool.call(device="cuda", **pool.groups)
    assert same(whole, pool.call(device="cuda"))
    for i in (0, 15, 16, 32):
        assert same(pool.call(slice(i, i + 1), device="cuda"), whole, slice(i, i + 1))


def test_more_groups_than_one_step_of_the_search(triton_device, generator):
    """65 groups of one row, then one that shares; rows behind the last group and before the first."""
    groups = [(0, [1 + n % 3]) for n in range(66)] + [(CHUNK, [CHUNK + 1, CHUNK + 2])] + [(0, [300])]
    pool = make(groups, 1, 1, 16, 16, generator, exact=True)
    described = {"group_offsets": pool.groups["group_offsets"][1:-1], "prefix_lens": pool.groups["prefix_lens"][1:-1]}
    assert same(pool.call(device=triton_device, scale=LN2, **described), pool.call(device=triton_device, scale=LN2))


def test_a_shared_chunk_is_read_through_one_row_of_its_tile(triton_device, generator):
    """The other rows' tables may say anything there, as the prefix is read once.  The 16 query rows of the interpreter hold 8 rows of 2 heads."""
    pool = make([(2 * CHUNK + 5, [0] + [2 * CHUNK + 5 + 40 * n for n in range(7)])], 4, 2, 16, 64, generator, exact=True)
    want = pool.call(device=triton_device, scale=LN2)
    pool.block_table[2:, : 2 * CHUNK // 64] = INT_MAX
    call = [x.to(triton_device) for x in (pool.q, pool.key_cache, pool.value_cache, pool.block_table, pool.seq_lens)]
    groups = {name: x.to(triton_device) for name, x in pool.groups.items()}
    assert same([x.cpu() for x in paged_attention_triton(*call, LN2, **groups, limit=2048)], want)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(triton_device, generator):
    lens = torch.randint(0, 400, (37,), generator=generator).tolist()
    pool = make(alone(lens), 2, 1, 16, 16, generator)
    whole = pool.call(device=triton_device)
    for i in (0, 1, 17, 36):
        assert same(pool.call(slice(i, i + 1), device=triton_device), whole, slice(i, i + 1)), lens[i]
    order = torch.randperm(37, generator=generator)
    assert same(pool.call(order, device=triton_device), whole, order)
    assert same(pool.call(slice(3, 9), device=triton_device, max_seq_len=400), whole, slice(3, 9))
    assert same(pool.call(device=triton_device), whole)  # and again


@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_what_lies_in_unused_slots_has_no_influence(poison, triton_device):
    groups = [(CHUNK + 3, [CHUNK + 3, CHUNK + 9, 600]), (0, [0, 1, 20])]
    clean, dirty = (make(groups, 4, 2, 16, 16, torch.Generator().manual_seed(3), poison=x) for x in (0.0, poison))
    want = clean.call(device=triton_device)
    assert same(dirty.call(device=triton_device, **dirty.groups), want) and same(dirty.call(device=triton_device), want)


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_broken_query_breaks_its_own_row_alone(bad, triton_device, generator):
    pool = make([(CHUNK, [CHUNK + n for n in (1, 2, 3, 4)])], 4, 2, 16, 16, generator)
    want = pool.call(device=triton_device, **pool.groups)
    pool.q[2] = bad
    out, lse = pool.call(device=triton_device, **pool.groups)
    assert out[2].isnan().all() and same((out[[0, 1, 3]], lse[[0, 1, 3]]), want, [0, 1, 3])


def test_views_and_empty_batches(triton_device, generator):
    pool = make([(CHUNK, [300, 400])], 4, 2, 16, 16, generator)
    want = pool.call(device=triton_device)
    both, wide = torch.stack((pool.key_cache, pool.value_cache), 2).to(triton_device), torch.cat((pool.q, pool.q + 1), 1).to(triton_device)
    table, lens = (torch.cat((x, x), -1).to(triton_device)[..., : x.shape[-1]] for x in (pool.block_table, pool.seq_lens))
    got = paged_attention(wide[:, :4], both[:, :, 0], both[:, :, 1], table, lens, return_lse=True, backend="triton")
    assert same([x.cpu() for x in got], want)
    none = pool.call(slice(0, 0), device=triton_device)
    assert none[0].shape == (0, 4, 16) and none[1].shape == (0, 4)
    out, lse = paged_attention(wide[:, :4], both[:, :, 0], both[:, :, 1], table[:, :0], 0 * lens, return_lse=True, backend="triton")
    assert not out.any() and (lse == -inf).all()


def test_pools_beyond_two_to_the_31_elements(triton_device, generator):
    """Blocks 1.5 2^30 elements apart in memory that is never touched but for them: block 2 starts at element 3 2^30 > 2^31."""
    pool = make(alone([33, 40]), 2, 1, 16, 16, generator, torch.float16)
    blocks, stride = len(pool.key_cache), 3 << 29
    want = pool.call(device=triton_device)
    if triton_device.type == "cuda":
        memory = [torch.empty(blocks * stride, dtype=torch.float16, device="cuda") for _ in range(2)]
    else:
        maps = [mmap.mmap(-1, 2 * blocks * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) for _ in range(2)]
        memory = [torch.frombuffer(m, dtype=torch.float16) for m in maps]
    far = [m.as_strided(pool.key_cache.shape, (stride, *pool.key_cache.stride()[1:])) for m in memory]
    for x, near in zip(far, (pool.key_cache, pool.value_cache), strict=True):
        x.copy_(near)
    assert int(pool.block_table[:, :3].max()) * stride > 2**31
    rest = [x.to(triton_device) for x in (pool.block_table, pool.seq_lens)]
    got = paged_attention(pool.q.to(triton_device), *far, *rest, return_lse=True, backend="triton")
    assert same([x.cpu() for x in got], want)


def test_neither_lengths_nor_batches_nor_tables_compile_anew(launches, generator):
    cache = torch.zeros(2, 3, 2, 16, 32)
    for n in range(50):
        R, P = 1 + n % 19, n % 4
        table, lens = (torch.zeros(R + 3, *shape, dtype=torch.int32)[n % 3 :][:R] for shape in ((n + 1,), ()))
        groups = {"group_offsets": torch.zeros(P + 3, dtype=torch.int32)[n % 2 :][: P + 2], "prefix_lens": torch.zeros(P + 2, dtype=torch.int32)[1:]}
        paged_attention_triton(torch.zeros(R, 4, 32), *cache, table, lens, 0.1 * (n + 1), **groups, limit=16 * (n + 1))
    assert sorted(name for name, *_ in launches.keys) == ["paged_attention_merge_kernel", "paged_attention_split_kernel"], launches.keys
    paged_attention_triton(torch.zeros(2, 4, 32), *cache, table[:2], lens[:2], 1.0, None, None, limit=16)
    assert len(launches.keys) == 3  # a call without groups is another kernel


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths(generator):
    pool = make([(CHUNK, [400, 700, 513])], 8, 2, 64, 16, generator, torch.bfloat16)
    call = [x.cuda() for x in (pool.q, pool.key_cache, pool.value_cache, pool.block_table, pool.seq_lens)]
    groups = {name: x.cuda() for name, x in pool.groups.items()}
    paged_attention(*call, **groups)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*call, **groups)
    for shorter in (0, 1, 100):
        call[4].copy_(pool.seq_lens - shorter)
        graph.replay()
        assert torch.equal(out, paged_attention(*call))


def test_refuses_what_it_cannot_serve(triton_device, generator):
    pool = make(alone([5]), 2, 1, 16, 16, generator, torch.float64)
    with pytest.raises(ValueError, match="fp64 is the reference's"):
        pool.call(device=triton_device)
