"""The FP8 layer's reference: which operands are quantised how, for y, dx and dw; against products of the dequantised operands."""

import pytest
import torch

from athanor.kernels import Quantized, fp8_grouped_gemm, fp8_grouped_matmul, fp8_grouped_wgrad, fp8_quantize, fp8_quantize_dual, grouped_gemm
from athanor.kernels.fp8_quantize import dequantize


def inputs(sizes, outside, N, K, generator, dtype=torch.float32):
    """Rows, columns and blocks of 128 of different size."""
    sized = lambda *shape: torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))  # noqa: E731
    T = sum(sizes) + outside
    blocks = torch.exp(torch.randn(-(-K // 128), generator=generator)).repeat_interleave(128)[:K]
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return (sized(T, K) * blocks).to(dtype), (sized(len(sizes), N, K) / K**0.5).to(dtype), sized(T, N).to(dtype), offsets


def layer(x, w, dy, offsets, function=fp8_grouped_gemm, **options):
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = function(x, w, offsets, **options)
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]


def rounded(x, block):
    return dequantize(fp8_quantize(x, block=block), block, torch.float64)


@pytest.mark.parametrize("sizes, outside, N, K", [([5, 0, 130], 3, 150, 260), ([0, 7], 0, 16, 128), ([0, 0], 2, 16, 16)])
def test_products_are_of_the_quantised_operands(sizes, outside, N, K, generator):
    x, w, dy, offsets = inputs(sizes, outside, N, K, generator)
    y, dx, dw = layer(x, w, dy, offsets)
    a, d, b = rounded(x, (1, 128)), rounded(dy, (1, 128)), torch.stack([rounded(t, (128, 128)) for t in w])
    wanted = [grouped_gemm(a, b, offsets), grouped_gemm(d, b.mT, offsets)]
    for got, want in zip((y, dx), wanted, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(dw, layer(x, w, dy, offsets, grouped_gemm)[2])


def test_weight_gradient_in_fp8_is_of_operands_quantised_along_tokens(generator):
    x, w, dy, offsets = inputs([128, 0, 256], 128, 150, 260, generator)
    y, dx, dw = layer(x, w, dy, offsets, wgrad="fp8")
    a, d = rounded(x, (128, 1)), rounded(dy, (128, 1))
    want = torch.stack([d[i:j].T @ a[i:j] for i, j in ((0, 128), (128, 128), (128, 384))])
    assert (dw - want).abs().max() <= 1e-5 * want.abs().max() and not dw[1].any()
    other = layer(x, w, dy, offsets)
    assert torch.equal(y, other[0]) and torch.equal(dx, other[1])


def decibels(got, want):
    return 10 * torch.log10(want.double().square().sum() / (got.double() - want.double()).square().sum())


@pytest.mark.parametrize("wgrad, at_least", [("bf16", 40), ("fp8", 26)])
def test_what_is_lost_to_fp8(wgrad, at_least, generator):
    x, w, dy, offsets = inputs([128, 0, 256], 0, 150, 260, generator, torch.bfloat16)
    got, want = layer(x, w, dy, offsets, wgrad=wgrad), layer(x.double(), w.double(), dy.double(), offsets, grouped_gemm)
    assert got[0].dtype == got[1].dtype == got[2].dtype == torch.bfloat16
    assert [decibels(a, b) >= limit for a, b, limit in zip(got, want, (28, 28, at_least), strict=True)] == [True] * 3


def test_a_weight_quantised_before_gives_equal_bits(generator):
    x, w, dy, offsets = inputs([5, 0, 130], 3, 150, 260, generator)
    kept = layer(x, w, dy, offsets, weight=fp8_quantize_dual(w, block=(128, 128)))
    assert all(torch.equal(a, b) for a, b in zip(kept, layer(x, w, dy, offsets), strict=True))


def test_one_operand_may_need_no_gradient(generator):
    x, w, dy, offsets = inputs([128, 128], 0, 16, 32, generator)
    for wgrad in ("bf16", "fp8"):
        _, dx, dw = layer(x, w, dy, offsets, wgrad=wgrad)
        leaf = x.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(fp8_grouped_gemm(leaf, w, offsets, wgrad=wgrad), leaf, dy)[0], dx)
        leaf = w.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(fp8_grouped_gemm(x, leaf, offsets, wgrad=wgrad), leaf, dy)[0], dw)


def test_mismatches_are_refused(generator):
    x, w, _, offsets = inputs([2, 3], 0, 16, 32, generator)
    a, b = fp8_quantize(x), fp8_quantize_dual(w, block=(128, 128))[0]
    with pytest.raises(ValueError, match=r"fp8_grouped_gemm: w is torch.float64, x is torch.float32"):
        fp8_grouped_gemm(x, w.double(), offsets)
    with pytest.raises(ValueError, match="fp8_grouped_gemm: wgrad is 'int4'; wanted one of"):
        fp8_grouped_gemm(x, w, offsets, wgrad="int4")
    with pytest.raises(ValueError, match=r"fp8_grouped_gemm: weight is \[\(2, 32, 16\)"):
        fp8_grouped_gemm(x, w, offsets, weight=fp8_quantize_dual(w.mT, block=(128, 128)))
    with pytest.raises(ValueError, match=r"fp8_grouped_matmul: scales are \(5, 2\) torch.float32 and"):
        fp8_grouped_matmul(Quantized(a.q, a.scales.expand(-1, 2)), b, offsets)
    with pytest.raises(ValueError, match="fp8_grouped_matmul: x is torch.float32"):
        fp8_grouped_matmul(Quantized(x, a.scales), b, offsets)
    with pytest.raises(ValueError, match=r"fp8_grouped_matmul: out is \(5, 15\)"):
        fp8_grouped_matmul(a, b, offsets, out=torch.empty(5, 15))
    with pytest.raises(ValueError, match=r"fp8_grouped_wgrad: scales are \(5, 1\)"):
        fp8_grouped_wgrad(a, a, offsets, 2)
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call: tensors are on cpu"):
        fp8_grouped_matmul(a, b, offsets, backend="cuda")
