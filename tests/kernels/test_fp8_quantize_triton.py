"""fp8_quantize in Triton: the bits of the reference, which test_fp8_quantize.py holds against the table of e4m3's numbers."""

import math

import pytest
import torch

from athanor.kernels import fp8_quantize, fp8_quantize_dual
from athanor.kernels.fp8_quantize import BLOCKS

pytest.importorskip("triton")
from athanor.kernels import fp8_quantize_triton as module  # noqa: E402

BF16 = torch.bfloat16
# one number; whole tiles; one more than a tile each way; odd; nothing
SIZES = [(1, 1), (128, 256), (129, 129), (37, 300), (0, 64), (5, 0)]


def numbers(R, C, generator, dtype=torch.float32):
    """Rows and columns of different sizes; 0, -0, 448, denormals of e4m3, ties; a NaN and an infinity in blocks of their own, if there is room."""
    x = torch.randn(R, C, generator=generator) * torch.exp(2 * torch.randn(R, 1, generator=generator) + torch.randn(1, C, generator=generator))
    special = torch.tensor([0.0, -0.0, 448.0, -448.0, 2.0**-9, 1.5 * 2.0**-9, 2.0**-10, 17.0, 19.0])
    x.view(-1)[: min(x.numel(), len(special))] = special[: x.numel()]
    if R > 20 and C > 200:
        x[20, 7], x[R - 1, C - 1], x[19] = math.nan, math.inf, 0.0
    return x.to(dtype)


def same(got, want):
    """Equal bits; one NaN is as good as another."""
    a, b = got.q.cpu().view(torch.uint8), want.q.view(torch.uint8)
    assert got.q.shape == want.q.shape and got.scales.shape == want.scales.shape and got.q.stride() == want.q.stride()
    assert torch.equal(torch.where(a & 0x7F == 0x7F, 0x7F, a), torch.where(b & 0x7F == 0x7F, 0x7F, b))
    assert torch.equal(got.scales.cpu().isnan(), want.scales.isnan()) and torch.equal(got.scales.cpu().nan_to_num(), want.scales.nan_to_num())


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("R, C", SIZES)
def test_gives_the_bits_of_the_reference(R, C, dtype, power_of_two, triton_device, poisoned, generator):
    x = numbers(R, C, generator, dtype)
    for block in BLOCKS:
        want = fp8_quantize(x, block=block, power_of_two=power_of_two, backend="reference")
        same(fp8_quantize(x.to(triton_device), block=block, power_of_two=power_of_two, backend="triton"), want)
    for block in BLOCKS[:2]:
        want = fp8_quantize_dual(x, block=block, power_of_two=power_of_two, backend="reference")
        for a, b in zip(fp8_quantize_dual(x.to(triton_device), block=block, power_of_two=power_of_two, backend="triton"), want, strict=True):
            same(a, b)


def test_weights_of_several_experts(triton_device, poisoned, generator):
    w = torch.stack([numbers(130, 150, generator) for _ in range(3)])
    got = fp8_quantize_dual(w.to(triton_device), block=(128, 128), backend="triton")
    for a, b in zip(got, fp8_quantize_dual(w, block=(128, 128), backend="reference"), strict=True):
        same(a, b)


def test_what_lies_around_has_no_influence(triton_device, padded, generator):
    x = numbers(19, 300, generator)
    same(fp8_quantize(padded(x).to(triton_device), backend="triton"), fp8_quantize(x))
    wide = torch.full((40, 310), math.nan)
    wide[:19, 3:303] = x
    same(fp8_quantize(wide.to(triton_device)[:19, 3:303], backend="triton"), fp8_quantize(x))
    same(fp8_quantize(x.T.contiguous().to(triton_device).T, backend="triton"), fp8_quantize(x))


def test_every_rounding_of_the_cast(triton_device):
    """All of e4m3's numbers, the middles between neighbours, and the fp32 numbers next to those; as one block whose scale is 1."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(1e9))])
    x = torch.cat([x, -x, torch.zeros(-2 * len(x) % 127)]).view(-1, 127)
    x = torch.cat([torch.full((len(x), 1), 448.0), x], 1)
    got = fp8_quantize(x.to(triton_device), backend="triton")
    assert (got.scales == 1).all()
    same(got, fp8_quantize(x))


def test_neither_lengths_nor_addresses_compile_anew(launches):
    flat = torch.zeros(400 * 256)
    for R in range(1, 60):
        module.fp8_quantize_triton(flat[: 256 * R].view(R, 256), ((1, 128),), True)
    assert len(launches.keys) == 1
    for R in range(1, 60):
        module.fp8_quantize_triton(flat[: 256 * R].view(R, 256), ((1, 128), (128, 1)), True)
    assert len(launches.keys) <= 3, launches.keys  # a column's stride is a multiple of 16, or 16


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("R, C", [(1, 2), (130, 130), (4097, 2048)])
def test_both_layouts_of_bf16_in_words(R, C, power_of_two, poisoned, generator):
    """On Hopper and later another kernel makes them; with an odd number of columns, or rows that begin amid a word, it is the one for all."""
    x = numbers(R, C + 1, generator, BF16)
    for part in (x[:, :C].contiguous(), x[:, :C], x):
        want = fp8_quantize_dual(part, power_of_two=power_of_two, backend="reference")
        for a, b in zip(fp8_quantize_dual(part.cuda(), power_of_two=power_of_two, backend="triton"), want, strict=True):
            same(a, b)


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    R, C = 300032, 7168  # 2.15e9
    x = torch.randn(R, C, device="cuda", dtype=BF16)
    rows, columns = fp8_quantize_dual(x, backend="triton")
    for part in (slice(0, 128), slice(R - 128, R)):
        want = fp8_quantize_dual(x[part].cpu())
        assert torch.equal(rows.q[part].cpu().view(torch.uint8), want[0].q.view(torch.uint8))
        assert torch.equal(columns.q[part].cpu().view(torch.uint8), want[1].q.view(torch.uint8))
        assert torch.equal(columns.scales[[part.start // 128]].cpu(), want[1].scales)
