import pytest
import torch
from torch.nn import functional as F

from athanor.kernels import linear_logprob, logprob
from athanor.kernels.linear_logprob import CHUNK_LOGITS, linear_op

SIZES = [(1, 7), (128, 96), (129, 257), (0, 64)]  # one row, aligned, both odd, empty


def oracle(logits, targets, temperature):
    """Sum of exponentials by hand, in fp64, one row at a time."""
    logps, entropies = [], []
    for z, y in zip(logits / temperature, targets.tolist(), strict=True):
        e = torch.exp(z - z.max())
        p = e / e.sum()
        logps.append(torch.log(p[y]) if y >= 0 else z.sum() * 0)
        entropies.append(-(p * torch.where(p > 0, p, 1.0).log()).sum())
    empty = logits.sum(1)
    return (torch.stack(logps), torch.stack(entropies)) if logps else (empty, empty.detach())


def inputs(T, V, generator, dtype=torch.float64, D=24):
    hidden, weight = (torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in ((T, D), (V, D)))
    targets = torch.randint(0, V, (T,), generator=generator)
    if T > 2:
        targets[::5] = -100
    return hidden, weight, targets, torch.randn(T, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("T, V", SIZES)
def test_matches_the_oracle_in_fp64_with_gradients(T, V, temperature, close64, generator):
    hidden, weight, targets, g = inputs(T, V, generator)
    logits = (hidden @ weight.T).detach().requires_grad_()
    want_logps, want_entropy = oracle(logits, targets, temperature)
    dz = torch.autograd.grad(want_logps, logits, g.double())[0]
    got = logprob(logits, targets, temperature=temperature)
    close64(got.logps, want_logps)
    close64(got.entropy, want_entropy)
    close64(torch.autograd.grad(got.logps, logits, g.double())[0], dz)
    got = linear_logprob(hidden, weight, targets, temperature=temperature)
    close64(got.logps, want_logps)
    close64(got.entropy, want_entropy)
    dhidden, dweight = torch.autograd.grad(got.logps, (hidden, weight), g.double())
    close64(dhidden, dz @ weight.detach())
    close64(dweight, dz.T @ hidden.detach())


def test_chunked_path_equals_the_oracle(monkeypatch, close64, generator):
    hidden, weight, targets, g = inputs(129, 57, generator)
    monkeypatch.setitem(linear_op.backends["reference"].run.__globals__, "CHUNK_LOGITS", 57 * 10)  # 13 chunks, the last of 9 rows
    got = linear_logprob(hidden, weight, targets, temperature=0.7)
    want_logps, want_entropy = oracle(hidden @ weight.T, targets, 0.7)
    close64(got.logps, want_logps)
    close64(got.entropy, want_entropy)
    wanted = torch.autograd.grad(want_logps, (hidden, weight), g.double())
    for a, b in zip(torch.autograd.grad(got.logps, (hidden, weight), g.double()), wanted, strict=True):
        close64(a, b)
    assert CHUNK_LOGITS > 12000 * 100  # the default recipe stays in one chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, V", SIZES)
def test_low_precision_is_accumulated_in_fp32(T, V, dtype, within_rule, generator):
    hidden, weight, targets, g = inputs(T, V, generator, dtype)
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want, want_entropy = oracle(x @ w.T, targets, 1.0)
    # the rival computes in fp32 from the same bf16 numbers: rounding the logits to bf16 would be off by 0.06
    x32, w32 = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    rival = -F.cross_entropy(x32 @ w32.T, targets, reduction="none")
    got = linear_logprob(hidden, weight, targets)
    assert got.logps.dtype == got.entropy.dtype == torch.float32
    within_rule(got.logps, rival, want)
    p = (x32 @ w32.T).softmax(-1)
    within_rule(got.entropy, -(p * p.log()).sum(-1), want_entropy, "entropy")
    grads = torch.autograd.grad(got.logps, (hidden, weight), g)
    for a, b, c in zip(grads, torch.autograd.grad(rival, (x32, w32), g), torch.autograd.grad(want, (x, w), g.double()), strict=True):
        within_rule(a, b.to(dtype), c, "gradient")


def test_skipped_targets_have_zero_gradient(generator):
    hidden, weight, _, _ = inputs(4, 9, generator)
    targets = torch.tensor([-100, 3, -100, 5])
    logps = linear_logprob(hidden, weight, targets).logps
    dhidden = torch.autograd.grad(logps.sum(), hidden)[0]
    assert torch.equal(logps[::2], torch.zeros(2).double()) and not dhidden[::2].any() and dhidden[1::2].all()


def test_extreme_logits():
    inf = torch.inf
    logits = torch.tensor([[-1e5, -1e5, -1e5, -1e5], [1e5, 0, 0, 0], [-inf, 0, -inf, 0], [-inf, 3, -inf, -inf]], requires_grad=True)
    out = logprob(logits, torch.tensor([0, 0, 1, 1]))
    log = torch.log(torch.tensor([4.0, 1, 2, 1]))
    assert torch.allclose(out.logps, -log) and torch.allclose(out.entropy, log)
    out.logps.sum().backward()
    assert torch.isfinite(logits.grad).all() and torch.equal(logits.grad[3], torch.zeros(4))
    assert logprob(logits, torch.tensor([0, 0, 0, 1])).logps[2] == -inf


def test_nan_poisons_its_own_row_alone(generator):
    logits = torch.randn(3, 5, generator=generator)
    logits[1, 2] = torch.nan
    out = logprob(logits, torch.tensor([0, 0, 0]))
    assert torch.isnan(out.logps).tolist() == torch.isnan(out.entropy).tolist() == [False, True, False]


def test_entropy_carries_no_gradient(generator):
    hidden, weight, targets, _ = inputs(3, 5, generator)
    assert not linear_logprob(hidden, weight, targets).entropy.requires_grad
    assert not logprob(hidden, targets).entropy.requires_grad


@pytest.mark.parametrize("bad", [9, -1, -99, -101])
def test_targets_out_of_range_are_refused(bad, generator):
    hidden, weight, _, _ = inputs(2, 9, generator)
    with pytest.raises(ValueError, match=r"linear_logprob: targets run from .*wanted \[0, 9\) or -100"):
        linear_logprob(hidden, weight, torch.tensor([1, bad]))


def test_wrong_shapes_and_temperature_are_refused():
    with pytest.raises(ValueError, match=r"linear_logprob: weight is \(9, 5\), hidden is \(2, 4\)"):
        linear_logprob(torch.ones(2, 4), torch.ones(9, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="logprob: temperature is 0"):
        logprob(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), temperature=0)
