"""Format reward of R1: 1 when the response is <think> reasoning </think> <answer> answer </answer> and nothing else, otherwise 0.

The strict rule is `parse_response(...).well_formed`; see response.py for what is accepted.  The softer `tag_count`, for models that do not know the
tags yet, gives a quarter for each of the four tags that occurs exactly once (open-r1's), and here nothing at all when these are out of order.
"""

import re
from collections import Counter
from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.base import Reward
from athanor.rewards.response import ORDER, parse_response
from athanor.samples import Problem, Sample


def tag_count(text: str, prompt: str = "") -> float:
    """A quarter per tag that occurs exactly once, 0 where those tags are out of order.  A prompt that ends with `<think>` has given the first."""
    found = re.findall("|".join(ORDER), "<think>" + text if prompt.rstrip().endswith("<think>") else text)
    counts = Counter(found)
    once = [tag for tag in found if counts[tag] == 1]
    return len(once) / 4 if once == [tag for tag in ORDER if tag in once] else 0.0


@dataclass(frozen=True)
class Format(Reward):
    """1.0 for a well-formed response, otherwise 0.0."""

    __name__ = "format"
    mode: str = "strict"
    """"strict" or "tag_count"."""

    def __post_init__(self):
        if self.mode not in ("strict", "tag_count"):
            raise UserError(f"reward format: mode is {self.mode!r}, wanted 'strict' or 'tag_count'")

    def score(self, sample: Sample, problem: Problem) -> float:
        if self.mode == "tag_count":
            return tag_count(sample.text, problem.prompt)
        return float(parse_response(sample.text, prompt=problem.prompt).well_formed)


make = Format
