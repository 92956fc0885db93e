import pytest
import torch

from athanor.kernels import swiglu
from athanor.kernels.swiglu import PARALLEL_GRAIN, whole_row_shares

SIZES = [(1, 3), (128, 64), (129, 257), (0, 4)]  # one row, aligned, both odd, empty


def plain(gate_up):
    F = gate_up.shape[1] // 2
    gate, up = gate_up[:, :F], gate_up[:, F:]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("T, F", SIZES)
def test_matches_the_formula_in_fp64_with_gradients(T, F, close64, generator):
    x = (3 * torch.randn(T, 2 * F, dtype=torch.float64, generator=generator)).requires_grad_()
    dy = torch.randn(T, F, dtype=torch.float64, generator=generator)
    close64(swiglu(x), plain(x))
    close64(torch.autograd.grad(swiglu(x), x, dy)[0], torch.autograd.grad(plain(x), x, dy)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, F", SIZES)
def test_low_precision_errs_no_more_than_the_formula(T, F, dtype, within_rule, generator):
    x = (3 * torch.randn(T, 2 * F, generator=generator)).to(dtype).requires_grad_()
    dy = torch.randn(T, F, generator=generator).to(dtype)
    x64 = x.detach().double().requires_grad_()
    within_rule(swiglu(x), plain(x), plain(x64))
    want = torch.autograd.grad(plain(x64), x64, dy.double())[0]
    within_rule(torch.autograd.grad(swiglu(x), x, dy)[0], torch.autograd.grad(plain(x), x, dy)[0], want, "gradient")


def test_extreme_gates_stay_finite():
    x = torch.tensor([[-1e4, 1e4, -88.0, 2.0, 3.0, 4.0]], requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    assert torch.equal(y[0, :2], torch.tensor([-0.0, 3e4])) and torch.isfinite(y).all() and torch.isfinite(x.grad).all()


def test_strided_input_gives_the_same(generator):
    x = torch.randn(6, 16, generator=generator)
    assert torch.equal(swiglu(x[::2, :8]), swiglu(x[::2, :8].contiguous()))


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"swiglu: gate_up is \(2, 5\)"):
        swiglu(torch.ones(2, 5))


@pytest.mark.parametrize("width", [48, 96])  # no multiple of 32: half of an odd number of rows ends inside a vector of 16
def test_the_bits_of_a_row_do_not_depend_on_the_other_rows_or_on_the_threads(width, generator):
    x = torch.randn(5001, 2 * width, generator=generator)
    alone = torch.cat([swiglu(part) for part in x.split(100)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(swiglu(x), alone)
            for rows in (1, 682, 1001, 3319, 5001):
                shares = whole_row_shares(x[:rows])
                assert sum(shares) == rows and all(n % min(threads, -(-n * 2 * width // PARALLEL_GRAIN)) == 0 for n in shares)
    finally:
        torch.set_num_threads(before)
