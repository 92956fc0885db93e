"""What the producers quantise is what the operation gives, and the layer of experts made of them is the one made of separate operations."""

import math

import pytest
import torch

from athanor.kernels import (
    fp8_grouped_gemm,
    fp8_mixture,
    fp8_permute,
    fp8_quantize,
    fp8_quantize_dual,
    fp8_rmsnorm,
    fp8_swiglu,
    fp8_swiglu_backward,
    moe_permute,
    moe_places,
    moe_unpermute,
    rmsnorm,
    swiglu,
)


def same(produced, y, columns, wide):
    """Equal bits to what quantising y gives; NaN is NaN."""
    wanted = [fp8_quantize(y, block=(1, 128)), fp8_quantize(y, block=(128, 1))]
    for got, want in zip((produced.rows, produced.columns)[: 1 + columns], wanted, strict=False):
        assert torch.equal(got.q.float().nan_to_num(nan=999), want.q.float().nan_to_num(nan=999)) and got.q.stride() == want.q.stride()
        assert torch.equal(got.scales.nan_to_num(nan=999), want.scales.nan_to_num(nan=999)) and got.scales.stride() == want.scales.stride()
    assert (produced.columns is not None) == columns and (produced.wide is not None) == wide
    assert not wide or torch.equal(produced.wide.nan_to_num(nan=999), y.nan_to_num(nan=999))


def numbers(generator, *shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=generator) * torch.exp(2 * torch.randn(shape[0], 1, generator=generator))
    x[1::7] = 0
    x[2 % len(x), 3 % shape[1]] = math.nan
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns, wide", [(False, False), (True, False), (False, True)])
def test_a_producer_quantises_what_its_operation_gives(columns, wide, dtype, generator):
    T, F, k, E = 37, 150, 2, 4
    gate_up, dy = numbers(generator, T, 2 * F, dtype=dtype), numbers(generator, T, F, dtype=dtype)
    leaf, asked = gate_up.clone().requires_grad_(), dict(columns=columns, wide=wide)
    same(fp8_swiglu(gate_up, **asked), swiglu(gate_up), columns, wide)
    same(fp8_swiglu_backward(gate_up, dy, **asked), torch.autograd.grad(swiglu(leaf), leaf, dy)[0], columns, wide)
    ids = torch.randint(-1, E, (T, k), generator=generator, dtype=torch.int32)
    x, dout, weights = numbers(generator, T, 200, dtype=dtype), numbers(generator, T, 200, dtype=dtype), torch.rand(T, k, generator=generator)
    rows, places = moe_permute(x, ids, E, align=16)
    same(fp8_permute(x, places, **asked), rows, columns, wide)
    y = torch.randn(rows.shape, generator=generator).to(dtype).requires_grad_()
    same(fp8_permute(dout, places, weights=weights, **asked), torch.autograd.grad(moe_unpermute(y, weights, places), y, dout)[0], columns, wide)
    if not columns:
        w, residual = numbers(generator, 1, 200, dtype=dtype)[0].nan_to_num(1), numbers(generator, T, 200, dtype=dtype)
        same(fp8_rmsnorm(x, w, wide=wide), rmsnorm(x, w), False, wide)
        produced, s = fp8_rmsnorm(x, w, residual=residual, wide=wide)
        y, want = rmsnorm(x, w, residual=residual)
        same(produced, y, False, wide)
        assert torch.equal(s.nan_to_num(nan=999), want.nan_to_num(nan=999))


@pytest.mark.parametrize("wgrad, dtype", [("bf16", torch.float32), ("fp8", torch.float32), ("fp8", torch.bfloat16)])
def test_the_mixture_has_the_bits_of_separate_operations(wgrad, dtype, generator):
    T, D, F, k, E = 50, 144, 72, 2, 4
    ids = torch.randint(-1, E - 1, (T, k), generator=generator, dtype=torch.int32)  # the last expert has no token
    x, dout, weights = torch.randn(T, D, generator=generator).to(dtype), torch.randn(T, D, generator=generator).to(dtype), torch.rand(T, k)
    gate_up, down = (torch.randn(E, 2 * F, D, generator=generator) / 12).to(dtype), (torch.randn(E, D, F, generator=generator) / 8).to(dtype)

    def separate(x, weights, gate_up, down):
        rows, places = moe_permute(x, ids, E, align=128)
        h = swiglu(fp8_grouped_gemm(rows, gate_up, places.offsets, wgrad=wgrad))
        return moe_unpermute(fp8_grouped_gemm(h, down, places.offsets, wgrad=wgrad), weights, places)

    def joined(x, weights, gate_up, down, copies=(None, None)):
        return fp8_mixture(x, weights, moe_places(ids, E, align=128), gate_up, down, wgrad=wgrad, copies=copies)

    def everything(function, needed=(0, 1, 2, 3)):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate((x, weights, gate_up, down))]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, [leaves[i] for i in needed], dout)]

    want = everything(separate)
    assert all(torch.equal(a, b) for a, b in zip(everything(joined), want, strict=True))
    assert not want[3][-1].any() and all(g.abs().sum() > 0 for g in want)
    copies = [fp8_quantize_dual(w, block=(128, 128)) for w in (gate_up, down)]
    assert torch.equal(everything(lambda *leaves: joined(*leaves, copies=copies))[1], want[1])
    for needed in ((0,), (1,), (2,), (3,)):  # and where one thing alone is trained
        assert torch.equal(everything(joined, needed)[1], want[1 + needed[0]])
    with torch.no_grad():
        assert torch.equal(joined(x, weights, gate_up, down), want[0])


def test_nothing_comes_of_nothing(generator):
    ids = torch.zeros(0, 2, dtype=torch.int32)
    w = torch.ones(3, 32, 16), torch.ones(3, 16, 16)
    x = torch.zeros(0, 16, requires_grad=True)
    out = fp8_mixture(x, torch.zeros(0, 2), moe_places(ids, 3, align=128), *w, wgrad="fp8")
    assert out.shape == (0, 16) and torch.autograd.grad(out.sum(), x)[0].shape == (0, 16)


def test_mismatches_are_refused(generator):
    x, places = torch.ones(4, 16), moe_places(torch.zeros(4, 2, dtype=torch.int32), 3)
    gate_up, down, weights = torch.ones(3, 32, 16), torch.ones(3, 16, 16), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"fp8_permute: x is \(3, 16\), inverse \(4, 2\)"):
        fp8_permute(x[:3], places)
    with pytest.raises(ValueError, match=r"fp8_swiglu: the input is \(4, 15\)"):
        fp8_swiglu(x[:, :15])
    with pytest.raises(ValueError, match=r"fp8_swiglu_backward: dy is \(4, 16\)"):
        fp8_swiglu_backward(x, x)
    with pytest.raises(ValueError, match=r"fp8_rmsnorm: weight is \(15,\)"):
        fp8_rmsnorm(x, torch.ones(15))
    with pytest.raises(ValueError, match=r"fp8_mixture: x is \(4, 16\), gate_up \(3, 16, 16\)"):
        fp8_mixture(x, weights, places, down, down)
    with pytest.raises(ValueError, match="wgrad is 'int4'"):
        fp8_mixture(x, weights, places, gate_up, down, wgrad="int4")
    with pytest.raises(ValueError, match=r"the copy of down is \[\(3, 32, 16\)"):
        fp8_mixture(x, weights, places, gate_up, down, copies=(None, fp8_quantize_dual(gate_up, block=(128, 128))))
    with pytest.raises(ValueError, match=r"fp8_mixture: weights is \(4, 1\)"):
        fp8_mixture(x, weights[:, :1], places, gate_up, down)
