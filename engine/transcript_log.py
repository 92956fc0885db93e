"""Samples of reinforcement learning to read: transcripts/<stage>.jsonl, the best and the worst of every so many steps.

One line per sample: {"step", "place" ("best" or "worst"), "task", "id", "prompt", "answer", "text", "finish", "num_tokens", "reward", "rewards" (by
name, unweighted, null = does not apply), "advantage"} and, where asked for, "tokens" (their texts, which joined are the text) and "logps" (nats,
under the distribution that was sampled from). A resumed stage cuts the file back to its state, as it does with the metrics.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from athanor.atomic import write_file
from athanor.parallel import Ranks
from athanor.rewards import RewardScores
from athanor.samples import Sample
from athanor.tokenizer import Tokenizer
from athanor.watch_config import TranscriptConfig

STEP = 8  # tokens after which a text is decoded from a later one on


def transcript_path(run_dir: Path, stage: str) -> Path:
    return run_dir / "transcripts" / f"{stage}.jsonl"


def rewind_transcripts(path: Path, step: int) -> None:
    """Drop what was written after `step`, and half a line that a kill left."""
    if path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        write_file(path, b"".join(line for line in lines if json.loads(line)["step"] <= step))


def write_transcripts(
    path: Path, step: int, groups: list[list[Sample]], places: list[int], scores: RewardScores, advantages: list[float], config: TranscriptConfig,
    tokenizer: Tokenizer, ranks: Ranks,
) -> None:  # fmt: skip
    """Append the best and the worst samples of a step; all ranks call it, one writes.

    groups, scores, advantages: this rank's, samples in one order.  places: of its groups, in the order of all ranks' groups.
    """
    samples = [(place, member, sample) for place, group in zip(places, groups, strict=True) for member, sample in enumerate(group)]
    mine = {at[:2]: i for i, at in enumerate(samples) if scores.applied[i]}
    judged = sorted(ranks.concatenate([(*at, float(scores.total[i]), samples[i][2].problem.id) for at, i in mine.items()])[0])
    seen = Counter()
    nth = [seen.update([row[3]]) or seen[row[3]] for row in judged]  # of equals one of each problem first
    num = min(config.num, len(judged))
    best = sorted(range(len(judged)), key=lambda i: (-judged[i][2], nth[i]))[: num - num // 2]
    worst = sorted(set(range(len(judged))) - set(best), key=lambda i: (judged[i][2], nth[i], i))[: num // 2]
    rows = {}
    for line, (i, place) in enumerate([(i, "best") for i in best] + [(i, "worst") for i in reversed(worst)]):
        own = mine.get(judged[i][:2])
        if own is not None:
            row = _row(samples[own][2], tokenizer if config.logps else None)
            parts = {name: values[own] for name, values in scores.parts.items()}
            rows[line] = {"step": step, "place": place, **row, "reward": float(scores.total[own]), "rewards": parts}
            rows[line]["advantage"] = float(advantages[own])
    written = sorted(ranks.concatenate(list(rows.items()))[0], key=lambda item: item[0])
    if ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for _, row in written)


def _row(sample: Sample, tokenizer: Tokenizer | None) -> dict:
    problem = sample.problem
    row = {"task": problem.task, "id": problem.id, "prompt": problem.prompt, "answer": problem.answer, "text": sample.text, "finish": sample.finish}
    row["num_tokens"] = sample.num_tokens
    if tokenizer is not None:
        row |= {"tokens": token_texts(tokenizer, sample.token_ids), "logps": [round(float(x), 4) for x in sample.logps]}
    return row


def token_texts(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The text of each token, in its context; a character of several tokens stands with its last one, a special token is ""."""
    texts, start, before = [], 0, ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[start : i + 1])
        if text.endswith("\ufffd") and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        before = text
        if i + 1 - start >= STEP:
            start, before = i, tokenizer.decode(ids[i : i + 1])
    return texts
