"""Length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3), over the samples of one problem:

lambda_i = 0.5 - (len_i - min len) / (max len - min len);   right: lambda_i;   wrong: min(0, lambda_i);   all of one length: 0

len in tokens, the end token included.  Right is a verifier's score of 1; a sample without a verdict gets None and sets no length.
"""

from collections import defaultdict
from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.base import Reward, group_key


@dataclass(frozen=True)
class Length(Reward):
    """From 0.5 for the shortest right sample of a problem to -0.5 for the longest; a wrong one gains nothing by being short."""

    __name__ = "length"
    needs_correct = True
    scale: float = 1.0
    """Factor of lambda."""

    def __post_init__(self):
        if self.scale <= 0:
            raise UserError(f"reward length: scale is {self.scale}, wanted more than 0")

    def __call__(self, samples=None, problems=None, *, correct=None, prompts=None, completions=None, completion_ids=None, **columns):
        samples, problems = self._given(samples, problems, prompts, completions, completion_ids, columns)
        correct = verdicts(samples, problems, correct, self.__name__)
        groups = defaultdict(list)
        for i, problem in enumerate(problems):
            if correct[i] is not None:
                groups[group_key(problem)].append(i)
        result: list[float | None] = [None] * len(samples)
        for rows in groups.values():
            lengths = [samples[i].num_tokens for i in rows]
            shortest, spread = min(lengths), max(lengths) - min(lengths)
            for i, length in zip(rows, lengths, strict=True):
                value = 0.5 - (length - shortest) / spread if spread else 0.0
                result[i] = self.scale * (value if correct[i] >= 1 else min(0.0, value))
        return result


def verdicts(samples, problems, correct, name: str) -> list[float | None]:
    """The verifier's scores that a table passes; called without a table, the accuracy reward's.  Token counts are needed."""
    if any(sample.token_ids is None for sample in samples):
        raise ValueError(f"reward {name}: needs token counts, got no `completion_ids`")
    if correct is None:
        from athanor.rewards.accuracy import Accuracy

        correct = Accuracy()(samples, problems)
    if len(correct) != len(samples):
        raise ValueError(f"reward {name}: {len(correct)} verdicts for {len(samples)} samples")
    return correct


make = Length
