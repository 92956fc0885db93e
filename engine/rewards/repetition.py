"""Repetition penalty:  -max_penalty * (1 - unique n-grams / all n-grams), over token ids or words; 0 for fewer than n tokens.

The definition of TRL (token ids) and open-r1 (words).  Text without spaces between words: each Han or kana character is a word.
"""

import re
from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.base import Reward
from athanor.samples import Problem, Sample

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def repetition_ratio(items: list, ngram_size: int) -> float:
    """1 - unique/total over the n-grams of `items`; 0.0 when there is none."""
    total = len(items) - ngram_size + 1
    if total <= 0:
        return 0.0
    return 1.0 - len(set(zip(*(items[i:] for i in range(ngram_size)), strict=False))) / total


def words_of(text: str) -> list[str]:
    """Words between white space, each Han or kana character one of its own."""
    return _WORDS.findall(text)


@dataclass(frozen=True)
class Repetition(Reward):
    """-max_penalty times the share of repeated n-grams."""

    __name__ = "repetition"
    ngram_size: int = 3
    max_penalty: float = 1.0
    """Largest magnitude of the penalty, >= 0."""
    unit: str = "tokens"
    """"tokens" or "words"."""

    def __post_init__(self):
        if self.ngram_size < 1:
            raise UserError(f"reward repetition: ngram_size is {self.ngram_size}, wanted at least 1")
        if self.max_penalty < 0:
            raise UserError(f"reward repetition: max_penalty is {self.max_penalty}, wanted >= 0 (the reward subtracts it)")
        if self.unit not in ("tokens", "words"):
            raise UserError(f"reward repetition: unit is {self.unit!r}, wanted 'tokens' or 'words'")

    def score(self, sample: Sample, problem: Problem) -> float:
        if self.unit == "words":
            items = words_of(sample.text.lower())
        elif sample.token_ids is None:
            raise ValueError("reward repetition: unit 'tokens' needs `completion_ids`, got none; use unit='words'")
        else:
            items = list(sample.token_ids)
        return -self.max_penalty * repetition_ratio(items, self.ngram_size) + 0.0  # + 0.0 turns -0.0 into 0.0


make = Repetition
