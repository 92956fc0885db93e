"""kv_append and qkv_append in Triton: what they write, what they leave alone, and that they compile once."""

import pytest
import torch

from athanor.kernels import kv_append, qkv_append, rope

triton = pytest.importorskip("triton")

from athanor.kernels.kv_append_triton import kv_append_triton, qkv_append_triton  # noqa: E402

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


BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("R, H, Hkv, d, block", [(6, 4, 2, 16, 16), (5, 3, 3, 24, 1), (1, 20, 20, 64, 64), (0, 2, 1, 8, 4)])
def test_appends_at_each_rows_position_and_nowhere_else(R, H, Hkv, d, block, dtype, triton_device, generator):
    (_, k, v), caches, table, positions = make(R, H, Hkv, d, block, generator, dtype)
    want = written(caches, k, v, table, positions)
    caches = [x.to(triton_device) for x in caches]
    kv_append(k.to(triton_device), v.to(triton_device), *caches, table.to(triton_device), positions.to(triton_device), backend="triton")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(caches, want, strict=True))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_fused_append_is_rope_in_triton_to_the_bit(norm, dtype, triton_device, generator):
    """One function turns the heads in both; test_rope_triton.py holds rope against fp64."""
    (q, k, v), caches, table, positions = make(6, 20, 2, 24, 16, generator, dtype)
    cos, sin = torch.randn(2, 6, 12, generator=generator).to(triton_device)
    weights = torch.randn(2, 24, generator=generator).to(dtype).to(triton_device)
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-5} if norm else {}
    q, k, v = (x.to(triton_device) for x in (q, k, v))
    q_want, k_want = rope(q, k, cos, sin, **options, backend="triton")
    want = written(caches, k_want.cpu(), v.cpu(), table, positions)
    caches = [x.to(triton_device) for x in caches]
    got = qkv_append(q, k, v, cos, sin, *caches, table.to(triton_device), positions.to(triton_device), **options, backend="triton")
    assert torch.equal(got, q_want) and all(torch.equal(a.cpu(), b) for a, b in zip(caches, want, strict=True))


def test_a_position_behind_the_table_writes_nothing(triton_device, generator):
    """On a GPU nothing waits to look; the public function refuses it on CPU."""
    (_, k, v), caches, table, positions = make(6, 4, 2, 16, 16, generator)
    before, caches = [x.clone() for x in caches], [x.to(triton_device) for x in caches]
    rest = [x.to(triton_device) for x in (table, torch.full_like(positions, 48))]
    kv_append_triton(k.to(triton_device), v.to(triton_device), *caches, *rest)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(caches, before, strict=True))


def test_neither_batches_nor_tables_compile_anew(launches):
    cache = torch.zeros(2, 3, 2, 16, 32)
    for n in range(50):
        R = 1 + n % 19
        q, k, v = torch.zeros(R, 8, 32).split((4, 2, 2), 1)
        table, positions = (torch.zeros(R + 3, *shape, dtype=torch.int32)[n % 3 :][:R] for shape in ((n + 1,), ()))
        cos = torch.zeros(R, 16)
        kv_append_triton(k, v, *cache, table, positions)
        qkv_append_triton(q, k, v, cos, cos, *cache, table, positions, cos[0].repeat(2), cos[0].repeat(2), 1e-6)
    assert sorted(name for name, *_ in launches.keys) == ["kv_append_kernel", "qkv_append_kernel"], launches.keys
