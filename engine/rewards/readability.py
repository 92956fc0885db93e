"""Readability of a chain of thought: what R1 filters by when it curates samples (arXiv 2501.12948 v1, sections 2.3.1 and 2.3.3): mixed languages,
long paragraphs, code blocks; and repetition and thoughts that do not end.  The rejection sampler drops by it, the reward "readability" pays by it.

The reward is the share of the five checks that hold:  one language,  no paragraph too long,  no code block,  little repetition,  finished.
"""

import re
from dataclasses import dataclass

from athanor.errors import UserError
from athanor.rewards.base import Reward
from athanor.rewards.language import SCRIPTS, language_consistency
from athanor.rewards.repetition import repetition_ratio, words_of
from athanor.rewards.response import parse_response
from athanor.samples import Problem, Sample

REPETITION_NGRAM = 8
_BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*")
_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)


@dataclass(frozen=True)
class Readability:
    """Figures of one chain of thought; of the whole text where it has no think tag."""

    language: float  # share of words in the target language
    longest_paragraph: int  # words between blank lines; a Han or kana character is a word
    code_blocks: int  # fences, two to a block; an unclosed one counts too
    repetition: float  # share of repeated n-grams of REPETITION_NGRAM, over tokens where they are known, else words
    finished: bool  # the thought was closed and something follows it


def readability(text: str, language: str, *, prompt: str = "", token_ids=None) -> Readability:
    """Measure a response.  Linear in its length.  Raises UserError for an unknown language."""
    response = parse_response(text, prompt=prompt)
    thought = text if response.think is None else response.think
    paragraphs = (len(words_of(paragraph)) for paragraph in _BLANK_LINES.split(thought))
    items = words_of(thought.lower()) if token_ids is None else list(token_ids)
    return Readability(
        language=language_consistency(text, language, prompt=prompt),
        longest_paragraph=max(paragraphs, default=0),
        code_blocks=len(_FENCE.findall(thought)),
        repetition=repetition_ratio(items, REPETITION_NGRAM),
        finished=response.think is not None and bool(response.summary),
    )


def objection(r: Readability, *, min_language: float, max_repetition: float, max_paragraph_words: int, code_blocks: bool) -> str | None:
    """The first reason against a sample: "language", "repetition", "paragraph" or "code"; None without one."""
    if r.language < min_language:
        return "language"
    if r.repetition > max_repetition:
        return "repetition"
    if max_paragraph_words and r.longest_paragraph > max_paragraph_words:
        return "paragraph"
    return "code" if r.code_blocks and not code_blocks else None


@dataclass(frozen=True)
class ReadabilityReward(Reward):
    """Share, in [0, 1], of the five checks that hold."""

    __name__ = "readability"
    target: str | None = None
    """ISO 639-1 code; None = each problem's own language."""
    min_language: float = 1.0
    """Share of words in the target language."""
    max_repetition: float = 0.5
    """Share of repeated n-grams."""
    max_paragraph_words: int = 400
    """Words of the longest paragraph."""

    def __post_init__(self):
        if self.target is not None and self.target not in SCRIPTS:
            raise UserError(f"reward readability: unknown target {self.target!r}, wanted one of {', '.join(SCRIPTS)}")
        for name in ("min_language", "max_repetition"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"reward readability: {name} is {getattr(self, name)}, wanted 0 to 1")
        if self.max_paragraph_words < 1:
            raise UserError(f"reward readability: max_paragraph_words is {self.max_paragraph_words}, wanted at least 1")

    def score(self, sample: Sample, problem: Problem) -> float:
        r = readability(sample.text, self.target or problem.language, prompt=problem.prompt, token_ids=sample.token_ids)
        checks = (
            r.language >= self.min_language, r.longest_paragraph <= self.max_paragraph_words, r.code_blocks == 0,
            r.repetition <= self.max_repetition, r.finished,
        )  # fmt: skip
        return sum(checks) / len(checks)


make = ReadabilityReward
