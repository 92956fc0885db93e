import pytest
import torch

from athanor.kernels import kv_append, qkv_append, rmsnorm, rope

INT_MAX = 2**31 - 1


def make(R, H, Hkv, d, block, generator, dtype=torch.float32):
    """A cache of known numbers, a table in random order whose other entries are INT_MAX, positions at the edges of blocks, an empty row."""
    blocks = R + 2
    caches = [torch.randn(blocks, Hkv, block, d, generator=generator).to(dtype) for _ in range(2)]
    positions = torch.tensor([0, block - 1, block, -1, 2 * block + block // 2, 3 * block - 1], dtype=torch.int32)[:R]
    table = torch.full((R, 3), INT_MAX, dtype=torch.int32)
    order = torch.randperm(blocks, generator=generator)
    for r, position in enumerate(positions.tolist()):
        if position >= 0:
            table[r, position // block] = order[r]
    fused = torch.randn(R, H + 2 * Hkv, d, generator=generator).to(dtype)
    return fused.split((H, Hkv, Hkv), 1), caches, table, positions


def written(caches, k, v, table, positions):
    """The caches after the append, slot by slot."""
    out = [x.clone() for x in caches]
    for r, position in enumerate(positions.tolist()):
        if position >= 0:
            block, slot = table[r, position // caches[0].shape[2]], position % caches[0].shape[2]
            out[0][block, :, slot], out[1][block, :, slot] = k[r], v[r]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("R, H, Hkv, d, block", [(6, 4, 2, 16, 16), (5, 3, 3, 24, 1), (1, 8, 1, 64, 64), (0, 2, 1, 8, 4)])
def test_appends_at_each_rows_position_and_nowhere_else(R, H, Hkv, d, block, dtype, generator):
    (q, k, v), caches, table, positions = make(R, H, Hkv, d, block, generator, dtype)
    want = written(caches, k, v, table, positions)
    kv_append(k, v, *caches, table, positions)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_append_is_the_composition_to_the_bit(norm, dtype, generator):
    (q, k, v), caches, table, positions = make(6, 4, 2, 32, 16, generator, dtype)
    cos, sin = torch.randn(2, 6, 16, generator=generator)
    weights = torch.randn(2, 32, generator=generator).to(dtype)
    normed = (rmsnorm(q, weights[0], eps=1e-5), rmsnorm(k, weights[1], eps=1e-5)) if norm else (q, k)
    q_want, k_want = rope(*normed, cos, sin)
    want = written(caches, k_want, v, table, positions)
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-5} if norm else {}
    got = qkv_append(q, k, v, cos, sin, *caches, table, positions, **options)
    assert torch.equal(got, q_want) and all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


def test_wrong_calls_are_named(generator):
    (q, k, v), caches, table, positions = make(6, 4, 2, 32, 16, generator)
    cos, sin = torch.randn(2, 6, 16, generator=generator)
    with pytest.raises(ValueError, match="kv_append: positions go up to 48; the table holds 48 tokens"):
        kv_append(k, v, *caches, table, positions + 1)
    with pytest.raises(ValueError, match=r"kv_append: positions is \(6,\) torch.int64"):
        kv_append(k, v, *caches, table, positions.long())
    with pytest.raises(ValueError, match=r"kv_append: k is \(6, 4, 32\)"):
        kv_append(q, v, *caches, table, positions)
    with pytest.raises(ValueError, match="qkv_append: one of q_weight and k_weight is missing"):
        qkv_append(q, k, v, cos, sin, *caches, table, positions, q_weight=cos[0])
    with pytest.raises(ValueError, match=r"qkv_append: cos is \(5, 16\)"):
        qkv_append(q, k, v, cos[:5], sin, *caches, table, positions)
