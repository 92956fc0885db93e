"""What every reward shares: the two ways to be called, where it runs, and the three outcomes of judging a sample.

Native:  reward(samples, problems=None), problems defaulting to each sample's own.
TRL (GRPOTrainer, RLOOTrainer):  reward(prompts=, completions=, completion_ids=, **columns), prompts and completions being strings or chat lists
([{"role": ..., "content": ...}]).  The gold answer is the column `answer`, or `solution` where there is none; columns `domain`, `language`,
`task`, `split` and `id` fill the problem's fields; every other column of the right length goes into its metadata.

Where a reward runs (`runs_in`):  "caller", cheap and safe on any text;  "process", in a killable worker under `timeout_s` seconds of processor time
(pool.py);  "thread", in a thread of the pool, for a reward that enforces a deadline of its own outside this process;  "batch", in the caller too, all
samples of a call at once, for a reward that has a model and knows failures (it defines `outcomes`).
"""

import logging
import math
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from athanor.samples import Problem, Sample

RUNS_IN = ("caller", "process", "thread", "batch")


@dataclass(frozen=True)
class Outcome:
    """What came of judging one sample.  An error or a timeout is never a score."""

    status: str  # "score", "error" or "timeout"
    value: float | None = None  # the score; None = the reward does not apply, or there is none
    message: str = ""  # what went wrong
    seconds: float = 0.0  # of a worker, sending and waiting for the answer included


def group_key(problem: Problem) -> tuple:
    """Equal for the samples of one problem, however they came (TRL gives every row a problem of its own)."""
    return problem.task, problem.split, problem.prompt, problem.answer


def judge(reward: "Reward", sample: Sample, problem: Problem) -> Outcome:
    """Judge one sample here: an exception is an error, a TimeoutError a timeout.  `score` may return an Outcome of its own."""
    start = time.perf_counter()
    try:
        value = reward.score(sample, problem)
        outcome = value if isinstance(value, Outcome) else Outcome("score", None if value is None else float(value))
        if outcome.value is not None and not math.isfinite(outcome.value):
            outcome = Outcome("error", message=f"score is {outcome.value}, wanted a finite number or None")
    except TimeoutError as error:
        outcome = Outcome("timeout", message=str(error) or "TimeoutError")
    except Exception as error:
        outcome = Outcome("error", message=f"{type(error).__name__}: {error}"[:500])
    return replace(outcome, seconds=time.perf_counter() - start)


def chat_text(message: str | list) -> str:
    """Text of a prompt or completion as TRL passes it: a string, or a chat list whose contents are strings or lists of text parts."""
    if isinstance(message, str):
        return message
    parts = []
    for turn in message:
        content = turn.get("content") or ""
        parts.append(content if isinstance(content, str) else "".join(part.get("text") or "" for part in content))
    return "\n".join(parts)


def samples_from_columns(prompts, completions, completion_ids, columns: dict) -> list[Sample]:
    """Build samples from the columns that TRL passes.  token_ids is None where `completion_ids` was not passed."""
    size = len(completions)
    per_row = {name: column for name, column in columns.items() if isinstance(column, (list, tuple)) and len(column) == size}
    golds = per_row.pop("answer", None) or per_row.pop("solution", None) or [None] * size
    samples = []
    for i, completion in enumerate(completions):
        row = {name: column[i] for name, column in per_row.items()}
        problem = Problem(
            prompt=chat_text(prompts[i]) if prompts is not None else "",
            answer=None if golds[i] is None else str(golds[i]),
            id=row.pop("id", i),
            task=row.pop("task", ""),
            domain=row.pop("domain", "reasoning"),
            language=row.pop("language", "en"),
            split=row.pop("split", "train"),
            metadata=row,
        )
        ids = None if completion_ids is None else np.asarray(completion_ids[i], np.int64)
        samples.append(Sample(problem, chat_text(completion), ids, np.zeros(0, np.float32)))
    return samples


@dataclass(frozen=True)
class Reward:
    """Base of all rewards: a subclass sets `__name__` and defines `score`; settings are its fields, checked when built."""

    __name__ = "reward"
    runs_in = "caller"
    preload = ()  # modules that workers import before the first sample; `warm_up()` of each is called where it has one
    timeout_s = 5.0  # processor time of one call in a worker; elapsed time may be `pool.WALL_FACTOR` times as long
    needs_correct = False  # the call takes `correct`, the verifier's scores of the samples

    def score(self, sample: Sample, problem: Problem) -> float | None:
        """Score one sample; None = does not apply."""
        raise NotImplementedError(f"{type(self).__qualname__}.score")

    def quick(self, sample: Sample, problem: Problem) -> Outcome | None:
        """Decide in the caller what needs no worker; None = undecided.  Must be cheap on any text."""
        return None

    def __call__(self, samples=None, problems=None, *, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        """Score samples, given natively or as TRL passes them (see the module).  Raises ValueError when neither or both are given.

        A worker's error or timeout gives None, and a line in the log; `outcomes` tells them apart.
        """
        samples, problems = self._given(samples, problems, prompts, completions, completion_ids, columns)
        if self.runs_in == "caller":
            return [self.score(sample, problem) for sample, problem in zip(samples, problems, strict=True)]
        outcomes = self.outcomes(samples, problems)
        failed = Counter(outcome.status for outcome in outcomes if outcome.status != "score")
        if failed:
            first = next(outcome for outcome in outcomes if outcome.status != "score")
            counts = f"{failed['error']} errors and {failed['timeout']} timeouts among {len(outcomes)} samples"
            logging.getLogger("athanor.rewards").warning("reward %s: %s, first: %s", self.__name__, counts, first.message)
        return [outcome.value for outcome in outcomes]

    def outcomes(self, samples: list[Sample], problems: list[Problem] | None = None) -> list[Outcome]:
        """Judge samples and wait; in their order.  Worker rewards use the pool that all direct calls share."""
        from athanor.rewards.pool import shared_pool

        problems = [sample.problem for sample in samples] if problems is None else problems
        futures = [shared_pool().submit(self, sample, problem) for sample, problem in zip(samples, problems, strict=True)]
        return [future.result() for future in futures]

    def _given(self, samples, problems, prompts, completions, completion_ids, columns) -> tuple[list[Sample], list[Problem]]:
        if (samples is None) == (completions is None):
            raise ValueError(f"reward {self.__name__}: wanted either `samples` or `completions=`, got {'neither' if samples is None else 'both'}")
        if completions is not None:
            samples = samples_from_columns(prompts, completions, completion_ids, columns)
        if problems is None:
            problems = [sample.problem for sample in samples]
        if len(problems) != len(samples):
            raise ValueError(f"reward {self.__name__}: {len(samples)} samples but {len(problems)} problems")
        return samples, problems
