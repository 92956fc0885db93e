import pytest
import torch

from athanor.kernels import LogProbs, logprob

SIZES = [(1, 7), (128, 96), (129, 257), (0, 64)]  # one row, aligned, both odd, empty
inf, nan = torch.inf, torch.nan


def oracle(logits, targets, temperature):
    """Sum of exponentials by hand, in fp64, one row at a time."""
    logps, entropies = [], []
    for z, y in zip(logits.double() / temperature, targets.tolist(), strict=True):
        e = torch.exp(z - z.max())
        p = e / e.sum()
        logps.append(torch.log(p[y]) if y >= 0 else z.sum() * 0)
        entropies.append(-(p * torch.where(p > 0, p, 1.0).log()).sum())
    empty = logits.double().sum(1)
    return (torch.stack(logps), torch.stack(entropies)) if logps else (empty, empty.detach())


def inputs(T, V, generator, dtype=torch.float64):
    logits = (3 * torch.randn(T, V, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    if T > 2:
        targets[::5] = -100
    return logits, targets, torch.randn(T, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("temperature", [1e-3, 0.6, 1.0, 5.0])
@pytest.mark.parametrize("T, V", SIZES)
def test_matches_the_oracle_in_fp64_with_gradients(T, V, temperature, close64, generator):
    logits, targets, g = inputs(T, V, generator)
    logits = (logits.detach() * temperature).requires_grad_()  # else 1e-3 leaves one-hot rows, which test nothing
    want_logps, want_entropy = oracle(logits, targets, temperature)
    got = logprob(logits, targets, temperature=temperature)
    assert isinstance(got, LogProbs) and got.argmax is None
    close64(got.logps, want_logps)
    close64(got.entropy, want_entropy)
    a, b = (torch.autograd.grad(x, logits, g)[0] * temperature for x in (got.logps, want_logps))
    close64(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, V", SIZES)
def test_low_precision_is_accumulated_in_fp32(T, V, dtype, within_rule, generator):
    logits, targets, g = inputs(T, V, generator, dtype)
    wide, z = logits.detach().double().requires_grad_(), logits.detach().float().requires_grad_()
    want, want_entropy = oracle(wide, targets, 0.7)
    # the rival computes in fp32 from the same bf16 numbers
    rival = -torch.nn.functional.cross_entropy(z / 0.7, targets, reduction="none")
    p = (z / 0.7).softmax(-1)
    got = logprob(logits, targets, temperature=0.7)
    assert got.logps.dtype == got.entropy.dtype == torch.float32
    within_rule(got.logps, rival, want)
    within_rule(got.entropy, -(p * p.log()).sum(-1), want_entropy, "entropy")
    dlogits, plain = torch.autograd.grad(got.logps, logits, g.float())[0], torch.autograd.grad(rival, z, g.float())[0]
    within_rule(dlogits, plain.to(dtype), torch.autograd.grad(want, wide, g)[0], "gradient")


def test_extreme_logits():
    logits = torch.tensor([[-1e5, -1e5, -1e5, -1e5], [1e5, 0, 0, 0], [-inf, 0, -inf, 0], [-inf, 3, -inf, -inf]], requires_grad=True)
    out = logprob(logits, torch.tensor([0, 0, 1, 1]))
    log = torch.log(torch.tensor([4.0, 1, 2, 1]))
    assert torch.allclose(out.logps, -log) and torch.allclose(out.entropy, log)
    out.logps.sum().backward()
    assert torch.isfinite(logits.grad).all() and torch.equal(logits.grad[3], torch.zeros(4))
    assert logprob(logits, torch.tensor([0, 0, 0, 1])).logps[2] == -inf


def test_a_row_that_forbids_everything_has_no_gradient_and_leaves_the_others_alone(generator):
    logits = torch.randn(3, 5, generator=generator)
    logits[1] = -inf
    logits.requires_grad_()
    out = logprob(logits, torch.tensor([0, 2, 4]))
    assert out.logps[1] == -inf and out.entropy[1] == 0 and torch.isfinite(out.logps[::2]).all() and (out.entropy[::2] > 0).all()
    out.logps.sum().backward()
    assert not logits.grad[1].any() and logits.grad[::2].all()


def test_nan_poisons_its_own_row_alone(generator):
    logits = torch.randn(3, 5, generator=generator)
    logits[1, 2] = nan
    out = logprob(logits, torch.tensor([0, 0, 0]))
    assert torch.isnan(out.logps).tolist() == torch.isnan(out.entropy).tolist() == [False, True, False]


def test_entropy_carries_no_gradient(generator):
    logits, targets, _ = inputs(3, 5, generator)
    assert not logprob(logits, targets).entropy.requires_grad


@pytest.mark.parametrize("bad", [9, -1, -99, -101])
def test_targets_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"logprob: targets run from .*wanted \[0, 9\) or -100"):
        logprob(torch.ones(2, 9), torch.tensor([1, bad]))


def test_wrong_shapes_and_temperature_are_refused():
    with pytest.raises(ValueError, match="logprob: temperature is 0"):
        logprob(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), temperature=0)
    with pytest.raises(ValueError, match=r"logprob: logits is \(4,\); wanted \(T, V\)"):
        logprob(torch.ones(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logprob: targets is \(3,\) torch.int64; wanted \(2,\) int64"):
        logprob(torch.ones(2, 4), torch.zeros(3, dtype=torch.int64))
