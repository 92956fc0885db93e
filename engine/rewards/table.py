"""Which rewards count for whom and when: R1's totals (arXiv 2501.12948 v2, eq. 4, 8-10).

    reasoning:  accuracy + format (equal weights) [+ language]
    general:    reward model + format [+ language]; the preference model only in the last steps of the last stage

A total is the weighted sum of the rewards that apply: the entry's domain is the problem's (or "any"), first_step <= step <= last_step, and the
reward did not answer None.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from athanor.errors import UserError
from athanor.samples import Sample

DOMAINS = ("reasoning", "general", "any")


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    reward: Callable
    weight: float = 1.0
    domain: str = "any"  # "reasoning", "general" or "any"
    first_step: int = 0  # both ends belong to the range
    last_step: int | None = None  # None = to the end

    def __post_init__(self):
        name = getattr(self.reward, "__name__", repr(self.reward))
        if self.domain not in DOMAINS:
            raise UserError(f"reward table: {name} has domain {self.domain!r}, wanted one of {', '.join(DOMAINS)}")
        if not np.isfinite(self.weight):
            raise UserError(f"reward table: {name} has weight {self.weight}, wanted a finite number")
        if self.first_step < 0 or (self.last_step is not None and self.last_step < self.first_step):
            raise UserError(f"reward table: {name} counts in steps {self.first_step} to {self.last_step}, wanted 0 <= first_step <= last_step")

    def applies(self, domain: str, step: int) -> bool:
        """Does this line count for a problem of `domain` at `step`?"""
        return self.domain in ("any", domain) and self.first_step <= step and (self.last_step is None or step <= self.last_step)


@dataclass(frozen=True)
class RewardScores:
    """Scores of S samples."""

    total: np.ndarray  # (S,) float64, 0 where nothing applied
    parts: dict[str, list[float | None]]  # unweighted, per reward name; None = does not apply
    raw: np.ndarray  # (S,) float64: accuracy alone where it applies, else the total.  Group filters look at this, never at shaped totals
    applied: np.ndarray  # (S,) bool: at least one reward applied; the others carry no signal and belong in no group statistic


class RewardTable:
    """Typed table of rewards.  Raises UserError when two lines of one name can count for the same sample."""

    def __init__(self, entries: list[Entry]):
        self.entries = list(entries)
        if not self.entries:
            raise UserError("reward table: no rewards, wanted at least one")
        for i, a in enumerate(self.entries):
            for b in self.entries[:i]:
                if a.reward.__name__ == b.reward.__name__ and _overlap(a, b):
                    raise UserError(
                        f"reward table: two lines of {a.reward.__name__!r} count for the same samples (domains {b.domain} and {a.domain})"
                    )

    def score(self, samples: list[Sample], step: int = 0) -> RewardScores:
        """Score samples at a training step (0-based within the stage).  Each reward sees only the samples it counts for, in one call."""
        total = np.zeros(len(samples))
        applied = np.zeros(len(samples), bool)
        parts: dict[str, list[float | None]] = {}
        for entry in self.entries:
            name = entry.reward.__name__
            column = parts.setdefault(name, [None] * len(samples))
            # a sample whose logits became NaN says nothing about its problem
            rows = [i for i, sample in enumerate(samples) if sample.finish != "error" and entry.applies(sample.problem.domain, step)]
            if not rows:
                continue
            chosen = [samples[i] for i in rows]
            values = entry.reward(chosen, [sample.problem for sample in chosen])
            if len(values) != len(rows):
                raise ValueError(f"reward {name}: {len(values)} scores for {len(rows)} samples")
            for i, value in zip(rows, values, strict=True):
                if value is None:
                    continue
                if not np.isfinite(value):
                    raise ValueError(f"reward {name}: score is {value}, wanted a finite number or None")
                column[i] = float(value)
                total[i] += entry.weight * float(value)
                applied[i] = True
        accuracy = parts.get("accuracy", [None] * len(samples))
        raw = np.array([t if a is None else a for a, t in zip(accuracy, total, strict=True)], np.float64)
        return RewardScores(total, parts, raw, applied)


def make_table(lines: list[dict]) -> RewardTable:
    """Build a table from plain dicts: keys name, weight, domain, first_step, last_step; what is left are the reward's settings."""
    from athanor.rewards import make_reward  # the package imports this file

    entries = []
    for line in lines:
        line = dict(line)
        if "name" not in line:
            raise UserError(f"reward table: a line without `name`: {line}")
        place = {key: line.pop(key) for key in ("weight", "domain", "first_step", "last_step") if key in line}
        entries.append(Entry(make_reward(line.pop("name"), **line), **place))
    return RewardTable(entries)


def _overlap(a: Entry, b: Entry) -> bool:
    if "any" not in (a.domain, b.domain) and a.domain != b.domain:
        return False
    end = float("inf")
    return a.first_step <= (end if b.last_step is None else b.last_step) and b.first_step <= (end if a.last_step is None else a.last_step)
