import math

import pytest
import torch

from athanor.kernels import linear_logprob, linear_sample, philox_uniform
from athanor.kernels.linear_sample import CHUNK, TILE


def draw(hidden, weight, rows=None, **options):
    rows = torch.arange(len(hidden)) if rows is None else rows
    return linear_sample(hidden, weight, seeds=rows * 7 - 3, positions=rows * 3, **options)


def first_beyond(p, u):
    """Inverse CDF, written out."""
    total, running = math.fsum(p), 0.0
    for i, x in enumerate(p):
        running += x
        if running > u * total:
            return i
    raise AssertionError("u is below 1")


# one token; less than a tile; tiles and a part; more than the chunk whose logits are held at once
@pytest.mark.parametrize("V", [1, 100, 3 * TILE + 5, CHUNK + TILE + 1])
def test_token_and_log_probs_against_brute_force(V, generator):
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, generator=generator) for n in (5, V))
    for temperature in (0.7, 1.0, 3.0):
        out = draw(hidden, weight, temperature=temperature)
        for b in range(5):
            z = hidden[b] @ weight.T / temperature
            p = (z - z.max()).exp()
            p /= p.sum()
            seed, position = torch.tensor([b * 7 - 3]), torch.tensor([b * 3])
            tile = first_beyond([float(t.sum()) for t in p.split(TILE)], float(philox_uniform(seed, position, stream=2)))
            u = float(philox_uniform(seed, position, tile=tile, stream=1))
            token = tile * TILE + first_beyond(p.split(TILE)[tile].tolist(), u)
            assert out.tokens[b] == token
            assert math.isclose(out.full_logps[b], p[token].log(), rel_tol=1e-10, abs_tol=1e-12)
            assert math.isclose(out.entropy[b], -(p * p.clamp_min(1e-300).log()).sum(), rel_tol=1e-10, abs_tol=1e-12)
        assert torch.equal(out.logps, out.full_logps) and (out.thresholds == -torch.inf).all() and (out.last_kept == V - 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_those_of_linear_logprob(dtype, within_rule, generator):
    hidden, weight = (torch.randn(n, 32, generator=generator).to(dtype) for n in (40, 1000))
    out = draw(hidden, weight, temperature=0.8)
    got = linear_logprob(hidden, weight, out.tokens, temperature=0.8)
    wide = linear_logprob(hidden.double(), weight.double(), out.tokens, temperature=0.8)
    within_rule(out.full_logps, got.logps, wide.logps)
    within_rule(out.entropy, got.entropy, wide.entropy)


def test_greedy_rows_take_the_lowest_index_of_the_largest(generator):
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(400, 8, generator=generator)
    weight[[390, 140, 17]] = 9 * hidden[0]
    out = draw(hidden, weight, temperature=torch.tensor([0.0, 0.0, 1.0, 0.0, 0.5, 2.0]))
    logits = hidden @ weight.T
    assert out.tokens[0] == 17 and torch.equal(out.tokens[[1, 3]], logits.argmax(1)[[1, 3]])
    assert not out.logps[[0, 1, 3]].any() and (out.logps[[2, 4, 5]] < 0).all()
    assert torch.allclose(out.thresholds[[0, 1, 3]], logits.amax(1)[[0, 1, 3]]) and torch.equal(out.last_kept[[0, 1, 3]], out.tokens[[0, 1, 3]])
    assert torch.equal(draw(hidden, weight, temperature=0).tokens[[1, 2, 3, 4, 5]], logits.argmax(1)[1:])


def test_a_row_does_not_depend_on_batch_or_order(generator):
    """Integers as inputs: their products are exact, so that the library's order of additions, which may follow the batch, cannot show."""
    hidden, weight = (torch.randint(-2, 3, (n, 12), generator=generator).float() for n in (20, 300))
    temperature = torch.linspace(0, 2, 20).round(decimals=1)
    whole = draw(hidden, weight, temperature=temperature)
    order = torch.randperm(20, generator=generator)
    mixed = draw(hidden[order], weight, order, temperature=temperature[order])
    for name, a, b in zip(whole._fields, whole, mixed, strict=True):
        assert torch.equal(a[order], b), name
    for i in range(20):
        alone = draw(hidden[i : i + 1], weight, torch.tensor([i]), temperature=float(temperature[i]))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("n", [60_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_chi_square_over_tokens_and_over_tiles(n, generator):
    V = 2 * TILE + 44
    hidden, weight = torch.randn(1, 8, generator=generator), torch.randn(V, 8, generator=generator)
    counts = torch.zeros(V, dtype=torch.float64)
    for rows in torch.arange(n).split(20_000):
        counts += torch.bincount(draw(hidden.expand(len(rows), 8), weight, rows, temperature=1.5).tokens, minlength=V)
    p = (hidden.double() @ weight.double().T / 1.5).softmax(1)[0]
    tiles = [torch.stack([t.sum() for t in x.split(TILE)]) for x in (counts, p)]
    for c, q in ((counts, p), tiles):
        big = q * n >= 10
        rest, expected = c[~big].sum(), n * q[~big].sum()
        chi2 = ((c[big] - n * q[big]) ** 2 / (n * q[big])).sum() + (rest - expected) ** 2 / (expected + 1)
        assert abs(chi2 - big.sum()) < 5 * math.sqrt(2 * big.sum()) + 10


def test_bad_rows_empty_batches_and_refusals(generator):
    hidden, weight = torch.randn(3, 4, generator=generator), torch.randn(150, 4, generator=generator)
    hidden[1, 2] = torch.nan
    for t in (1.0, 0.0):
        out = draw(hidden, weight, temperature=t)
        assert torch.isnan(out.logps).tolist() == torch.isnan(out.thresholds).tolist() == [False, True, False]
        assert ((out.tokens >= 0) & (out.tokens < 150)).all()
    assert all(x.shape == (0,) for x in draw(hidden[:0], weight))
    with pytest.raises(ValueError, match=r"linear_sample: weight is \(150, 4\), hidden is \(3, 3\)"):
        draw(hidden[:, :3], weight)
    with pytest.raises(ValueError, match="linear_sample: temperature is -1; wanted >= 0"):
        draw(hidden, weight, temperature=-1)
