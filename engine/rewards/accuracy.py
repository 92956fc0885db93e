"""Accuracy reward of R1: 1 when the final answer equals the gold one, otherwise 0; None when the problem has no gold answer.

Extraction (setting `extract`, or the problem's own in its metadata), always outside the chain of thought (see response.py):
  "answer"  the last <answer> ... </answer> block;
  "boxed"   the last \\boxed{...} after the chain of thought.
Nothing extracted = 0.  Comparison: `same_answer` (answers.py), unless the problem's task has registered its own scorer, which gets the extracted
text and may give partial credit in [0, 1].  The model's text is never evaluated.
"""

from collections.abc import Callable
from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.answers import last_boxed, same_answer
from athanor.rewards.base import Reward
from athanor.rewards.response import parse_response
from athanor.samples import Problem, Sample

scorers: dict[str, Callable[[str, Problem], float | None]] = {}  # problem.task -> (extracted answer, problem) -> score, None = not scorable


def extract_answer(text: str, *, prompt: str = "", extract: str = "answer") -> str | None:
    """Final answer of a response by the rule `extract`, or None."""
    response = parse_response(text, prompt=prompt)
    answer = response.answer if extract == "answer" else last_boxed(response.summary)
    return answer or None


@dataclass(frozen=True)
class Accuracy(Reward):
    """1.0 for a right final answer, 0.0 for a wrong or missing one, None without a gold answer."""

    __name__ = "accuracy"
    extract: str = "answer"
    """"answer" or "boxed"."""
    require_format: bool = False
    """0 for whatever the format reward rejects."""
    ignore_case: bool = True

    def __post_init__(self):
        if self.extract not in ("answer", "boxed"):
            raise UserError(f"reward accuracy: extract is {self.extract!r}, wanted 'answer' or 'boxed'")
        if self.require_format and self.extract == "boxed":
            raise UserError("reward accuracy: require_format asks for an <answer> block, so it cannot go with extract='boxed'")

    def __call__(self, samples=None, problems=None, *, completions=None, **columns):
        if completions is not None and columns.get("answer") is None and columns.get("solution") is None and columns.get("task") is None:
            raise ValueError(f"reward accuracy: wanted a column `answer` (or `solution`), got {sorted(columns)}")
        return super().__call__(samples, problems, completions=completions, **columns)

    def answer_of(self, sample: Sample, problem: Problem) -> str | None:
        """The final answer by the problem's rule, or else by this reward's.  Raises ValueError when it is none of the rules here."""
        rule = problem.metadata.get("extract", self.extract)
        if rule not in ("answer", "boxed"):
            raise ValueError(f"reward accuracy: extract is {rule!r} in the problem's metadata, wanted 'answer' or 'boxed'")
        return extract_answer(sample.text, prompt=problem.prompt, extract=rule)

    def score(self, sample: Sample, problem: Problem) -> float | None:
        scorer = scorers.get(problem.task)
        if scorer is None and problem.answer is None:
            return None
        if self.require_format and not parse_response(sample.text, prompt=problem.prompt).well_formed:
            return 0.0
        answer = self.answer_of(sample, problem)
        if answer is None:
            return 0.0
        if scorer is not None:
            return scorer(answer, problem)
        return float(same_answer(answer, problem.answer, ignore_case=self.ignore_case))


make = Accuracy
