import pytest
import torch

from athanor.kernels import logprob

inf, nan = torch.inf, torch.nan
# one token, a part of 16, 16, one more, the last chunk of 1024 full, begun and missing
SIZES = [(3, 1), (9, 7), (5, 16), (5, 17), (40, 1024), (3, 1025), (4, 5000)]


def on_cpu(*args, **kwargs):
    return logprob(*args, backend="cpu", **kwargs)


def inputs(T, V, generator):
    logits = (3 * torch.randn(T, V, generator=generator)).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[2::7] = -100
    return logits, targets, torch.randn(T, generator=generator)


def supports(logits, targets, generator):
    """A threshold that is one of the row's logits, so that equal ones must be told apart by index; targets on both sides of it."""
    T, V = logits.shape
    with torch.no_grad():
        logits[1::3] = logits[1::3].round()
    thresholds = logits.detach().sort(1).values[torch.arange(T), torch.randint(0, V, (T,), generator=generator)]
    thresholds[::4] = -inf
    last_kept = torch.where(thresholds == -inf, V - 1, torch.randint(0, V, (T,), generator=generator))
    return thresholds, last_kept


def textbook(logits, targets, temperature, support):
    """One row at a time, in the dtype of the logits, with the restricted softmax written as a list of kept indices."""
    logps, entropies = [], []
    for t, (x, y) in enumerate(zip(logits, targets.tolist(), strict=True)):
        keep = list(range(len(x)))
        if support is not None:
            value, last = float(support[0][t]), int(support[1][t])
            numbers = x.tolist()
            keep = [i for i in keep if numbers[i] > value or numbers[i] == value and i <= last or i == y] or keep
        log_p = torch.log_softmax(x[keep] / temperature, 0)
        logps.append(log_p[keep.index(y)] if y >= 0 else 0 * x[0])
        entropies.append(-(log_p.detach().exp() * log_p.detach()).sum())
    return torch.stack(logps), torch.stack(entropies)


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("T, V", SIZES)
def test_errs_no_more_than_log_softmax_among_poison(T, V, temperature, restricted, within_rule, poisoned, padded, generator):
    logits, targets, g = inputs(T, V, generator)
    support = supports(logits, targets, generator) if restricted else None
    logits = padded(logits)
    got = on_cpu(logits, targets, temperature=temperature, support=support)
    wide = logits.detach().double().requires_grad_()
    simple, exact = (textbook(x, targets, temperature, support) for x in (logits, wide))
    within_rule(got.logps, simple[0], exact[0])
    within_rule(got.entropy, simple[1], exact[1], "entropy")
    gradients = [torch.autograd.grad(y, x, g.to(x.dtype))[0] for y, x in ((got.logps, logits), (simple[0], logits), (exact[0], wide))]
    within_rule(*gradients, "gradient")
    assert torch.equal(gradients[0] == 0, gradients[1] == 0) or not restricted


def test_a_vocabulary_of_262144_and_logits_of_extreme_size(within_rule, generator):
    x = (3 * torch.randn(2, 1 << 18, generator=generator)).requires_grad_()
    wide, y = x.detach().double().requires_grad_(), torch.tensor([5, 262143])
    got, simple, exact = on_cpu(x, y), textbook(x, y, 1.0, None), textbook(wide, y, 1.0, None)
    within_rule(got.logps, simple[0], exact[0])
    within_rule(got.entropy, simple[1], exact[1])
    within_rule(*(torch.autograd.grad(p.sum(), z)[0] for p, z in ((got.logps, x), (simple[0], x), (exact[0], wide))))
    out = on_cpu(torch.tensor([[1e5, 0, 0], [-1e5, -1e5, -1e5], [3e38, -3e38, 0]]), torch.tensor([0, 1, 0]), temperature=0.5)
    assert torch.allclose(out.logps, -torch.tensor([1.0, 3, 1]).log()) and torch.allclose(out.entropy, torch.tensor([1.0, 3, 1]).log())


def test_forbidden_tokens_bad_rows_and_skipped_rows(generator):
    logits = torch.randn(8, 37, generator=generator)
    logits[0, ::2], logits[1, ::2], logits[2] = -inf, -inf, -inf
    logits[3, 36], logits[4, 0], logits[5, 5] = nan, inf, nan
    logits.requires_grad_()
    targets = torch.tensor([1, 2, 3, 4, 5, -100, -100, 7])
    for support in (None, (torch.full((8,), -inf), torch.full((8,), 36)), (torch.full((8,), -1e30), torch.full((8,), 36))):
        out = on_cpu(logits, targets, support=support)
        want = logits[0, 1::2].log_softmax(0)
        assert torch.allclose(out.logps[0], want[0]) and torch.allclose(out.entropy[0], -(want.exp() * want).sum())
        assert out.logps[1] == -inf and out.logps[2] == -inf and out.entropy[2] == 0 and torch.isfinite(out.entropy[1])
        assert out.logps[3:5].isnan().all() and out.entropy[3:6].isnan().all() and not out.logps[5:7].any() and torch.isfinite(out.logps[7])
        (dlogits,) = torch.autograd.grad(out.logps.sum(), logits)
        assert torch.isfinite(dlogits[:3]).all() and not dlogits[2].any() and not dlogits[5:7].any()
        assert dlogits[3].isnan().all() and dlogits[4].isnan().all() and torch.isfinite(dlogits[7]).all() and dlogits[7].all()
    # nothing of a row lies in the support: its target alone, or where it has none, everything
    high = (torch.full((8,), 50.0), torch.full((8,), 36))
    out = on_cpu(logits, targets, support=high)
    assert out.logps[7] == 0 and out.entropy[7] == 0 and out.logps[1] == -inf and torch.equal(out.entropy[6], on_cpu(logits, targets).entropy[6])


@pytest.mark.parametrize("V", [37, 512, 1300])
def test_bits_of_a_row_depend_on_the_row_alone(V, with_threads, padded, generator):
    logits, targets, g = inputs(301, V, generator)
    support = supports(logits, targets, generator)

    def run(rows=slice(None), place=lambda x: x):
        x = place(logits.detach()[rows].requires_grad_())
        out = on_cpu(x, targets[rows], temperature=0.8, support=[s[rows] for s in support])
        return out.logps, out.entropy, torch.autograd.grad(out.logps, x, g[rows])[0]

    first, *others = [*with_threads(run), run(place=padded), run(place=lambda x: x.detach().T.contiguous().T.requires_grad_())]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for rows in (slice(7, 8), slice(100, 133), torch.randperm(301, generator=generator)):
        assert all(torch.equal(a[rows], b) for a, b in zip(first, run(rows), strict=True))


def test_no_rows_and_what_the_backend_refuses():
    empty = torch.empty(0, 5, requires_grad=True)
    out = on_cpu(empty, torch.empty(0, dtype=torch.int64))
    assert out.logps.shape == out.entropy.shape == (0,) and torch.autograd.grad(out.logps.sum(), empty)[0].shape == (0, 5)
    x, y = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="logprob: backend 'cpu' cannot serve this call: thresholds is torch.float64"):
        on_cpu(x, y, support=(torch.zeros(1).double(), y))
    assert logprob(x, y, support=(torch.zeros(1).double(), y + 3)).logps.dtype == torch.float32  # the reference takes it
