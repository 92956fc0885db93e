"""Athanor's losses and verifiers in verl's registries (verl 0.9).

    actor_rollout_ref.model.external_lib=athanor.adapters.verl_losses                    # imported in every worker; there `register_losses()` runs
    actor_rollout_ref.actor.policy_loss.loss_mode=athanor_dapo                           # one of the names that it registers

    reward.custom_reward_function.path=pkg://athanor.adapters.verl                       # math answers by athanor.rewards, in killable workers;
    reward.custom_reward_function.name=compute_score                                     # +reward.custom_reward_function.reward_kwargs.reward=code

athanor_vanilla is verl's vanilla by our kernel: clip_ratio_low, clip_ratio_high, clip_ratio_c and loss_agg_mode of the actor's config, any of verl's.
athanor_<preset> is ratio, surrogate, clip bounds and aggregation of the preset (athanor.losses); clip_ratio* are not read, and a loss_agg_mode that
is not the preset's is an error.  Advantages and the KL to a reference model stay verl's work: `verl_settings("r1")` lists what completes a preset.
Weights of verl's rollout correction multiply the loss, as in verl.  Nothing else of verl is touched; to undo it, leave the settings out.

Left out: advantages that differ within a sequence (GAE, token-level rewards), entropy, dynamic sampling and a renewed reference, which are verl's.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from athanor.errors import UserError
from athanor.kernels import LossVariant, policy_loss
from athanor.losses import PRESETS, resolve_preset
from athanor.rewards import Reward, make_reward
from athanor.samples import Problem, Sample

# verl's loss_agg_mode -> aggregation, and what a sequence is divided by besides ("horizon": loss_scale_factor or else the padded length)
AGGREGATION = {"token-mean": ("token_mean", None), "token-sum": ("token_mean", None), "seq-mean-token-mean": ("sequence_mean", None),
               "seq-mean-token-sum": ("constant", 1), "seq-mean-token-sum-norm": ("constant", "horizon")}  # fmt: skip
WEIGHT_RANGE = (1e-8, 4e8)  # of rollout correction weights: below counts as 0, and policy_loss knows nothing beyond exp(20)


def register_losses() -> list[str]:
    """Enter athanor_vanilla and athanor_<preset> into verl's policy losses; return the names."""
    registry = importlib.import_module("verl.trainer.ppo.core_algos")
    losses = {"athanor_vanilla": vanilla} | {f"athanor_{name}": functools.partial(preset_loss, name) for name in PRESETS}
    for name, loss in losses.items():
        registry.register_policy_loss(name)(loss)
    return list(losses)


def agg_mode_of(preset: str) -> str:
    """The loss_agg_mode that is the preset's aggregation."""
    aggregation = PRESETS[preset].variant.aggregation
    return {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean",
            "constant": "seq-mean-token-sum-norm" if preset == "dr_grpo" else "seq-mean-token-sum"}[aggregation]  # fmt: skip


def verl_settings(name: str) -> dict[str, Any]:
    """verl's settings that make one of its runs compute a preset, its advantages and KL included.  Raises UserError on an unknown name.

    Not among them: the population standard deviation (verl takes the sample one), dapo's dynamic sampling, r1's renewal of the reference, and for
    dr_grpo actor.loss_scale_factor, the completion limit.
    """
    preset = resolve_preset(name, max_tokens=1 if name == "dr_grpo" else None)
    estimator = {"leave_one_out": "rloo"}.get(preset.baseline, "reinforce_plus_plus_baseline" if preset.whiten else "grpo")
    actor = {"policy_loss.loss_mode": f"athanor_{name}", "loss_agg_mode": agg_mode_of(name), "use_kl_loss": preset.variant.kl != "none"}
    if preset.variant.kl != "none":
        actor |= {"kl_loss_type": {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}[preset.variant.kl], "kl_loss_coef": preset.variant.beta}
    settings = {f"actor_rollout_ref.actor.{key}": value for key, value in actor.items()}
    settings |= {"actor_rollout_ref.model.external_lib": "athanor.adapters.verl_losses", "algorithm.adv_estimator": estimator}
    return settings | ({"algorithm.norm_adv_by_std_in_grpo": preset.scale == "std"} if estimator == "grpo" else {})


def vanilla(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean", config=None,
            rollout_is_weights: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """verl's policy-loss signature: log-probs, advantages and mask (B, L); returns the loss of this micro-batch and verl's metrics."""
    low, high = (config.clip_ratio if bound is None else bound for bound in (config.clip_ratio_low, config.clip_ratio_high))
    numbers = dict(surrogate="dual_clip", clip_low=low, clip_high=high, dual_clip=config.get("clip_ratio_c", 3.0))
    return _loss(numbers, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)


def preset_loss(name: str, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean",
                config=None, rollout_is_weights: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """The same signature behind the name of a preset.  Raises UserError for a loss_agg_mode that is not the preset's."""
    if loss_agg_mode != agg_mode_of(name):
        raise UserError(f"athanor_{name}: loss_agg_mode is {loss_agg_mode!r}; wanted {agg_mode_of(name)!r}")
    v = PRESETS[name].variant
    # Without weights the two have the same gradient; weights belong to the tokens, as in verl's own GSPO.
    ratio = "sequence_token" if v.ratio == "sequence" else v.ratio
    numbers = dict(ratio=ratio, surrogate=v.surrogate, clip_low=v.clip_low, clip_high=v.clip_high)
    return _loss(numbers, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)


def _loss(numbers: dict, old: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor, mode: str, config, weights: Tensor | None):
    if mode not in AGGREGATION:
        raise UserError(f"athanor: loss_agg_mode is {mode!r}; wanted one of {', '.join(AGGREGATION)}")
    batch = config.global_batch_info  # of the optimizer step: dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    kept = mask.bool()
    numbers["aggregation"], numbers["max_tokens"] = AGGREGATION[mode]
    if numbers["max_tokens"] == "horizon":
        numbers["max_tokens"] = batch.get("loss_scale_factor") or mask.shape[1]
    rollout = None
    if weights is not None:  # exp(old - rollout) is the weight then
        low, high = WEIGHT_RANGE
        numbers |= dict(correction="token_mask", correction_low=low, correction_high=high)
        rollout = (old - weights.log())[kept]
    lengths = kept.sum(1)
    loss, stats = policy_loss(
        logps[kept], old[kept], one_per_sequence(advantages, kept), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        rollout_logps=rollout, variant=LossVariant(**numbers), num_sequences=batch.get("global_batch_size"),
        num_tokens=1 if mode == "token-sum" else batch.get("batch_num_tokens"),
    )  # fmt: skip
    with torch.no_grad():
        log_ratio, count = (logps - old)[kept].clamp(-20, 20), stats["num_tokens"].clamp_min(1)
        # Only dual clip has a cap for A < 0; policy_loss counts it among the tokens that the upper bound cuts.
        capped = ((log_ratio.exp() > numbers["dual_clip"]) & (advantages[kept] < 0)).sum() if "dual_clip" in numbers else count * 0
        metrics = {
            "actor/pg_clipfrac": ((stats["clip_low"] + stats["clip_high"] - capped) / count).item(),
            "actor/ppo_kl": (-log_ratio.sum() / count).item(),
            "actor/pg_clipfrac_lower": (capped / count).item(),
        }
    return loss * batch.get("dp_size", 1), metrics


def one_per_sequence(advantages: Tensor, kept: Tensor) -> Tensor:
    """(B,) from verl's (B, L), 0 for a row without tokens.  Raises UserError where a row holds different ones."""
    highest, lowest = (advantages.masked_fill(~kept, fill) for fill in (-torch.inf, torch.inf))
    highest, lowest = highest.amax(1), lowest.amin(1)
    differ = (highest > lowest).nonzero()
    if len(differ):
        i = int(differ[0])
        raise UserError(f"athanor: the advantages of response {i} go from {lowest[i]:.4g} to {highest[i]:.4g}; wanted one for all of its tokens, "
                        "as adv_estimator grpo, rloo and reinforce_plus_plus_baseline give")  # fmt: skip
    return highest.masked_fill(~kept.any(1), 0.0)


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None, *, reward: str = "math",
                  failed_score: float = 0.0, reward_router_address: str | None = None, reward_model_tokenizer: Any = None,
                  **settings) -> dict[str, float]:  # fmt: skip
    """Score one response with a reward of athanor.rewards, in verl's signature.

    ground_truth is the gold answer; extra_info goes into the problem's metadata (for code: the tests, see rewards/code_tests.py), its `prompt` is
    the text before the response.  reward, failed_score and **settings, which are the reward's own, come from verl's reward_kwargs.  verl passes the
    other two where it has a reward model, which is not asked.
    Returns {"score", "failed"}: failed = 1 when a verifier broke or ran out of time, which is a failed_score and no verdict on the response.
    Raises UserError for an unknown reward or setting, or when the reward does not apply to the response (no gold answer, no tests).
    """
    metadata = dict(extra_info or {})
    prompt = metadata.pop("prompt", "")
    gold = None if ground_truth is None else str(ground_truth)
    problem = Problem(prompt if isinstance(prompt, str) else "", gold, 0, str(data_source), metadata=metadata)
    judge = _reward(reward, tuple(sorted(settings.items())))
    sample = Sample(problem, solution_str, None, None)
    outcome = judge.outcomes([sample])[0] if judge.runs_in != "caller" else None
    value = judge.score(sample, problem) if outcome is None else outcome.value
    if outcome is not None and outcome.status != "score":
        return {"score": float(failed_score), "failed": 1.0}
    if value is None:
        raise UserError(f"compute_score: reward {reward!r} does not apply to a response of {data_source!r}; wanted a ground_truth (code: tests)")
    return {"score": float(value), "failed": 0.0}


@functools.cache
def _reward(name: str, settings: tuple) -> Reward:
    return make_reward(name, **dict(settings))
