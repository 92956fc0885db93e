"""The Gluon kernels, which no interpreter runs, as Python (gluon_emulation.py): every tile, mask, scale and phase, against the references."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from athanor.kernels import fp8_quantize, fp8_quantize_dual
from athanor.kernels.fp8_grouped_gemm import fp8_grouped_matmul_reference, fp8_grouped_wgrad_reference
from athanor.kernels.fp8_quantize import fp8_quantize_reference

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from gluon_emulation import emulated  # noqa: E402

dual, few, many, wgrad = (importlib.import_module(f"athanor.kernels.{name}_hopper_triton")
                          for name in ("fp8_quantize_dual", "fp8_grouped_gemm_few", "fp8_grouped_gemm", "fp8_grouped_wgrad"))  # fmt: skip


def numbers(R, C, generator):
    x = torch.randn(R, C, generator=generator) * torch.exp(2 * torch.randn(R, 1, generator=generator) + torch.randn(1, C, generator=generator))
    return x.bfloat16()


# one word; less than a tile; one more than a tile each way, rows not a multiple of 16; more tiles than lie above each other
@pytest.mark.parametrize("R, C", [(1, 2), (37, 100), (145, 258), (1153, 130)])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_both_layouts_have_the_bits_of_the_reference(R, C, power_of_two, poisoned, generator):
    wide = torch.full((R + 2, C + 4), torch.nan, dtype=torch.bfloat16)
    x = wide[1:-1, 2:-2]
    x.copy_(numbers(R, C, generator))
    if R > 20:
        x[20, 7], x[R - 1, C - 1], x[19], x[:, 5] = math.nan, math.inf, 0, 0
        x[3, :9] = torch.tensor([0.0, -0.0, 448.0, -448.0, 2.0**-9, 1.5 * 2.0**-9, 2.0**-10, 17.0, 19.0])
    with emulated(dual):
        got = dual.fp8_quantize_dual_words(x, power_of_two)
    for a, b in zip(got, fp8_quantize_reference(x, ((1, 128), (128, 1)), power_of_two), strict=True):
        codes = [q.view(torch.uint8).clone() for q in (a.q, b.q)]
        for code in codes:
            code[code & 0x7F == 0x7F] = 0x7F  # one NaN is as good as another
        assert torch.equal(*codes) and a.q.stride() == b.q.stride()
        assert torch.equal(a.scales.nan_to_num(nan=999), b.scales.nan_to_num(nan=999)) and a.scales.stride() == b.scales.stride()


def tile_map(offsets, T, E, BM):
    """What `tile_map_of` gives: expert, first row and the row behind the last of each tile, and how many there are."""
    ends = offsets.tolist()
    tiles = [(e, row, end) for e, (start, end) in enumerate(zip(ends, ends[1:], strict=False)) for row in range(start, end, BM)]
    slots = -(-T // BM) + E
    padded = tiles + [(-1, 0, 0)] * (slots - len(tiles))
    return torch.tensor([x for column in zip(*padded, strict=True) for x in column] + [len(tiles)], dtype=torch.int32), slots


# experts without rows, with one, around a tile; outputs and sums that end inside a block; the columns of a weight by their strides
@pytest.mark.parametrize("kernel, sizes", [(16, [0, 1, 15, 16, 17]), (32, [33, 0, 5]), (64, [64, 70]), ("many", [0, 129, 5, 128])])
@pytest.mark.parametrize("N, K, transposed", [(144, 272, False), (288, 144, True)])
def test_the_grouped_product_is_near_the_reference(kernel, sizes, N, K, transposed, monkeypatch, poisoned, generator):
    x, weight = numbers(sum(sizes) + 3, K, generator).float(), torch.randn(len(sizes), N, K, generator=generator) / K**0.5
    weight *= torch.exp(torch.randn(-(-N // 128), generator=generator)).repeat_interleave(128)[:N, None]
    x[-3:] = math.nan  # rows of no expert
    (q, scales), offsets = fp8_quantize(x), torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    if transposed:  # what dx takes
        columns = fp8_quantize_dual(weight.mT.contiguous(), block=(128, 128))[1]
        w, ws = columns.q.mT, columns.scales.mT
    else:
        w, ws = fp8_quantize_dual(weight, block=(128, 128))[0]
    module = many if kernel == "many" else few
    monkeypatch.setattr(module, "tile_map_of", tile_map)
    y = torch.full((len(q), N + 7), 7.0)
    with emulated(module):
        if kernel == "many":
            many.fp8_grouped_matmul_many(q, scales, w, ws, offsets, y[:, :N])
        else:
            few.fp8_grouped_matmul_few(q, scales, w, ws, offsets, y[:, :N], kernel)
    rows = sum(sizes)
    want = fp8_grouped_matmul_reference(q, scales, w, ws, offsets, None, torch.float64)[:rows]
    exact = fp8_grouped_matmul_reference(*(t.abs() if t.dtype == torch.float32 else t.float().abs().to(t.dtype) for t in (q, scales, w, ws)), offsets,
                                         None, torch.float64)[:rows]  # fmt: skip
    assert ((y[:rows, :N].double() - want).abs() <= 2.0**-20 * exact).all()
    assert (y[rows:] == 7).all() and (y[:, N:] == 7).all()


@pytest.mark.parametrize("sizes, N, K", [([128, 0, 256], 144, 96), ([0, 384], 130, 260)])
def test_the_weight_gradient_is_near_the_reference(sizes, N, K, poisoned, generator):
    T = sum(sizes) + 128
    dy, x = (fp8_quantize(numbers(T, n, generator), block=(128, 1)) for n in (N, K))
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    with emulated(wgrad):
        got = wgrad.fp8_grouped_wgrad_hopper(dy.q, dy.scales, x.q, x.scales, offsets, len(sizes), torch.float32)
    call = offsets, len(sizes), torch.float64
    want = fp8_grouped_wgrad_reference(dy.q, dy.scales, x.q, x.scales, *call)
    absolute = [t.float().abs().to(t.dtype) for t in (dy.q, dy.scales, x.q, x.scales)]
    assert ((got.double() - want).abs() <= 2.0**-20 * fp8_grouped_wgrad_reference(*absolute, *call)).all()
