"""mla_decode: reference and C++ kernel against attention written out, poisoned slots, lengths around blocks and chunks, the bits of `attention`."""

import pytest
import torch

from athanor.kernels import attention, empty_kv_cache, kv_append, mla_decode

LENS = [0, 1, 15, 16, 17, 255, 256, 257, 300]


def inputs(generator, lens, H=5, rank=12, rotated=6, block=16, dtype=torch.float64, poison=True):
    """Rows of these lengths in shuffled blocks; every other slot is NaN, and table entries behind a row's end are out of range."""
    R, d, columns = len(lens), rank + rotated, -(-max(lens) // block) + 1
    order = torch.randperm(R * columns, generator=generator)
    keys, values = empty_kv_cache(R * columns, 1, block, d, dtype=dtype, device="cpu")
    table = order.view(R, columns).to(torch.int32)
    rows = [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for n in lens]
    if poison:
        keys.fill_(torch.nan), values.fill_(torch.nan)
    for r, row in enumerate(rows):
        for t, x in enumerate(row):
            keys[table[r, t // block], 0, t % block] = x
            values[table[r, t // block], 0, t % block] = x
        table[r, -(-len(row) // block) :] = 2147483000 if poison else 0
    q = torch.randn(R, H, d, generator=generator, dtype=torch.float64).to(dtype)
    return q, keys, values, table, torch.tensor(lens, dtype=torch.int32), rows


def by_hand(q, rows, rank, scale):
    out = torch.zeros(len(rows), q.shape[1], rank, dtype=q.dtype)
    for r, row in enumerate(rows):
        if len(row):
            out[r] = ((q[r] @ row.T) * scale).softmax(-1) @ row[:, :rank]
    return out


@pytest.mark.parametrize("H, rank, rotated", [(5, 12, 6), (1, 16, 0), (16, 40, 8)])
def test_rows_attend_to_their_own_tokens(H, rank, rotated, generator, close64):
    q, keys, values, table, lens, rows = inputs(generator, LENS, H, rank, rotated)
    got = mla_decode(q, keys, values, table, lens, rank=rank, scale=0.3, backend="reference")
    close64(got, by_hand(q, rows, rank, 0.3))
    assert not got[0].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fp32_errs_no_more_than_the_formula(backend, generator, within_rule):
    q, keys, values, table, lens, rows = inputs(generator, LENS, dtype=torch.float32)
    got = mla_decode(q, keys, values, table, lens, rank=12, scale=0.3, backend=backend)
    within_rule(got, by_hand(q, rows, 12, 0.3), by_hand(q.double(), [r.double() for r in rows], 12, 0.3))


def test_a_token_has_the_bits_of_packed_attention(generator):
    """What the generator and the trainer rest on: 70 tokens in one packed call, and one after the other through the cache."""
    T, H, rank, d, block = 70, 4, 16, 24, 16
    q, latent = (torch.randn(T, n, d, generator=generator) for n in (H, 1))
    packed = attention(q, latent, latent, torch.tensor([0, T], dtype=torch.int32), scale=0.2)[..., :rank]
    keys, values = empty_kv_cache(8, 1, block, d, dtype=torch.float32, device="cpu")
    table = torch.randperm(8, generator=generator).to(torch.int32)[None]
    for t in range(T):
        kv_append(latent[t : t + 1], latent[t : t + 1], keys, values, table, torch.tensor([t], dtype=torch.int32))
        row = mla_decode(q[t : t + 1], keys, values, table, torch.tensor([t + 1], dtype=torch.int32), rank=rank, scale=0.2)
        assert torch.equal(row[0], packed[t])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_groups_change_no_bit_and_are_checked(backend, generator):
    q, keys, values, table, lens, _ = inputs(generator, [300, 290, 40], dtype=torch.float32)
    for block in range(17):  # 272 tokens
        keys[table[1, block]], values[table[1, block]] = keys[table[0, block]], values[table[0, block]]
    call = dict(rank=12, scale=0.3, backend=backend)
    want = mla_decode(q, keys, values, table, lens, **call)
    groups = dict(group_offsets=torch.tensor([0, 2, 3], dtype=torch.int32), prefix_lens=torch.tensor([272, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match="different blocks in their prefix"):
        mla_decode(q, keys, values, table, lens, **groups, **call)
    table[1, :17] = table[0, :17]
    assert torch.equal(mla_decode(q, keys, values, table, lens, **groups, **call), want)
    with pytest.raises(ValueError, match="mla_decode: group_offsets and prefix_lens are given together"):
        mla_decode(q, keys, values, table, lens, prefix_lens=groups["prefix_lens"], **call)


def test_max_seq_len_cuts_nothing_that_it_allows(generator):
    q, keys, values, table, lens, _ = inputs(generator, [3, 40], dtype=torch.float32)
    whole = mla_decode(q, keys, values, table, lens, rank=12, scale=0.3)
    assert torch.equal(mla_decode(q, keys, values, table, lens, rank=12, scale=0.3, max_seq_len=40), whole)


def test_mismatches_are_refused(generator):
    q, keys, values, table, lens, _ = inputs(generator, [3, 40], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mla_decode: q is \(2, 5, 17\)"):
        mla_decode(q[..., :-1], keys, values, table, lens, rank=12, scale=1.0)
    with pytest.raises(ValueError, match="rank 19"):
        mla_decode(q, keys, values, table, lens, rank=19, scale=1.0)
    with pytest.raises(ValueError, match="seq_lens is .* torch.int64"):
        mla_decode(q, keys, values, table, lens.long(), rank=12, scale=1.0)
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="seq_lens run from 3 to 4000"):
            mla_decode(q, keys, values, table, torch.tensor([3, 4000], dtype=torch.int32), rank=12, scale=1.0, backend=backend)
    with pytest.raises(ValueError, match="values lie elsewhere"):
        mla_decode(q, keys.contiguous(), values.clone(), table, lens, rank=12, scale=1.0, backend="triton")
