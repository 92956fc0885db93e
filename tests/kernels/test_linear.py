import pytest
import torch

from athanor.kernels import is_strict, linear, strict_mode

SIZES = [(1, 3, 7), (64, 32, 48), (37, 19, 5), (0, 4, 3), (3, 0, 2)]  # one row, aligned, odd, no rows, nothing to sum


def inputs(T, K, N, generator, dtype=torch.float64):
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in ((T, K), (N, K), (N,))]


def by_columns(x, weight, bias):
    """One output at a time, as sums of products."""
    columns = [(x * w).sum(1) + (0 if bias is None else bias[n]) for n, w in enumerate(weight)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("T, K, N", SIZES)
def test_matches_the_sums_in_fp64_with_gradients(T, K, N, with_bias, close64, generator):
    leaves = inputs(T, K, N, generator)[: 2 + with_bias]
    y, want = linear(*leaves), by_columns(*leaves, *[None] * (not with_bias))
    close64(y, want)
    dy = torch.randn(T, N, dtype=torch.float64, generator=generator)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        close64(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_the_sums(dtype, within_rule, generator):
    leaves = inputs(37, 190, 21, generator, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got, plain, oracle = linear(*leaves), by_columns(*leaves), by_columns(*wide)
    within_rule(got, plain, oracle)
    dy = torch.randn(37, 21, generator=generator).to(dtype)
    grads = (torch.autograd.grad(y, x, dy.to(y.dtype)) for y, x in ((got, leaves), (plain, leaves), (oracle, wide)))
    for a, b, c in zip(*grads, strict=True):
        within_rule(a, b, c)


def test_strict_mode_changes_nothing_on_cpu(generator):
    x, weight, bias = (t.detach() for t in inputs(5, 8, 3, generator, torch.float32))
    want = linear(x, weight, bias)
    with strict_mode():
        assert is_strict() and torch.equal(linear(x, weight, bias), want)
        assert torch.equal(linear(x, weight, bias, backend="cpu"), want)
        assert torch.allclose(linear(x, weight, bias, backend="reference"), want)
        with strict_mode(False):
            assert not is_strict()
    assert not is_strict()


def test_mismatches_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"linear: weight is \(4, 2\) torch.float32, x is \(2, 3\) torch.float32; wanted"):
        linear(x, torch.ones(4, 2))
    with pytest.raises(ValueError, match="weight is .* torch.float64, x is .* torch.float32"):
        linear(x, torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"linear: bias is \(3, torch.float32\); wanted \(4,\) torch.float32"):
        linear(x, torch.ones(4, 3), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_logits_of_low_precision_are_not_rounded(dtype, generator):
    x, weight = (torch.randn(n, 33, generator=generator).to(dtype) for n in (7, 19))
    y, oracle = linear(x, weight, out_dtype=torch.float32), x.double() @ weight.double().T
    assert y.dtype == torch.float32 and (y.double() - oracle).abs().max() < 1e-5 * oracle.abs().max()
    with pytest.raises(ValueError, match="out_dtype is torch.float64"):
        linear(x, weight, out_dtype=torch.float64)
