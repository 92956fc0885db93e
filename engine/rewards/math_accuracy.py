"""Math accuracy, reward "math": 1 when the final answer equals the gold one, 0 when it does not or is missing; None without a gold answer.

Extraction: extraction.py.  Plain answers (numbers, words, options, units) are decided at once in the caller, which reads nothing longer than
MAX_QUICK_CHARS.  Everything else goes to a worker process, where equivalence.py uses math-verify's packages.  A gold answer that cannot be read is an
error, never a 0; an answer that cannot be read is wrong.
"""

import importlib.util
import re
from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.answers import answer_key, parse_number, same_answer
from athanor.rewards.base import Outcome, Reward
from athanor.rewards.equivalence import equivalent, same_number, wordlike
from athanor.rewards.extraction import RULES, find_answer, inner_answer
from athanor.rewards.notation import canonical, split_unit
from athanor.rewards.response import parse_response
from athanor.samples import Problem, Sample

MAX_QUICK_CHARS = 200
_OPTION = re.compile(r"[A-Ha-h]")


def max_answer_chars(gold: str) -> int:
    """An answer longer than this is wrong without being read."""
    return 4 * len(gold) + 1000


def settle(answer: str, gold: str) -> bool | None:
    """Decide plain answers, cheaply and exactly; None = a worker has to."""
    if len(answer) > max_answer_chars(gold):
        return False
    if max(len(answer), len(gold)) > MAX_QUICK_CHARS:
        return None
    if same_answer(answer, gold, ignore_case=wordlike(gold)):
        return True
    (value, unit), (gold_value, gold_unit) = split_unit(canonical(answer)), split_unit(canonical(gold))
    numbers = parse_number(value), parse_number(gold_value)
    if None not in numbers:
        return (not unit or not gold_unit or unit == gold_unit) and same_number(value, gold_value)
    if wordlike(gold_value) and (wordlike(value) or numbers[0] is not None):
        return answer_key(value) == answer_key(gold_value)
    return None


@dataclass(frozen=True)
class Math(Reward):
    """1.0 for an equal answer, 0.0 for a different or missing one, None without a gold answer."""

    __name__ = "math"
    runs_in = "process"
    preload = ("athanor.rewards.math_accuracy", "athanor.rewards.equivalence", "math_verify")
    extract: str = "auto"
    """auto, answer, boxed, hash or number; a problem may say its own (metadata "extract")."""
    require_format: bool = False
    """0 for whatever the format reward rejects."""
    timeout_s: float = 0.5
    """Processor time of one comparison; ten times as long by the clock."""

    def __post_init__(self):
        if self.extract not in RULES:
            raise UserError(f"reward math: extract is {self.extract!r}, wanted one of {', '.join(RULES)}")
        if not 0 < self.timeout_s <= 60:
            raise UserError(f"reward math: timeout_s is {self.timeout_s}, wanted more than 0 and at most 60")
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("reward math: the package math-verify is missing; pip install math-verify")

    def quick(self, sample: Sample, problem: Problem) -> Outcome | None:
        if problem.answer is None:
            return Outcome("score", None)
        if self.require_format and not parse_response(sample.text, prompt=problem.prompt).well_formed:
            return Outcome("score", 0.0)
        gold, answer = inner_answer(problem.answer), self.answer_of(sample, problem)
        if not gold.strip():
            return Outcome("error", message="the gold answer is empty")
        verdict = False if answer is None else settle(answer, gold)
        return None if verdict is None else Outcome("score", float(verdict))

    def score(self, sample: Sample, problem: Problem) -> float | None:
        """Compare, in a worker: what `quick` left undecided."""
        decided = self.quick(sample, problem)
        if decided is not None:
            return decided
        gold, answer = inner_answer(problem.answer), self.answer_of(sample, problem)
        return float(equivalent(answer, gold))

    def answer_of(self, sample: Sample, problem: Problem) -> str | None:
        """The final answer by the problem's rule, or else by this reward's.  Raises ValueError for an unknown rule."""
        rule = problem.metadata.get("extract", self.extract)
        if rule not in RULES:
            raise ValueError(f"extract is {rule!r} in the problem's metadata, wanted one of {', '.join(RULES)}")
        return find_answer(sample.text, prompt=problem.prompt, rule=rule)


make = Math
