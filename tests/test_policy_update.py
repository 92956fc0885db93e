"""The update of one rollout: identities of the first step, what must not change the gradient, and the gate on the log-prob gap."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from athanor.config import GRPOConfig, ModelConfig, OptimizerConfig, SamplingConfig
from athanor.errors import UserError
from athanor.kernels import LossVariant
from athanor.model.transformer import Decoder
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.rollout import rollout_generator, sample_groups
from athanor.stages.policy_update import update_policy
from athanor.tasks.arithmetic import ArithmeticTask
from athanor.tokenizer import symbol_tokenizer

TASK = ArithmeticTask()
TOKENIZER = symbol_tokenizer(list(TASK.symbols))
CONTEXT = SimpleNamespace(name="zero", ranks=Ranks(threads=1))


def grpo_config(**changes):
    settings = {"kind": "grpo", "init": "base", "prompts": [{"task": "chain"}], "rewards": [{"reward": "accuracy"}], "prompts_per_step": 6}
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=0, grad_clip=0.0)
    return GRPOConfig(**settings, group_size=4, sampling=SamplingConfig(max_tokens=12), optimizer=optimizer, **changes)


def rollout(seed=0):
    model = Decoder(ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=32, num_hidden_layers=2, initializer_range=0.2)).initialize_(seed)
    config = grpo_config()
    generator = rollout_generator(model, TOKENIZER, 64, 4)
    groups = sample_groups(generator, TOKENIZER, [TASK.problem("train", i) for i in range(6)], 4, config.sampling, CONTEXT.ranks, seed)
    advantages = torch.from_numpy(np.random.default_rng(seed).normal(size=24).astype(np.float32))
    advantages[[1, 5, 6, 7, 20]] = 0.0
    return model, groups, advantages


def update(model, groups, advantages, variant=None, reference=None, **changes):
    config = grpo_config(**{"updates_per_rollout": 1, **changes})
    loop = SimpleNamespace(model=model, optimizer=Optimizer(model, config.optimizer, CONTEXT.ranks), applied=lambda norm, *_: math.isfinite(norm))
    metrics = update_policy(CONTEXT, config, variant or LossVariant(), loop, reference, groups, list(range(len(groups))), advantages, 0)
    return metrics, torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])


def test_the_first_update_starts_from_exact_identities():
    metrics, gradient = update(*rollout())
    assert metrics["logp_gap_max"] == metrics["kl_old"] == metrics["clip_fraction"] == 0.0
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0 and gradient.abs().max() > 0


def test_the_gradient_is_the_policy_gradient_of_the_definition():
    """On policy the loss is -sum A logp / N tokens: plain REINFORCE, computed here sequence by sequence."""
    model, groups, advantages = rollout()
    _, gradient = update(model, groups, advantages)
    model, groups, advantages = rollout()
    samples = [s for group in groups for s in group]
    total = sum(s.num_tokens for s in samples)
    loss = 0.0
    from athanor.model.transformer import PackedAttention

    for sample, advantage in zip(samples, advantages.tolist(), strict=True):
        tokens = torch.from_numpy(np.concatenate((sample.prompt_ids, sample.token_ids)))
        n = len(tokens) - 1
        hidden = model(tokens[:-1], torch.arange(n), PackedAttention(torch.tensor([0, n], dtype=torch.int32)))
        logps = torch.log_softmax(hidden @ model.lm_head_weight.T, -1).gather(1, tokens[1:, None])[:, 0]
        loss = loss - advantage * logps[len(sample.prompt_ids) - 1 :].sum() / total
    loss.backward()
    wanted = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [16, 50, 10_000])  # a sequence each, a few, all in one
def test_micro_batches_do_not_change_the_gradient(tokens):
    model, groups, advantages = rollout()
    _, whole = update(model, groups, advantages, micro_batch_tokens=10**6)
    model, groups, advantages = rollout()
    _, split = update(model, groups, advantages, micro_batch_tokens=tokens)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()) + 1e-8)


@pytest.mark.parametrize("changes", [{}, {"variant": LossVariant(correction="tis", correction_high=2.0), "updates_per_rollout": 2}], ids=["", "tis"])
def test_parts_do_not_change_the_gradient(monkeypatch, changes):
    """Four of them, packed by themselves; of two updates of three groups each, some have few samples."""
    metrics, whole = update(*rollout(), **changes)
    monkeypatch.setattr(CONTEXT, "ranks", Ranks(threads=1, gradient_parts=4))
    split_metrics, split = update(*rollout(), micro_batch_tokens=50, **changes)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()) + 1e-8)
    assert split_metrics["logp_gap_max"] == 0.0 and split_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)


def test_dropping_samples_without_advantage_does_not_change_the_gradient():
    model, groups, advantages = rollout()
    _, dropped = update(model, groups, advantages)
    model, groups, advantages = rollout()
    # With a reference every sample gets its forward; a KL weight of 1e-30 adds nothing that fp32 could see.
    reference = Decoder(model.config)
    reference.load_state_dict(model.state_dict())
    metrics, kept = update(model, groups, advantages, LossVariant(kl="k3", beta=1e-30), reference.requires_grad_(False))
    torch.testing.assert_close(dropped, kept, rtol=1e-4, atol=1e-6 * float(kept.abs().max()))
    assert metrics["kl_ref"] == 0.0


def test_flipped_advantages_flip_the_gradient_and_none_give_none():
    model, groups, advantages = rollout()
    _, gradient = update(model, groups, advantages)
    model, groups, advantages = rollout()
    _, flipped = update(model, groups, -advantages)
    torch.testing.assert_close(flipped, -gradient)


def test_several_updates_see_every_group_once():
    model, groups, advantages = rollout()
    metrics, _ = update(model, groups, advantages, updates_per_rollout=3)
    assert metrics["ratio_max"] > 1.0  # the later parts are off policy
    assert metrics["logp_gap_max"] == 0.0  # measured on the first only


def test_a_gap_of_rounding_size_warns_and_goes_on(monkeypatch):
    warnings = []
    monkeypatch.setattr(CONTEXT, "console", SimpleNamespace(warn=warnings.append), raising=False)
    model, groups, advantages = rollout()
    groups[0][0].logps[0] += 1e-4
    metrics, _ = update(model, groups, advantages)
    assert metrics["logp_gap_max"] == pytest.approx(1e-4, rel=0.01) and len(warnings) == 1 and "1e-05" in warnings[0]


def test_a_rollout_by_other_weights_is_caught():
    model, groups, advantages = rollout()
    with torch.no_grad():
        model.layers[0].o_proj.weight.mul_(1.01)
    with pytest.raises(UserError, match="sampled log-probs differ from the trainer's"):
        update(model, groups, advantages)


def test_a_log_prob_that_is_no_number_changes_no_weight():
    model, groups, advantages = rollout()
    groups[0][0].logps[0] = np.nan
    metrics, _ = update(model, groups, advantages)
    assert math.isnan(metrics["grad_norm"]) and math.isnan(metrics["logp_gap_max"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rollout()[0].parameters(), strict=True))


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.8, "min_p": 0.1}], ids=lambda s: " ".join(s))
def test_truncated_sampling_starts_from_the_same_identities(sampling):
    """The trainer rebuilds the distribution that each token was drawn from; its full softmax would give ratios below 1."""
    config = grpo_config(updates_per_rollout=1).model_copy(update={"sampling": SamplingConfig(max_tokens=12, **sampling)})
    model, _, advantages = rollout()
    generator = rollout_generator(model, TOKENIZER, 64, 4)
    groups = sample_groups(generator, TOKENIZER, [TASK.problem("train", i) for i in range(6)], 4, config.sampling, CONTEXT.ranks, 0)
    loop = SimpleNamespace(model=model, optimizer=Optimizer(model, config.optimizer, CONTEXT.ranks), applied=lambda norm, *_: math.isfinite(norm))
    metrics = update_policy(CONTEXT, config, LossVariant(), loop, None, groups, list(range(len(groups))), advantages, 0)
    assert metrics["logp_gap_max"] == metrics["logp_gap_mean"] == metrics["logp_gap_k3"] == 0.0
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    for group in groups:
        for sample in group:
            sample.support = None
    with pytest.raises(UserError, match="sampled log-probs differ"):
        update_policy(CONTEXT, config, LossVariant(), loop, None, groups, list(range(len(groups))), advantages, 0)


def test_the_gap_is_a_mean_and_a_divergence_too(monkeypatch):
    monkeypatch.setattr(CONTEXT, "console", SimpleNamespace(warn=lambda text: None), raising=False)
    model, groups, advantages = rollout()
    shift = 5e-4
    for sample in sum(groups, []):
        sample.logps = sample.logps - np.float32(shift)
    metrics, _ = update(model, groups, advantages)
    assert metrics["logp_gap_mean"] == pytest.approx(shift, rel=1e-2) and metrics["logp_gap_k3"] == pytest.approx(shift**2 / 2, rel=0.05)


@pytest.mark.parametrize("updates", [1, 3])
def test_a_correction_weighs_the_distance_from_the_sampler(updates, monkeypatch):
    """A sampler whose log-probs are off by log 1.5 on every token: the trainer's own are the old ones, a token weighs 1.5, or 1.2 when cut there."""
    model, groups, advantages = rollout()
    monkeypatch.setattr(CONTEXT, "console", SimpleNamespace(warn=lambda text: None), raising=False)
    plain, gradient = update(model, groups, advantages, updates_per_rollout=updates)
    for high, weight in ((2.0, 1.5), (1.2, 1.2)):
        model, groups, advantages = rollout()
        for sample in sum(groups, []):
            sample.logps = sample.logps - np.float32(np.log(1.5))
        variant = LossVariant(correction="tis", correction_high=high)
        corrected, scaled = update(model, groups, advantages, variant, updates_per_rollout=updates, max_logp_gap=1.0)
        assert corrected["logp_gap_max"] == pytest.approx(np.log(1.5), rel=1e-4)
        if updates == 1:
            assert corrected["ratio_max"] == 1.0  # old log-probs are the trainer's
            torch.testing.assert_close(scaled, weight * gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
            live = sum(s.num_tokens for s, a in zip(sum(groups, []), advantages.tolist(), strict=True) if a)
            assert corrected["correction_weight"] * live == pytest.approx(weight * live, rel=1e-3)
    assert "correction_weight" not in plain
