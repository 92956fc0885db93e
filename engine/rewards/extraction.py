"""Find the final answer in a response.  Everything here is linear in the text and runs in the trainer's process.

Rules (always outside the chain of thought, see response.py):
  "answer"   the last <answer> ... </answer> block;  inside it the last \\boxed{...} or what follows the last "####", where there is one
  "boxed"    the last complete \\boxed{...}, nested braces allowed
  "hash"     what follows the last "####" on its line (GSM8K)
  "number"   the last number of the text, for tasks that say so
  "auto"     answer, else boxed, else hash
"""

import re

from athanor.rewards.answers import last_boxed
from athanor.rewards.response import parse_response

RULES = ("auto", "answer", "boxed", "hash", "number")
_NUMBER = re.compile(r"(?<![\w.,])[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?(?!\w)|(?<![\w.,])[-+]?\.\d+%?(?!\w)")
_LEAD = re.compile(r"^(?:so |thus |therefore,? )?(?:the )?(?:final )?answer(?: is)?\s*:?\s+", re.IGNORECASE)


def find_answer(text: str, *, prompt: str = "", rule: str = "auto") -> str | None:
    """Final answer of a response by `rule`, None where there is none."""
    response = parse_response(text, prompt=prompt)
    if rule == "number":
        return last_number(response.answer or response.summary)
    if rule in ("answer", "auto") and response.answer:
        return inner_answer(response.answer)
    if rule in ("boxed", "auto") and (boxed := last_boxed(response.summary)):
        return boxed
    if rule in ("hash", "auto"):
        return after_hash(response.summary)
    return None


def inner_answer(text: str) -> str:
    """The answer inside an answer block or a gold solution: its last box, what follows its last "####", or all of it without "The answer is"."""
    return last_boxed(text) or after_hash(text) or _LEAD.sub("", text.strip()) or text


def after_hash(text: str) -> str | None:
    """What follows the last "####" on its line, None where nothing does."""
    _, mark, rest = text.rpartition("####")
    found = rest.strip().partition("\n")[0].strip() if mark else ""
    return found or None


def last_number(text: str) -> str | None:
    """The last number of a text as it is written there."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match.group()
    return found
