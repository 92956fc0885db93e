import math

import pytest
import torch

from athanor.errors import UserError
from athanor.kernels import policy_loss
from athanor.losses import PRESETS, formula, resolve_preset


def evaluate(preset, logps, old, A, ref):
    """Loss by the paper's equation, written out with Python floats for sequences of unequal length."""
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
                "cispo": -min(r, 5.0) * a * lp,
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
    preset = resolve_preset(name, **({"max_tokens": 32} if name == "dr_grpo" else {}))
    g = torch.Generator().manual_seed(5)
    lengths = [3, 7, 1, 5]
    logps = -2 * torch.rand(16, generator=g, dtype=torch.float64)
    old, ref = (logps + s * torch.randn(16, generator=g, dtype=torch.float64) for s in (0.5, 0.7))
    A = torch.tensor([1.3, -0.8, 0.4, -1.1], dtype=torch.float64)
    loss, _ = policy_loss(logps, old, A, torch.tensor([0, 3, 10, 11, 16]), ref_logps=ref, variant=preset.variant)
    rows = [[x.tolist() for x in t.split(lengths)] for t in (logps, old, ref)]
    assert math.isclose(loss, evaluate(preset, rows[0], rows[1], A.tolist(), rows[2]), rel_tol=1e-12)


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
