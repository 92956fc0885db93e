import pytest
import torch

from athanor.kernels import rmsnorm

SIZES = [(1, 96), (128, 64), (129, 97), (0, 8)]  # one row, aligned, both odd, empty


def plain(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("T, D", SIZES)
def test_matches_the_formula_in_fp64_with_gradients(T, D, close64, generator):
    x, w, dy = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((T, D), (D,), (T, D)))
    x.requires_grad_(), w.requires_grad_()
    y, expected = rmsnorm(x, w), plain(x, w)
    close64(y, expected)
    for got, want in zip(torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(expected, (x, w), dy), strict=True):
        close64(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, D", SIZES)
def test_low_precision_errs_no_more_than_the_formula(T, D, dtype, within_rule, generator):
    x, w, dy = (torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in ((T, D), (D,), (T, D)))
    y = rmsnorm(x, w)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    oracle = plain(x64, w64)
    within_rule(y, plain(x, w), oracle, "y")
    got = torch.autograd.grad(y, (x, w), dy)
    simple = torch.autograd.grad(plain(x, w), (x, w), dy)
    want = torch.autograd.grad(oracle, (x64, w64), dy.double())
    for name, a, b, c in zip(("dx", "dweight"), got, simple, want, strict=True):
        within_rule(a, b, c, name)


def test_gradient_agrees_with_finite_differences_on_three_axes(generator):
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(rmsnorm, (x, w))


def test_a_row_of_zeros_gives_zeros_and_finite_gradients():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rmsnorm(x, torch.ones(4))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4)) and torch.isfinite(x.grad).all()


def test_a_row_does_not_depend_on_the_others(generator):
    x, w = torch.randn(7, 96, generator=generator), torch.randn(96, generator=generator)
    assert torch.equal(rmsnorm(x, w)[3:4], rmsnorm(x[3:4], w))


def test_mismatched_weight_is_refused():
    with pytest.raises(ValueError, match=r"rmsnorm: weight is \(5,\), x is \(2, 4\)"):
        rmsnorm(torch.ones(2, 4), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_form_has_the_bits_of_addition_and_norm(dtype, generator):
    """The state and the output in every dtype; the gradients in fp32, where adding to the gradient of the state rounds nothing away."""
    x, r, dy, ds = (torch.randn(33, 40, generator=generator).to(dtype) for _ in range(4))
    w = torch.randn(40, generator=generator).to(dtype).requires_grad_()
    leaves = [t.clone().requires_grad_() for t in (x, r)]
    y, s = rmsnorm(leaves[0], w, residual=leaves[1])
    apart = [t.clone().requires_grad_() for t in (x, r)]
    total = apart[0] + apart[1]
    assert torch.equal(s, total) and torch.equal(y, rmsnorm(total, w))
    got, want = torch.autograd.grad((y, s), (*leaves, w), (dy, ds)), torch.autograd.grad((rmsnorm(total, w), total), (*apart, w), (dy, ds))
    same = [torch.equal(a, b) for a, b in zip(got, want, strict=True)]
    assert all(same) if dtype == torch.float32 else same[2] and torch.allclose(got[0], want[0], rtol=2**-6, atol=1e-2)


def test_the_residual_form_agrees_with_finite_differences_and_passes_on_a_state_that_is_used_alone(generator):
    x, r = (torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    w = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, r: rmsnorm(x, w, residual=r), (x, w, r))
    y, s = rmsnorm(x, w, residual=r)
    assert all(torch.equal(g, torch.ones_like(x)) for g in torch.autograd.grad(s.sum(), (x, r), retain_graph=True))
    want = torch.autograd.grad(plain(x + r, w).sum(), (x, r, w))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(torch.autograd.grad(y.sum(), (x, r, w)), want, strict=True))


def test_a_residual_of_another_shape_or_dtype_is_refused():
    with pytest.raises(ValueError, match=r"rmsnorm: residual is \(1, 4\) torch.float32; wanted that of x, \(2, 4\)"):
        rmsnorm(torch.ones(2, 4), torch.ones(4), residual=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"rmsnorm: residual is \(2, 4\) torch.bfloat16"):
        rmsnorm(torch.ones(2, 4), torch.ones(4), residual=torch.ones(2, 4).bfloat16())
