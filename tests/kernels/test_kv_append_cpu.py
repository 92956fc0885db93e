"""The C++ kernel of kv_append: every slot that is named and no other, in both layouts of the cache."""

import pytest
import torch

from athanor.kernels import attention, empty_kv_cache, kv_append, paged_attention, qkv_append, rmsnorm, rope, use_backend
from athanor.kernels._dispatch import OPS

INT_MAX = 2**31 - 1


def make(R, H, Hkv, d, block, generator, transposed):
    """A cache of known numbers, a table in random order whose other entries are INT_MAX, positions at the edges of blocks, an empty row."""
    blocks = R + 2
    caches = [torch.randn(blocks, Hkv, block, d, generator=generator) for _ in range(2)]
    if transposed:
        caches[0] = caches[0].transpose(2, 3).contiguous().transpose(2, 3)
    positions = torch.tensor([0, block - 1, block, -1, 2 * block + block // 2, 3 * block - 1], dtype=torch.int32).repeat(R // 6 + 1)[:R]
    table = torch.full((R, 3), INT_MAX, dtype=torch.int32)
    order = torch.randperm(blocks, generator=generator)
    for r, position in enumerate(positions.tolist()):
        if position >= 0:
            table[r, position // block] = order[r]
    fused = torch.randn(R, H + 2 * Hkv, d, generator=generator)
    return fused.split((H, Hkv, Hkv), 1), caches, table, positions


def written(caches, k, v, table, positions):
    """The caches after the append, slot by slot."""
    out = [x.clone() for x in caches]
    for r, position in enumerate(positions.tolist()):
        if position >= 0:
            block, slot = table[r, position // caches[0].shape[2]], position % caches[0].shape[2]
            out[0][block, :, slot], out[1][block, :, slot] = k[r], v[r]
    return out


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("transposed", [True, False])
# a batch of the edges, an odd head in blocks of one token, one row, no row, and enough for several threads
@pytest.mark.parametrize("R, H, Hkv, d, block", [(6, 4, 2, 16, 16), (5, 3, 3, 24, 1), (1, 8, 1, 64, 64), (0, 2, 1, 8, 4), (600, 4, 2, 64, 16)])
def test_appends_at_each_rows_position_and_nowhere_else(R, H, Hkv, d, block, transposed, generator):
    (q, k, v), caches, table, positions = make(R, H, Hkv, d, block, generator, transposed)
    want, before = written(caches, k, v, table, positions), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = [x.clone() for x in caches]
            assert got[0].stride() == caches[0].stride()
            kv_append(k, v, *got, table, positions, backend="cpu")
            assert same(got, want)
    finally:
        torch.set_num_threads(before)


def test_strided_rows_and_tables_are_read_right(generator):
    (q, k, v), caches, table, positions = make(6, 4, 2, 16, 16, generator, True)
    want = written(caches, k, v, table, positions)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    kv_append(k, v, *caches, table.T.contiguous().T, torch.stack((positions, positions), 1)[:, 0], backend="cpu")
    assert same(caches, want)


@pytest.mark.parametrize("norm", [True, False])
def test_fused_append_is_the_composition_to_the_bit(norm, generator):
    (q, k, v), caches, table, positions = make(6, 4, 2, 32, 16, generator, True)
    cos, sin = torch.randn(2, 6, 16, generator=generator)
    weights = torch.randn(2, 32, generator=generator)
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-5} if norm else {}
    q_want, k_want = rope(q, k, cos, sin, **options)
    want = written(caches, k_want, v, table, positions)
    if norm:
        assert torch.allclose(q_want, rope(rmsnorm(q, weights[0], eps=1e-5), k, cos, sin)[0], atol=1e-5)
    with use_backend("cpu"):
        got = qkv_append(q, k, v, cos, sin, *caches, table, positions, **options)
    assert torch.equal(got, q_want) and same(caches, want)


def test_a_bad_row_is_named_and_nothing_is_written(generator):
    (q, k, v), caches, table, positions = make(6, 4, 2, 32, 16, generator, True)
    cos, sin = torch.randn(2, 6, 16, generator=generator)
    before = [x.clone() for x in caches]
    bad = table.clone()
    bad[5, 2] = len(caches[0])
    for append, where in ((lambda *rest: kv_append(k, v, *caches, *rest, backend="cpu"), "kv_append"),
                          (lambda *rest: qkv_append(q, k, v, cos, sin, *caches, *rest, backend="cpu"), "qkv_append")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{where}: positions go up to 48; the table holds 48 tokens"):
            append(table, positions + 1)
        with pytest.raises(ValueError, match=f"^{where}: block_table names a block outside of the cache; it has 8 blocks"):
            append(bad, positions)
    assert same(caches, before)


def test_triton_refuses_keys_with_neighbouring_tokens(generator, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for transposed in (True, False):
        (q, k, v), caches, table, positions = make(6, 4, 2, 32, 16, generator, transposed)
        call = {"k": k, "v": v, "key_cache": caches[0], "value_cache": caches[1], "block_table": table, "positions": positions}
        reason = OPS["kv_append"].why_not("triton", **call)
        assert ("the elements of a key are not neighbours" in reason) if transposed else reason is None


def test_a_decoded_sequence_has_the_bits_of_the_trained_one(generator):
    """Token after token through the cache, against one packed forward: the promise that rollout and trainer rest on."""
    R, n, H, Hkv, d, block = 3, 45, 4, 2, 32, 16
    q, k, v = (torch.randn(R, n, h, d, generator=generator) for h in (H, Hkv, Hkv))
    packed = attention(*(x.flatten(0, 1) for x in (q, k, v)), torch.arange(0, R * n + 1, n, dtype=torch.int32)).unflatten(0, (R, n))
    caches = empty_kv_cache(R * 3, Hkv, block, d, dtype=torch.float32, device="cpu")
    table = torch.randperm(R * 3, generator=generator, dtype=torch.int32).view(R, 3)
    for t in range(n):
        kv_append(k[:, t], v[:, t], *caches, table, torch.full((R,), t, dtype=torch.int32))
        out = paged_attention(q[:, t], *caches, table, torch.full((R,), t + 1, dtype=torch.int32))
        assert torch.equal(out, packed[:, t]), t
