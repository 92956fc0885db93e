"""Reinforcement learning with group-relative advantages: rollout -> rewards -> advantages -> clipped policy updates.

DeepSeekMath (arXiv 2402.03300), eq. 3, as R1 uses it; the loss preset decides the variant.  Old log-probs are the sampler's own: model and
kernels are the same on both sides, and the gap between them is measured on every first (on-policy) update, reported and gated.  Under top-k, top-p
or min-p both sides use the truncated distribution: the sampler hands out each token's support, the trainer rebuilds it.
"""

import math
import time

import numpy as np
import torch
from torch import Tensor

from athanor import watchdog
from athanor.advantages import advantages_of, gdpo_advantages, groups_with_contrast
from athanor.config import GRPOConfig
from athanor.detectors import Detectors
from athanor.errors import UserError
from athanor.generative_judge import load_judge
from athanor.generator import Generator
from athanor.losses import Preset, formula, resolve_preset
from athanor.metrics import read_metrics
from athanor.metrics_eval import REFLECTIVE_WORDS, reflection_rate
from athanor.model.transformer import Decoder
from athanor.reward_models import MODEL_FIELDS, load_reward
from athanor.rewards import Entry, RewardScores, RewardService, RewardTable, make_reward
from athanor.rewards.language import SCRIPTS, language_consistency
from athanor.rewards.table import VERIFIERS
from athanor.rollout import ProblemStream, rollout_generator, sample_groups
from athanor.samples import Sample, in_domain
from athanor.seeds import derive_seed
from athanor.sharding import FullWeights, copy_weights_, parallelize_
from athanor.stages.context import StageContext
from athanor.stages.policy_update import check_experts, update_policy
from athanor.stages.training import TrainingLoop
from athanor.transcript_log import rewind_transcripts, transcript_path, write_transcripts
from athanor.weights import weights_hash

SHOWN = ("reward", "mean_tokens", "pass@1", "reflection_rate", "logp_gap_max", "tokens_per_s", "rollout_idle_share")


def run(context: StageContext, config: GRPOConfig) -> dict:
    """Train `init` by RL and export; return metrics and outputs."""
    check(context.name, config)
    with RewardService(reward_table(context, config), num_workers=config.reward_workers) as rewards:
        return _train(context, config, rewards)


def _train(context: StageContext, config: GRPOConfig, rewards: RewardService) -> dict:
    preset = resolve_preset(config.loss, **config.loss_overrides)
    objective = formula(preset) + ("; A replaced by GDPO's (arXiv 2601.05242)" if config.reward_scaling == "gdpo" else "")
    context.console.note(f"{context.name}: {objective}")
    model = context.load(config.init, parallel=True)
    check_experts(context.name, config, model)
    loop = TrainingLoop(context, config, model)
    reference = _reference(context, preset, loop, config)
    detectors = Detectors(config.detectors, [row for row in read_metrics(context.run_dir) if row["stage"] == context.name])
    log = transcript_path(context.run_dir, context.name)
    if context.ranks.is_main:
        rewind_transcripts(log, loop.next_step)
    attempts = config.max_refills + 1 if preset.dynamic_sampling else 1
    per_step = config.prompts_per_step
    stream = ProblemStream(context.tasks, config.prompts, per_step, config.steps * attempts, context.recipe.seed, context.name)
    gap = loop.extra.setdefault("logp_gap_max", 0.0)
    # On a CPU the trainer's bits are those of `sample` on logits.
    parts = context.recipe.parallel.rollout == "split"
    fused = context.ranks.device.type == "cuda" and not config.sampling.truncated and not parts
    weights = FullWeights(model, parts=parts)
    loop.validate_on(weights)
    options = {"fused_sampling": fused, "record_routes": config.routing_replay == "rollout", "speculation": context.recipe.speculation}
    generator = rollout_generator(weights.model, context.tokenizer, context.recipe.max_rows, config.group_size, **options)
    trained = weights_hash(model) if context.recipe.verify_weights else None
    for step, metrics in loop.steps(config.steps, SHOWN):
        start = time.perf_counter()
        if trained is not None and weights_hash(generator.model) != trained:
            raise UserError(f"stage {context.name}, step {step + 1}: the sampler's weights are not those of the last optimizer step")
        before, drafted_before, dispatched_before = dict(generator.timings), dict(generator.drafting), dict(generator.dispatched)
        groups, places, scores, refills = _rollout(context, config, rewards, generator, stream, step, attempts)
        rollout_s = time.perf_counter() - start
        metrics |= _reward_figures(context, rewards, scores, loop)
        metrics |= {f"rollout_{name}": generator.timings[name] - before[name] for name in before}
        metrics |= _drafting(context, {name: generator.drafting[name] - drafted_before[name] for name in drafted_before})
        metrics |= _dispatching(context, {name: generator.dispatched[name] - dispatched_before[name] for name in dispatched_before})
        advantages = _advantages(context, config, preset, groups, places, scores, step)
        metrics |= _describe(context, groups, scores, advantages) | {"refills": refills}
        start = time.perf_counter()
        metrics |= update_policy(context, config, preset.variant, loop, reference, groups, places, advantages, step)
        weights.refresh()
        train_s = time.perf_counter() - start
        if trained is not None:
            trained = weights_hash(model)
            metrics["weights_hash"] = int(trained[:12], 16)
        tokens = context.ranks.sum_int(sum(s.num_tokens for group in groups for s in group))
        metrics |= {"rollout_s": rollout_s, "train_s": train_s, "tokens_per_s": tokens / (rollout_s + train_s)}
        for name, says in detectors.update(metrics).items():
            metrics[f"warning_{name}"] = 1
            context.console.warn(f"{context.name}, step {step + 1}: {says}")
        if config.transcripts.every and step % config.transcripts.every == 0:
            write_transcripts(log, step + 1, groups, places, scores, advantages.tolist(), config.transcripts, context.tokenizer, context.ranks)
        loop.stopped = config.stop_at_accuracy is not None and max(metrics.get(name, 0.0) for name in VERIFIERS) >= config.stop_at_accuracy
        gap = loop.extra["logp_gap_max"] = max(gap, metrics["logp_gap_max"])
        if reference is not None and preset.reference_interval and (step + 1) % preset.reference_interval == 0:
            copy_weights_(model, reference)
            # A state names the reference it was trained against, so the file must exist before the state does.
            loop.extra["reference"] = f"reference-{step + 1}"
            context.export(reference, context.state_dir / loop.extra["reference"])
    measured = {"logp_gap_max": gap, "rl_steps": loop.next_step, "loss_formula": objective}
    measured |= {name: loop.extra[name] for name in ("reward_failures",) if name in loop.extra}
    return {"metrics": measured, "outputs": loop.export()}


def check(name: str, config: GRPOConfig) -> None:
    """Refuse settings that have no meaning together."""
    if config.sampling.temperature == 0:
        raise UserError(f"stages.{name}.sampling.temperature is 0, wanted > 0: greedy samples of a group are all the same")
    if config.stop_at_accuracy is not None and not any(entry.reward in VERIFIERS for entry in config.rewards):
        raise UserError(f"stages.{name}.stop_at_accuracy is {config.stop_at_accuracy}, but no reward of the stage is {' or '.join(VERIFIERS)}")
    preset = resolve_preset(config.loss, **config.loss_overrides)
    if config.reward_scaling == "gdpo" and (preset.scale != "std" or preset.baseline != "mean" or preset.whiten):
        raise UserError(f"stages.{name}.reward_scaling is gdpo, which sets the advantages; wanted a loss with group mean and std, got {config.loss}")
    if config.reward_scaling == "gdpo" and len({entry.reward for entry in config.rewards}) < len({(e.reward, e.weight) for e in config.rewards}):
        raise UserError(f"stages.{name}.reward_scaling is gdpo, but a reward has two weights, wanted one each")
    for entry in config.rewards:
        if entry.end <= entry.start:
            raise UserError(f"stages.{name}.rewards: {entry.reward} counts from {entry.start} to {entry.end} of the steps, wanted start < end")
    if config.prompts_per_step % config.updates_per_rollout:
        raise UserError(
            f"stages.{name}.prompts_per_step is {config.prompts_per_step}, wanted a multiple of updates_per_rollout = {config.updates_per_rollout}"
        )


def reward_table(context: StageContext, config: GRPOConfig) -> RewardTable:
    """Build the stage's rewards; `start` fractions become steps."""
    entries = []
    for entry in config.rewards:
        if entry.reward in MODEL_FIELDS:
            folder = context.source_dir(getattr(config, MODEL_FIELDS[entry.reward]))
            reward = load_reward(entry.reward, folder, context.tokenizer, context.ranks.device)
        elif "checkpoint" in entry.settings:
            settings = {name: value for name, value in entry.settings.items() if name != "checkpoint"}
            folder = context.source_dir(entry.settings["checkpoint"])
            reward = load_judge(entry.reward, folder, settings, device=context.ranks.device, dtype=context.dtype, seed=context.recipe.seed)
        else:
            reward = make_reward(entry.reward, **entry.settings)
        last = None if entry.end == 1 else int(np.ceil(entry.end * config.steps)) - 1
        entries.append(Entry(reward, entry.weight, entry.domain, first_step=int(np.ceil(entry.start * config.steps)), last_step=last))
    return RewardTable(entries, config.reward_failures)


def _reference(context: StageContext, preset: Preset, loop: TrainingLoop, config: GRPOConfig) -> Decoder | None:
    """The reference policy when the loss has a KL term: what the stage began with, or its last refresh."""
    if preset.variant.kl == "none":
        return None
    source = str(context.state_dir / loop.extra["reference"]) if "reference" in loop.extra else config.init
    reference = context.load(source, parallel=True).requires_grad_(False)
    return parallelize_(reference, context.recipe.parallel, context.ranks)


def _rollout(
    context: StageContext, config: GRPOConfig, rewards: RewardService, generator: Generator, stream: ProblemStream, step: int, attempts: int
) -> tuple[list[list[Sample]], list[int], RewardScores, int]:
    """Groups of this rank, their places in the order of all draws and prompts, their scores, and the refills it took: dynamic sampling replaces
    groups whose raw scores are all equal."""
    seed, ranks, total = context.recipe.seed, context.ranks, 0
    kept: dict[int, list[Sample]] = {}  # by place
    for attempt in range(attempts):
        problems = stream.draw(step * attempts + attempt)
        key = (seed, context.name, step, attempt)
        groups = sample_groups(
            generator, context.tokenizer, problems, config.group_size, config.sampling, ranks, *key, on_sample=lambda s: rewards.submit(s, step)
        )
        if attempts > 1:
            with watchdog.phase("reward"):
                raw = torch.from_numpy(rewards.score([s for group in groups for s in group], step).raw)
            contrast = groups_with_contrast(raw, torch.arange(len(groups)).repeat_interleave(config.group_size)).view(len(groups), -1)[:, 0]
        else:
            contrast = torch.ones(len(groups), dtype=torch.bool)
        places = [attempt * config.prompts_per_step + i * ranks.world + ranks.rank for i in range(len(groups))]
        found = {place: group for place, group, keep in zip(places, groups, contrast.tolist(), strict=True) if keep}
        first = sorted(ranks.concatenate(list(found))[0])[: config.prompts_per_step - total]
        kept |= {place: found[place] for place in first if place in found}
        total += len(first)
        if total == config.prompts_per_step:
            break
    if total == 0:
        context.console.warn(f"{context.name}: a step trains on nothing, no group in {attempts} draws had rewards that differ")
    with watchdog.phase("reward"):
        return list(kept.values()), list(kept), rewards.score([sample for group in kept.values() for sample in group], step), attempt


def _advantages(
    context: StageContext, config: GRPOConfig, preset: Preset, groups: list[list[Sample]], places: list[int], scores: RewardScores, step: int
) -> Tensor:
    """Advantages (S,) fp32 of this rank's samples, with statistics over all ranks' where the preset wants the batch."""
    rewards = np.where(scores.applied, scores.total, np.nan)
    names = list(scores.parts) if config.reward_scaling == "gdpo" else []
    parts = np.array([scores.parts[name] for name in names], np.float64).reshape(len(names), len(rewards))  # None becomes NaN
    parts[:, ~scores.applied] = np.nan
    own = np.repeat(np.array(places, np.int64), config.group_size)  # the same order whatever the number of ranks
    rows = zip(own.tolist(), rewards.tolist(), (s.num_tokens for group in groups for s in group), parts.T.tolist(), strict=True)
    everyone = sorted(context.ranks.concatenate(list(rows))[0], key=lambda row: row[0])
    group_ids = torch.arange(len(everyone)) // config.group_size
    if names:
        weights = torch.tensor([next(entry.weight for entry in config.rewards if entry.reward == name) for name in names])
        table = torch.tensor([row[3] for row in everyone], dtype=torch.float64).reshape(-1, len(names))
        advantages = gdpo_advantages(table, weights, group_ids).float()
    else:
        totals, lengths = (torch.tensor([float(row[i]) for row in everyone], dtype=torch.float32) for i in (1, 2))
        advantages = advantages_of(totals, group_ids, preset, num_tokens=lengths)
    mine = np.isin([row[0] for row in everyone], places)
    return _controlled(context, config, advantages, step)[torch.from_numpy(mine)]


def _controlled(context: StageContext, config: GRPOConfig, advantages: Tensor, step: int) -> Tensor:
    if config.control == "shuffle":
        order = np.random.default_rng(derive_seed(context.recipe.seed, context.name, step, "shuffle")).permutation(len(advantages))
        return advantages[torch.from_numpy(order)]
    return -advantages if config.control == "flip" else advantages


def _reward_figures(context: StageContext, rewards: RewardService, scores: RewardScores, loop: TrainingLoop) -> dict[str, float]:
    """What rewards that may fail did in this step; {} where there is none.  Counts are over all ranks, seconds this rank's."""
    figures, first = rewards.measure()
    if not rewards.measures:
        return {}
    figures |= {name: context.ranks.sum_int(figures[name]) for name in ("reward_errors", "reward_timeouts", "reward_judged")}
    figures["reward_dropped"] = context.ranks.sum_int(int(scores.dropped.sum()))
    failed = figures["reward_errors"] + figures["reward_timeouts"]
    loop.extra["reward_failures"] = loop.extra.get("reward_failures", 0) + failed
    if first:
        context.console.warn(f"{context.name}: {failed} samples without a verdict ({figures['reward_timeouts']} timeouts), the first: {first}")
    return figures


def _drafting(context: StageContext, counts: dict[str, int]) -> dict[str, float]:
    """How drafts did over all ranks; {} where there were none."""
    forwards, tokens = (context.ranks.sum_int(counts[name]) for name in ("forwards", "tokens"))
    if not forwards:
        return {}
    per_forward = tokens / forwards
    return {"drafted_tokens_per_forward": per_forward, "draft_acceptance": (per_forward - 1) / context.recipe.speculation.tokens}


def _dispatching(context: StageContext, figures: dict[str, float]) -> dict[str, float]:
    """How the ranks shared the rollout; {} on one rank.

    rollout_idle_share: of all ranks' time until the last sample, what they did not sample in.  rollout_idle_s: this rank's.  rollout_handed_over:
    samples that began on one rank and went on on another.
    """
    if context.ranks.world == 1:
        return {}
    everyone, _ = context.ranks.concatenate([figures])
    whole = max(rank["wall_s"] for rank in everyone)
    idle = [whole - rank["busy_s"] for rank in everyone]
    shared = {"rollout_idle_share": sum(idle) / max(whole * len(idle), 1e-9), "rollout_idle_s": idle[context.ranks.rank]}
    return shared | {"rollout_handed_over": sum(rank["handed_over"] for rank in everyone)}


def _describe(context: StageContext, groups: list[list[Sample]], scores: RewardScores, advantages: Tensor) -> dict:
    """What the rollout looked like: means over the samples of all ranks."""
    flat = sum(groups, [])
    words = context.recipe.reflection_words or REFLECTIVE_WORDS
    columns = {"reward": scores.total[~scores.dropped], "mean_tokens": [s.num_tokens for s in flat]}
    columns["truncated_rate"] = [s.finish == "length" for s in flat]
    columns |= {f"{kind}_rate": [s.finish == kind for s in flat] for kind in ("repetition", "error")}
    columns |= {name: [v for v in values if v is not None] for name, values in scores.parts.items()}
    columns["reflection_rate"] = [reflection_rate([s.text], words) for s in flat if in_domain(s.problem.domain, "reasoning")]
    columns["pass@1"] = [v >= 1 for v in map(scores.verdict, range(len(flat))) if v is not None]
    # One sample of each group: a second of work on a rollout of thousands of long ones.
    firsts = [group[0] for group in groups if group[0].problem.language in SCRIPTS]
    columns["language_consistency"] = [language_consistency(s.text, s.problem.language, prompt=s.problem.prompt) for s in firsts]
    columns["no_verdict_rate"] = (~scores.applied).tolist()  # samples that no reward applied to: they take no part in their group's statistics
    columns["zero_advantage_rate"] = (advantages == 0).float().tolist()
    # Rounded once, whatever the order: the means of one rank.
    everyone = context.ranks.concatenate([{name: np.asarray(column, np.float64).tolist() for name, column in columns.items()}])[0]
    whole = {name: [value for rank in everyone for value in rank[name]] for name in columns}
    return {name: math.fsum(values) / len(values) for name, values in whole.items() if values}
