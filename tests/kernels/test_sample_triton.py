"""sample in Triton: the kept set against sorting in fp64, draws against the inverse CDF, and what only a kernel can get wrong."""

import math
import mmap
import os

import pytest
import torch

from athanor.kernels import logprob, philox_uniform, sample

pytest.importorskip("triton")
from athanor.kernels import sample_bracket_triton, sample_filter_triton, sample_tiles_triton  # noqa: E402
from athanor.kernels.sample_triton import sample_triton  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
OPTIONS = [(0.7, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (0.6, 20, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (2.0, 0, 1e-9, 0.0),
           (1.0, 0, 1.0, 0.05), (1.0, 0, 1.0, 1.0), (0.8, 150, 0.6, 0.0), (1.3, 30, 0.95, 0.02), (1.0, 10**6, 0.5, 0.1)]  # fmt: skip


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def small_structure(monkeypatch):
    """Under the interpreter segments of 4 tiles and short walks, so that a small vocabulary has several of both, and fewer but larger steps.

    A GPU runs what the tables hold.
    """
    if INTERPRETED:
        monkeypatch.setattr(sample_tiles_triton, "TILES", 4)
        monkeypatch.setattr(sample_bracket_triton, "STEPS", 2)
        monkeypatch.setattr(sample_filter_triton, "CHUNK", 256)
        monkeypatch.setattr(sample_filter_triton, "PIVOTS", 64)


@pytest.fixture
def brackets(monkeypatch):
    """The brackets of every call with filters: lo, hi, the lowest key that the threshold may have, and the largest logit's, (B, 4)."""
    seen, kernel = [], sample_filter_triton.sample_resolve_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (seen.append(args[3].cpu().clone()), kernel[grid](*args, **kwargs))

    monkeypatch.setattr(sample_filter_triton, "sample_resolve_kernel", Recorded())
    return seen


def keys(x):
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def draw(logits, device, rows=None, backend="triton", **options):
    rows = torch.arange(len(logits)) if rows is None else rows
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = sample(logits.to(device), seeds=(rows * 7 - 3).to(device), positions=(rows * 3).to(device), backend=backend, **options)
    return type(out)(*(x.cpu() for x in out))


def oracle(row, temperature, top_k, top_p, min_p):
    """p in fp64, its running sum in falling order, and the order: falling logit, then rising index."""
    z = row.double() / temperature
    p = (z - z.max()).exp()
    p /= p.sum()
    order = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    order = [i for i in order if row[i] > -torch.inf]
    if top_k:
        order = order[:top_k]
    mass, before, kept, near = math.fsum(p[i] for i in order), 0.0, [], False
    for i in order:
        if top_p < 1:
            near |= len(kept) > 0 and abs(before - top_p * mass) < 1e-6
            if before >= top_p * mass:
                break
        kept.append(i)
        before += float(p[i])
    near |= any(abs(float(p[i] / p.max()) - min_p) < 1e-6 for i in kept if p[i] < p.max())
    kept = [i for i in kept if p[i] >= min_p * p.max()]
    return p, kept, near


def special_rows(V, generator):
    """Random, heavy ties, all equal, half forbidden, one ulp apart, bf16 values, one token far above, flat."""
    logits = 4 * torch.randn(8, V, generator=generator)
    logits[1] = logits[1].round()
    logits[2] = 0.25
    logits[3, ::2] = -torch.inf
    logits[4] = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    logits[4, ::3] = 1.0
    logits[5] = logits[5].bfloat16().float()
    logits[6, V // 2] = 60.0
    logits[7] *= 0.02
    return logits


# one token; less than a tile; one more than 8 tiles of 128, two segments of the small structure
@pytest.mark.parametrize("V, dtype", [(1, torch.float32), (50, torch.float16), (1025, torch.float32),
                                      pytest.param(1025, torch.bfloat16, marks=pytest.mark.gpu)])  # fmt: skip
def test_kept_set_token_and_log_probs_against_fp64(V, dtype, triton_device, generator):
    logits = special_rows(V, generator).to(dtype)
    u = philox_uniform(torch.arange(8) * 7 - 3, torch.arange(8) * 3)
    compared = 0
    for t, k, p, m in OPTIONS:
        out = draw(logits, triton_device, temperature=t, top_k=k, top_p=p, min_p=m)
        for b in range(8) if V > 1 else (0, 3):
            full, kept, near = oracle(logits[b].float(), t, k, p, m)
            x, thr, last, token = logits[b].float(), out.thresholds[b], out.last_kept[b], int(out.tokens[b])
            got = torch.nonzero(((x > thr) | ((x == thr) & (torch.arange(V) <= last))) & (x > -torch.inf)).flatten().tolist()
            if near or not kept:
                continue  # a rounding error decides: fp32 probabilities
            compared += 1
            assert got == sorted(kept), (t, k, p, m, b)
            mass = full[got].sum()
            cdf = (full[got] / mass).cumsum(0)
            at = got.index(token)
            assert cdf[at] > u[b] - 1e-6 and cdf[at] - full[token] / mass < u[b] + 1e-6, (t, k, p, m, b)
            assert abs(out.full_logps[b] - full[token].log()) <= 2e-6 * max(1.0, -full[token].log())
            assert abs(out.logps[b] - (full[token] / mass).log()) <= 2e-6 * max(1.0, -full[token].log()) and out.logps[b] <= 0
            want = -(full * full.clamp_min(1e-300).log()).sum()
            assert abs(out.entropy[b] - want) <= 4e-6 * max(1.0, want)
    assert compared >= (40 if V > 1 else 9)


def test_statistics_err_no_more_than_the_reference(triton_device, within_rule, generator):
    logits = 3 * torch.randn(9, 700, generator=generator)
    logits[4] *= 100
    for options in ({"temperature": 0.7}, {"top_k": 40}, {"top_p": 0.8}):
        out = draw(logits, triton_device, **options)
        plain = draw(logits, "cpu", backend="reference", **options)
        wide = draw(logits.double(), "cpu", backend="reference", **options)
        assert torch.equal(out.tokens, wide.tokens) and torch.equal(plain.tokens, wide.tokens)
        for name in ("logps", "full_logps", "entropy"):
            within_rule(getattr(out, name), getattr(plain, name), getattr(wide, name), name)
        assert torch.equal(out.thresholds, plain.thresholds) and torch.equal(out.last_kept, plain.last_kept)


def test_a_row_does_not_depend_on_batch_order_or_the_form_of_its_parameters(triton_device, generator):
    logits = special_rows(300, generator)
    options = [OPTIONS[i] for i in (0, 2, 3, 5, 7, 8, 9, 1)]
    names = ("temperature", "top_k", "top_p", "min_p")
    mixed = {name: torch.tensor([o[i] for o in options]) for i, name in enumerate(names)}
    mixed["temperature"][3] = 0.0
    whole = draw(logits, triton_device, **mixed)
    order = torch.randperm(8, generator=generator)
    shuffled = draw(logits[order], triton_device, order, **{k: v[order] for k, v in mixed.items()})
    for name, a, b in zip(whole._fields, whole, shuffled, strict=True):
        assert torch.equal(a[order], b), name
    for i in range(8):
        alone = draw(logits[i : i + 1], triton_device, torch.tensor([i]), **{k: v[i].item() for k, v in mixed.items()})
        for name, a, b in zip(whole._fields, whole, alone, strict=True):
            assert torch.equal(a[i : i + 1], b), (i, name)


def test_greedy_takes_the_lowest_index_and_bad_rows_are_flagged(triton_device, generator):
    logits = torch.randn(6, 300, generator=generator)
    logits[0, [290, 130]] = 9.0
    logits[1, :299] = -torch.inf
    logits[2, 200], logits[3], logits[4, 7] = torch.nan, -torch.inf, torch.inf
    out = draw(logits, triton_device, temperature=0.0, top_k=3)
    assert out.tokens[[0, 1, 5]].tolist() == [130, 299, logits[5].argmax()] and not out.logps[[0, 1, 5]].any()
    assert torch.equal(out.thresholds[[0, 1, 5]], logits.amax(1)[[0, 1, 5]]) and torch.equal(out.last_kept[[0, 1, 5]], out.tokens[[0, 1, 5]])
    assert torch.allclose(out.full_logps[5], logits[5].log_softmax(0).amax())
    for options in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}):
        out = draw(logits, triton_device, **options)
        for x in (out.logps, out.full_logps, out.thresholds, out.entropy):
            assert torch.isnan(x).tolist() == [False, False, True, True, True, False], options
        assert ((out.tokens >= 0) & (out.tokens < 300)).all()


def test_tokens_are_the_references(triton_device, generator):
    """The reference's draws are held against the distribution by test_sample.py: 10 million of them in the slow tests."""
    logits = 1.5 * torch.randn(1, 130, generator=generator).expand(40, 130)
    for options in ({}, {"top_k": 40, "top_p": 0.9}):
        tokens = draw(logits, triton_device, **options).tokens
        assert torch.equal(tokens, draw(logits, "cpu", backend="reference", **options).tokens) and len(tokens.unique()) > 10


@pytest.mark.gpu
def test_draws_follow_the_distribution(generator):
    V, n = 2000, 10_000_000
    logits = 2 * torch.randn(1, V, generator=generator)
    logits[0, 500:600] -= 14
    for options in ({}, {"top_k": 900, "top_p": 0.95}):
        counts = torch.zeros(V, dtype=torch.float64)
        for rows in torch.arange(n).split(200_000):
            counts += torch.bincount(draw(logits.expand(len(rows), V), "cuda", rows, **options).tokens, minlength=V)
        full, kept, _ = oracle(logits[0], 1.0, options.get("top_k", 0), options.get("top_p", 1.0), 0.0)
        p = torch.zeros(V, dtype=torch.float64)
        p[kept] = full[kept] / full[kept].sum()
        assert not counts[p == 0].any()
        big = p * n >= 10
        chi2 = ((counts[big] - n * p[big]) ** 2 / (n * p[big])).sum() + (counts[~big].sum() - n * p[~big].sum()) ** 2 / (n * p[~big].sum() + 1)
        assert abs(chi2 - big.sum()) < 5 * math.sqrt(2 * big.sum()) + 10


def test_the_uniform_is_that_of_philox_uniform(triton_device):
    """Equal logits make the token the uniform number's leading digits: 1024 tokens, 10 bits."""
    seeds = torch.tensor([0, -1, 2**62 + 12345, -(2**63), 77], device=triton_device)
    positions = torch.tensor([0, 5, 2**40 + 1, 3, 2**32], device=triton_device)
    out = sample(torch.zeros(5, 1024, device=triton_device), seeds=seeds, positions=positions, backend="triton")
    assert torch.equal(out.tokens.cpu(), (philox_uniform(seeds.cpu(), positions.cpu()) * 1024).long())


def test_the_trainer_rebuilds_the_truncated_distribution(triton_device, within_rule, generator):
    logits = special_rows(400, generator)[[0, 1, 3, 5, 6]]
    out = draw(logits, triton_device, temperature=0.8, top_k=60, top_p=0.9, min_p=0.001)
    g = torch.randn(5, generator=generator)

    def run(x, backend, device):
        x = x.to(device).requires_grad_()
        got = logprob(x, out.tokens.to(device), temperature=0.8, support=[s.to(device) for s in out.support], backend=backend)
        return got.logps.detach().cpu(), got.entropy.cpu(), torch.autograd.grad(got.logps, x, g.to(device, got.logps.dtype))[0].cpu()

    got, plain, wide = run(logits, "triton", triton_device), run(logits, "reference", "cpu"), run(logits.double(), "reference", "cpu")
    for a, b, c in zip(got, plain, wide, strict=True):
        within_rule(a, b, c)
    assert torch.allclose(got[0], out.logps, atol=2e-6)
    assert (got[2] != 0).sum(1).tolist() == (plain[2] != 0).sum(1).tolist()


def test_padded_rows_and_offsets_beyond_two_to_the_31_elements(triton_device, generator):
    """Three rows 1.5 2^30 elements apart in memory that is never touched but for those rows: row 2 starts at element 3 2^30 > 2^31."""
    if triton_device.type == "cuda":
        memory = torch.empty(4 << 30, dtype=torch.float16, device="cuda")
    else:
        memory = torch.frombuffer(mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=torch.float16)
    logits = torch.randn(3, 150, generator=generator).half()
    far = memory.as_strided((3, 150), (3 << 29, 1))
    far.copy_(logits)
    memory.as_strided((3, 20), (3 << 29, 1), 150).fill_(torch.nan)  # beyond the vocabulary
    for options in ({}, {"top_p": 0.7, "top_k": 30}, {"temperature": 0.0}):
        for a, b in zip(draw(far, triton_device, **options), draw(logits, triton_device, **options), strict=True):
            assert torch.equal(a, b)


def test_no_rows_and_what_cannot_be_served(triton_device):
    assert all(x.shape == (0,) for x in draw(torch.empty(0, 5), triton_device, top_p=0.5))
    with pytest.raises(ValueError, match="logits of a row are not neighbours in memory"):
        draw(torch.ones(6, 4, device=triton_device).T, triton_device)
    with pytest.raises(ValueError, match="fp64 is the reference's"):
        draw(torch.ones(4, 6, dtype=torch.float64), triton_device)


def test_neither_batches_nor_parameters_compile_anew(launches, generator):
    for n in range(1, 51):
        rows = torch.arange(2 * n)[n:]
        sample_triton(torch.randn(n, 300, generator=generator), 0.1 * n, n % 7, 1.0 if n % 3 else n / 51, n / 60, rows, rows[:n])
    names = sorted(name for name, *_ in launches.keys)
    assert names == [f"sample_{what}_kernel" for what in ("bracket", "collect", "resolve", "tiles")], launches.keys
    for n in range(1, 51):
        rows = torch.arange(2 * n)[n:]
        sample_triton(torch.randn(n, 300, generator=generator), 0.1 * n, 0, 1.0, 0.0, rows, rows[:n])
    assert sorted(name for name, *_ in launches.keys) == sorted([*names, "sample_draw_kernel"]) and launches.grids[-1] == (50,)


def test_more_rows_than_a_grid_dimension_holds(launches):
    rows = torch.arange(65_537)
    sample_triton(torch.zeros(65_537, 2), 1.0, 0, 1.0, 0.0, rows, rows)
    sample_triton(torch.zeros(65_537, 2), 1.0, 1, 1.0, 0.0, rows, rows)
    assert launches.grids == [(65_537,)] * 6


def test_repeats_give_equal_bits(triton_device, generator):
    logits = special_rows(260, generator)
    first = draw(logits, triton_device, top_p=0.9, min_p=0.01)
    again = draw(logits, triton_device, top_p=0.9, min_p=0.01)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def flat_rows(generator):
    """A flat row, a wide one, heavy ties, bf16 values and a narrow one far from 0: 40 tiles."""
    logits = torch.randn(5, 5000, generator=generator)
    logits[1] *= 6
    logits[2] = (logits[2] * 2).round() / 2
    logits[3] = logits[3].bfloat16().float()
    logits[4] = 1000 + 0.01 * logits[4]
    return logits


def assert_references(out, logits, **options):
    plain = draw(logits, "cpu", backend="reference", **options)
    for name in ("tokens", "thresholds", "last_kept"):
        assert torch.equal(getattr(out, name), getattr(plain, name)), (name, options)
    assert torch.allclose(out.logps, plain.logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 700}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.2, "top_p": 0.99}], ids=str)
def test_the_bracket_holds_the_threshold(options, triton_device, brackets, generator, monkeypatch):
    """With the steps of a GPU.  The bracket is narrow, or no second read would be worth it."""
    monkeypatch.setattr(sample_bracket_triton, "STEPS", 9)
    logits = flat_rows(generator)
    out = draw(logits, triton_device, **options)
    assert_references(out, logits, **options)
    lo, hi, _, top = brackets[0].unbind(1)
    key = keys(out.thresholds)
    # what min-p keeps last may be the first above its bracket, which then holds nothing
    assert ((lo <= key) & ((key <= hi) | ("min_p" in options)) & (hi <= top)).all()
    inside = (keys(logits) >= lo[:, None]) & (keys(logits) <= hi[:, None])
    assert (inside.sum(1)[[0, 1, 3, 4]] < 2000).all(), inside.sum(1)


@pytest.mark.parametrize("options", [{"top_p": 0.9, "min_p": 1e-4}, {"top_k": 700}, {"top_k": 700, "top_p": 0.5}], ids=str)
def test_a_bracket_that_misses_costs_time_only(options, triton_device, brackets, generator, monkeypatch):
    """Margins that are wrong on purpose: brackets above the threshold and below it."""
    logits, above, below = flat_rows(generator)[[0, 2, 4]], 0, 0
    for sigmas, unseen in ((-30.0, 1e6), (0.0, -1e6), (-30.0, -1e6)):
        monkeypatch.setattr(sample_bracket_triton, "SIGMAS", sigmas)
        monkeypatch.setattr(sample_bracket_triton, "UNSEEN", unseen)
        out = draw(logits, triton_device, **options)
        assert_references(out, logits, **options)
        lo, hi, *_ = brackets.pop().unbind(1)
        above, below = above + (lo > keys(out.thresholds)).sum(), below + (hi < keys(out.thresholds)).sum()
    # top-p after top-k has no bracket below the largest logit
    assert above > 0 and (below > 0 or len(options) == 2 and "top_k" in options)


def test_a_threshold_of_zero_is_in_its_bracket(triton_device, brackets, generator, monkeypatch):
    """Below key 0 comes -0, which is no smaller than 0: a row whose least logits are 0 must not be read once more."""
    if not INTERPRETED:
        pytest.skip("a compiled kernel cannot be watched")
    logits, collected, collect = torch.randn(2, 3000, generator=generator).relu(), [], sample_filter_triton.collect

    def watched(*args, **kwargs):
        collected.append(args[5])
        return collect(*args, **kwargs)

    monkeypatch.setattr(sample_filter_triton, "collect", watched)
    out = draw(logits, triton_device, top_p=0.9)
    assert_references(out, logits, top_p=0.9)
    segments = -(-3000 // (sample_tiles_triton.TILES * sample_tiles_triton.TILE.value))
    assert (out.thresholds == 0).all() and (brackets[0][:, 0] == 0).all() and len(collected) == 2 * segments


def test_more_allowed_than_there_are(triton_device, generator):
    """Fewer allowed tokens than top-k keeps, and masses too small to be counted."""
    logits = flat_rows(generator)
    logits[0, 100:] = -torch.inf
    logits[1, 50:] -= 200
    for options in ({"top_k": 300}, {"top_k": 4000}, {"top_p": 0.9999999}, {"top_k": 4900, "min_p": 1e-30}):
        out = draw(logits[:2], triton_device, **options)
        plain = draw(logits[:2], "cpu", backend="reference", **options)
        assert torch.equal(out.tokens, plain.tokens), options
        if "top_k" in options:
            assert torch.equal(out.thresholds, plain.thresholds) and torch.equal(out.last_kept, plain.last_kept), options
