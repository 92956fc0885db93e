"""moe_route in Triton against the reference: the same choices, ties and replays included, weights and gradients within the rule."""

import pytest
import torch

from athanor.kernels import moe_route

pytest.importorskip("triton")
from athanor.kernels import moe_route_triton as module  # noqa: E402

# T around a tile's rows; E a power of two, odd, more than a tile's smallest width; k = E
CASES = [
    (1, 6, 2, {}),
    (70, 16, 3, {"normalize": False, "scale": 2.0}),
    (35, 24, 4, {"scoring": "sigmoid", "groups": (4, 2), "scale": 2.5, "bias": True}),
    (5, 12, 4, {"scoring": "sigmoid", "groups": (3, 2), "normalize": False, "bias": True}),
    (9, 200, 8, {"scoring": "sigmoid", "groups": (8, 4), "bias": True}),
    (20, 5, 5, {"scoring": "sigmoid"}),
    (3, 1, 1, {}),
    (0, 8, 2, {}),
]


def inputs(T, E, k, options, generator, dtype=torch.float32):
    logits = torch.randn(T, E, generator=generator).to(dtype)
    options = {**options, "bias": torch.randn(E, generator=generator)} if options.get("bias") else dict(options)
    return logits, torch.randn(T, k, generator=generator), options


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def routed(logits, dweights, k, options, backend=None):
    logits = logits.detach().requires_grad_()
    routing = moe_route(logits, k, backend=backend, **options)
    (dlogits,) = torch.autograd.grad(routing.weights, logits, dweights)
    return [x.detach().cpu() for x in (*routing, dlogits)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("T, E, k, options", CASES)
def test_chooses_and_weighs_as_the_reference(T, E, k, options, replayed, dtype, triton_device, within_rule, poisoned, padded, generator):
    logits, dweights, options = inputs(T, E, k, options, generator, dtype)
    if replayed:
        order = torch.rand(T, E, generator=generator).argsort(1)[:, :k].to(torch.int32)
        order[1::3] = -1
        options["replay"] = order
    plain, oracle = routed(logits, dweights, k, options), routed(logits.double(), dweights.double(), k, options)
    got = routed(padded(logits).to(triton_device), dweights.to(triton_device), k, on(triton_device, options), "triton")
    assert torch.equal(got[0], plain[0]) and torch.equal(got[2], plain[2]) and got[3] == plain[3]
    assert torch.equal(got[0], oracle[0])  # no choice hangs on a rounding here
    within_rule(got[1], plain[1], oracle[1], "weights")
    within_rule(got[4], plain[4], oracle[4], "dlogits")


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ties_broken_rows_and_extremes_are_the_references(scoring, triton_device, poisoned):
    logits = torch.zeros(8, 12)
    logits[1, 5], logits[2, 3], logits[3, 7] = torch.nan, torch.inf, -torch.inf
    logits[4] = torch.tensor([1.0, 3.0] * 6)
    logits[5] = torch.linspace(-300, 0, 12)
    logits[6] = -torch.inf
    for k in (1, 4):
        a, b = moe_route(logits, k, scoring=scoring), moe_route(logits.to(triton_device), k, scoring=scoring, backend="triton")
        assert torch.equal(a.ids, b.ids.cpu()) and torch.equal(a.counts, b.counts.cpu())
        torch.testing.assert_close(b.weights.cpu(), a.weights, equal_nan=True, rtol=1e-6, atol=0)


def test_groups_tie_to_the_lowest_too(triton_device):
    logits = torch.zeros(3, 16)
    logits[1, 9], logits[2, 2] = 1.0, 1.0
    for top in (1, 2):
        options = dict(scoring="sigmoid", groups=(4, top))
        a, b = moe_route(logits, 3, **options), moe_route(logits.to(triton_device), 3, backend="triton", **options)
        assert torch.equal(a.ids, b.ids.cpu())


def test_neither_tokens_nor_addresses_compile_anew(launches):
    flat, replay = torch.zeros(60 * 32), torch.zeros(70 * 4, dtype=torch.int32)
    for T in range(1, 51):
        logits = flat[32 * (T % 4) :][: 32 * T].view(T, 32).requires_grad_()
        weights = module.moe_route_triton(logits, 4, "softmax", None, (1, 1), True, 0.1 * T, replay[T % 9 :][: 4 * T].view(T, 4))[1]
        weights.backward(flat[T % 7 :][: 4 * T].view(T, 4))
    assert sorted(name for name, *_ in launches.keys) == ["moe_count_kernel", "moe_route_bwd_kernel", "moe_route_fwd_kernel"], launches.keys


@pytest.mark.gpu
def test_many_tokens_twice_give_the_same_bits_and_never_wait_for_the_device(generator):
    logits, dweights, options = inputs(16384, 256, 8, CASES[4][3], generator)
    logits, dweights, options = logits.cuda(), dweights.cuda(), on("cuda", options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = moe_route(logits, 8, backend="triton", **options)
        second = moe_route(logits, 8, backend="triton", **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and first.counts.sum() == 16384 * 8
    assert (first.ids == moe_route(logits, 8, backend="reference", **options).ids).float().mean() > 0.999  # sigmoids differ by an ulp
