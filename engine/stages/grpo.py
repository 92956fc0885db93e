"""Reinforcement learning with group-relative advantages: rollout -> rewards -> advantages -> clipped policy updates.

DeepSeekMath (arXiv 2402.03300), eq. 3, as R1 uses it; the loss preset decides the variant.  Old log-probs are the sampler's own: model and
kernels are the same on both sides, and the gap between them is measured on every first (on-policy) update, reported and gated.  Under top-k, top-p
or min-p both sides use the truncated distribution: the sampler hands out each token's support, the trainer rebuilds it.
"""

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
        groups, scores, refills = _rollout(context, config, rewards, generator, stream, step, attempts)
        rollout_s = time.perf_counter() - start
        metrics |= _reward_figures(context, rewards, scores, loop)
        metrics |= {f"rollout_{name}": generator.timings[name] - before[name] for name in before}
        metrics |= _drafting(context, {name: generator.drafting[name] - drafted_before[name] for name in drafted_before})
        metrics |= _dispatching(context, {name: generator.dispatched[name] - dispatched_before[name] for name in dispatched_before})
        advantages = _advantages(context, config, preset, groups, scores, step)
        metrics |= _describe(context, groups, scores, advantages) | {"refills": refills}
        start = time.perf_counter()
        metrics |= update_policy(context, config, preset.variant, loop, reference, groups, advantages, step)
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
        if config.transcripts.every and step % config.transcripts.every == 0 and context.ranks.is_main:
            write_transcripts(log, step + 1, sum(groups, []), scores, advantages.tolist(), config.transcripts, context.tokenizer)
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
) -> tuple[list[list[Sample]], RewardScores, int]:
    """Groups of this rank, their scores, and the refills it took: dynamic sampling replaces groups whose raw scores are all equal."""
    seed, ranks, wanted = context.recipe.seed, context.ranks, len(context.ranks.share(list(range(config.prompts_per_step))))
    kept: list[list[Sample]] = []
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
            groups = [group for group, keep in zip(groups, contrast.tolist(), strict=True) if keep]
        kept = (kept + groups)[:wanted]
        total = ranks.sum_int(len(kept))
        if total == config.prompts_per_step:
            break
    if total == 0:
        context.console.warn(f"{context.name}: a step trains on nothing, no group in {attempts} draws had rewards that differ")
    with watchdog.phase("reward"):
        return kept, rewards.score([sample for group in kept for sample in group], step), attempt


def _advantages(context: StageContext, config: GRPOConfig, preset: Preset, groups: list[list[Sample]], scores: RewardScores, step: int) -> Tensor:
    """Advantages (S,) fp32 of this rank's samples, with statistics over all ranks' where the preset wants the batch."""
    G = config.group_size
    if config.reward_scaling == "gdpo":
        return _gdpo(context, config, scores, step)
    rewards = np.where(scores.applied, scores.total, np.nan)
    mine = [(reward, s.num_tokens) for reward, s in zip(rewards.tolist(), sum(groups, []), strict=True)]
    everyone, first = context.ranks.concatenate(mine)
    rewards = torch.tensor([reward for reward, _ in everyone], dtype=torch.float32)
    lengths = torch.tensor([float(n) for _, n in everyone])
    advantages = advantages_of(rewards, torch.arange(len(everyone)) // G, preset, num_tokens=lengths)
    return _controlled(context, config, advantages, step)[first : first + len(mine)]


def _gdpo(context: StageContext, config: GRPOConfig, scores: RewardScores, step: int) -> Tensor:
    """The same with each reward normalised by itself."""
    names = list(scores.parts)
    mine = np.array([[np.nan if part is None else part for part in scores.parts[name]] for name in names], np.float64).T.reshape(-1, len(names))
    mine[~scores.applied] = np.nan
    everyone, first = context.ranks.concatenate(mine.tolist())
    weights = torch.tensor([next(entry.weight for entry in config.rewards if entry.reward == name) for name in names])
    group_ids = torch.arange(len(everyone)) // config.group_size
    advantages = gdpo_advantages(torch.tensor(everyone, dtype=torch.float64).reshape(-1, len(names)), weights, group_ids).float()
    return _controlled(context, config, advantages, step)[first : first + len(mine)]


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
    sums = torch.tensor([[float(np.sum(np.asarray(c, np.float64))), len(c)] for c in columns.values()], dtype=torch.float64)
    context.ranks.sum_(sums)
    return {name: float(total / count) for name, (total, count) in zip(columns, sums, strict=True) if count}
