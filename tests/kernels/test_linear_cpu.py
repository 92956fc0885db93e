import pytest
import torch
from torch.nn.functional import linear as blas

from athanor.kernels import linear
from athanor.kernels.linear_cpu import input_gradient, product, weight_gradient

# (rows, sum over, columns): one of each, less than a vector, tiles and panels exactly, one more than these, and sums of several runs
# and of several panels
SIZES = [(1, 1, 1), (5, 3, 7), (16, 64, 48), (64, 32, 6), (65, 33, 49), (130, 17, 101), (3, 1030, 5), (1030, 7, 3), (7, 3, 1030),
         (2, 4100, 3), (4100, 3, 2), (3, 2, 4100), (200, 1100, 70), (1100, 70, 200)]


def inputs(T, K, N, generator):
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((T, K), (N, K), (N,))]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("T, K, N", SIZES)
def test_errs_no_more_than_blas_among_poison(T, K, N, with_bias, within_rule, poisoned, padded, generator):
    x, weight, bias = inputs(T, K, N, generator)
    leaves = (padded(x), padded(weight), bias)[: 2 + with_bias]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, plain, exact = linear(*leaves, backend="cpu"), blas(*leaves), blas(*wide)
    within_rule(got, plain, exact)
    dy = torch.randn(T, N, generator=generator)
    gradients = torch.autograd.grad(got, leaves, padded(dy), retain_graph=True)
    for a, b, c in zip(gradients, torch.autograd.grad(plain, leaves, dy), torch.autograd.grad(exact, wide, dy.double()), strict=True):
        within_rule(a, b, c)
    assert all(torch.equal(a, b) for a, b in zip(gradients, torch.autograd.grad(got, leaves, dy), strict=True))


def test_the_bits_of_a_row_are_its_own(with_threads, generator):
    """In any batch and at any place of it, under any number of threads."""
    x, weight, bias = (t.detach() for t in inputs(203, 530, 101, generator))

    def run():
        whole, dx = product(x, weight, bias), input_gradient(x[:, :101], weight)
        for T, start in ((1, 0), (1, 202), (2, 65), (15, 1), (17, 100), (64, 64), (130, 3)):
            here = slice(start, start + T)
            assert torch.equal(product(x[here], weight, bias), whole[here]), (T, start)
            assert torch.equal(input_gradient(x[here, :101], weight), dx[here]), (T, start)
        return whole, dx, weight_gradient(x[:, :101], x)

    first, *others = with_threads(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_bad_row_stays_alone(generator):
    x, weight, bias = (t.detach() for t in inputs(70, 20, 50, generator))
    x[65, 3], weight[49, 2] = torch.nan, torch.inf
    y = product(x, weight, bias)
    assert y[65].isnan().all() and torch.isfinite(y[:65, :49]).all() and torch.isfinite(y[66:, :49]).all()
    assert y[:65, 49].isinf().all()


def test_gradients_go_where_they_are_asked_for(generator):
    x, weight, _ = inputs(40, 12, 9, generator)
    dy, before = torch.randn(40, 9, generator=generator), torch.randn(9, 12, generator=generator)
    dx, dweight = torch.autograd.grad(linear(x, weight), (x, weight), dy)
    assert torch.equal(torch.autograd.grad(linear(x, weight.detach()), x, dy)[0], dx)
    assert torch.equal(torch.autograd.grad(linear(x.detach(), weight), weight, dy)[0], dweight)
    memory = torch.full((41, 12), torch.nan)
    assert input_gradient(dy, weight, out=memory[:40]).data_ptr() == memory.data_ptr() and torch.equal(memory[:40], dx) and memory[40].isnan().all()
    assert torch.equal(weight_gradient(dy, x, add_to=before.clone()), before + dweight)


def test_nothing_to_multiply():
    for T, K, N in ((0, 4, 3), (3, 0, 2), (3, 4, 0)):
        leaves = [torch.ones(*shape).requires_grad_() for shape in ((T, K), (N, K), (N,))]
        y = linear(*leaves, backend="cpu")
        assert y.shape == (T, N) and (y == 1).all()
        assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [x.shape for x in leaves]
