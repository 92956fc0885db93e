"""The language and the statistics by which FP8 is compared with no FP8."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from fp8_language import LENGTH, TOPICS, VOCABULARY, Falling, Language  # noqa: E402
from fp8_loss import compare, figures_of_falls, interval, spread, summary  # noqa: E402
from fp8_products import Noisy  # noqa: E402

from athanor.kernels import fp8_mixture, moe_places  # noqa: E402


def test_documents_follow_the_tables_and_do_not_depend_on_who_asks():
    language = Language(3, torch.device("cpu"))
    ids = language.documents(0, 400)
    assert ids.shape == (400, LENGTH + 1) and np.array_equal(language.documents(17, 2), ids[17:19])
    # Over all topics, what follows a token has the mean of the chances; 25,600 draws leave a standard error of 0.003 in each of the 64.
    chances = np.zeros(VOCABULARY)
    for tilt in language.tilts:
        for token, count in zip(*np.unique(ids[:, :-1], return_counts=True), strict=True):
            e = np.exp(language.pairs[0, token] + tilt)
            chances += count * e / e.sum() / TOPICS
    seen = np.bincount(ids[:, 1:].flatten(), minlength=VOCABULARY)
    assert np.abs(seen - chances).max() / ids[:, 1:].size < 0.015  # 400 topics drawn of 8


@pytest.mark.parametrize("kind", [Language, Falling])
def test_the_best_loss_is_that_of_the_whole_documents_probability(kind):
    language, given = kind(0, torch.device("cpu")), len(kind.spreads)
    total = 0.0
    for row in language.documents(5, 3):
        chances = []
        for tilt in language.tilts:
            logits = torch.from_numpy(sum(language.pairs[i][row[given - 1 - i : -1 - i]] for i in range(given)) + tilt)
            chances.append(float(logits.log_softmax(-1).gather(1, torch.from_numpy(row[given:, None])).sum()))
        total -= float(torch.tensor(chances, dtype=torch.float64).logsumexp(0)) - math.log(TOPICS)
    assert language.best_loss(5, 3) == pytest.approx(total / (3 * LENGTH), rel=1e-12)


@pytest.mark.parametrize("mode", ["dgrad", "wgrad"])
def test_noise_without_signs_is_fp8_and_with_signs_has_its_size(mode):
    """Output and all gradients of a layer's experts; what the signs turn is the whole error of an operand, and only its side."""
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(150, 160), 0.1 * torch.randn(4, 2 * 96, 160), 0.1 * torch.randn(4, 160, 96)
    ids, weights, dout = torch.randint(0, 4, (150, 2), dtype=torch.int32), torch.rand(150, 2), torch.randn(150, 160)
    found = []
    for noise in (None, Noisy(wgrad=mode == "wgrad", seed=None), Noisy(wgrad=mode == "wgrad", seed=0)):
        leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
        places = moe_places(ids, 4, align=128)
        if noise is None:
            out = fp8_mixture(leaves[0], leaves[1], places, leaves[2], leaves[3], wgrad="fp8" if mode == "wgrad" else "bf16")
        else:
            out = noise.routed(leaves[0], leaves[1], places, leaves[2], leaves[3], gathered=False)
        out.backward(dout)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fp8, same, other in zip(*found, strict=True):
        torch.testing.assert_close(same, fp8, rtol=2e-5, atol=2e-5 * float(fp8.abs().max()))
        assert 0.01 < float((other - fp8).norm() / fp8.norm()) < 0.2
    fp8, noise = Noisy(wgrad=False, seed=None), Noisy(wgrad=False, seed=1)
    for block in ((1, 128), (128, 1)):
        error, turned = fp8.noisy(x, block) - x, noise.noisy(x, block) - x
        torch.testing.assert_close(turned.abs(), error.abs(), rtol=0, atol=1e-6)
        assert 0.45 < float(((turned * error) > 0).double().mean() / (error != 0).double().mean()) < 0.55


def test_the_interval_is_students():
    # n = 4, from a table of the distribution: 3.182 times the standard error
    mean, error, half = interval([1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx(math.sqrt(14 / 3 / 4))) and half == pytest.approx(3.182 * error)
    with pytest.raises(ValueError, match="1 values, wanted 2 to 12"):
        interval([1.0])


def test_a_pair_is_two_runs_of_one_seed():
    rows = [{"mode": mode, "seed": seed, "held_out": loss, "last_steps": 2 * loss}
            for seed in (0, 1, 2) for mode, loss in (("off", 2.0 + seed), ("disturbed", 2.0 + seed), ("dgrad", (2.0 + seed) * 1.001),
                                                     ("wgrad", (2.0 + seed) * (1.01 if seed else 0.99)))]  # fmt: skip
    found = summary([*rows, {"mode": "off", "seed": 3, "held_out": 1.0, "last_steps": 1.0}])
    assert found["disturbed, held_out"]["values"] == [0.0, 0.0, 0.0] and found["dgrad, last_steps"]["mean"] == pytest.approx(0.001)
    assert found["dgrad, held_out"]["within"] and not found["wgrad, held_out"]["within"]


def falling_rows(kind, seed, falls, losses):
    """Runs that stand at 3 up to a step and at 2 from there on."""
    return [{"mode": kind, "seed": seed, "draw": draw, "held_out": loss, "curve": [3.0 if 10 * i < fall else 2.0 for i in range(50)]}
            for draw, (fall, loss) in enumerate(zip(falls, losses, strict=True))]  # fmt: skip


def test_a_fall_is_where_a_run_passes_half_way_of_the_runs_without_fp8():
    rows = falling_rows("off", 0, (200, 220), (2.0, 2.2)) + falling_rows("noise", 0, (300, 900), (2.31, 2.1))
    found = figures_of_falls(rows)
    assert found["off", 0]["step"] == [210, 230] and found["noise", 0]["step"] == [310, 510]  # never: after the last step
    assert found["noise", 0]["held_out"] == pytest.approx([0.1, 0.0])


def test_a_bias_is_beyond_the_spread_within_seeds_and_between_them():
    def figures(shifts, n=4):
        rng = np.random.default_rng(0)
        return {(kind, seed): {"held_out": list(rng.normal(shift if kind == "dgrad" else 0, 0.01, n))}
                for seed, shift in enumerate(shifts) for kind in ("noise", "dgrad")}  # fmt: skip

    even = compare(figures([0.05, 0.05, 0.05, 0.05]), "dgrad", "noise", "held_out")
    assert even["beyond"] and even["difference"] == pytest.approx(0.05, abs=0.01)
    # 0.01 sqrt(2 / 4) / sqrt(4 seeds) = 0.0035 within seeds
    assert 0.002 < compare(figures([0, 0, 0, 0]), "dgrad", "noise", "held_out")["error"] < 0.007
    uneven = compare(figures([0.2, -0.1, 0.2, -0.1]), "dgrad", "noise", "held_out")
    assert not uneven["beyond"] and uneven["error"] == pytest.approx(np.std([0.2, -0.1, 0.2, -0.1], ddof=1) / 2, rel=0.15)
    found = figures([0.05] * 4, n=400)
    assert spread(found, "dgrad", "held_out") == pytest.approx(0.01, rel=0.05)
    with pytest.raises(ValueError, match="1 seeds of dgrad and noise, wanted at least 2"):
        compare(figures([0.0]), "dgrad", "noise", "held_out")
