"""Which rewards count for whom and when: R1's totals (arXiv 2501.12948 v2, eq. 4, 8-10).

    reasoning:  accuracy + format (equal weights) [+ language]
    general:    reward model + format [+ language]; the preference model only in the last steps of the last stage

A total is the weighted sum of the rewards that apply: the problem belongs to the entry's domain (math, code, stem and logic are the family
"reasoning"; "any" is everything), first_step <= step <= last_step, and the reward did not answer None.

A reward that ends in an error or a timeout gives no score.  `on_failure` says what becomes of its sample:  "zero" counts it as 0,  "drop_sample"
takes it out of its group's statistics,  "drop_group" its whole group.  Either way it is counted (`failures`).
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from athanor.errors import UserError
from athanor.registry import near_misses
from athanor.rewards.base import Outcome, group_key
from athanor.samples import DOMAINS, Sample, in_domain

ON_FAILURE = ("zero", "drop_sample", "drop_group")
VERIFIERS = ("accuracy", "math", "code", "choice", "judge_answer")  # rewards that say whether an answer is right: their score is the raw one


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    reward: Callable
    weight: float = 1.0
    domain: str = "any"  # one of samples.DOMAINS, or "any"
    first_step: int = 0  # both ends belong to the range
    last_step: int | None = None  # None = to the end

    def __post_init__(self):
        name = getattr(self.reward, "__name__", repr(self.reward))
        if self.domain not in (*DOMAINS, "any"):
            raise UserError(f"reward table: {name} has domain {self.domain!r}; {near_misses(self.domain, [*DOMAINS, 'any'])}")
        if not np.isfinite(self.weight):
            raise UserError(f"reward table: {name} has weight {self.weight}, wanted a finite number")
        if self.first_step < 0 or (self.last_step is not None and self.last_step < self.first_step):
            raise UserError(f"reward table: {name} counts in steps {self.first_step} to {self.last_step}, wanted 0 <= first_step <= last_step")

    def applies(self, domain: str, step: int) -> bool:
        """Does this line count for a problem of `domain` at `step`?"""
        return in_domain(domain, self.domain) and self.first_step <= step and (self.last_step is None or step <= self.last_step)


@dataclass(frozen=True)
class RewardScores:
    """Scores of S samples."""

    total: np.ndarray  # (S,) float64, 0 where nothing applied
    parts: dict[str, list[float | None]]  # unweighted, per reward name; None = does not apply
    raw: np.ndarray  # (S,) float64: the verifier alone where it applies, else the total; NaN = dropped.  Group filters look at this
    applied: np.ndarray  # (S,) bool: at least one reward applied; the others carry no signal and belong in no group statistic
    dropped: np.ndarray  # (S,) bool: not applied because a reward failed on it or, with "drop_group", on a sibling
    seconds: dict[str, float] = field(default_factory=dict)  # reward -> elapsed, waiting for workers included
    failures: dict[str, Counter] = field(default_factory=dict)  # reward -> "error" and "timeout" counts, of rewards that failed at all

    def verdict(self, i: int) -> float | None:
        """What the verifier says of sample i; None where no verifier applies."""
        return _correct(self.parts, i)


class RewardTable:
    """Typed table of rewards.  Raises UserError when two lines of one name can count for the same sample."""

    def __init__(self, entries: list[Entry], on_failure: str = "drop_sample"):
        self.entries, self.on_failure = list(entries), on_failure
        if not self.entries:
            raise UserError("reward table: no rewards, wanted at least one")
        if on_failure not in ON_FAILURE:
            raise UserError(f"reward table: on_failure is {on_failure!r}, wanted one of {', '.join(ON_FAILURE)}")
        for i, a in enumerate(self.entries):
            for b in self.entries[:i]:
                if a.reward.__name__ == b.reward.__name__ and _overlap(a, b):
                    raise UserError(
                        f"reward table: two lines of {a.reward.__name__!r} count for the same samples (domains {b.domain} and {a.domain})"
                    )

    def score(self, samples: list[Sample], step: int = 0, *, judge: Callable[[Entry, list[Sample]], list[Outcome]] | None = None) -> RewardScores:
        """Score samples at a training step (0-based within the stage).  Each reward sees only the samples it counts for, in one call.

        judge: gives the outcomes of rewards that know failures; default their own `outcomes`.
        """
        total, applied, failed = np.zeros(len(samples)), np.zeros(len(samples), bool), np.zeros(len(samples), bool)
        parts: dict[str, list[float | None]] = {entry.reward.__name__: [None] * len(samples) for entry in self.entries}
        failures: dict[str, Counter] = {}
        seconds = dict.fromkeys(parts, 0.0)
        for entry in sorted(self.entries, key=lambda entry: getattr(entry.reward, "needs_correct", False)):
            name, rows = entry.reward.__name__, self.rows(entry, samples, step)
            if not rows:
                continue
            chosen = [samples[i] for i in rows]
            start = time.perf_counter()
            if gives_outcomes(entry.reward):
                outcomes = (judge or _judge)(entry, chosen)
                values = [outcome.value if outcome.status == "score" else 0.0 if self.on_failure == "zero" else None for outcome in outcomes]
                counts = Counter(outcome.status for outcome in outcomes if outcome.status != "score")
                failures |= {name: failures.get(name, Counter()) + counts} if counts else {}
                failed[[i for i, outcome in zip(rows, outcomes, strict=True) if outcome.status != "score"]] = True
            else:
                extra = {"correct": [_correct(parts, i) for i in rows]} if getattr(entry.reward, "needs_correct", False) else {}
                values = entry.reward(chosen, [sample.problem for sample in chosen], **extra)
            seconds[name] += time.perf_counter() - start
            if len(values) != len(rows):
                raise ValueError(f"reward {name}: {len(values)} scores for {len(rows)} samples")
            for i, value in zip(rows, values, strict=True):
                if value is None:
                    continue
                if not np.isfinite(value):
                    raise ValueError(f"reward {name}: score is {value}, wanted a finite number or None")
                parts[name][i] = float(value)
                total[i] += entry.weight * float(value)
                applied[i] = True
        raw = np.array([t if (c := _correct(parts, i)) is None else c for i, t in enumerate(total)], np.float64)
        dropped = failed & (self.on_failure != "zero")
        if self.on_failure == "drop_group":
            lost = {group_key(samples[i].problem) for i in np.flatnonzero(failed)}
            dropped |= np.array([group_key(sample.problem) in lost for sample in samples], bool)
        total[dropped], raw[dropped], applied[dropped] = 0.0, np.nan, False
        return RewardScores(total, parts, raw, applied, dropped, seconds, failures)

    def rows(self, entry: Entry, samples: list[Sample], step: int) -> list[int]:
        """Which samples an entry counts for.  One whose logits became NaN says nothing about its problem."""
        return [i for i, sample in enumerate(samples) if sample.finish != "error" and entry.applies(sample.problem.domain, step)]


def gives_outcomes(reward: Callable) -> bool:
    """Does a reward tell scores from errors and timeouts?  All do that do more than a cheap computation here."""
    return getattr(reward, "runs_in", "caller") != "caller"


def runs_away(reward: Callable) -> bool:
    """Does a reward run in a worker, a process or a thread?"""
    return getattr(reward, "runs_in", "caller") in ("process", "thread")


def _judge(entry: Entry, samples: list[Sample]) -> list[Outcome]:
    return entry.reward.outcomes(samples)


def _correct(parts: dict[str, list[float | None]], i: int) -> float | None:
    return next((parts[name][i] for name in VERIFIERS if name in parts and parts[name][i] is not None), None)


def make_table(lines: list[dict], on_failure: str = "drop_sample") -> RewardTable:
    """Build a table from plain dicts: keys name, weight, domain, first_step, last_step; what is left are the reward's settings."""
    from athanor.rewards import make_reward  # the package imports this file

    entries = []
    for line in lines:
        line = dict(line)
        if "name" not in line:
            raise UserError(f"reward table: a line without `name`: {line}")
        place = {key: line.pop(key) for key in ("weight", "domain", "first_step", "last_step") if key in line}
        entries.append(Entry(make_reward(line.pop("name"), **line), **place))
    return RewardTable(entries, on_failure)


def _overlap(a: Entry, b: Entry) -> bool:
    if not any(in_domain(x, y) for x, y in ((a.domain, b.domain), (b.domain, a.domain))) and a.domain != "any":
        return False
    end = float("inf")
    return a.first_step <= (end if b.last_step is None else b.last_step) and b.first_step <= (end if a.last_step is None else a.last_step)
