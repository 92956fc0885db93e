"""Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), n = completion tokens, the end token included:

0                                  n <= max_tokens - buffer
(max_tokens - buffer - n)/buffer   up to max_tokens
-1                                 beyond
"""

from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.base import Reward
from athanor.samples import Problem, Sample


@dataclass(frozen=True)
class Overlong(Reward):
    """From 0 down to -1 over the last `buffer` tokens before `max_tokens`."""

    __name__ = "overlong"
    max_tokens: int
    """Generation limit, in tokens."""
    buffer: int
    """Tokens before the limit over which the punishment grows."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"reward overlong: max_tokens is {self.max_tokens}, wanted at least 1")
        if not 0 < self.buffer <= self.max_tokens:
            raise UserError(f"reward overlong: buffer is {self.buffer}, wanted 1 to max_tokens ({self.max_tokens})")

    def score(self, sample: Sample, problem: Problem) -> float:
        if sample.token_ids is None:
            raise ValueError("reward overlong: needs token counts, got no `completion_ids`")
        over = sample.num_tokens - (self.max_tokens - self.buffer)
        return -min(max(over, 0) / self.buffer, 1.0) + 0.0  # + 0.0 turns -0.0 into 0.0


make = Overlong
