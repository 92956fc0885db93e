"""Sampling that survives a kill: every group goes to disk as soon as it is complete, and a second start samples only what is missing.

FOLDER/samples.jsonl has one line per problem (until the end rank r > 0 appends to samples.<r>.jsonl; what several ranks drew comes then):
{"index", "task", "split", "id", "prompt", "answer", "samples": [{"text", "finish", "token_ids"}, ...]}.  Sampled log-probs are not kept.
As seeds are a function of the problem and the sample, the finished file is the same wherever and on however many ranks the sampling was interrupted.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from athanor import preemption
from athanor.atomic import write_file
from athanor.config import SamplingConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.parallel import Ranks
from athanor.rollout import as_asked, asked, stream_samples
from athanor.samples import Problem, Sample
from athanor.tokenizer import Tokenizer

SAMPLES_NAME = "samples.jsonl"


def resumable_groups(
    generator: Generator | Callable[[], Generator],
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    group_size: int,
    sampling: SamplingConfig,
    ranks: Ranks,
    *key: int | str,
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """`group_size` samples of every problem, on every rank, in the problems' order; what lies in `folder` is read instead of sampled.

    generator: or what makes it when there is something to sample.  progress(samples): how many there are so far, on several ranks an estimate.
    Raises UserError when the folder holds samples of other problems or groups of another size.
    """
    problems = [as_asked(problem, tokenizer) for problem in problems]
    groups, beyond = _collect(folder, problems, group_size) if ranks.is_main else ({}, {})
    found = set(ranks.broadcast(sorted(groups)))  # the others wait here until the files are in order
    missing = [i for i in range(len(problems)) if i not in found]
    if missing:
        path = folder / (SAMPLES_NAME if ranks.is_main else f"samples.{ranks.rank}.jsonl")
        generator = generator if isinstance(generator, Generator) else generator()
        still, dispatch = asked(generator, tokenizer, [problems[i] for i in missing], group_size, sampling, ranks, *key)
        drawn: dict[int, dict[int, Sample]] = {i: {} for i in missing}  # by member; those of a group may be drawn on several ranks
        saved, done, peers = len(groups), 0, generator.peers
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "ab") as file, contextlib.closing(stream_samples(dispatch, still, tokenizer)) as stream:
                for position, member, sample in stream:
                    i = missing[position]
                    drawn[i][member] = sample
                    done += 1
                    if progress:
                        progress(len(found) * group_size + min(done * dispatch.num_consumers, dispatch.total))
                    if len(drawn[i]) == group_size and dispatch.leads:
                        saved += 1
                        file.write(_line(i, _in_order(drawn[i])))
                        file.flush()
                    if preemption.asked(peers) if peers else preemption.asked_here():
                        break
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; the groups before are kept") from error
        if preemption.asked(ranks):
            preemption.stop(ranks, f"with {ranks.sum_int(saved)} of {len(problems)} groups of samples saved")
        parts = [(i, dict(enumerate(group))) for i, group in groups.items()] + (list(drawn.items()) if dispatch.leads else [])
        whole: dict[int, dict[int, Sample]] = {i: {} for i in range(len(problems))}
        for i, members in ranks.concatenate(parts)[0]:
            whole[i] |= members
        groups = {i: _in_order(members) for i, members in whole.items()}
        dispatch.clear()
        if ranks.is_main:
            _write(folder, groups, beyond)
    else:
        groups = ranks.broadcast(groups)
    return [groups[i] for i in range(len(problems))]


def _in_order(members: dict[int, Sample]) -> list[Sample]:
    return [members[m] for m in range(len(members))]


def _collect(folder: Path, problems: Sequence[Problem], group_size: int) -> tuple[dict[int, list[Sample]], dict[int, bytes]]:
    """Groups of all files of the folder, and the lines of problems beyond those asked; the files are made one, without half lines (a kill)."""
    groups: dict[int, list[Sample]] = {}
    paths = sorted(folder.glob("samples*.jsonl"))
    beyond: dict[int, bytes] = {}
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                index, samples = row["index"], row["samples"]
                if index >= len(problems):
                    beyond[index] = line
                    continue
                problem = problems[index]
                same = (row["task"], row["split"], row["id"], row["prompt"]) == (problem.task, problem.split, problem.id, problem.prompt)
                groups[index] = [_sample(problem, sample) for sample in samples]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}:{number}: not a line of samples ({error!r}); delete the file to sample again") from None
            if not same or len(samples) != group_size:
                raise UserError(
                    f"{path}:{number}: {len(samples)} samples of {row['task']} {row['split']} {row['id']}, wanted {group_size} of "
                    f"{problem.task} {problem.split} {problem.id} with the same prompt; delete the file to sample again"
                )
    if paths:
        _write(folder, groups, beyond)
    return groups, beyond


def _write(folder: Path, groups: dict[int, list[Sample]], beyond: dict[int, bytes]) -> None:
    lines = {i: _line(i, group) for i, group in groups.items()} | beyond
    write_file(folder / SAMPLES_NAME, b"".join(lines[i] for i in sorted(lines)))
    for part in folder.glob("samples.*.jsonl"):
        os.unlink(part)


def _line(index: int, group: list[Sample]) -> bytes:
    problem = group[0].problem
    row = {"index": index, "task": problem.task, "split": problem.split, "id": problem.id, "prompt": problem.prompt, "answer": problem.answer}
    row["samples"] = [{"text": s.text, "finish": s.finish, "token_ids": s.token_ids.tolist()} for s in group]
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _sample(problem: Problem, row: dict) -> Sample:
    ids = np.array(row["token_ids"], np.int64)
    return Sample(problem, row["text"], ids, np.zeros(len(ids), np.float32), row["finish"])
