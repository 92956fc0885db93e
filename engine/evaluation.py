"""Evaluate any checkpoint on any tasks:  torchrun engine/train.py eval --model DIR --task gsm8k --data test.jsonl

As in the R1 report: k samples per problem at T = 0.6, top-p 0.95, up to 32,768 tokens; pass@1 is their mean with a standard error clustered by
problem, pass@k the unbiased estimate, cons@k the majority vote over equivalent answers.  Every finished problem goes to OUT/TASK/samples.jsonl at
once and is never sampled again; judging is done anew at each start, so a better verifier needs no new samples.  OUT/results.{json,csv,html} hold all
tasks that were ever evaluated into OUT, with the report's numbers beside them.
"""

import argparse
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from athanor import preemption, watchdog
from athanor.atomic import read_json, write_file
from athanor.config import DeadlineConfig, ParallelConfig, SamplingConfig
from athanor.console import Console
from athanor.errors import UserError
from athanor.evaluation_report import METRICS_NAME, write_results
from athanor.judging import judge_of, score_groups, vote_groups
from athanor.manifest import hash_path
from athanor.metrics_eval import elo_rating, score_metrics, text_metrics
from athanor.parallel import Ranks
from athanor.rollout import as_asked, rollout_generator
from athanor.run_folder import changed_keys
from athanor.sample_store import resumable_groups
from athanor.samples import Problem, Sample
from athanor.sharding import for_sampling
from athanor.tasks import Task, make_task
from athanor.tokenizer import Tokenizer
from athanor.weights import load_model

DEADLINES = ("rollout", "reward", "collective")  # the phases that an evaluation has
DEFAULT_LIMIT = 128  # problems of a procedural task
REPORT_TOKENS = 32_768
BREAKDOWNS = ("level", "difficulty", "subject", "type", "category", "platform", "High-level domain")
EPILOG = """exit codes: 0 done; 2 what you can fix, one line on stderr; 3 a deadline; 130 interrupted, the same command goes on.
torchrun turns 2, 3 and 130 into 1.
The last line on stdout is one JSON object: {"model", "out", "results": {task: {metric: value}}}.  Progress is on stderr."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="train.py eval", description="Sample a checkpoint on tasks and judge the answers.", epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--model", required=True, metavar="DIR", help="HuggingFace checkpoint folder")
    p.add_argument("--task", action="append", required=True, metavar="NAME", help="gsm8k, math, gpqa, gym:FAMILY ...; may be given several times")
    p.add_argument("--data", action="append", default=[], metavar="FILE", help="the task's data file, all rows of it; one per --task, in their order")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the tasks, such as template=r1_zero or seed=1")
    p.add_argument("--split", choices=("validation", "test"), default="test", help="default test")
    p.add_argument("--k", type=int, default=16, metavar="K", help="samples per problem (default 16; the report: 64 on AIME and GPQA)")
    p.add_argument("--limit", type=int, default=0, metavar="N", help=f"first N problems; 0 = all, {DEFAULT_LIMIT} of a procedural task")
    p.add_argument("--max-tokens", type=int, default=0, metavar="N", help=f"longest sample; 0 = what the context leaves, at most {REPORT_TOKENS}")
    p.add_argument("--temperature", type=float, default=0.6, metavar="T", help="0 = greedy (default 0.6)")
    p.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="key of the samples (default 0)")
    p.add_argument("--chat", choices=("auto", "on", "off"), default="auto", help="ask as a user's message; auto: where the checkpoint has a chat "
                   "template and the prompt is no whole conversation that ends with \"Assistant:\"")  # fmt: skip
    p.add_argument("--reward", default="", metavar="NAME", help="judge by this reward; default by the problem's domain")
    p.add_argument("--out", default="", metavar="DIR", help="where samples and results go (default runs/eval-NAME of the model folder)")
    p.add_argument("--overwrite", action="store_true", help="drop samples in OUT that were drawn with other settings")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: bfloat16 on CUDA, float32 on a CPU")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads of a process; 0 = cores divided by the local ranks")
    p.add_argument("--tensor", type=int, default=1, metavar="N", help="ranks that sample together with a part of the model each, for one that "
                   "does not fit one GPU (default 1)")  # fmt: skip
    p.add_argument("--max-rows", type=int, default=512, metavar="N", help="sequences that decode at once (default 512)")
    deadlines = ", ".join(f"{name} {seconds:g}" for name, seconds in DeadlineConfig().by_phase().items() if name in DEADLINES)
    p.add_argument("--deadline", action="append", default=[], metavar="PHASE=S", help="seconds after which a phase counts as hung: the "
                   f"process says where it is and ends with status {watchdog.EXIT_STATUS}; may be repeated (default {deadlines})")  # fmt: skip
    p.add_argument("--debug", action="store_true", help="tracebacks")
    return p


@dataclasses.dataclass(frozen=True)
class Asked:
    """One task of the command line with the problems that are asked."""

    kind: str  # "gym" of "gym:chain_sum"
    task: Task
    problems: list[Problem]


def command(argv: list[str]) -> dict:
    """Run the command line; return what its last line shows ({} on ranks other than 0).  Raises UserError for what the user can fix."""
    options = parser().parse_args(argv)
    sampling = _check(options)
    tokenizer = Tokenizer.from_folder(options.model)
    asked = [Asked(name.partition(":")[0], task, problems_of(task, options, tokenizer)) for name, task in _tasks(options)]
    out = Path(options.out or f"runs/eval-{Path(options.model).resolve().name}")
    deadlines_s = _deadlines(options.deadline)
    ranks = Ranks(options.device, options.threads, timeout_s=deadlines_s["collective"] + watchdog.GRACE_S, tensor=options.tensor)
    console = Console(len(asked))
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32"
    parallel = ParallelConfig(tensor=options.tensor, rollout="split" if options.tensor > 1 else "whole")
    model = load_model(options.model, dtype=getattr(torch, dtype), device=ranks.device if options.tensor == 1 else "cpu").requires_grad_(False)
    model = for_sampling(model, parallel, ranks)
    generator = rollout_generator(model, tokenizer, options.max_rows, options.k)
    facts = {"model": options.model, "split": options.split, "k": options.k, "seed": options.seed, "dtype": dtype}
    facts |= {"weights_sha256": _weights_hash(Path(options.model))} if ranks.is_main else {}
    guard = watchdog.Watchdog(deadlines_s, ranks.rank, ranks.world)
    try:
        results = {}
        for entry in asked:
            watchdog.at(f"eval {entry.task.name}")
            if preemption.asked(ranks):
                preemption.stop(ranks, f"with {len(results)} of {len(asked)} tasks done")
            budget = _max_tokens(entry, options, tokenizer, model.config.max_position_embeddings)
            drawn = sampling.model_copy(update={"max_tokens": budget})
            results[entry.task.name] = evaluate_task(entry, out, facts, drawn, generator, tokenizer, ranks, console, options)
        if ranks.is_main:
            console.note(f"results: {write_results(out)}")
        ranks.barrier()
        return {"model": options.model, "out": str(out), "results": results} if ranks.is_main else {}
    except Exception as error:
        watchdog.note(error)
        raise
    finally:
        ranks.close()
        guard.stop()


def problems_of(task: Task, options: argparse.Namespace, tokenizer: Tokenizer) -> list[Problem]:
    """The first problems of the split as the model sees them; what cannot be judged is found here, before anything is sampled."""
    size = task.size(options.split)
    count = (options.limit or DEFAULT_LIMIT) if size is None else min(size, options.limit or size)
    if not count:
        raise UserError(f"task {task.name} has no problems in its {options.split} split; --data FILE takes all rows of a file")
    problems = [task.problem(options.split, i) for i in range(count)]
    for judge in dict.fromkeys(judge_of(problem, options.reward) for problem in problems):
        if judge:
            judge.build()
    return [as_asked(_as_message(problem, options.chat, tokenizer), tokenizer) for problem in problems]


def evaluate_task(
    entry: Asked, out: Path, facts: dict, sampling: SamplingConfig, generator, tokenizer: Tokenizer, ranks: Ranks, console: Console, options
) -> dict:
    """Sample what is missing, judge everything and write OUT/TASK/; return the metrics (rank 0; {} on the others)."""
    name = entry.task.name
    folder = out / re.sub(r"[^\w.=-]+", "_", name)
    facts = facts | {"task": name, "sampling": sampling.model_dump(mode="json")}
    if ranks.is_main:
        _claim(folder, facts, options.overwrite)
    ranks.barrier()
    total = len(entry.problems) * options.k
    with console.stage(name, total) as progress:
        try:
            groups = resumable_groups(
                generator, tokenizer, entry.problems, options.k, sampling, ranks, options.seed, "evaluate", "usual",
                folder=folder, progress=lambda done: progress.step(min(done, total)),
            )  # fmt: skip
        except ValueError as error:  # the generator's word on a prompt or a length
            raise UserError(f"task {name}: {error}") from error
        scores = ranks.gather(score_groups(ranks.share(groups), options.reward))
        if not ranks.is_main:
            return {}
        votes = vote_groups(groups, scores, options.reward)
        metrics = all_metrics(groups, scores, votes)
        progress.step(total, {key: metrics[key] for key in ("pass@1", "mean_tokens", "truncated_rate") if key in metrics})
    row = {"task": name, "kind": entry.kind, "settings": facts, "metrics": metrics, "breakdowns": breakdowns(groups, scores)}
    write_file(folder / METRICS_NAME, json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    lines = [{"index": i, "scores": own, "votes": None if votes is None else [_shown(vote) for vote in votes[i]]} for i, own in enumerate(scores)]
    write_file(folder / "scores.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return metrics


def all_metrics(groups: list[list[Sample]], scores: list[list[float | None]], votes: list | None) -> dict:
    """Every metric of one task: pass@1, 2, 4 ... k and cons@k with standard errors, what the texts look like, a rating where problems have one.

    unjudged_rate: share of samples that the verifier gave up on (an error, a time-out) among those that it should have judged.
    """
    k = min(map(len, groups))
    result = score_metrics(scores, votes, ks=sorted({2**i for i in range(1, k.bit_length())} | {k}), errors=True)
    judged = [score for group in scores for score in group]
    if result:
        result["unjudged_rate"] = sum(score is None for score in judged) / len(judged)
    rated = [(group[0].problem.metadata.get("rating"), own) for group, own in zip(groups, scores, strict=True)]
    if result and all(isinstance(rating, (int, float)) and not isinstance(rating, bool) and np.isfinite(rating) for rating, _ in rated):
        solved = [sum(score is not None and score >= 1.0 for score in own) for _, own in rated]
        elo = elo_rating([rating for rating, _ in rated], [len(own) for _, own in rated], solved)
        result |= {"rating": elo.value, "rating_se": elo.standard_error} | ({"rating_bound": elo.bound} if elo.bound else {})
    return result | text_metrics(groups)


def breakdowns(groups: list[list[Sample]], scores: list[list[float | None]]) -> dict[str, dict]:
    """pass@1 by each column of BREAKDOWNS that all problems have: {column: {value: {num_problems, pass@1, pass@1_se}}}."""
    found = {}
    for column in BREAKDOWNS:
        values = [group[0].problem.metadata.get(column) for group in groups]
        if any(not isinstance(value, (str, int)) for value in values) or not 2 <= len(set(values)) <= 64:
            continue
        rows = {}
        for value in sorted(set(values), key=str):
            own = [row for row, other in zip(scores, values, strict=True) if other == value]
            rows[str(value)] = {"num_problems": len(own)} | score_metrics(own)
        found[column] = rows
    return found


def _check(options: argparse.Namespace) -> SamplingConfig:
    for name, least in {"k": 1, "tensor": 1, "max_rows": 1, "limit": 0, "max_tokens": 0, "seed": 0}.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, wanted at least {least}")
    if options.data and len(options.data) != len(options.task):
        raise UserError(f"--data: got {len(options.data)} files for {len(options.task)} tasks, wanted one per --task, in their order")
    if not Path(options.model).is_dir():
        raise UserError(f"--model: {options.model} is no folder, wanted a HuggingFace checkpoint (config.json, safetensors, tokenizer.json)")
    try:
        return SamplingConfig(temperature=options.temperature, top_p=options.top_p)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{str(first['loc'][0]).replace('_', '-')} is {first['input']}: {first['msg']}") from None


def _deadlines(given: list[str]) -> dict[str, float]:
    """The recipe's deadlines by phase, with those of the command line."""
    changed = {}
    for pair in given:
        phase, _, seconds = pair.partition("=")
        try:
            if phase not in DEADLINES:
                raise ValueError
            changed[f"{phase}_s"] = float(seconds)
            DeadlineConfig(**changed)
        except ValueError:
            raise UserError(f"--deadline {pair}: wanted PHASE=SECONDS above 0 with a phase of {', '.join(DEADLINES)}") from None
    return DeadlineConfig(**changed).by_phase()


def _tasks(options: argparse.Namespace) -> list[tuple[str, Task]]:
    settings = {}
    for pair in options.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: wanted KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    files = [{options.split: path} for path in options.data] or [{}] * len(options.task)
    tasks = [(name, make_task(name, **settings, **data)) for name, data in zip(options.task, files, strict=True)]
    names = [task.name for _, task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"--task: {', '.join(names)}; wanted tasks of different names")
    return tasks


def _as_message(problem: Problem, chat: str, tokenizer: Tokenizer) -> Problem:
    """The problem with its prompt as a user's message, where `--chat` says so."""
    plain = tokenizer.chat_template is None or problem.prompt.rstrip().endswith("Assistant:")
    if problem.metadata.get("messages") or chat == "off" or (chat == "auto" and plain):
        return problem
    return dataclasses.replace(problem, metadata=problem.metadata | {"messages": [{"role": "user", "content": problem.prompt}]})


def _max_tokens(entry: Asked, options: argparse.Namespace, tokenizer: Tokenizer, context: int) -> int:
    longest = max(len(tokenizer.encode_prompt(problem.prompt)) for problem in entry.problems)
    if longest >= context:
        raise UserError(f"task {entry.task.name}: its longest prompt has {longest} tokens, the checkpoint's max_position_embeddings is {context}")
    return options.max_tokens or min(REPORT_TOKENS, context - longest)


def _weights_hash(model: Path) -> str:
    """One hash of what decides the samples: weights, configuration and tokenizer."""
    files = sorted([*model.glob("*.safetensors"), *(model / name for name in ("config.json", "tokenizer.json") if (model / name).is_file())])
    return ", ".join(f"{file.name} {hash_path(file)[:16]}" for file in files)


def _claim(folder: Path, facts: dict, overwrite: bool) -> None:
    """Make or re-enter the folder of one task; samples that were drawn otherwise are refused, or dropped with `overwrite`."""
    path = folder / "settings.json"
    if path.exists():
        changes = changed_keys(read_json(path, "eval"), json.loads(json.dumps(facts)), ignore=("model",))
        if changes and not overwrite:
            raise UserError(f"{folder} holds samples drawn with other settings ({'; '.join(changes)}); give another --out, or --overwrite")
        if changes:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _shown(vote) -> str | None:
    return None if vote is None else " ".join(map(str, vote)) if isinstance(vote, tuple) else str(vote)
