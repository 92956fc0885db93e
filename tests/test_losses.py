import itertools
import math

import pytest
import torch

from athanor.errors import UserError
from athanor.kernels import policy_loss
from athanor.losses import PRESETS, formula, resolve_preset


def evaluate(preset, logps, old, A, ref, stopped=None):
    """Loss by the paper's equation, written out with Python floats for sequences of unequal length.

    stopped: the log-probs that stand under a stop-gradient (cispo's weight); None = logps.
    """
    stopped = logps if stopped is None else stopped
    v = preset.variant
    per_token, N = [], sum(map(len, logps))
    for i, row in enumerate(logps):
        for t, lp in enumerate(row):
            r = math.exp(lp - old[i][t])
            s = math.exp(sum(x - y for x, y in zip(row, old[i], strict=True)) / len(row))
            e = ref[i][t] - lp
            a = A[i]
            per_token.append((i, {
                "grpo": -min(r * a, min(max(r, 0.8), 1.2) * a) + 0.04 * (math.exp(e) - e - 1),
                "r1": -min(r * a, min(r, 11) * a) + 0.001 * (math.exp(e) - e - 1),
                "dapo": -min(r * a, min(max(r, 0.8), 1.28) * a),
                "dr_grpo": -min(r * a, min(max(r, 0.8), 1.2) * a),
                "gspo": -min(s * a, min(max(s, 1 - 3e-4), 1 + 4e-4) * a),
                "cispo": -min(math.exp(stopped[i][t] - old[i][t]), 5.0) * a * lp,
                "rloo": -a * lp,
                "reinforce_pp": -min(r * a, min(max(r, 0.8), 1.2) * a) + 0.001 * e * e / 2,
            }[preset.name]))  # fmt: skip
    if v.aggregation == "token_mean":
        return sum(x for _, x in per_token) / N
    if v.aggregation == "constant":
        return sum(x for _, x in per_token) / (len(logps) * v.max_tokens)
    return sum(x / len(logps[i]) for i, x in per_token) / len(logps)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_equation_of_its_paper(name):
    preset = preset_of(name)
    g = torch.Generator().manual_seed(5)
    lengths = [3, 7, 1, 5]
    logps = -2 * torch.rand(16, generator=g, dtype=torch.float64)
    old, ref = (logps + s * torch.randn(16, generator=g, dtype=torch.float64) for s in (0.5, 0.7))
    A = torch.tensor([1.3, -0.8, 0.4, -1.1], dtype=torch.float64)
    loss, _ = policy_loss(logps, old, A, torch.tensor([0, 3, 10, 11, 16]), ref_logps=ref, variant=preset.variant)
    rows = [[x.tolist() for x in t.split(lengths)] for t in (logps, old, ref)]
    assert math.isclose(loss, evaluate(preset, rows[0], rows[1], A.tolist(), rows[2]), rel_tol=1e-12)


def preset_of(name, **more):
    return resolve_preset(name, **({"max_tokens": 32} if name == "dr_grpo" else {}), **more)


@pytest.mark.parametrize("name", PRESETS)
def test_gradient_is_the_finite_difference_of_the_papers_equation(name):
    """T7: the same Python floats as above, moved by +-1e-5 one token at a time."""
    preset = preset_of(name)
    g = torch.Generator().manual_seed(6)
    lengths = [3, 7, 1, 5]
    logps = -2 * torch.rand(16, generator=g, dtype=torch.float64)
    # gspo's bounds are 3e-4 and 4e-4 wide: at the noise of the others every sequence would be clipped or nearly so, with gradient 0
    noise = 3e-4 if name == "gspo" else 0.5
    old, ref = (logps + s * torch.randn(16, generator=g, dtype=torch.float64) for s in (noise, 0.7))
    A = torch.tensor([1.3, -0.8, 0.4, -1.1], dtype=torch.float64)
    x = logps.clone().requires_grad_()
    loss, _ = policy_loss(x, old, A, torch.tensor([0, 3, 10, 11, 16]), ref_logps=ref, variant=preset.variant)
    got = torch.autograd.grad(loss, x)[0]
    rows = [[t.tolist() for t in y.split(lengths)] for y in (logps, old, ref)]

    def moved(t, h):
        y = logps.clone()
        y[t] += h
        return evaluate(preset, [z.tolist() for z in y.split(lengths)], rows[1], A.tolist(), rows[2], stopped=rows[0])

    want = torch.tensor([(moved(t, 1e-5) - moved(t, -1e-5)) / 2e-5 for t in range(16)], dtype=torch.float64)
    assert (got - want).abs().max() <= 1e-8 and got.abs().max() > 1e-2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", PRESETS)
def test_the_cut_into_micro_batches_does_not_change_the_gradient(name, dtype, tolerance):
    """T8: 16 sequences in one call, in 2 and in 16, shuffled, and padded with masked garbage, each with the step's own denominators."""
    preset = preset_of(name)
    g = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 12, (16,), generator=g).tolist()
    logps = [(-2 * torch.rand(n, generator=g, dtype=torch.float64)).to(dtype) for n in lengths]
    old, ref = ([(x + s * torch.randn(len(x), generator=g)).to(dtype) for x in logps] for s in (0.5, 0.7))
    A = torch.randn(16, generator=g, dtype=torch.float64).to(dtype)

    def gradient(calls, padding=0):
        """One gradient per sequence, accumulated over calls of the sequences that each names."""
        leaves = [x.clone().requires_grad_() for x in logps]
        garbage = torch.full((padding,), torch.nan, dtype=dtype)
        for members in calls:
            joined = [torch.cat([x for i in members for x in (values[i], garbage)]) for values in (leaves, old, ref)]
            cu = torch.tensor([0, *itertools.accumulate(lengths[i] + padding for i in members)])
            mask = torch.cat([torch.arange(lengths[i] + padding) < lengths[i] for i in members]) if padding else None
            loss, _ = policy_loss(joined[0], joined[1], A[members], cu, ref_logps=joined[2], mask=mask, variant=preset.variant,
                                  num_tokens=sum(lengths), num_sequences=16)  # fmt: skip
            loss.backward()
        return torch.cat([x.grad for x in leaves]).double()

    whole = gradient([list(range(16))])
    shuffled = torch.randperm(16, generator=g).tolist()
    others = {
        "2 x 8": gradient([list(range(8)), list(range(8, 16))]),
        "16 x 1": gradient([[i] for i in range(16)]),
        "shuffled": gradient([shuffled]),
        "shuffled, 5 + 11": gradient([shuffled[:5], shuffled[5:]]),
        "padded": gradient([list(range(16))], padding=3),
    }
    for how, other in others.items():
        assert (other - whole).abs().max() <= tolerance * whole.abs().max(), how


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_step_is_exact(name):
    """T31: with old = ref = new, ratio 1, nothing clipped, both KL 0, and the loss is minus the weighted mean advantage."""
    preset = preset_of(name)
    v, lengths = preset.variant, torch.tensor([3, 7, 1, 5])
    logps = -2 * torch.rand(16, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    A = torch.tensor([1.3, -0.8, 0.4, -1.1], dtype=torch.float64)
    loss, stats = policy_loss(logps, logps.clone(), A, torch.tensor([0, 3, 10, 11, 16]), ref_logps=logps.clone(), variant=v)
    assert stats["ratio_sum"] == stats["num_tokens"] == 16 and stats["ratio_max"] == 1
    assert all(stats[k] == 0 for k in ("clip_low", "clip_high", "old_kl_sum", "ref_kl_sum"))
    weights = {"token_mean": 1 / 16, "constant": 1 / (4 * (v.max_tokens or 1))}.get(v.aggregation)
    weights = torch.full((16,), weights, dtype=torch.float64) if weights else (1 / (4.0 * lengths.double())).repeat_interleave(lengths)
    surrogate = A.repeat_interleave(lengths) * (logps if v.surrogate in ("cispo", "reinforce") else 1.0)
    assert math.isclose(loss, -(weights * surrogate).sum(), rel_tol=1e-14)


def test_settings_around_the_loss():
    assert PRESETS["dapo"].dynamic_sampling and not any(p.dynamic_sampling for n, p in PRESETS.items() if n != "dapo")
    assert PRESETS["r1"].reference_interval == 400 and PRESETS["reinforce_pp"].whiten
    assert {n: (p.scale, p.baseline) for n, p in PRESETS.items() if (p.scale, p.baseline) != ("std", "mean")} == {
        "dr_grpo": ("none", "mean"), "rloo": ("none", "leave_one_out"), "reinforce_pp": ("none", "mean")}  # fmt: skip


def test_overrides_replace_single_settings_and_drop_what_they_make_meaningless():
    p = resolve_preset("grpo", beta=0.0, clip_high=0.3, eps=1e-4, aggregation=None)
    assert (p.variant.kl, p.variant.beta, p.variant.clip_high, p.variant.clip_low, p.eps) == ("none", 0, 0.3, 0.2, 1e-4)
    assert resolve_preset("r1", kl="none").reference_interval is None and resolve_preset("dapo", beta=0.1).variant.kl == "k3"
    p = resolve_preset("dr_grpo", aggregation="token_mean", correction="tis")
    assert p.variant.max_tokens is None and p.variant.correction_high == 2.0
    assert resolve_preset("grpo") == PRESETS["grpo"]


@pytest.mark.parametrize("name, overrides, message", [
    ("gpro", {}, "loss: unknown preset 'gpro'; did you mean .*'grpo'.*known: cispo"),
    ("grpo", {"clip_hihg": 0.3}, "loss grpo: unknown setting 'clip_hihg'; did you mean 'clip_high'"),
    ("grpo", {"scale": "sdt"}, "loss grpo: scale is 'sdt'; did you mean 'std'"),
    ("dr_grpo", {}, "loss dr_grpo: max_tokens is missing"),
    ("grpo", {"delta": 4.0}, "loss grpo: LossVariant: delta is 4.0, but only surrogate 'two_sided' uses it"),
    ("dapo", {"reference_interval": 10}, "without KL there is no reference model"),
    ("grpo", {"kl": "none", "beta": 0.1}, "give both or neither"),
])  # fmt: skip
def test_wrong_presets_are_user_errors_with_near_misses(name, overrides, message):
    with pytest.raises(UserError, match=message):
        resolve_preset(name, **overrides)


def test_formula_states_every_constant():
    assert formula(resolve_preset("r1")) == (
        "r1: loss = mean over sequences of the mean over tokens of -min(rho A, clip(rho, 0, 11) A) + 0.001 * (exp(ref - logp) - (ref - logp) - 1); "
        "A = (r_i - mean_group(r)) / (std_group(r) + 1e-06); rho = exp(logp - old); ref = policy every 400 steps"
    )
    line = formula(resolve_preset("dapo", correction="sequence_mask"))
    for part in ("clip(rho, 0.8, 1.28)", "sum_tokens / num_tokens of the step", "1[0 <= W <= 3]", "W = exp(sum_seq(old - rollout))", "drawn again"):
        assert part in line, part
    assert len({formula(p).split(": ", 1)[1] for p in PRESETS.values()}) == len(PRESETS)
    assert all("\n" not in formula(p) for p in PRESETS.values())
