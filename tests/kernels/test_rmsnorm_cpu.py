import pytest
import torch

from athanor.kernels import rmsnorm
from athanor.kernels.rmsnorm import in_rows

# a few numbers; one short of 16, 16 and one more; the default recipe's; several runs of rows for dweight, the last one short
SIZES = [(3, 5), (5, 15), (17, 16), (16, 17), (100, 96), (2100, 33)]


def plain(x, w, residual=None, eps=1e-6):
    s = x if residual is None else x + residual
    return s / (s.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


def on_cpu(*args, **kwargs):
    return rmsnorm(*args, backend="cpu", **kwargs)


def inputs(T, D, generator):
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((T, D), (T, D), (D,))]


@pytest.mark.parametrize("T, D", SIZES)
def test_errs_no_more_than_the_formula_among_poison(T, D, within_rule, poisoned, padded, generator):
    x, r, w = (padded(t) for t in inputs(T, D, generator))
    dy, ds = (padded(torch.randn(T, D, generator=generator)) for _ in range(2))
    x64, r64, w64 = (t.detach().double().requires_grad_() for t in (x, r, w))
    for residual, residual64 in ((None, None), (r, r64)):
        leaves, leaves64 = ([a, b] if residual is None else [a, b, c] for a, b, c in ((x, w, r), (x64, w64, r64)))
        out = on_cpu(x, w, residual=residual)
        y, upstream = (out, dy) if residual is None else (out, (dy, ds))
        simple, oracle = plain(x, w, residual), plain(x64, w64, residual64)
        within_rule(out if residual is None else out[0], simple, oracle, "y")
        if residual is not None:
            assert torch.equal(out[1], x + r)
            y, simple, oracle = out, (simple, x + r), (oracle, x64 + r64)
        got, want = torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(simple, leaves, upstream)
        exact = torch.autograd.grad(oracle, leaves64, upstream.double() if residual is None else [g.double() for g in upstream])
        for name, a, b, c in zip(("dx", "dweight", "dresidual"), got, want, exact, strict=False):
            within_rule(a, b, c, name)


@pytest.mark.parametrize("D", [24, 32, 97])
def test_bits_depend_on_the_row_alone_and_dweight_on_the_rows_in_order(D, with_threads, generator):
    T = 4001
    x, r, w = inputs(T, D, generator)
    dy, ds = (torch.randn(T, D, generator=generator) for _ in range(2))

    def run(rows=slice(None)):
        leaves = [t.detach()[rows].requires_grad_() for t in (x, r)]
        y, s = on_cpu(leaves[0], w, residual=leaves[1])
        return y, s, *torch.autograd.grad((y, s), (*leaves, w), (dy[rows], ds[rows]))

    first, *others = with_threads(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for rows in (slice(7, 8), slice(1000, 1033)):
        assert all(torch.equal(a[rows], b) for a, b in zip(first[:4], run(rows), strict=False))


def test_head_slices_are_read_in_place_and_any_layout_gives_the_same(generator):
    qkv = torch.randn(9, 8 * 24, generator=generator).requires_grad_()
    w = torch.randn(24, generator=generator)
    heads = qkv.view(9, 8, 24)[:, 2:5]
    assert in_rows(heads)[0] is heads
    want, dy = on_cpu(heads.contiguous(), w), torch.randn(9, 3, 24, generator=generator)
    layouts = [heads, heads.transpose(0, 1).contiguous().transpose(0, 1), heads.permute(2, 0, 1).contiguous().permute(1, 2, 0)]
    gradients = [torch.autograd.grad(on_cpu(x, w), qkv, dy, retain_graph=True)[0] for x in layouts]
    assert all(torch.equal(on_cpu(x, w), want) for x in layouts) and all(torch.equal(g, gradients[0]) for g in gradients)
    assert torch.equal(on_cpu(qkv[0, :24], w), on_cpu(qkv[:1, :24], w)[0])  # one axis
    y = on_cpu(heads, w)
    assert torch.equal(torch.autograd.grad(y.sum(), qkv, retain_graph=True)[0], torch.autograd.grad(y, qkv, torch.ones_like(y))[0])  # stride 0


def test_a_bad_row_stays_alone(generator):
    x, w = torch.randn(5, 40, generator=generator), torch.randn(40, generator=generator)
    x[1, 3], x[2, 39], x[3] = torch.nan, torch.inf, 1e25
    x.requires_grad_()
    y = on_cpu(x, w)
    dx = torch.autograd.grad(y.sum(), x)[0]
    assert y[1:3].isnan().any(1).all() and torch.isfinite(y[[0, 4]]).all() and torch.isfinite(dx[[0, 4]]).all()
    assert dx[1].isnan().all() and not y[3].any()  # a sum of squares beyond fp32: zeros, as in torch.nn.functional.rms_norm


def test_no_rows_and_a_state_that_is_used_alone(generator):
    x, w = torch.empty(0, 3, 8, requires_grad=True), torch.randn(8, generator=generator).requires_grad_()
    dx, dw = torch.autograd.grad(on_cpu(x, w).sum(), (x, w))
    assert dx.shape == x.shape and torch.equal(dw, torch.zeros(8))
    x, r, w = inputs(3, 8, generator)
    g = torch.randn(3, 8, generator=generator)
    assert all(torch.equal(d, g) for d in torch.autograd.grad(on_cpu(x, w, residual=r)[1], (x, r), g))


def test_other_dtypes_are_refused_by_name_and_left_to_the_reference():
    for dtype in (torch.float64, torch.bfloat16):
        x, w = torch.ones(2, 4, dtype=dtype), torch.ones(4, dtype=dtype)
        with pytest.raises(ValueError, match=f"rmsnorm: backend 'cpu' cannot serve this call: x is {dtype}; the C\\+\\+ kernels compute in fp32"):
            on_cpu(x, w)
        assert rmsnorm(x, w).dtype == dtype
