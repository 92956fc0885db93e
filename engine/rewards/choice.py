"""Option match of R1 for multiple choice (arXiv 2501.12948 v2, section 2.2): 1 when the chosen letter is the gold one, otherwise 0.

Applies to problems whose metadata has `choices`; None for all others.  The letter is looked for outside the chain of thought (response.py), in this
order:  the last <answer> block;  the last \\boxed{};  the last line "Answer: X" (in any case, with bold marks or brackets).  What was found is a
letter of an option, or the text of exactly one option.  Two letters ("A or B") are none.
"""

import re
from dataclasses import dataclass

from athanor.rewards.answers import answer_key, last_boxed, normalize
from athanor.rewards.base import Reward
from athanor.rewards.response import parse_response
from athanor.samples import Problem, Sample

_LINE = re.compile(r"^[ \t*_#>-]*(?:final |the |correct )*answer(?: is)?[ \t*_]*[:：]?[ \t*_]*(.*)$", re.IGNORECASE | re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,](?:\s.*)?)?", re.DOTALL)
_MAX_CHARS = 2000


def chosen_letter(text: str, choices: list[str], *, prompt: str = "") -> str | None:
    """Letter of the option that a response chooses, or None.  Linear in the length of the text."""
    response = parse_response(text, prompt=prompt)
    answer = response.answer or last_boxed(response.summary)
    if answer is None:
        lines = _LINE.findall(response.summary)
        answer = lines[-1] if lines else None
    return None if answer is None or len(answer) > _MAX_CHARS else _letter_of(answer, choices)


def _letter_of(answer: str, choices: list[str]) -> str | None:
    answer = normalize(answer.strip().rstrip(".").strip("*_` \t"))
    letters = {chr(ord("A") + i): choice for i, choice in enumerate(choices)}
    match = _LETTER.fullmatch(answer)
    if match and match[1].upper() in letters:
        return match[1].upper()
    key = answer_key(answer)
    found = [letter for letter, choice in letters.items() if answer_key(choice) == key]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Choice(Reward):
    """1.0 for the right option, 0.0 for a wrong or missing one, None where there are no options."""

    __name__ = "choice"

    def score(self, sample: Sample, problem: Problem) -> float | None:
        choices = problem.metadata.get("choices")
        if not choices or problem.answer is None:
            return None
        return float(chosen_letter(sample.text, choices, prompt=problem.prompt) == problem.answer)


make = Choice
