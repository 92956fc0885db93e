"""Losses in verl's signature against formulas in fp64 and, where verl is installed, against verl's own; scores against known answers.

verl pins older versions of transformers and tensordict than constraints.txt, so no extra installs it: its tests skip unless it can be imported.
"""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from athanor.adapters import verl as adapter
from athanor.errors import UserError
from athanor.losses import PRESETS

S, L = 6, 9


class ActorConfig(SimpleNamespace):
    """What the losses read of verl's."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def config(**changes) -> ActorConfig:
    named = dict(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={}, loss_scale_factor=None)
    return ActorConfig(**{**named, **changes})


def batch(dtype=torch.float64, spread: float = 0.5) -> dict:
    """Ragged, with a hole as tools leave it, one row without tokens, and ratios on both sides of every bound."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(L) < torch.tensor([L, 1, 0, 5, 7, L])[:, None]
    mask[3, 2] = False
    logps = -3 * torch.rand(S, L, generator=draw, dtype=torch.float64)
    old = logps + spread * torch.randn(S, L, generator=draw, dtype=torch.float64)
    advantages = torch.tensor([1.5, 0.0, 0.3, -2.0, -1.0, 0.7], dtype=torch.float64)[:, None] * mask
    return {"old_log_prob": old.to(dtype), "log_prob": logps.to(dtype).requires_grad_(), "advantages": advantages.to(dtype), "response_mask": mask}


def surrogate(ratio, A, low, high, cap):
    loss = torch.maximum(-ratio * A, -ratio.clamp(1 - low, 1 + high) * A)
    return torch.where(A < 0, torch.minimum(loss, -cap * A), loss)


def aggregated(x, mask, mode, info):
    """Each mode as its name says, over rows that have a token."""
    lengths, dp = mask.sum(1), info.get("dp_size", 1)
    sums = (x * mask).sum(1)
    if mode in ("token-mean", "token-sum"):
        return dp * sums.sum() / (1 if mode == "token-sum" else info.get("batch_num_tokens") or lengths.sum())
    rows = info.get("global_batch_size") or (lengths > 0).sum()
    if mode == "seq-mean-token-mean":
        sums = sums / lengths.clamp_min(1)
    return dp * sums.sum() / rows / ((info.get("loss_scale_factor") or L) if mode == "seq-mean-token-sum-norm" else 1)


def value_and_gradient(loss_fn, inputs, *args, **kwargs):
    inputs["log_prob"].grad = None
    loss, metrics = loss_fn(**inputs, **kwargs)
    loss.backward()
    return loss.detach(), inputs["log_prob"].grad, metrics


INFO = {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 16, "loss_scale_factor": 40}


@pytest.mark.parametrize("info", [{}, INFO])
@pytest.mark.parametrize("mode", adapter.AGGREGATION)
@pytest.mark.parametrize("cap, weighted", [(3.0, False), (1.4, True)])
def test_vanilla_is_the_dual_clip_formula(mode, info, cap, weighted):
    inputs = batch(spread=1.0)
    weights = torch.rand(S, L, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    weights[0, :3] = 0  # masked by verl's rollout correction
    extra = {"rollout_is_weights": weights} if weighted else {}
    actor = config(clip_ratio_c=cap, global_batch_info=info)
    loss, gradient, metrics = value_and_gradient(adapter.vanilla, inputs, loss_agg_mode=mode, config=actor, **extra)
    x, A, mask = inputs["log_prob"].detach().requires_grad_(), inputs["advantages"], inputs["response_mask"]
    per_token = surrogate((x - inputs["old_log_prob"]).exp(), A, 0.2, 0.28, cap)
    expected = aggregated(per_token * weights if weighted else per_token, mask, mode, info)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, x.grad)
    assert not weighted or not gradient[0, :3].any()  # weight 0 is exactly 0
    ratio = (x - inputs["old_log_prob"]).exp()
    kept = mask.double()
    outside = ((ratio > 1.28) & (A > 0)) | ((ratio < 0.8) & (A < 0))
    wanted = {"pg_clipfrac": outside, "pg_clipfrac_lower": (ratio > cap) & (A < 0), "ppo_kl": -ratio.log()}
    assert wanted["pg_clipfrac"].any() and wanted["pg_clipfrac_lower"].any()
    assert metrics == pytest.approx({f"actor/{name}": ((x * kept).sum() / kept.sum()).item() for name, x in wanted.items()}, abs=1e-6)


def preset_formula(name: str, x, old, A, mask):
    """Loss per token of each preset, from its paper."""
    ratio = (x - old).exp()
    lengths = mask.sum(1, keepdim=True).clamp_min(1)
    if name == "gspo":
        return surrogate((((x - old) * mask).sum(1, keepdim=True) / lengths).exp().expand_as(x), A, 3e-4, 4e-4, 1e9)
    if name == "cispo":
        return -ratio.detach().clamp(max=5) * A * x
    if name == "rloo":
        return -A * x
    low, high = {"r1": (10, 10), "dapo": (0.2, 0.28)}.get(name, (0.2, 0.2))
    return surrogate(ratio, A, low, high, 1e9)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_their_papers_formulas(name):
    inputs, mode = batch(spread=1.0), adapter.agg_mode_of(name)
    old, A, mask = (inputs[key] for key in ("old_log_prob", "advantages", "response_mask"))
    loss, gradient, _ = value_and_gradient(
        lambda **kwargs: adapter.preset_loss(name, **kwargs), inputs, loss_agg_mode=mode, config=config(clip_ratio=0.01, global_batch_info=INFO)
    )
    x = inputs["log_prob"].detach().requires_grad_()
    expected = aggregated(preset_formula(name, x, old, A, mask), mask, mode, INFO)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, x.grad)
    assert gradient.abs().max() > 1e-4


def test_what_cannot_be_honoured_is_named():
    inputs = batch()
    with pytest.raises(UserError, match="athanor_grpo: loss_agg_mode is 'token-mean'; wanted 'seq-mean-token-mean'"):
        adapter.preset_loss("grpo", **inputs, loss_agg_mode="token-mean", config=config())
    with pytest.raises(UserError, match="loss_agg_mode is 'mean'; wanted one of token-mean"):
        adapter.vanilla(**inputs, loss_agg_mode="mean", config=config())
    inputs["advantages"][4, 3] += 0.25  # as GAE would
    with pytest.raises(UserError, match="advantages of response 4 go from -1 to -0.75; wanted one for all of its tokens"):
        adapter.vanilla(**inputs, config=config())


def test_settings_complete_a_preset():
    actor = "actor_rollout_ref.actor."
    r1 = adapter.verl_settings("r1")
    assert r1[actor + "policy_loss.loss_mode"] == "athanor_r1" and r1[actor + "loss_agg_mode"] == "seq-mean-token-mean"
    assert (r1[actor + "use_kl_loss"], r1[actor + "kl_loss_type"], r1[actor + "kl_loss_coef"]) == (True, "low_var_kl", 0.001)
    assert r1["algorithm.adv_estimator"] == "grpo" and r1["algorithm.norm_adv_by_std_in_grpo"]
    assert not adapter.verl_settings("dr_grpo")["algorithm.norm_adv_by_std_in_grpo"]
    assert adapter.verl_settings("rloo")["algorithm.adv_estimator"] == "rloo" and not adapter.verl_settings("rloo")[actor + "use_kl_loss"]
    assert adapter.verl_settings("reinforce_pp")[actor + "kl_loss_type"] == "mse"
    with pytest.raises(UserError, match="did you mean 'dapo'"):
        adapter.verl_settings("dapoo")


def test_scores_in_verls_signature():
    right, wrong = "so it is \\boxed{\\frac{1}{2}}", "so it is \\boxed{3}"
    assert adapter.compute_score("any/math", right, "0.5", {"index": 3, "split": "test"}) == {"score": 1.0, "failed": 0.0}
    assert adapter.compute_score("any/math", wrong, "0.5") == {"score": 0.0, "failed": 0.0}
    assert adapter.compute_score("gsm8k", "#### 42", 42, None, extract="hash")["score"] == 1.0
    assert adapter.compute_score("any", "<think>a</think><answer>b</answer>", "b", reward="format")["score"] == 1.0
    with ThreadPoolExecutor(4) as threads:  # verl calls from threads
        scores = list(threads.map(lambda i: adapter.compute_score("m", f"\\boxed{{\\sqrt{{{i * i}}}}}", str(i))["score"], range(1, 9)))
    assert scores == [1.0] * 8


def test_a_verifier_that_fails_is_no_verdict():
    assert adapter.compute_score("m", "\\boxed{3}", "  ", failed_score=-0.5) == {"score": -0.5, "failed": 1.0}
    with pytest.raises(UserError, match="reward 'math' does not apply to a response of 'm'"):
        adapter.compute_score("m", "\\boxed{3}", None)
    with pytest.raises(UserError, match="did you mean math"):
        adapter.compute_score("m", "x", "y", reward="maths")


@pytest.fixture
def core_algos(monkeypatch):
    pytest.importorskip("verl", reason="verl is not installed (it wants other versions than constraints.txt)", exc_type=ImportError)
    module = importlib.import_module("verl.trainer.ppo.core_algos")
    monkeypatch.setattr(module, "POLICY_LOSS_REGISTRY", dict(module.POLICY_LOSS_REGISTRY))
    return module


def test_registered_names_are_found_by_verl(core_algos):
    before = set(core_algos.POLICY_LOSS_REGISTRY)
    importlib.import_module("athanor.adapters.verl_losses")
    names = adapter.register_losses()
    assert set(core_algos.POLICY_LOSS_REGISTRY) == before | set(names) and {f"athanor_{name}" for name in PRESETS} < set(names)
    assert core_algos.get_policy_loss_fn("athanor_vanilla") is adapter.vanilla
    for name in PRESETS:
        assert adapter.verl_settings(name)["algorithm.adv_estimator"] in [member.value for member in core_algos.AdvantageEstimator]


def test_verl_loads_what_the_docstring_names(core_algos):
    from verl.utils.import_utils import import_external_libs, load_extern_object

    words = [word.split("=", 1)[1] for word in adapter.__doc__.split() if "=" in word]
    assert words == ["athanor.adapters.verl_losses", "athanor_dapo", "pkg://athanor.adapters.verl", "compute_score", "code"]
    sys.modules.pop(words[0], None)
    import_external_libs(words[0])
    assert core_algos.get_policy_loss_fn(words[1])
    assert load_extern_object(words[2], words[3]) is adapter.compute_score


@pytest.mark.parametrize("info", [{}, INFO])
@pytest.mark.parametrize("ours, theirs, bounds", [
    ("vanilla", "vanilla", {}), ("vanilla", "vanilla", {"clip_ratio_c": 1.4}), ("gspo", "gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    ("cispo", "cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}), ("dapo", "vanilla", {"clip_ratio_c": 1e9}),
    ("dr_grpo", "vanilla", {"clip_ratio_high": 0.2, "clip_ratio_c": 1e9}),
])  # fmt: skip
def test_losses_equal_verls_own(ours, theirs, bounds, info, core_algos):
    from verl.workers.config import ActorConfig as TheirConfig

    adapter.register_losses()
    actor = TheirConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1, **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, **bounds})
    actor.global_batch_info.update(info)
    modes = [mode for mode in adapter.AGGREGATION if ours == "vanilla" or mode == adapter.agg_mode_of(ours)]
    weights = torch.rand(S, L, generator=torch.Generator().manual_seed(1)) * 2
    weights[0, :3] = 0
    for mode in modes:
        for extra in ({}, {"rollout_is_weights": weights}):
            inputs, made = batch(torch.float32, spread=1.0), []
            for name in (f"athanor_{ours}", theirs):
                made.append(value_and_gradient(core_algos.get_policy_loss_fn(name), inputs, loss_agg_mode=mode, config=actor, **extra))
            (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = made
            # fp32 on both sides; a weight goes through a logarithm here
            torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6)
            assert metrics == pytest.approx(their_metrics, abs=1e-6)
