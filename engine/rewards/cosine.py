"""Cosine length reward of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373, section 4.2), n = tokens, L = max_tokens:

n < L:   end + (start - end) / 2 * (1 + cos(pi n / L))       from `start` at n = 0 to `end` at n = L, one pair for right and one for wrong answers
n >= L:  exceeded

The cosine is never followed past L, where it would rise again.  The defaults are open-r1's: a right answer is worth more when short, a wrong one
costs less when long.  Right is a verifier's score of 1; None without a verdict.
"""

import math
from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.base import Reward
from athanor.rewards.length import verdicts


@dataclass(frozen=True)
class Cosine(Reward):
    """A reward for right and wrong answers that depends on their length."""

    __name__ = "cosine"
    needs_correct = True
    max_tokens: int
    """Generation limit L, in tokens."""
    right_start: float = 1.0
    """A right answer of no length."""
    right_end: float = 0.5
    """A right answer of length L."""
    wrong_start: float = -1.0
    """A wrong answer of no length."""
    wrong_end: float = -0.5
    """A wrong answer of length L."""
    exceeded: float = -1.0
    """Anything of L tokens or more."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"reward cosine: max_tokens is {self.max_tokens}, wanted at least 1")

    def __call__(self, samples=None, problems=None, *, correct=None, prompts=None, completions=None, completion_ids=None, **columns):
        samples, problems = self._given(samples, problems, prompts, completions, completion_ids, columns)
        correct = verdicts(samples, problems, correct, self.__name__)
        return [None if c is None else self.value(sample.num_tokens, c >= 1) for sample, c in zip(samples, correct, strict=True)]

    def value(self, num_tokens: int, right: bool) -> float:
        """The reward of a response of `num_tokens` tokens."""
        if num_tokens >= self.max_tokens:
            return self.exceeded
        start, end = (self.right_start, self.right_end) if right else (self.wrong_start, self.wrong_end)
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * num_tokens / self.max_tokens))


make = Cosine
