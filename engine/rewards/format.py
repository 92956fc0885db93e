"""Format reward of R1: 1 when the response is <think> reasoning </think> <answer> answer </answer> and nothing else, otherwise 0.

The rule is `parse_response(...).well_formed`; see response.py for what is accepted.
"""

from dataclasses import dataclass

from athanor.rewards.base import Reward
from athanor.rewards.response import parse_response
from athanor.samples import Problem, Sample


@dataclass(frozen=True)
class Format(Reward):
    """1.0 for a well-formed response, otherwise 0.0."""

    __name__ = "format"

    def score(self, sample: Sample, problem: Problem) -> float:
        return float(parse_response(sample.text, prompt=problem.prompt).well_formed)


make = Format
