import math

import pytest
import torch

from athanor.kernels import logprob, philox_uniform, sample

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
        assert draw(logits, backend="reference").tokens == token


def test_no_rows():
    out = draw(torch.empty(0, 5), top_p=0.5)
    assert all(x.shape == (0,) for x in out) and out.tokens.dtype == torch.int64


@pytest.mark.parametrize("options, message", [
    ({"temperature": -1.0}, "temperature is -1.0; wanted >= 0"), ({"top_p": 0.0}, r"top_p is 0.0; wanted in \(0, 1\]"),
    ({"top_k": -1}, "top_k is -1"), ({"min_p": 1.5}, "min_p is 1.5"),
    ({"temperature": torch.tensor([1.0, -1.0])}, "temperature holds another value; wanted >= 0"),
    ({"temperature": torch.ones(3)}, r"temperature is \(3,\)"),
])  # fmt: skip
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"sample: {message}"):
        draw(torch.ones(2, 4), **options)


PER_ROW = {"temperature": torch.tensor([0.0, 1.0, 0.7, 1.3, 0.6, 2.0, 1.0, 0.0]), "top_k": torch.tensor([3, 0, 5, 1000, 1, 0, 7, 0]),
           "top_p": torch.tensor([0.5, 1.0, 0.9, 0.3, 1.0, 0.95, 1.0, 1.0], dtype=torch.float64),
           "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.5, 0.0, 0.05, 0.0])}  # fmt: skip


def test_parameters_per_row_equal_the_row_alone_with_numbers(generator):
    logits = 2 * torch.randn(8, 50, generator=generator)
    logits[6] = logits[6].round()
    mixed = draw(logits, **PER_ROW)
    for i in range(8):
        numbers = {k: v[i].item() for k, v in PER_ROW.items()}
        numbers["temperature"] = float(PER_ROW["temperature"][i])
        alone = draw(logits[i : i + 1], torch.tensor([i]), **numbers)
        for name, a, b in zip(mixed._fields, mixed, alone, strict=True):
            assert torch.equal(a[i : i + 1], b), (i, name)


def test_support_is_the_brute_force_set(generator):
    """threshold and last_kept against sorting, over ties, equal rows, forbidden tokens, floats one ulp apart, and filters at their ends."""
    logits = 3 * torch.randn(8, 41, generator=generator)
    logits[1] = logits[1].round()
    logits[2] = 0.25
    logits[3, ::2] = -torch.inf
    logits[4] = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    logits[4, ::3] = 1.0
    logits[5] = logits[5].bfloat16().float()
    for t, k, p, m in [*GRID, (1.0, 41, 1.0, 0.0), (1.0, 40, 1.0, 0.0), (1.0, 1, 0.5, 1.0), (1.0, 0, 1.0, 1.0)]:
        out = draw(logits, temperature=t, top_k=k, top_p=p, min_p=m)
        for b in range(8):
            if p < 1 and b in (2, 4) or m == 1 and b == 4:
                continue  # within a rounding error of a token's edge
            _, kept = brute_force(logits[b].tolist(), t, k, p, m)
            want = {i for i in kept if logits[b, i] > -torch.inf}
            x, last = logits[b], out.last_kept[b]
            got = {i for i in range(41) if x[i] > out.thresholds[b] or (x[i] == out.thresholds[b] and i <= last)} - {
                i for i in range(41) if x[i] == -torch.inf}  # fmt: skip
            assert got == want, (t, k, p, m, b)
            truncated = 0 < k < 41 or p < 1 or m > 0
            assert (out.thresholds[b] == -torch.inf) == (not truncated)


def test_logits_that_round_to_one_probability_are_kept_by_logit():
    """In fp32, log p of 1e-9 and of 0 under a large row are equal; the larger logit is still the more likely."""
    logits = torch.full((1, 1000), 3.0)
    logits[0, 7], logits[0, 500] = 5.0, 5.000001
    logits[0, 100:110] = torch.linspace(1e-9, 1e-8, 10)
    logits[0, 110:] = -9.0
    assert torch.equal(logits.softmax(1)[0, 100:110].unique(), logits.softmax(1)[0, 100:101])
    out = draw(logits, top_k=105)
    assert out.last_kept == 999 and out.thresholds == logits[0, 105]  # 100 larger ones, then 109, 108, 107, 106, 105


def test_the_trainer_rebuilds_the_truncated_log_prob_bit_for_bit(generator):
    logits = 3 * torch.randn(300, 97, generator=generator)
    logits[:20] = logits[:20].round()
    logits[20:30, ::3] = -torch.inf
    logits[30:40] = 0.5
    for t, k, p, m in [*GRID, (1.0, 0, 1.0, 0.0)]:
        out = draw(logits, temperature=t, top_k=k, top_p=p, min_p=m)
        again = logprob(logits, out.tokens, temperature=t, support=out.support)
        assert torch.equal(again.logps, out.logps), (t, k, p, m)
    mixed = {k: v.repeat(3) for k, v in PER_ROW.items()}
    mixed["temperature"] = 0.8
    out = draw(logits[:24], **mixed)
    assert torch.equal(logprob(logits[:24], out.tokens, temperature=0.8, support=out.support).logps, out.logps)


def test_support_gradient_and_entropy_against_masked_softmax(close64, generator):
    logits = 2 * torch.randn(40, 30, dtype=torch.float64, generator=generator)
    logits[3] = logits[3].round()
    logits.requires_grad_()
    out = draw(logits, temperature=0.7, top_k=12, top_p=0.8)
    got = logprob(logits, out.tokens, temperature=0.7, support=out.support)
    keep = torch.zeros(40, 30, dtype=torch.bool)
    for b in range(40):
        keep[b, list(brute_force(logits[b].tolist(), 0.7, 12, 0.8, 0.0)[1])] = True
    z = (logits / 0.7).masked_fill(~keep, -torch.inf)
    want = z.gather(1, out.tokens[:, None]).squeeze(1) - z.logsumexp(1)
    p = z.softmax(1)
    close64(got.logps, want)
    close64(got.entropy, -(p * p.clamp_min(1e-300).log()).sum(1).detach())
    g = torch.randn(40, dtype=torch.float64, generator=generator)
    close64(torch.autograd.grad(got.logps, logits, g)[0], torch.autograd.grad(want, logits, g)[0])


def test_a_target_outside_the_support_counts_as_kept_and_a_skipped_one_does_not():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(2, 1)
    support = (torch.full((2,), 2.0), torch.full((2,), 3))
    out = logprob(logits, torch.tensor([3, -100]), support=support)
    assert torch.allclose(out.logps, torch.tensor([logits[0, [0, 1, 3]].log_softmax(0)[2], 0.0]))
    p = logits[0, :2].softmax(0)
    assert torch.allclose(out.entropy[1], -(p * p.log()).sum())
    with pytest.raises(ValueError, match=r"logprob: support is \(2,\) torch.float32 and \(1,\) torch.int64; wanted \(2,\)"):
        logprob(logits, torch.tensor([3, 0]), support=(support[0], support[1][:1]))


def test_bad_rows_are_flagged_in_the_support_too():
    logits = torch.zeros(4, 10)
    logits[1, 2], logits[2], logits[3, 4] = torch.nan, -torch.inf, torch.inf
    for options in ({}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.0}, {"min_p": 0.5}):
        out = draw(logits, **options)
        for x in (out.logps, out.full_logps, out.thresholds):
            assert torch.isnan(x).tolist() == [False, True, True, True], options
        assert ((out.tokens >= 0) & (out.tokens < 10)).all()


def chi_square(counts, p, n):
    """Statistic and degrees of freedom, tokens of fewer than 10 expected draws counted together."""
    big = p * n >= 10
    rest, expected = counts[~big].sum(), n * p[~big].sum()
    chi2 = ((counts[big] - n * p[big]) ** 2 / (n * p[big])).sum() + ((rest - expected) ** 2 / expected if expected > 1 else 0)
    return float(chi2), int(big.sum())


# fp32 logits whose tail has tokens of p < 1e-7, next to each other and apart
@pytest.mark.parametrize("n", [200_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_chi_square_of_many_draws(n, generator):
    V = 250
    for case, options in enumerate(({}, {"temperature": 0.7, "top_p": 0.97}, {"top_k": 100, "min_p": 1e-4})):
        logits = 2 * torch.randn(1, V, generator=generator)
        logits[0, 120:150] -= 14
        share = n // 3
        counts = torch.zeros(V)
        for rows in torch.arange(share).split(20_000):
            counts += torch.bincount(draw(logits.expand(len(rows), V), rows + case * n, **options).tokens, minlength=V)
        _, kept = brute_force(logits[0].tolist(), options.get("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1.0),
                              options.get("min_p", 0.0))  # fmt: skip
        p = torch.zeros(V, dtype=torch.float64)
        p[list(kept)] = torch.tensor(list(kept.values()), dtype=torch.float64)
        assert not counts[p == 0].any()
        chi2, dof = chi_square(counts.double(), p, share)
        assert abs(chi2 - dof) < 5 * math.sqrt(2 * dof) + 10, (case, chi2, dof)
