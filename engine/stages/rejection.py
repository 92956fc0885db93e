"""Rejection sampling: sample a checkpoint, keep what is correct, well formed, readable and in one language, add written examples, write JSONL.

R1 uses it twice: to curate R1-Zero's outputs for the cold start, and to make the second SFT set from the first RL checkpoint (arXiv 2501.12948,
sections 2.3.1 and 2.3.3).  Duplicates are dropped; at most `keep_per_prompt` stay for one prompt.  What shares a word n-gram with an evaluation set
goes, prompts before they are sampled.  A kill loses only the groups that were being sampled.  data/<stage>.statistics.json says per task how many
samples there were, how many stayed and how long they are, as the report's Table 5 does.
"""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np

from athanor.atomic import write_file
from athanor.config import RejectionConfig
from athanor.contamination import ReferenceNgrams, evaluation_ngrams, question_of
from athanor.errors import UserError
from athanor.judging import judge_of, score_groups
from athanor.rewards import Response, parse_response
from athanor.rewards.readability import objection, readability
from athanor.rollout import ProblemStream, rollout_generator
from athanor.sample_store import resumable_groups
from athanor.samples import Problem, Sample
from athanor.seeds import derive_seed
from athanor.stages.context import StageContext
from athanor.stages.sft import read_examples


def run(context: StageContext, config: RejectionConfig) -> dict:
    """Collect the set and write it; the metrics say what was kept and why the rest was not."""
    rows, reasons, statistics = [], Counter(), {}
    with context.console.stage(context.name, config.num_prompts * config.samples_per_prompt if config.source else 0) as progress:
        if config.source:
            rows, reasons, statistics = _sampled(context, config, progress)
        kept = len(rows)
        rows += _written(context, config)
        written = len(rows) - kept
        rows += _mixed(context, config)
        progress.step(progress.done, {"kept": kept, "written": written})
    if not rows:
        raise UserError(f"stage {context.name}: kept none of {sum(reasons.values())} samples ({dict(reasons)}); train its source longer")
    order = np.random.default_rng(derive_seed(context.recipe.seed, context.name, "order")).permutation(len(rows))
    sampled = sum(reasons.values())
    metrics = {"sampled": sampled, "kept": kept, "written": written, "acceptance": kept / sampled if sampled else 0.0}
    metrics |= {"mixed": len(rows) - kept - written} if config.mixed else {}
    metrics |= {f"dropped_{name}": count for name, count in reasons.items() if name != "kept"}
    metrics |= {f"contaminated_{what}": sum(counts.values()) for what, counts in statistics.get("contaminated", {}).items()}
    statistics_path = context.data_path.with_suffix(".statistics.json")
    if context.ranks.is_main:
        context.data_path.parent.mkdir(parents=True, exist_ok=True)
        write_file(context.data_path, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in order))
        write_file(statistics_path, json.dumps(metrics | statistics, indent=2, ensure_ascii=False) + "\n")
    context.ranks.barrier()
    return {"metrics": metrics, "outputs": {"data": context.data_path, "statistics": statistics_path}}


def _sampled(context: StageContext, config: RejectionConfig, progress) -> tuple[list[dict], Counter, dict]:
    """Kept rows, the number of samples per verdict, and statistics per task and evaluation set."""
    seed = context.recipe.seed
    problems = ProblemStream(context.tasks, config.prompts, config.num_prompts, 1, seed, context.name).draw(0)
    ngrams = evaluation_ngrams(config.decontaminate, context.tasks, config.decontaminate_words)
    removed = {"prompts": Counter(), "samples": Counter()}
    if config.decontaminate:
        problems = [problem for problem in problems if not _contaminated(ngrams, removed["prompts"], question_of(problem))]

    for judge in dict.fromkeys(judge_of(problem, config.verifier, config.verifier_settings) for problem in problems):
        if judge:
            judge.build()
    saved = time.monotonic()

    def advance(done: int) -> None:
        nonlocal saved
        progress.step(done)
        if context.on_save and context.ranks.is_main and time.monotonic() - saved > 10:
            saved = time.monotonic()
            context.on_save()

    groups = resumable_groups(
        lambda: rollout_generator(
            context.load(config.source), context.tokenizer, context.recipe.max_rows, config.samples_per_prompt, context.recipe.speculation
        ),
        context.tokenizer, problems, config.samples_per_prompt, config.sampling, context.ranks, seed, context.name,
        folder=context.state_dir, progress=advance,
    )  # fmt: skip
    reasons, rows, lengths, seen = Counter(), [], [], set()
    worth_judging = [[sample] for group in groups for sample in group if not _unusable(sample)]
    scores = iter(context.ranks.gather(score_groups(context.ranks.share(worth_judging), config.verifier, settings=config.verifier_settings)))
    for group in groups:
        taken = 0
        for sample in group:
            reason = _unusable(sample) or _verdict(sample, next(scores)[0], config)
            row = _row(context.name, sample.problem, sample.text)
            if reason == "kept" and config.decontaminate and _contaminated(ngrams, removed["samples"], sample.text):
                reason = "contaminated"
            if reason == "kept" and (row["prompt"], row["completion"]) in seen:
                reason = "duplicate"
            if reason == "kept" and taken == config.keep_per_prompt:
                reason = "surplus"
            reasons[reason] += 1
            if reason == "kept":
                taken += 1
                seen.add((row["prompt"], row["completion"]))
                rows.append(row)
                lengths.append(sample.num_tokens)
    if config.max_kept and len(rows) > config.max_kept:
        chosen = np.random.default_rng(derive_seed(seed, context.name, "kept")).permutation(len(rows))[: config.max_kept]
        reasons["surplus"] += len(rows) - config.max_kept
        reasons["kept"] -= len(rows) - config.max_kept
        rows, lengths = [rows[i] for i in sorted(chosen)], [lengths[i] for i in sorted(chosen)]
    statistics = {"tasks": _per_task(groups, rows, lengths)}
    if config.decontaminate:
        statistics["contaminated"] = {what: {name: counts[name] for name in ngrams.names} for what, counts in removed.items()}
    return rows, reasons, statistics


def _contaminated(ngrams: ReferenceNgrams, counts: Counter, *texts: str) -> bool:
    """Whether a text shares an n-gram with an evaluation set; counts it once for each set that it does."""
    found = ngrams.found_in(*texts)
    counts.update(found)
    return bool(found)


def _per_task(groups: list[list[Sample]], rows: list[dict], lengths: list[int]) -> dict[str, dict]:
    """Per task: prompts, samples, how many were kept, and the mean tokens of these."""
    tasks = {}
    for name in dict.fromkeys(group[0].problem.task for group in groups):
        asked = [group for group in groups if group[0].problem.task == name]
        kept = [length for row, length in zip(rows, lengths, strict=True) if row["task"] == name]
        sampled = sum(map(len, asked))
        tasks[name] = {"prompts": len(asked), "sampled": sampled, "kept": len(kept), "acceptance": len(kept) / sampled}
        tasks[name]["mean_tokens"] = float(np.mean(kept)) if kept else None
    return tasks


def _unusable(sample: Sample) -> str | None:
    """Why a sample cannot stay whatever its answer is: it never ended, or it is not well formed."""
    if sample.finish != "stop":
        return "truncated" if sample.finish == "length" else sample.finish
    return None if _well_formed(parse_response(sample.text, prompt=sample.problem.prompt), sample.problem) else "format"


def _verdict(sample: Sample, score: float | None, config: RejectionConfig) -> str:
    """ "kept", or the first reason against a usable sample.  score: the verifier's; None for open-ended problems, and where it gave up."""
    if score is None and judge_of(sample.problem, config.verifier):
        return "unjudged"
    if score is not None and score < 1:
        return "incorrect"
    quality = readability(sample.text, sample.problem.language, prompt=sample.problem.prompt, token_ids=sample.token_ids.tolist())
    return objection(
        quality, min_language=config.min_language_consistency, max_repetition=config.max_repetition,
        max_paragraph_words=config.max_paragraph_words, code_blocks=config.code_blocks or sample.problem.domain == "code",
    ) or "kept"  # fmt: skip


def _well_formed(response: Response, problem: Problem) -> bool:
    """Both tag pairs; a closed chain of thought and a summary are enough where the prompt asked for another form of the answer."""
    if problem.domain == "code" or problem.metadata.get("choices") or problem.metadata.get("extract") == "boxed":
        return bool(response.think and response.summary)
    return response.well_formed


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


def _mixed(context: StageContext, config: RejectionConfig) -> list[dict]:
    """Examples from files, all of them or `num_mixed` at random."""
    rows = [
        {"prompt": prompt, "completion": completion, "task": Path(path).stem, "id": i, "answer": None, "source": "mixed"}
        for path in config.mixed
        for i, (prompt, completion) in enumerate(read_examples(Path(path)))
    ]
    if not config.num_mixed or config.num_mixed >= len(rows):
        return rows
    chosen = np.random.default_rng(derive_seed(context.recipe.seed, context.name, "mixed")).permutation(len(rows))[: config.num_mixed]
    return [rows[i] for i in sorted(chosen)]


def _row(source: str, problem: Problem, completion: str) -> dict:
    return {"prompt": problem.prompt, "completion": completion, "task": problem.task, "id": problem.id, "answer": problem.answer, "source": source}


