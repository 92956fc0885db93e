import numpy as np
import pytest
import torch

from athanor.kernels import logprob, philox_uniform, sample, sample_cpu

FILTERS = [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": 40}, {"top_k": 10**12}, {"top_p": 1e-9}, {"top_p": 0.3}, {"top_p": 0.95}, {"top_p": 1 - 1e-12},
           {"min_p": 0.1}, {"min_p": 1.0}, {"min_p": 1e-44}, {"top_k": 30, "top_p": 0.8}, {"top_k": 7, "min_p": 0.2}, {"top_p": 0.9, "min_p": 0.02},
           {"top_k": 50, "top_p": 0.9, "min_p": 0.01}]  # fmt: skip
inf, nan = torch.inf, torch.nan


def draw(logits, rows=None, **options):
    rows = torch.arange(len(logits)) if rows is None else rows
    return sample(logits, seeds=rows * 7 - 3, positions=rows * 3, backend="cpu", **options)


def distributions(V, generator):
    """Peaked, flat, tied by rounding, all equal but for the sign of zero, half forbidden, one ulp apart, one far outlier, two plateaus."""
    x = 3 * torch.randn(9, V, generator=generator)
    x[1] = 0.01 * torch.randn(V, generator=generator)
    x[2] = x[2].round()
    x[3] = torch.where(torch.arange(V) % 2 == 0, 0.0, -0.0)
    x[4, 1::2] = -inf
    x[5] = torch.tensor(1.0)
    x[5, ::3] = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    x[6, V // 2] = -1e30
    x[7] = torch.where(torch.arange(V) % 5 == 1, 2.0, -2.0)
    x[8, V // 3] = 30.0
    return x


def brute_force(x, temperature, top_k, top_p, min_p):
    """Probabilities in fp64, the kept tokens by a full stable sort, and how far the nearest decision was from its edge."""
    z = x.double().numpy() / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-(x.double().numpy() + 0.0), kind="stable")
    order = order[x.numpy()[order] > -np.inf]
    order = order[: top_k or len(order)]
    margin = inf
    if top_p < 1:
        mass = p[order].cumsum()
        before = np.concatenate([[0.0], mass[:-1]])
        margin = np.abs(mass / mass[-1] - top_p).min()
        order = order[before < top_p * mass[-1]]
    if min_p > 0:
        rest = p[order] / p.max() - min_p
        margin = min(margin, np.abs(rest[rest != 0]).min(initial=inf) / min_p)
        order = order[rest >= 0]
    return p, order, margin


def test_uniforms_are_those_of_philox(generator):
    seeds, positions = (torch.randint(-(2**63), 2**63 - 1, (1000,), generator=generator) for _ in range(2))
    assert torch.equal(sample_cpu.uniforms(seeds, positions), philox_uniform(seeds, positions))
    assert torch.equal(sample_cpu.uniforms(seeds[::3], positions[::3]), philox_uniform(seeds[::3], positions[::3]))


@pytest.mark.parametrize("V", [1, 7, 64, 97, 1000, 3001])
def test_support_token_and_log_probs_against_a_full_sort(V, poisoned, padded, generator):
    checked = 0
    for temperature in (1.0, 0.6):
        logits = padded(distributions(V, generator))
        u = philox_uniform(torch.arange(9) * 7 - 3, torch.arange(9) * 3)
        for options in FILTERS:
            out = draw(logits, temperature=temperature, **options)
            top_k, top_p, min_p = options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0)
            for b, x in enumerate(logits):
                p, order, margin = brute_force(x, temperature, top_k, top_p, min_p)
                if margin < 1e-5:  # within fp32 rounding of another decision
                    continue
                last, value = order[-1], x[order[-1]]
                tied = (x == value).sum() > (x[order] == value).sum()  # not all of the equal ones are kept
                truncated = 0 < top_k < V or top_p < 1 or min_p > 0
                assert out.thresholds[b] == (value if truncated else -inf), (b, options)
                assert out.last_kept[b] == (last if tied and truncated else V - 1), (b, options)
                cdf = np.zeros(V)
                cdf[order] = p[order]
                cdf = cdf.cumsum() / cdf.sum()
                token = int(out.tokens[b])
                assert token in order and cdf[token] > u[b] - 1e-6 and (token == 0 or cdf[token - 1] <= u[b] + 1e-6), (b, options)
                assert abs(out.logps[b] - np.log(p[token] / p[order].sum())) < 1e-5 and abs(out.full_logps[b] - np.log(p[token])) < 1e-5
                assert abs(out.entropy[b] + (p[p > 0] * np.log(p[p > 0])).sum()) < 1e-5
                checked += 1
    assert checked > 200


@pytest.mark.parametrize("V", [1, 17, 97, 512, 1300])
def test_logprob_has_the_bits_of_the_draw(V, padded, with_threads, generator):
    """Same logits, any temperature, filters, batch, place of the row and number of threads."""
    rows = torch.arange(63)
    logits = distributions(V, generator).repeat(7, 1)
    shuffled = torch.randperm(63, generator=generator)
    for options in FILTERS:
        for temperature in (1.0, 0.7, 1.3):
            out, *others = with_threads(lambda o=options, t=temperature: draw(logits, rows, temperature=t, **o))
            others.append(draw(padded(logits), rows, temperature=temperature, **options))
            assert all(torch.equal(a, b) for other in others for a, b in zip(out, other, strict=True)), options
            mixed = draw(logits[shuffled], rows[shuffled], temperature=temperature, **options)
            assert all(torch.equal(a[shuffled], b) for a, b in zip(out, mixed, strict=True)), options
            for batch in (slice(None), slice(5, 6), shuffled):
                scored = logprob(padded(logits[batch]), out.tokens[batch], temperature=temperature, support=[s[batch] for s in out.support])
                full = logprob(logits[batch], out.tokens[batch], temperature=temperature)
                assert torch.equal(scored.logps, out.logps[batch]), (options, temperature)
                assert torch.equal(full.logps, out.full_logps[batch]) and torch.equal(full.entropy, out.entropy[batch])
                assert (out.logps <= 0).all()


def test_parameters_per_row_equal_numbers_and_may_have_any_dtype(generator):
    logits = distributions(200, generator)[:8]
    per_row = {"temperature": torch.tensor([0.0, 1.0, 0.7, 1.3, 0.6, 2.0, 1.0, 0.0]), "top_k": torch.tensor([3, 0, 5, 1000, 1, 0, 7, 0]),
               "top_p": torch.tensor([0.5, 1.0, 0.9, 0.3, 1.0, 0.95, 1.0, 1.0]), "min_p": torch.tensor([0, 0, 0.1, 0, 0.5, 0, 0.05, 0])}  # fmt: skip
    mixed = draw(logits, **per_row)
    for i in range(8):
        alone = draw(logits[i : i + 1], torch.tensor([i]), **{k: v[i].item() for k, v in per_row.items()})
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(mixed, alone, strict=True))
    others = {"temperature": torch.float64, "top_k": torch.int32, "top_p": torch.float64, "min_p": torch.bfloat16}
    per_row["min_p"] = per_row["min_p"].bfloat16()
    again = draw(logits, **{k: v.to(others[k]) for k, v in per_row.items()})
    assert all(torch.equal(a, b) for a, b in zip(draw(logits, **per_row), again, strict=True))


def test_greedy_takes_the_lowest_of_the_largest_and_scores_at_temperature_one(generator):
    logits = distributions(97, generator)
    logits[0, 3] = logits[0, 30] = logits[0, 96] = 20.0
    out = draw(logits, temperature=0.0, top_k=3, top_p=0.5)
    want = torch.tensor([int(np.argmax(x.numpy() + 0.0)) for x in logits])
    assert torch.equal(out.tokens, want) and torch.equal(out.last_kept, want) and torch.equal(out.thresholds, logits.amax(1))
    assert not out.logps.any() and torch.equal(out.full_logps, logprob(logits, want).logps)
    assert not logprob(logits, want, support=out.support).logps.any()


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2.0**-53, 98)])
def test_a_uniform_of_zero_or_almost_one_lands_on_an_allowed_token(u, token, monkeypatch, generator):
    logits = torch.randn(5, 200, generator=generator)
    logits[:, 0] = logits[:, 99:] = -inf
    monkeypatch.setattr(sample_cpu, "uniforms", lambda seeds, positions: torch.full(seeds.shape, u, dtype=torch.float64))
    assert (draw(logits).tokens == token).all()
    out = draw(logits, top_k=4)
    kept = logits >= out.thresholds[:, None]
    assert all(int(t) == (k.nonzero().min() if u == 0 else k.nonzero().max()) for t, k in zip(out.tokens, kept, strict=True))


def test_bad_rows_are_flagged_and_leave_the_others_alone():
    logits = torch.zeros(4, 40)
    logits[1, 2], logits[2], logits[3, 39] = nan, -inf, inf
    for options in (*FILTERS, {"temperature": 0.0}):
        out = draw(logits, **options)
        for x in (out.logps, out.full_logps, out.entropy, out.thresholds):
            assert x.isnan().tolist() == [False, True, True, True], options
        assert ((out.tokens >= 0) & (out.tokens < 40)).all() and (out.last_kept[1:] == 39).all()


def test_rows_may_be_columns_or_one_row_many_times(generator):
    logits = torch.randn(50, 6, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(draw(logits.T), draw(logits.T.contiguous()), strict=True))
    many = logits[:, 0].expand(500, 50)
    assert torch.equal(draw(many, top_p=0.9).tokens, draw(many.contiguous(), top_p=0.9).tokens)
    assert all(x.shape == (0,) for x in draw(torch.empty(0, 5), top_p=0.5))
