"""Rejection sampling: sample a checkpoint, keep what is correct, well formed, readable and in one language, add written examples, write JSONL.

R1 uses it twice: to curate R1-Zero's outputs for the cold start, and to make the second SFT set from the first RL checkpoint (arXiv 2501.12948,
sections 2.3.1 and 2.3.3).  Duplicates are dropped; at most `keep_per_prompt` stay for one prompt.
"""

import json
from collections import Counter

import numpy as np

from athanor.atomic import write_file
from athanor.config import RejectionConfig
from athanor.errors import UserError
from athanor.rewards import Outcome, make_reward, parse_response
from athanor.rewards.readability import objection, readability
from athanor.rollout import ProblemStream, rollout_generator, sample_groups
from athanor.samples import Problem, Sample
from athanor.seeds import derive_seed
from athanor.stages.context import StageContext


def run(context: StageContext, config: RejectionConfig) -> dict:
    """Collect the set and write it; the metrics say what was kept and why the rest was not."""
    rows, reasons = [], Counter()
    with context.console.stage(context.name, config.num_prompts * config.samples_per_prompt if config.source else 0) as progress:
        if config.source:
            rows, reasons = _sampled(context, config, progress)
        kept = len(rows)
        rows += _written(context, config)
        progress.step(progress.done, {"kept": kept, "written": len(rows) - kept})
    if not rows:
        raise UserError(f"stage {context.name}: kept none of {sum(reasons.values())} samples ({dict(reasons)}); train its source longer")
    order = np.random.default_rng(derive_seed(context.recipe.seed, context.name, "order")).permutation(len(rows))
    if context.ranks.is_main:
        context.data_path.parent.mkdir(parents=True, exist_ok=True)
        write_file(context.data_path, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in order))
    context.ranks.barrier()
    sampled = sum(reasons.values())
    metrics = {"sampled": sampled, "kept": kept, "written": len(rows) - kept, "acceptance": kept / sampled if sampled else 0.0}
    metrics |= {f"dropped_{name}": count for name, count in reasons.items() if name != "kept"}
    return {"metrics": metrics, "outputs": {"data": context.data_path}}


def _sampled(context: StageContext, config: RejectionConfig, progress) -> tuple[list[dict], Counter]:
    seed = context.recipe.seed
    problems = ProblemStream(context.tasks, config.prompts, config.num_prompts, 1, seed, context.name).draw(0)
    generator = rollout_generator(context.load(config.source), context.tokenizer, context.recipe.max_rows, config.samples_per_prompt)
    groups = sample_groups(
        generator, context.tokenizer, problems, config.samples_per_prompt, config.sampling, context.ranks, seed, context.name,
        progress=lambda done, total: progress.step(done * context.ranks.world),
    )  # fmt: skip
    groups = context.ranks.gather(groups)
    outcomes = iter(make_reward(config.verifier).outcomes([sample for group in groups for sample in group]))
    reasons, rows, seen = Counter(), [], set()
    for group in groups:
        taken = 0
        for sample in group:
            reason = _verdict(sample, config, next(outcomes))
            row = _row(context.name, sample.problem, sample.text)
            if reason == "kept" and (row["prompt"], row["completion"]) in seen:
                reason = "duplicate"
            if reason == "kept" and taken == config.keep_per_prompt:
                reason = "surplus"
            reasons[reason] += 1
            if reason == "kept":
                taken += 1
                seen.add((row["prompt"], row["completion"]))
                rows.append(row)
    if config.max_kept and len(rows) > config.max_kept:
        chosen = np.random.default_rng(derive_seed(seed, context.name, "kept")).permutation(len(rows))[: config.max_kept]
        reasons["surplus"] += len(rows) - config.max_kept
        reasons["kept"] -= len(rows) - config.max_kept
        rows = [rows[i] for i in sorted(chosen)]
    return rows, reasons


def _verdict(sample: Sample, config: RejectionConfig, outcome: Outcome) -> str:
    """ "kept", or the first reason against it.  outcome: what the verifier says; without a verdict a sample is never kept."""
    response = parse_response(sample.text, prompt=sample.problem.prompt)
    if sample.finish != "stop":
        return "truncated" if sample.finish == "length" else sample.finish
    if not response.well_formed:
        return "format"
    if outcome.status != "score":
        return "unjudged"
    if outcome.value is not None and outcome.value < 1:
        return "incorrect"
    quality = readability(sample.text, sample.problem.language, prompt=sample.problem.prompt, token_ids=sample.token_ids.tolist())
    return objection(
        quality, min_language=config.min_language_consistency, max_repetition=config.max_repetition,
        max_paragraph_words=config.max_paragraph_words, code_blocks=config.code_blocks,
    ) or "kept"  # fmt: skip


def _written(context: StageContext, config: RejectionConfig) -> list[dict]:
    """Examples that tasks write themselves, shares by weight."""
    if not config.num_written:
        return []
    weights = np.array([entry.weight for entry in config.written])
    counts = np.floor(config.num_written * weights / weights.sum()).astype(int)
    counts[0] += config.num_written - counts.sum()
    base = derive_seed(context.recipe.seed, context.name) % 2**20 * 2**20
    return [
        _row("written", *context.tasks[entry.task].written(base + i))
        for entry, count in zip(config.written, counts.tolist(), strict=True)
        for i in range(count)
    ]


def _row(source: str, problem: Problem, completion: str) -> dict:
    return {"prompt": problem.prompt, "completion": completion, "task": problem.task, "id": problem.id, "answer": problem.answer, "source": source}


