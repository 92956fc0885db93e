import pytest
import torch

from athanor.kernels import linear, mlp_cpu, swiglu, use_backend
from athanor.model.layers import Linear, mlp


def parts(x, gate_up_weight, down_weight):
    return linear(swiglu(linear(x, gate_up_weight)), down_weight)


def inputs(T, D, F, generator):
    shapes = (T, D), (2 * F, D), (D, F)
    return [torch.randn(*shape, generator=generator).mul_(shape[1] ** -0.5 if shape[0] != T else 1).requires_grad_() for shape in shapes]


# less than a block, whole blocks, blocks and a rest; tails of vectors
@pytest.mark.parametrize("T, D, F", [(1, 3, 5), (130, 17, 24), (1024, 16, 11), (1300, 24, 40)])
def test_has_the_bits_of_its_parts(T, D, F, with_threads, generator):
    leaves = inputs(T, D, F, generator)
    dy = torch.randn(T, D, generator=generator)
    want = parts(*leaves)
    gradients = torch.autograd.grad(want, leaves, dy)

    def run():
        got = mlp_cpu.mlp_cpu(*leaves)
        assert torch.equal(got, want)
        with torch.no_grad():
            assert torch.equal(mlp_cpu.mlp_cpu(*leaves), want)
        return torch.autograd.grad(got, leaves, dy)

    for got in with_threads(run):
        assert all(torch.equal(a, b) for a, b in zip(got, gradients, strict=True))


def test_errs_no_more_than_the_formula(within_rule, generator):
    leaves = inputs(700, 24, 40, generator)
    wide = [x.detach().double().requires_grad_() for x in leaves]

    def formula(x, gate_up, down):
        gate, up = (x @ gate_up.T).chunk(2, 1)
        return (gate / (1 + torch.exp(-gate)) * up) @ down.T

    dy = torch.randn(700, 24, generator=generator)
    got, plain, exact = mlp_cpu.mlp_cpu(*leaves), formula(*leaves), formula(*wide)
    within_rule(got, plain, exact)
    for a, b, c in zip(*(torch.autograd.grad(y, x, dy.to(y.dtype)) for y, x in ((got, leaves), (plain, leaves), (exact, wide))), strict=True):
        within_rule(a, b, c, "gradient")


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_go_where_they_are_asked_for(wanted, generator):
    leaves = inputs(600, 12, 9, generator)
    dy = torch.randn(600, 12, generator=generator)
    want = torch.autograd.grad(parts(*leaves), leaves[wanted], dy)[0]
    only = [x if i == wanted else x.detach() for i, x in enumerate(leaves)]
    (got,) = torch.autograd.grad(mlp_cpu.mlp_cpu(*only), only[wanted], dy)
    assert torch.equal(got, want)


def test_a_layer_takes_it_for_plain_matrices_in_fp32(monkeypatch, generator):
    """Not where a module is another one, as with adapters and tensor parallelism, or a backend is asked for."""
    seen = []
    monkeypatch.setattr("athanor.model.layers.mlp_cpu", lambda *tensors: seen.append(len(tensors[0])) or mlp_cpu.mlp_cpu(*tensors))
    up, down = Linear(12, 16, bias=False), Linear(8, 12, bias=False)
    x = torch.randn(600, 12, generator=generator)
    want = down(swiglu(up(x)))
    assert torch.equal(mlp(x, up, down), want) and seen == [600]
    assert torch.equal(mlp(x[:100], up, down), want[:100]) and seen == [600, 100]

    class Other(Linear):
        pass

    other = Other(8, 12, bias=False)
    other.weight = down.weight
    assert torch.equal(mlp(x, up, other), want)
    with use_backend("reference"):
        assert torch.allclose(mlp(x, up, down), want, atol=1e-5)
    mlp(x.double(), up.double(), down.double())
    assert seen == [600, 100]
