import math

import pytest
import torch

from athanor.kernels import philox_uniform, sample

GRID = [(t, k, p, m) for t in (0.6, 1.0, 2.0) for k in (0, 1, 5, 1000) for p in (1.0, 0.9, 0.3, 1e-9) for m in (0.0, 0.1)]


def draw(logits, rows=None, **options):
    rows = torch.arange(len(logits)) if rows is None else rows
    return sample(logits, seeds=rows * 7 + 1, positions=rows * 3, **options)


def brute_force(row, temperature, top_k, top_p, min_p):
    """Kept tokens and probabilities of one row, by sorting Python tuples: falling probability, then rising index."""
    z = [x / temperature for x in row]
    top = max(z)
    e = [math.exp(x - top) for x in z]
    p = [x / math.fsum(e) for x in e]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        order = order[:top_k]
    mass, kept, before = math.fsum(p[i] for i in order), [], 0.0
    for i in order:
        if before < top_p * mass or top_p == 1:
            kept.append(i)
        before += p[i]
    kept = [i for i in kept if p[i] >= min_p * max(p)]
    total = math.fsum(p[i] for i in kept)
    return p, {i: p[i] / total for i in kept}


@pytest.mark.parametrize("V", [1, 7, 64, 129])  # one token, odd, aligned, odd
def test_token_and_log_probs_against_brute_force(V, generator):
    """T5: the token is the brute-force inverse CDF's, its log-probs are the brute-force ones, and both need the kept set to be exact."""
    logits = 3 * torch.randn(8, V, dtype=torch.float64, generator=generator)
    logits[1] = logits[1].round()  # heavy ties
    logits[2] = 0.5  # all equal
    logits[3, 1::2] = -torch.inf
    u = philox_uniform(torch.arange(8) * 7 + 1, torch.arange(8) * 3)
    for t, k, p, m in GRID:
        out = draw(logits, temperature=t, top_k=k, top_p=p, min_p=m)
        for b in range(8):
            full, kept = brute_force(logits[b].tolist(), t, k, p, m)
            running, want = 0.0, None
            for i in sorted(kept):
                running += kept[i]
                if want is None and running > u[b]:
                    want = i
            assert out.tokens[b] == want, (t, k, p, m, b)
            assert math.isclose(out.logps[b], math.log(kept[want]), rel_tol=1e-9, abs_tol=1e-12)
            assert math.isclose(out.full_logps[b], math.log(full[want]), rel_tol=1e-9, abs_tol=1e-12)
            entropy = -math.fsum(x * math.log(x) for x in full if x > 0)
            assert math.isclose(out.entropy[b], entropy, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_log_probs_are_fp32_accurate(dtype, within_rule, generator):
    logits = (3 * torch.randn(64, 100, generator=generator)).to(dtype)
    out = draw(logits, temperature=0.7)
    wide = (logits.double() / 0.7).log_softmax(1).gather(1, out.tokens[:, None]).squeeze(1)
    plain = (logits.float() / 0.7).log_softmax(1).gather(1, out.tokens[:, None]).squeeze(1)
    within_rule(out.full_logps, plain, wide)
    assert torch.equal(out.logps, out.full_logps)


def test_probabilities_over_the_support_sum_to_one(generator):
    logits = 2 * torch.randn(1, 50, generator=generator)
    rows = torch.arange(4000)
    out = draw(logits.expand(4000, 50), rows, temperature=0.8, top_k=12, top_p=0.9)
    support = {int(t): float(lp) for t, lp in zip(out.tokens, out.logps, strict=True)}
    assert abs(sum(math.exp(lp) for lp in support.values()) - 1) < 1e-5


def test_draws_follow_the_distribution():
    """T5b, small: chi-square of 100,000 draws on V = 64 for 20 distributions; the bound is 5 standard deviations of the statistic."""
    g = torch.Generator().manual_seed(3)
    for case in range(20):
        logits = torch.randn(1, 64, generator=g) * (0.2 + 0.15 * case)
        options = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}][case % 4]
        n = 100_000
        rows = torch.arange(n) + case * n
        tokens = torch.cat([sample(logits.expand(len(r), 64), seeds=r, positions=r % 7, **options).tokens for r in rows.split(50_000)])
        _, kept = brute_force(logits[0].tolist(), 1.0, *(options.get(k, d) for k, d in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))))
        counts = torch.bincount(tokens, minlength=64)
        assert set(tokens.unique().tolist()) <= set(kept)
        big = [i for i in kept if kept[i] * n >= 10]
        rest = n - sum(int(counts[i]) for i in big), n * (1 - sum(kept[i] for i in big))
        chi2 = sum((int(counts[i]) - n * kept[i]) ** 2 / (n * kept[i]) for i in big) + ((rest[0] - rest[1]) ** 2 / rest[1] if rest[1] > 1 else 0)
        dof = len(big)
        assert chi2 < dof + 5 * math.sqrt(2 * dof) + 10, (case, chi2, dof)


def test_a_row_does_not_depend_on_batch_or_order(generator):
    logits = torch.randn(33, 100, generator=generator)
    rows = torch.arange(33)
    for options in ({}, {"temperature": 0.6, "top_p": 0.95}, {"top_k": 9, "min_p": 0.02}):
        whole = draw(logits, rows, **options)
        shuffle = torch.randperm(33, generator=generator)
        mixed = draw(logits[shuffle], rows[shuffle], **options)
        alone = [draw(logits[i : i + 1], rows[i : i + 1], **options) for i in range(33)]
        for name in whole._fields:
            assert torch.equal(getattr(whole, name)[shuffle], getattr(mixed, name)), name
            assert torch.equal(getattr(whole, name), torch.cat([getattr(a, name) for a in alone])), name


def test_temperature_per_row_mixes_greedy_and_sampled(generator):
    logits = torch.randn(6, 40, generator=generator)
    logits[1, 3] = logits[1, 30] = 9.0  # a tie: the lowest index
    logits[2, 5:] = -torch.inf
    t = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5, 2.0])
    out = draw(logits, temperature=t, top_p=0.9)
    assert out.tokens[:3].tolist() == [logits[0].argmax(), 3, logits[2, :5].argmax()] and not out.logps[:3].any()
    assert torch.allclose(out.full_logps[:3], logits[:3].log_softmax(1).amax(1))
    for i in (3, 4, 5):
        one = draw(logits[i : i + 1], torch.tensor([i]), temperature=float(t[i]), top_p=0.9)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(out, one, strict=True))
    greedy = draw(logits, temperature=0)
    assert torch.equal(greedy.tokens[[0, 2, 3, 4, 5]], logits.argmax(1)[[0, 2, 3, 4, 5]]) and greedy.tokens[1] == 3


def test_forbidden_tokens_are_never_drawn_and_nan_rows_are_flagged():
    logits = torch.full((2000, 10), -torch.inf)
    logits[:, 4] = logits[:, 9] = 0.0
    out = draw(logits)
    assert set(out.tokens.tolist()) == {4, 9} and torch.allclose(out.logps, torch.tensor(0.5).log())
    logits = torch.zeros(3, 10)
    logits[1, 2], logits[2] = torch.nan, -torch.inf
    for options in ({}, {"top_p": 0.9}, {"top_k": 3}):
        out = draw(logits, **options)
        assert torch.isnan(out.logps).tolist() == [False, True, True] and ((out.tokens >= 0) & (out.tokens < 10)).all()


def test_a_uniform_of_zero_or_almost_one_lands_on_an_allowed_token(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    for u, token in ((0.0, 1), (1 - 2.0**-53, 2)):
        monkeypatch.setitem(sample.__globals__, "philox_uniform", lambda seeds, positions, u=u: torch.tensor([u], dtype=torch.float64))
        assert draw(logits).tokens == token


def test_no_rows():
    out = draw(torch.empty(0, 5), top_p=0.5)
    assert all(x.shape == (0,) for x in out) and out.tokens.dtype == torch.int64


@pytest.mark.parametrize("options, message", [
    ({"temperature": -1.0}, "temperature is -1.0; wanted >= 0"), ({"top_p": 0.0}, r"top_p is 0.0; wanted in \(0, 1\]"),
    ({"top_k": -1}, "top_k is -1"), ({"min_p": 1.5}, "min_p is 1.5"),
    ({"temperature": torch.tensor([1.0, -1.0])}, "temperature holds a value below 0"),
    ({"temperature": torch.ones(3)}, r"temperature is \(3,\)"),
])  # fmt: skip
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"sample: {message}"):
        draw(torch.ones(2, 4), **options)
