"""Block-scaled FP8 against the table of e4m3's numbers, one number at a time."""

import math

import pytest
import torch

from athanor.kernels import fp8_quantize, fp8_quantize_dual
from athanor.kernels.fp8_quantize import BLOCKS, Quantized, dequantize

inf, nan = math.inf, math.nan


def value_of(code):
    """OCP 8-bit floating point, section 5.1: one sign, four exponent bits with bias 7, three mantissa bits; 0x7f is NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


VALUES = [value_of(code) for code in range(0x7F)]


def nearest_code(x):
    """Of the two neighbours the nearer, of two equally near the even one."""
    size = min(abs(x), 448.0)
    return min(range(0x7F), key=lambda code: (abs(VALUES[code] - size), code & 1)) | (0x80 if math.copysign(1, x) < 0 else 0)


def scale_and_factor(numbers, power_of_two):
    """Of one block, in fp32 arithmetic."""
    f32 = lambda x: torch.tensor(x, dtype=torch.float64).float().item()  # noqa: E731
    amax = max(max((abs(x) for x in numbers), default=0.0), 448 * 2.0**-126)
    scale, factor = f32(amax / 448), f32(448 / amax)
    if power_of_two:
        mantissa, exponent = math.frexp(amax / 448)
        scale = 2.0 ** (exponent - (mantissa == 0.5))
        factor = 1 / scale
    return scale, factor


def wanted(x, block, power_of_two):
    (R, C), (br, bc) = x.shape, block
    codes, scales = torch.zeros(R, C, dtype=torch.uint8), torch.zeros(-(-R // br), -(-C // bc))
    for i, rows in enumerate(range(0, R, br)):
        for j, columns in enumerate(range(0, C, bc)):
            part = x[rows : rows + br, columns : columns + bc]
            scale, factor = scale_and_factor(part.flatten().tolist(), power_of_two)
            scales[i, j] = scale
            product = part.float() * factor
            codes[rows : rows + br, columns : columns + bc] = torch.tensor([[nearest_code(v) for v in row] for row in product.tolist()])
    return codes, scales


def numbers(R, C, generator, dtype=torch.float32):
    """Rows and columns of different size, and what is special: 0, -0, 448, denormals of e4m3 and of fp32, ties."""
    x = torch.randn(R, C, generator=generator) * torch.exp(2 * torch.randn(R, 1, generator=generator) + torch.randn(1, C, generator=generator))
    special = torch.tensor([0.0, -0.0, 448.0, -448.0, 2.0**-9, 1.5 * 2.0**-9, 2.0**-10, 1e-40, 17.0, 19.0])
    x.view(-1)[: min(x.numel(), len(special))] = special[: x.numel()]
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block, R, C", [((1, 128), 3, 300), ((128, 128), 130, 140), ((128, 1), 140, 5), ((1, 128), 1, 1), ((1, 128), 0, 64)])
def test_each_number_goes_to_the_nearest(block, R, C, dtype, power_of_two, generator):
    x = numbers(R, C, generator, dtype)
    q, scales = fp8_quantize(x, block=block, power_of_two=power_of_two)
    codes, want = wanted(x, block, power_of_two)
    assert q.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert torch.equal(q.view(torch.uint8), codes) and torch.equal(scales, want)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_dequantised_numbers_are_near(power_of_two, generator):
    x = numbers(200, 300, generator)
    for block in BLOCKS:
        quantized = fp8_quantize(x, block=block, power_of_two=power_of_two)
        back, step = dequantize(quantized, block, torch.float64), dequantize(Quantized(torch.ones_like(quantized.q), quantized.scales), block)
        # half of the last of four significant bits, or half of the smallest step
        assert ((back - x).abs() <= torch.maximum(x.abs() * 2.0**-4 * (1 + 1e-6), step * 2.0**-10)).all()


def test_a_block_of_zeros_is_zeros():
    for block in BLOCKS:
        q, scales = fp8_quantize(torch.zeros(130, 130), block=block)
        assert not q.view(torch.uint8).any() and (scales > 0).all() and scales.isfinite().all()


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_bad_number_poisons_its_block_alone(bad, generator):
    x = numbers(140, 260, generator)
    clean = x.clone()
    x[3, 200] = bad
    for block, where in [((1, 128), (slice(3, 4), slice(128, 256))), ((128, 128), (slice(0, 128), slice(128, 256))),
                         ((128, 1), (slice(0, 128), slice(200, 201)))]:  # fmt: skip
        for power_of_two in (True, False):
            back = dequantize(fp8_quantize(x, block=block, power_of_two=power_of_two), block)
            want = dequantize(fp8_quantize(clean, block=block, power_of_two=power_of_two), block)
            want[where] = nan
            assert torch.equal(back.isnan(), want.isnan()) and torch.equal(back.nan_to_num(), want.nan_to_num())


def test_powers_of_two_scale_exactly(generator):
    x = numbers(40, 256, generator, torch.bfloat16)
    a, b = fp8_quantize(x), fp8_quantize(x * 4)
    large = a.scales > 2.0**-100
    assert torch.equal((a.scales * 4)[large], b.scales[large]) and large.any()
    assert torch.equal(a.scales, a.scales.log2().round().exp2())
    again = fp8_quantize(dequantize(a, (1, 128)))
    assert torch.equal(dequantize(again, (1, 128)), dequantize(a, (1, 128)))


@pytest.mark.parametrize("power_of_two", [True, False])
def test_both_layouts_are_those_of_one_at_a_time(power_of_two, generator):
    x = numbers(150, 270, generator, torch.bfloat16)
    rows, columns = fp8_quantize_dual(x, power_of_two=power_of_two)
    for got, block in ((rows, (1, 128)), (columns, (128, 1))):
        want = fp8_quantize(x, block=block, power_of_two=power_of_two)
        assert torch.equal(got.q.view(torch.uint8), want.q.view(torch.uint8)) and torch.equal(got.scales, want.scales)
    w = torch.stack([numbers(150, 270, generator) for _ in range(3)])
    first, second = fp8_quantize_dual(w, block=(128, 128), power_of_two=power_of_two)
    assert torch.equal(first.q.view(torch.uint8), second.q.view(torch.uint8)) and torch.equal(first.scales, second.scales)
    for part, third in zip(w, first.q, strict=True):
        assert torch.equal(fp8_quantize(part, block=(128, 128), power_of_two=power_of_two).q.view(torch.uint8), third.view(torch.uint8))


def test_memory_is_laid_out_as_the_products_read_it(generator):
    x = numbers(150, 272, generator)
    rows, columns = fp8_quantize_dual(x)
    assert rows.q.is_contiguous() and rows.scales.shape == (150, 3) and rows.scales.stride() == (1, 152)
    assert columns.q.stride() == (1, 160) and columns.scales.shape == (2, 272) and columns.scales.is_contiguous()
    first, second = fp8_quantize_dual(x[None].expand(2, -1, -1), block=(128, 128))
    assert first.q.is_contiguous() and second.q.mT.stride() == (272 * 160, 160, 1) and first.scales.shape == (2, 2, 3)


def test_mismatches_are_refused():
    with pytest.raises(ValueError, match=r"fp8_quantize: block is \(2, 2\); wanted one of"):
        fp8_quantize(torch.ones(2, 3), block=(2, 2))
    with pytest.raises(ValueError, match=r"fp8_quantize: x is \(1, 2, 3\); wanted"):
        fp8_quantize(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="fp8_quantize: x is torch.float64"):
        fp8_quantize(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"fp8_quantize_dual: block is \(128, 1\)"):
        fp8_quantize_dual(torch.ones(2, 3), block=(128, 1))
