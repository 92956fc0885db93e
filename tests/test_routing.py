"""Balance of routers over an optimizer step, and replay of recorded experts through the trainer's scoring."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import GRPOConfig, OptimizerConfig, SamplingConfig, SFTConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.kernels import LossVariant
from athanor.model.moe import Routes, routers
from athanor.model.transformer import PackedAttention, fill_tokens
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.rollout import rollout_generator, sample_groups
from athanor.stages.policy_update import check_experts, update_policy
from athanor.stages.routing import RouterBalance
from athanor.stages.training import completion_logprobs, cross_entropy_step
from athanor.tasks.arithmetic import ArithmeticTask
from athanor.tokenizer import symbol_tokenizer

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, random_decoder  # noqa: E402

RANKS = Ranks(threads=1)


pytestmark = pytest.mark.usefixtures("threads")


def sft_config(**changes):
    return SFTConfig(kind="sft", data=["x"], init="base", optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0), **changes)


def batches(micro_batch_tokens=64, num=6):
    rng = np.random.default_rng(0)
    prompts, completions = ([rng.integers(2, 67, size=rng.integers(3, 20)) for _ in range(num)] for _ in range(2))
    return pack(prompts, completions, micro_batch_tokens)


@torch.no_grad()
def choices(model, batch):
    """(layers, T, k) without filler, by a forward of its own."""
    routes, filled = Routes(), fill_tokens(batch.input_ids, batch.positions, batch.cu_seqlens)
    model(filled[0], filled[1], PackedAttention(filled[2]), routes)
    return torch.stack(routes.ids)[:, : len(batch.input_ids)]


def test_a_dense_model_has_no_balance():
    model = random_decoder(FAMILIES["qwen3_moe"].model_copy(update={"mlp_only_layers": (0, 1, 2)}))
    balance = RouterBalance(model, sft_config(), RANKS)
    assert balance.routes(batches()[0]) is None and balance.loss(None, 1.0) == 0.0 and balance.finish() == {}


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_step_moves_the_biases_by_what_all_its_micro_batches_chose(rate):
    model = random_decoder(FAMILIES["deepseek_v3"])
    before = [router.bias.clone() for router in routers(model)]
    split = batches()
    assert len(split) > 1 and any(len(b.input_ids) % 16 for b in split)  # filler rows must not count
    counts = sum(torch.stack([torch.bincount(layer.flatten(), minlength=8) for layer in choices(model, b)]) for b in split)
    optimizer, num_targets = Optimizer(model, sft_config().optimizer, RANKS), sum(b.num_targets for b in split)
    balance = RouterBalance(model, sft_config(router_bias_rate=rate), RANKS)
    cross_entropy_step(model, optimizer, [split], num_targets, 1e-3, balance)
    metrics = balance.finish()
    assert metrics["router_imbalance"] == pytest.approx(float((counts.amax(1) / counts.double().mean(1)).max()) - 1)
    for router, old, count in zip(routers(model), before, counts.double(), strict=True):
        torch.testing.assert_close(router.bias - old, rate * torch.sign(count.mean() - count).float(), rtol=0, atol=1e-6)


def test_the_balance_loss_does_not_depend_on_a_dense_layer_and_reaches_the_routers():
    model, split = random_decoder(FAMILIES["qwen3_moe_unnormalised_some_dense_untied"]), batches(10**6)
    num_targets = split[0].num_targets
    losses = []
    for alpha in (0.0, 0.5):
        balance = RouterBalance(model, sft_config(balance_loss=alpha), RANKS)
        routes = balance.routes(split[0])
        with torch.no_grad():
            plain = -completion_logprobs(model, split[0], routes=routes).logps.sum() / num_targets
            losses.append(float(plain + balance.loss(routes, 1.0)))
        if alpha:
            assert losses[1] - losses[0] == pytest.approx(0.5 * float(torch.stack(routes.balance).mean()), abs=1e-5)
    assert len(routers(model)) < len(model.layers)
    balance = RouterBalance(model, sft_config(balance_loss=0.5), RANKS)
    routes = balance.routes(split[0])
    completion_logprobs(model, split[0], routes=routes)
    balance.loss(routes, 1.0).backward()  # of the balance alone
    assert all(router.weight.grad.any() for router in routers(model))


def test_the_balance_loss_does_not_depend_on_the_packing():
    model, found = random_decoder(FAMILIES["deepseek_v3"]).double(), []
    for micro_batch_tokens in (1, 64, 10**6):
        split = batches(micro_batch_tokens)
        num_targets, total = sum(batch.num_targets for batch in split), 0.0
        balance = RouterBalance(model, sft_config(balance_loss=0.5), RANKS)
        for batch in split:
            routes = balance.routes(batch)
            completion_logprobs(model, batch, routes=routes)
            total = total + balance.loss(routes, batch.num_targets / num_targets)
        found.append([total, *torch.autograd.grad(total, [router.weight for router in routers(model)])])
    assert len(batches(1)) > len(batches(64)) > len(batches(10**6)) == 1
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_recorded_experts_are_replayed_when_the_weights_have_moved():
    model = random_decoder(FAMILIES["deepseek_v3"])
    (batch,) = batches(10**6)
    recorded = Routes(num_tokens=len(batch.input_ids))  # without the filler, which is routed as usual
    assert len(batch.input_ids) % 16
    with torch.no_grad():
        old = completion_logprobs(model, batch, routes=recorded).logps
        for router in routers(model):
            router.weight.add_(0.3 * torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0)))
        free, replayed = Routes(), Routes(replay=recorded.recorded)
        moved = completion_logprobs(model, batch, routes=free).logps
        kept = completion_logprobs(model, batch, routes=replayed).logps
    n = len(batch.input_ids)
    assert recorded.recorded.shape == (2, n, 3) and torch.equal(torch.stack(replayed.ids)[:, :n], recorded.recorded)
    assert not torch.equal(torch.stack(free.ids)[:, :n], recorded.recorded)
    assert 0.05 < float(replayed.disagreement) < 0.9
    assert float((kept - old).abs().mean()) < float((moved - old).abs().mean())


def an_update(model, tokenizer, task, replay, **changes):
    config = GRPOConfig(
        kind="grpo", init="base", prompts=[{"task": "chain"}], rewards=[{"reward": "accuracy"}], prompts_per_step=4, group_size=4,
        updates_per_rollout=2, routing_replay=replay, sampling=SamplingConfig(max_tokens=12), optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0),
        micro_batch_tokens=64, **changes,
    )  # fmt: skip
    generator = rollout_generator(model, tokenizer, 64, 4, record_routes=replay == "rollout")
    groups = sample_groups(generator, tokenizer, [task.problem("train", i) for i in range(4)], 4, config.sampling, RANKS, 0)
    advantages = torch.from_numpy(np.random.default_rng(0).normal(size=16).astype(np.float32))
    loop = SimpleNamespace(model=model, optimizer=Optimizer(model, config.optimizer, RANKS), applied=lambda norm, *_: math.isfinite(norm))
    return config, loop, groups, advantages


def a_policy():
    task = ArithmeticTask()
    tokenizer = symbol_tokenizer(list(task.symbols))
    return random_decoder(FAMILIES["deepseek_v3"].model_copy(update={"vocab_size": tokenizer.vocab_size})), tokenizer, task


CONTEXT = SimpleNamespace(name="zero", ranks=RANKS, console=SimpleNamespace(warn=lambda text: None))


@pytest.mark.parametrize("replay", ["off", "trainer", "rollout"])
def test_a_policy_update_of_a_mixture_of_experts_starts_without_a_gap(replay):
    model, tokenizer, task = a_policy()
    before = [router.bias.clone() for router in routers(model)]
    config, loop, groups, advantages = an_update(model, tokenizer, task, replay)
    metrics = update_policy(CONTEXT, config, LossVariant(), loop, None, groups, list(range(len(groups))), advantages, 0)
    assert metrics["logp_gap_max"] == 0.0 and metrics["router_imbalance"] > 0
    assert ("route_disagreement" in metrics) == (replay != "off")
    assert replay == "off" or metrics["route_disagreement"] > 0  # of the second update: the first moved the routers
    assert metrics.get("rollout_route_disagreement") == (0.0 if replay == "rollout" else None)
    assert all(not torch.equal(router.bias, old) for router, old in zip(routers(model), before, strict=True))


@pytest.mark.parametrize("replay", ["off", "rollout"])
def test_a_trainer_whose_routers_differ_takes_the_samplers_experts(replay, monkeypatch):
    """The negative control: what the sampler recorded is trained on, and how often the trainer would have chosen otherwise is told."""
    model, tokenizer, task = a_policy()
    config, loop, groups, advantages = an_update(model, tokenizer, task, "rollout", max_logp_gap=100.0, router_bias_rate=0.0)
    config = config.model_copy(update={"routing_replay": replay})
    recorded = {bytes(np.concatenate((s.prompt_ids, s.token_ids[:-1]))): np.concatenate((s.routes[0], s.routes[1][1:])) for g in groups for s in g}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for router in routers(model):
            router.weight.add_(0.3 * torch.randn(router.weight.shape, generator=generator))
    seen, score = [], RouterBalance.loss

    def watched(self, routes, share):
        seen.append(torch.stack(routes.ids))
        return score(self, routes, share)

    monkeypatch.setattr(RouterBalance, "loss", watched)
    packed, routes_of = [], RouterBalance.routes
    monkeypatch.setattr(RouterBalance, "routes", lambda self, batch, replay=None: packed.append(batch) or routes_of(self, batch, replay))
    metrics = update_policy(CONTEXT, config, LossVariant(), loop, None, groups, list(range(len(groups))), advantages, 0)
    assert ("rollout_route_disagreement" in metrics) == (replay == "rollout")
    assert replay == "off" or 0.05 < metrics["rollout_route_disagreement"] < 0.9
    same = total = 0
    for batch, ids in zip(packed, seen, strict=True):
        bounds = batch.cu_seqlens.tolist()
        for first, end in zip(bounds[:-1], bounds[1:], strict=True):
            want = recorded[bytes(batch.input_ids[first:end].numpy())]
            same += int((ids[:, first:end].transpose(0, 1).numpy() == want).sum())
            total += want.size
    assert total > 1000 and (same == total) == (replay == "rollout")


def test_replay_is_refused_for_a_dense_model():
    dense = random_decoder(FAMILIES["qwen3_moe"].model_copy(update={"mlp_only_layers": (0, 1, 2)}))
    config = GRPOConfig(kind="grpo", prompts=[{"task": "chain"}], rewards=[{"reward": "accuracy"}], routing_replay="trainer")
    with pytest.raises(UserError, match="routing_replay is trainer, but the model has no experts"):
        check_experts("zero", config, dense)
    with pytest.raises(ValueError, match="record_routes is true, but the model has no experts"):
        Generator(dense, {1}, record_routes=True)
