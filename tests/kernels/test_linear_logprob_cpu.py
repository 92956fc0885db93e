import pytest
import torch

from athanor.kernels import linear, logprob, sample
from athanor.kernels import linear_logprob_cpu as module
from athanor.kernels.linear_logprob_cpu import linear_logprob_cpu, tiles_of

# one row, an odd number, whole tiles of 16, and (with the small tiles of the fixture) several tiles of which the last is short
SIZES = [(1, 7, 5), (33, 97, 24), (64, 300, 32), (203, 41, 17)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 rows, of which the first is kept for the backward where V is 41."""
    monkeypatch.setattr(module, "TILE_LOGITS", 1)
    monkeypatch.setattr(module, "KEPT_LOGITS", 64 * 41)
    monkeypatch.setattr(module, "KEPT_SHARE", 1)


def inputs(T, V, D, generator):
    hidden, weight = torch.randn(T, D, generator=generator).requires_grad_(), (torch.randn(V, D, generator=generator) / D**0.5 * 3).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[3::7] = -100
    return hidden, weight, targets, torch.randn(T, generator=generator)


def textbook(hidden, weight, targets, temperature, thresholds=None):
    z = hidden @ weight.T
    if thresholds is not None:
        kept = (z.float() >= thresholds[:, None]) | (torch.arange(z.shape[1]) == targets[:, None])
        z = z.masked_fill(~kept, -torch.inf)
    log_p = (z / temperature).log_softmax(1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(1).detach()
    return log_p.gather(1, targets.clamp_min(0)[:, None]).squeeze(1).masked_fill(targets < 0, 0.0), entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("T, V, D", SIZES)
def test_errs_no_more_than_the_formula_among_poison(T, V, D, temperature, within_rule, poisoned, padded, small_tiles, generator):
    hidden, weight, targets, g = inputs(T, V, D, generator)
    hidden = padded(hidden)
    logps, entropy, argmax = linear_logprob_cpu(hidden, weight, targets, temperature, True)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    simple, exact = textbook(hidden, weight, targets, temperature), textbook(*wide, targets, temperature)
    within_rule(logps, simple[0], exact[0])
    within_rule(entropy, simple[1], exact[1])
    assert torch.equal(argmax, (hidden @ weight.T).argmax(1))
    got = torch.autograd.grad(logps, (hidden, weight), g, retain_graph=True)
    again = torch.autograd.grad(logps, (hidden, weight), g)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    plain, want = torch.autograd.grad(simple[0], (hidden, weight), g), torch.autograd.grad(exact[0], wide, g.double())
    for name, a, b, c in zip(("dhidden", "dweight"), got, plain, want, strict=True):
        within_rule(a, b, c, name)


@pytest.mark.parametrize("V", [16, 97, 512, 1300])
def test_has_the_bits_of_the_sampler_on_the_same_logits_for_any_batch(V, small_tiles, with_threads, generator):
    hidden, weight, *_ = (t.detach() for t in inputs(203, V, 32, generator))
    rows = torch.arange(203)

    def run(**options):
        logits = linear(hidden, weight)
        out = sample(logits, temperature=0.8, seeds=rows, positions=rows, backend="cpu", **options)

        def score(T, start):
            here = slice(start, start + T)
            return linear_logprob_cpu(hidden[here], weight, out.tokens[here], 0.8, False, tuple(s[here] for s in out.support))[0]

        for T, start in ((203, 0), (1, 0), (1, 202), (2, 65), (15, 1), (17, 100), (64, 64), (130, 3)):
            assert torch.equal(score(T, start), out.logps[start : start + T]), (T, start)
        full = linear_logprob_cpu(hidden, weight, out.tokens, 0.8, False)
        assert torch.equal(full[0], out.full_logps) and torch.equal(full[1], out.entropy)

    for options in ({}, {"top_p": 0.9}, {"top_k": 9, "min_p": 0.02}):
        with_threads(lambda options=options: run(**options))


def test_gradient_is_that_of_logprob_on_the_logits_also_with_a_support(small_tiles, within_rule, generator):
    hidden, weight, targets, g = inputs(203, 41, 17, generator)
    thresholds = (hidden @ weight.T).detach().sort(1).values[:, 25] - 1e-3
    logps, entropy, _ = linear_logprob_cpu(hidden, weight, targets, 0.7, False, (thresholds, torch.full((203,), 40)))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    simple, exact = textbook(hidden, weight, targets, 0.7, thresholds), textbook(*wide, targets, 0.7, thresholds)
    within_rule(logps, simple[0], exact[0])
    within_rule(entropy, simple[1], exact[1])
    got, plain = (torch.autograd.grad(y, (hidden, weight), g) for y in (logps, simple[0]))
    for a, b, c in zip(got, plain, torch.autograd.grad(exact[0], wide, g.double()), strict=True):
        within_rule(a, b, c)


def test_gradients_are_computed_where_they_are_needed_alone(generator):
    hidden, weight, targets, g = inputs(33, 97, 24, generator)
    both = torch.autograd.grad(linear_logprob_cpu(hidden, weight, targets, 1.0, False)[0], (hidden, weight), g)
    for i, leaf in enumerate((hidden, weight)):
        leaves = [t if j == i else t.detach() for j, t in enumerate((hidden, weight))]
        logps = linear_logprob_cpu(*leaves, targets, 1.0, False)[0]
        assert torch.equal(torch.autograd.grad(logps, leaf, g)[0], both[i])


def test_a_bad_row_stays_alone_and_skipped_ones_have_no_gradient(generator):
    hidden, weight, targets, _ = inputs(40, 97, 24, generator)
    with torch.no_grad():
        hidden[1, 3] = hidden[3, 2] = torch.nan  # 3 is skipped
    logps, entropy, _ = linear_logprob_cpu(hidden, weight, targets, 1.0, True)
    assert logps.isnan().nonzero().tolist() == [[1]] and entropy.isnan().nonzero().tolist() == [[1], [3]]
    dhidden = torch.autograd.grad(logps[2:].sum(), hidden)[0]
    assert not dhidden[:2].any() and not dhidden[3].any() and torch.isfinite(dhidden).all() and dhidden[2].all()


def test_tiles_are_whole_multiples_of_16_and_bounded():
    for T, V in ((0, 5), (1, 5), (1000, 512), (100_000, 512), (1000, 151_936), (5000, 32_001)):
        tiles = tiles_of(T, V)
        assert [i for rows in tiles for i in range(rows.start, rows.stop)] == list(range(T))
        assert all((rows.stop - rows.start) % 16 == 0 and rows.stop - rows.start >= 64 for rows in tiles[:-1])
        assert all((rows.stop - rows.start) * V <= max(module.TILE_LOGITS, 64 * V) for rows in tiles)


def test_no_rows(generator):
    hidden, weight = torch.empty(0, 8, requires_grad=True), torch.randn(5, 8, generator=generator).requires_grad_()
    logps, entropy, argmax = linear_logprob_cpu(hidden, weight, torch.empty(0, dtype=torch.int64), 1.0, True)
    dhidden, dweight = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert logps.shape == entropy.shape == argmax.shape == (0,) and dhidden.shape == (0, 8) and not dweight.any()


def test_given_logits_and_hidden_states_agree_to_the_bit(generator):
    hidden, weight, targets, _ = inputs(64, 300, 32, generator)
    got, want = linear_logprob_cpu(hidden, weight, targets, 0.9, False), logprob(linear(hidden, weight), targets, temperature=0.9, backend="cpu")
    assert torch.equal(got[0], want.logps) and torch.equal(got[1], want.entropy)
