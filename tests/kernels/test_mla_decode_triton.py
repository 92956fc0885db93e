"""mla_decode in Triton against the reference: chunks, blocks, heads beyond a tile, poisoned slots, rows of no tokens."""

import pytest
import torch

from athanor.kernels import mla_decode

pytest.importorskip("triton")
from athanor.kernels import mla_decode_triton as module  # noqa: E402

LENS = [0, 1, 15, 16, 17, 256, 257, 530]  # nothing, around a block, around a chunk, three chunks


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 256)


def inputs(generator, H, rank, rotated, block, dtype):
    R, d, columns = len(LENS), rank + rotated, -(-max(LENS) // block) + 1
    table = torch.randperm(R * columns, generator=generator).view(R, columns).to(torch.int32)
    cache = torch.full((R * columns, 1, block, d), torch.nan, dtype=dtype)
    for r, n in enumerate(LENS):
        at = torch.arange(n)
        cache[table[r, at // block].long(), 0, at % block] = torch.randn(n, d, generator=generator).to(dtype)
        table[r, -(-n // block) :] = 2147483000
    return torch.randn(R, H, d, generator=generator).to(dtype), cache, table, torch.tensor(LENS, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("H, rank, rotated, block", [(5, 24, 8, 16), (16, 32, 16, 64), (20, 16, 4, 16)])
def test_errs_no_more_than_the_reference(H, rank, rotated, block, dtype, triton_device, within_rule, poisoned, generator):
    q, cache, table, lens = inputs(generator, H, rank, rotated, block, dtype)
    call = dict(rank=rank, scale=0.2)
    plain, oracle = (mla_decode(q.to(t), cache.to(t), cache.to(t), table, lens, backend="reference", **call) for t in (dtype, torch.float64))
    q, cache, table, lens = (x.to(triton_device) for x in (q, cache, table, lens))
    got = mla_decode(q, cache, cache, table, lens, backend="triton", **call)
    within_rule(got.cpu(), plain, oracle)
    assert not got[0].any()


def test_a_rows_bits_do_not_depend_on_the_others(triton_device, rowwise_products, generator):
    q, cache, table, lens = (x.to(triton_device) for x in inputs(generator, 5, 24, 8, 16, torch.float32))
    whole = mla_decode(q, cache, cache, table, lens, rank=24, scale=0.2, backend="triton")
    for r in (1, 4, 7):
        alone = mla_decode(q[r : r + 1], cache, cache, table[r : r + 1], lens[r : r + 1], rank=24, scale=0.2, backend="triton")
        assert torch.equal(alone[0], whole[r])


# prefix and lengths of its rows: two chunks, more rows than a tile of 16 queries has room for; less than a chunk; nothing shared; empty rows in front
GROUPS = [(512, [600, 512, 0, 515, 530]), (250, [260, 300]), (0, [17]), (256, [0, 0, 257, 256])]


def grouped_inputs(generator, H, rank, rotated, block, dtype):
    """Rows of a group name the same blocks for the whole blocks of its prefix; every slot that no row may read is NaN."""
    d, lens = rank + rotated, [n for _, rows in GROUPS for n in rows]
    columns = -(-max(lens) // block) + 1
    table = torch.full((len(lens), columns), 2147483000, dtype=torch.int32)
    free, row = torch.randperm(len(lens) * columns + 1, generator=generator).tolist(), 0
    cache = torch.full((len(free), 1, block, d), torch.nan, dtype=dtype)
    for prefix, rows in GROUPS:
        shared, common = [free.pop() for _ in range(prefix // block)], torch.randn(prefix, d, generator=generator).to(dtype)
        for n in rows:
            own = [*shared, *(free.pop() for _ in range(-(-n // block) - len(shared)))][: -(-n // block)]
            table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
            tokens = torch.cat((common, torch.randn(max(0, n - prefix), d, generator=generator).to(dtype)))[:n]
            at = torch.arange(n)
            cache[table[row, at // block].long(), 0, at % block] = tokens
            row += 1
    groups = dict(group_offsets=torch.tensor([0, *torch.tensor([len(rows) for _, rows in GROUPS]).cumsum(0)], dtype=torch.int32),
                  prefix_lens=torch.tensor([prefix for prefix, _ in GROUPS], dtype=torch.int32))  # fmt: skip
    return torch.randn(len(lens), H, d, generator=generator).to(dtype), cache, table, torch.tensor(lens, dtype=torch.int32), groups


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("H", [5, pytest.param(16, marks=pytest.mark.gpu), pytest.param(20, marks=pytest.mark.gpu)])
def test_rows_that_share_a_prefix_get_the_bits_that_they_get_alone(H, dtype, triton_device, rowwise_products, within_rule, poisoned, generator):
    q, cache, table, lens, groups = grouped_inputs(generator, H, 24, 8, 16, dtype)
    call = dict(rank=24, scale=0.2)
    plain, oracle = (mla_decode(q.to(t), cache.to(t), cache.to(t), table, lens, backend="reference", **call) for t in (dtype, torch.float64))
    q, cache, table, lens = (x.to(triton_device) for x in (q, cache, table, lens))
    groups = {name: x.to(triton_device) for name, x in groups.items()}
    got = mla_decode(q, cache, cache, table, lens, backend="triton", **groups, **call)
    within_rule(got.cpu(), plain, oracle)
    assert torch.equal(got, mla_decode(q, cache, cache, table, lens, backend="triton", **call))
    alone = [mla_decode(q[r : r + 1], cache, cache, table[r : r + 1], lens[r : r + 1], backend="triton", **call) for r in (1, 4, 10)]
    assert torch.equal(torch.cat(alone), got[[1, 4, 10]])


def test_a_prefix_is_read_once_for_a_tile(triton_device, generator):
    """What the table says there of a row that is not the first of its tile is never looked at."""
    q, cache, table, lens, groups = (x.to(triton_device) if isinstance(x, torch.Tensor) else x
                                     for x in grouped_inputs(generator, 5, 24, 8, 16, torch.float32))  # fmt: skip
    groups = {name: x.to(triton_device) for name, x in groups.items()}
    want = mla_decode(q, cache, cache, table, lens, rank=24, scale=0.2, backend="triton", **groups)
    table[1, :32] = 0  # row 1 sits in the tile of row 0
    module_call = dict(rank=24, scale=0.2, limit=table.shape[1] * 16, **groups)
    got = module.mla_decode_triton(q, cache, cache, table, lens, **module_call)
    assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


def test_neither_batches_nor_tables_compile_anew(launches):
    cache = torch.zeros(8, 1, 16, 48)
    for R in range(1, 31):
        q, table, lens = torch.zeros(R, 4, 48), torch.zeros(R, 3 + R % 5, dtype=torch.int32), torch.zeros(R + 9, dtype=torch.int32)[R % 9 :][:R]
        module.mla_decode_triton(q, cache, cache, table, lens, 32, 0.1 * R, None, None, 16 * (3 + R % 5))
    assert sorted(name for name, *_ in launches.keys) == ["mla_decode_split_kernel", "paged_attention_merge_kernel"], launches.keys
