"""Reinforcement learning with group-relative advantages: rollout -> rewards -> advantages -> clipped policy updates.

DeepSeekMath (arXiv 2402.03300), eq. 3, as R1 uses it; the loss preset decides the variant.  Old log-probs are the sampler's own: model and
kernels are the same on both sides, and the gap between them is measured on every first (on-policy) update and reported.
"""

import copy
import time

import numpy as np
import torch
from torch import Tensor

from athanor.advantages import advantages_of
from athanor.batch import PackedBatch, pack
from athanor.checkpoint import export_model
from athanor.config import GRPOConfig
from athanor.errors import UserError
from athanor.kernels import policy_loss
from athanor.losses import Preset, formula, resolve_preset
from athanor.metrics_eval import REFLECTIVE_WORDS, reflection_rate
from athanor.model.transformer import Decoder
from athanor.optim import learning_rate
from athanor.reward_models import load_preference_reward
from athanor.rewards import make_reward
from athanor.rewards.table import Entry, RewardTable
from athanor.rollout import ProblemStream, sample_groups
from athanor.samples import Sample
from athanor.seeds import derive_seed
from athanor.stages.context import StageContext
from athanor.stages.training import TrainingLoop, completion_logprobs, optimizer_step
from athanor.weights import load_model

SHOWN = ("reward", "accuracy", "mean_tokens", "reflection_rate", "logp_gap_max", "tokens_per_s")


def run(context: StageContext, config: GRPOConfig) -> dict:
    """Train `init` by RL and export; return metrics and outputs."""
    check(context.name, config)
    preset = resolve_preset(config.loss, **config.loss_overrides)
    context.console.note(f"{context.name}: {formula(preset)}")
    table = reward_table(context, config)
    model = context.load(config.init)
    reference = copy.deepcopy(model).requires_grad_(False) if preset.variant.beta else None
    loop = TrainingLoop(context, config, model)
    if reference is not None and "reference" in loop.extra:
        reference = load_model(context.state_dir / loop.extra["reference"], dtype=context.dtype, device=str(context.ranks.device)).requires_grad_(False)
    stream = ProblemStream(context.tasks, config.prompts, config.prompts_per_step, config.steps, context.recipe.seed, context.name)
    gap = loop.extra.setdefault("logp_gap_max", 0.0)
    for step, metrics in loop.steps(config.steps, SHOWN):
        start = time.perf_counter()
        key = (context.recipe.seed, context.name, step)
        groups = sample_groups(model, context.tokenizer, stream.draw(step), config.group_size, config.sampling, context.ranks, *key, max_rows=context.recipe.max_rows)
        rollout_s = time.perf_counter() - start
        scores, advantages = _advantages(context, config, preset, table, groups, step)
        metrics |= _describe(context, groups, scores, advantages)
        start = time.perf_counter()
        metrics |= _update(context, config, preset, loop, reference, groups, advantages, step)
        train_s = time.perf_counter() - start
        tokens = sum(s.num_tokens for group in groups for s in group)
        metrics |= {"rollout_s": rollout_s, "train_s": train_s, "tokens_per_s": tokens / (rollout_s + train_s)}
        gap = loop.extra["logp_gap_max"] = max(gap, metrics["logp_gap_max"])
        if reference is not None and (step + 1) % config.reference_refresh_steps == 0:
            reference.load_state_dict(model.state_dict())
            # A state names the reference it was trained against, so the file must exist before the state does.
            loop.extra["reference"] = f"reference-{step + 1}"
            if context.ranks.is_main:
                export_model(reference, context.tokenizer, context.state_dir / loop.extra["reference"])
    return {
        "metrics": {"logp_gap_max": gap, "loss_formula": formula(preset)},
        "outputs": {"checkpoint": context.export(model)},
    }


def check(name: str, config: GRPOConfig) -> None:
    """Refuse settings whose sampled log-probs the trainer could not reproduce."""
    s = config.sampling
    if s.temperature == 0 or s.top_k or s.top_p < 1 or s.min_p:
        raise UserError(f"stage {name}: sampling is {s}, wanted temperature > 0 and no truncation (top_k 0, top_p 1, min_p 0): the loss uses the full softmax")
    if config.prompts_per_step % config.updates_per_rollout:
        raise UserError(f"stage {name}: prompts_per_step is {config.prompts_per_step}, wanted a multiple of updates_per_rollout = {config.updates_per_rollout}")


def reward_table(context: StageContext, config: GRPOConfig) -> RewardTable:
    """Build the stage's rewards; `start` fractions become steps."""
    entries = []
    for entry in config.rewards:
        if entry.reward == "preference":
            if not config.reward_model:
                raise UserError(f"stage {context.name}: the preference reward needs reward_model, the stage that trains it")
            reward = load_preference_reward(context.source_dir(config.reward_model), context.tokenizer, context.ranks.device)
        else:
            reward = make_reward(entry.reward, **entry.settings)
        entries.append(Entry(reward, entry.weight, entry.domain, first_step=int(np.ceil(entry.start * config.steps))))
    return RewardTable(entries)


def _advantages(context: StageContext, config: GRPOConfig, preset: Preset, table: RewardTable, groups: list[list[Sample]], step: int):
    """Score this rank's groups, share the rewards, and return (scores, this rank's advantages (G per group,) fp32)."""
    flat = [sample for group in groups for sample in group]
    scores = table.score(flat, step)
    G, ranks = config.group_size, context.ranks
    mine = scores.total.reshape(len(groups), G)
    rewards = np.stack(ranks.gather(list(mine)))
    group_ids = torch.arange(len(rewards)).repeat_interleave(G)
    advantages = advantages_of(torch.from_numpy(rewards.reshape(-1)).float(), group_ids, preset)
    if config.control == "shuffle":
        order = np.random.default_rng(derive_seed(context.recipe.seed, context.name, step, "shuffle")).permutation(len(advantages))
        advantages = advantages[torch.from_numpy(order)]
    elif config.control == "flip":
        advantages = -advantages
    return scores, torch.cat(ranks.share(list(advantages.view(len(rewards), G))))


def _describe(context: StageContext, groups: list[list[Sample]], scores, advantages: Tensor) -> dict:
    """What the rollout looked like: means over the samples of all ranks."""
    flat = [sample for group in groups for sample in group]
    columns = {"reward": scores.total, "mean_tokens": [s.num_tokens for s in flat], "truncated_rate": [s.finish == "length" for s in flat]}
    columns |= {name: [v for v in values if v is not None] for name, values in scores.parts.items()}
    words = context.recipe.reflection_words or REFLECTIVE_WORDS
    columns["reflection_rate"] = [reflection_rate([s.text], words) for s in flat if s.problem.domain == "reasoning"]
    columns["zero_advantage_rate"] = (advantages == 0).float().tolist()
    sums = torch.tensor([[float(np.sum(np.asarray(c, np.float64))), len(c)] for c in columns.values()], dtype=torch.float64)
    context.ranks.sum_(sums)
    return {name: float(total / count) for name, (total, count) in zip(columns, sums, strict=True) if count}


def _update(context, config: GRPOConfig, preset: Preset, loop: TrainingLoop, reference: Decoder | None, groups, advantages: Tensor, step: int) -> dict:
    """Split the rollout into whole-group updates; return averaged loss statistics and the on-policy log-prob gap."""
    G, ranks, device = config.group_size, context.ranks, context.ranks.device
    sums: dict[str, float] = {}
    norms, gap = [], torch.zeros((), dtype=torch.float64)
    share = config.prompts_per_step // config.updates_per_rollout
    offset = 0
    for update in range(config.updates_per_rollout):
        count = sum(i % ranks.world == ranks.rank for i in range(update * share, (update + 1) * share))
        samples = [s for group in groups[offset : offset + count] for s in group]
        own = advantages[offset * G : (offset + count) * G]
        offset += count
        # Denominators count every sample; those without an advantage add nothing to the gradient (and no KL), so they need no forward.
        num_tokens = ranks.sum_int(sum(s.num_tokens for s in samples))
        num_sequences = ranks.sum_int(len(samples))
        live = [i for i in range(len(samples)) if reference is not None or own[i] != 0]
        samples, own = [samples[i] for i in live], own[live]
        batches = pack([s.prompt_ids for s in samples], [s.token_ids for s in samples], config.micro_batch_tokens, device) if samples else []

        def loss_of(batch: PackedBatch) -> Tensor:
            nonlocal gap
            old = torch.from_numpy(np.concatenate([samples[i].logps for i in batch.sequences])).to(device)
            scored = completion_logprobs(loop.model, batch, config.sampling.temperature)
            ref_logps = None
            if reference is not None:
                with torch.no_grad():
                    ref_logps = completion_logprobs(reference, batch, config.sampling.temperature).logps
            loss, stats = policy_loss(
                scored.logps, old, own[torch.from_numpy(batch.sequences)].to(device), batch.loss_cu_seqlens, ref_logps=ref_logps,
                variant=preset.variant, num_tokens=num_tokens, num_sequences=num_sequences,
            )
            if update == 0:
                gap = torch.maximum(gap, (scored.logps.detach() - old).abs().max().double().cpu())
            stats = {**stats, "entropy_sum": scored.entropy.sum()}
            for name, value in stats.items():
                sums[name] = max(sums.get(name, 0.0), float(value)) if name.endswith("_max") else sums.get(name, 0.0) + float(value)
            return loss

        loss, norm = optimizer_step(loop.optimizer, batches, loss_of, learning_rate(config.optimizer, step, config.steps))
        norms.append(norm)
    ranks.max_(gap)
    if not float(gap) <= config.max_logp_gap:  # NaN must not pass
        raise UserError(f"stage {context.name}, step {step}: sampled log-probs differ from the trainer's by {float(gap):.2e}, more than max_logp_gap = {config.max_logp_gap}")
    names = sorted(sums)
    totals = torch.tensor([sums[name] for name in names], dtype=torch.float64)
    ranks.sum_(totals)
    values = dict(zip(names, totals.tolist(), strict=True))
    tokens = max(values.get("num_tokens", 0.0), 1.0)
    return {
        "logp_gap_max": float(gap),
        "grad_norm": float(np.mean(norms)),
        "entropy": values.get("entropy_sum", 0.0) / tokens,
        "clip_fraction": (values.get("clip_low", 0.0) + values.get("clip_high", 0.0)) / tokens,
        "kl_old": values.get("old_kl_sum", 0.0) / tokens,
        "kl_ref": values.get("ref_kl_sum", 0.0) / tokens,
        "ratio_mean": values.get("ratio_sum", 0.0) / tokens,
    }
