"""linear_sample in Triton against the two-step inverse CDF in fp64, and what only a kernel can get wrong."""

import pytest
import torch

from athanor.kernels import linear_logprob, linear_sample

pytest.importorskip("triton")
from athanor.kernels.linear_sample_triton import linear_sample_triton  # noqa: E402


def draw(hidden, weight, device="cpu", rows=None, backend="triton", **options):
    rows = torch.arange(len(hidden)) if rows is None else rows
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = linear_sample(hidden.to(device), weight.to(device), seeds=(rows * 7 - 3).to(device), positions=(rows * 3).to(device), backend=backend,
                        **options)  # fmt: skip
    return type(out)(*(x.cpu() for x in out))


def inputs(B, D, V, generator, dtype=torch.float32):
    return (torch.randn(n, D, generator=generator).to(dtype) for n in (B, V))


# one row and less than a tile; rows over a tile of 16, V not a multiple of 128, D not one of 16; fp16
@pytest.mark.parametrize("B, D, V, dtype", [(1, 8, 7, torch.float32), (19, 24, 300, torch.float32), (4, 32, 257, torch.float16),
                                            pytest.param(65, 128, 1000, torch.bfloat16, marks=pytest.mark.gpu)])  # fmt: skip
def test_tokens_and_statistics_against_fp64(B, D, V, dtype, triton_device, within_rule, generator):
    hidden, weight = inputs(B, D, V, generator, dtype)
    for temperature in (0.6, torch.arange(B) % 3 * 0.5):
        out = draw(hidden, weight, triton_device, temperature=temperature)
        plain = draw(hidden, weight, backend="reference", temperature=temperature)
        wide = draw(hidden.double(), weight.double(), backend="reference", temperature=temperature)
        # a uniform number within 1e-6 of an edge may fall on either side: none of these does
        assert torch.equal(out.tokens, wide.tokens)
        for name in ("logps", "full_logps", "entropy"):
            within_rule(getattr(out, name), getattr(plain, name), getattr(wide, name), name)
        assert torch.equal(out.last_kept, wide.last_kept)
        greedy = wide.thresholds > -torch.inf
        assert torch.equal(out.thresholds > -torch.inf, greedy)
        within_rule(out.thresholds[greedy], plain.thresholds[greedy], wide.thresholds[greedy])


def test_log_probs_are_those_of_linear_logprob(triton_device, within_rule, generator):
    hidden, weight = inputs(10, 32, 200, generator)
    out = draw(hidden, weight, triton_device, temperature=0.8)
    device = [x.to(triton_device) for x in (hidden, weight, out.tokens)]
    got = linear_logprob(*device, temperature=0.8, backend="triton")
    wide = linear_logprob(hidden.double(), weight.double(), out.tokens, temperature=0.8)
    within_rule(out.full_logps, got.logps.cpu(), wide.logps)
    within_rule(out.entropy, got.entropy.cpu(), wide.entropy)


def test_a_row_does_not_depend_on_batch_or_order(triton_device, generator):
    """Integers under the interpreter: numpy's products of matrices add in another order for other rows, which exact products cannot show."""
    hidden, weight = inputs(18, 16, 140, generator)
    if triton_device.type == "cpu":
        hidden, weight = hidden.round(), weight.round()
    temperature = torch.linspace(0, 2, 18)
    whole = draw(hidden, weight, triton_device, temperature=temperature)
    order = torch.randperm(18, generator=generator)
    mixed = draw(hidden[order], weight, triton_device, order, temperature=temperature[order])
    alone = draw(hidden[17:], weight, triton_device, torch.tensor([17]), temperature=2.0)
    for name, a, b, c in zip(whole._fields, whole, mixed, alone, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[17:], c), name


def test_ties_bad_rows_and_no_rows(triton_device, generator):
    hidden, weight = inputs(4, 16, 300, generator)
    weight[[290, 140]] = 9 * hidden[0]
    hidden[2, 3], hidden[3] = torch.nan, 0.0  # row 3: all logits equal
    out = draw(hidden, weight, triton_device, temperature=0.0)
    assert out.tokens[[0, 3]].tolist() == [140, 0] and not out.logps[[0, 1, 3]].any()
    for t in (0.0, 1.0):
        out = draw(hidden, weight, triton_device, temperature=t)
        for x in (out.logps, out.full_logps, out.entropy, out.thresholds):
            assert torch.isnan(x).tolist() == [False, False, True, False]
        assert ((out.tokens >= 0) & (out.tokens < 300)).all()
    assert abs(out.entropy[3] - torch.tensor(300.0).log()) < 1e-5
    assert all(x.shape == (0,) for x in draw(hidden[:0], weight, triton_device))


def test_padded_strides_and_what_cannot_be_served(triton_device, generator):
    hidden, weight = inputs(3, 20, 130, generator)
    wide = torch.full((130, 31), torch.nan)
    wide[:, :20] = weight
    for a, b in zip(draw(hidden, wide.to(triton_device)[:, :20], triton_device), draw(hidden, weight, triton_device), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="the numbers of a row of weight are not neighbours in memory"):
        draw(hidden, weight.T.contiguous().T, triton_device)
    with pytest.raises(ValueError, match="hidden is torch.float32, weight is torch.float16"):
        draw(hidden, weight.half(), triton_device)


def test_neither_batches_nor_temperatures_compile_anew(launches, generator):
    weight = torch.randn(300, 16, generator=generator)
    for n in range(1, 51):
        rows = torch.arange(2 * n)[n:]
        linear_sample_triton(torch.randn(n, 16, generator=generator), weight, 0.1 * n, rows, rows)
    assert sorted(name for name, *_ in launches.keys) == ["linear_sample_draw_kernel", "linear_sample_tiles_kernel"], launches.keys
    assert launches.grids[-2:] == [(4 * 3,), (50,)]


@pytest.mark.gpu
def test_chi_square_of_two_million_draws(generator):
    V, n = 1000, 2_000_000
    hidden, weight = inputs(1, 64, V, generator, torch.bfloat16)
    tokens = draw(hidden.expand(n, 64), weight, "cuda", torch.arange(n), temperature=4.0).tokens
    p = (hidden.double() @ weight.double().T / 4).softmax(1)[0]
    c, big = torch.bincount(tokens, minlength=V).double(), p * n >= 10
    chi2 = ((c[big] - n * p[big]) ** 2 / (n * p[big])).sum() + (c[~big].sum() - n * p[~big].sum()) ** 2 / (n * p[~big].sum() + 1)
    assert abs(chi2 - big.sum()) < 5 * (2 * big.sum()) ** 0.5 + 10
