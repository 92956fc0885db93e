"""Language consistency of R1 (arXiv 2501.12948 v2, eq. 7):  words in the target language / words, in the chain of thought.

A word's language is told by its script, so English and Chinese can be told apart, English and French cannot.  (Language identifiers miss mixing
inside a sentence.)  For languages of one script, `detector` takes a second look: words in the target's script count only in sentences that the
detector takes for the target language, or cannot tell.
Counting, declared:
- a word is a maximal run of letters of one script; apostrophes inside belong to it;
- scripts written without spaces: a run of n Han, kana or Thai characters counts ceil(n / 2) words (Thai: n / 4), near the mean word length;
- not counted: LaTeX, code, URLs, tags, digits and symbols, identifiers with a digit or underscore, single Latin or Greek letters (variables);
- no word at all gives `empty` (1.0 by default: nothing is in a foreign language);
- a response without any think tag is judged whole, so leaving the tags out hides nothing.
"""

import importlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from athanor.errors import UserError
from athanor.registry import near_misses
from athanor.rewards.base import Reward
from athanor.rewards.response import parse_response
from athanor.samples import Problem, Sample

SCRIPTS = {  # language -> scripts its words are written in
    **dict.fromkeys("en fr de es pt it nl sv da no fi pl cs sk sl hr hu ro tr vi id ms ca eu et lv lt la sw".split(), {"LATIN"}),
    **dict.fromkeys("ru uk bg be mk sr kk".split(), {"CYRILLIC"}),
    **dict.fromkeys("ar fa ur".split(), {"ARABIC"}),
    **dict.fromkeys("hi mr ne".split(), {"DEVANAGARI"}),
    "zh": {"CJK"},
    "ja": {"CJK", "KANA"},
    "ko": {"HANGUL"},
    "el": {"GREEK"},
    "he": {"HEBREW"},
    "th": {"THAI"},
}
_CHARS_PER_WORD = {"CJK": 2, "KANA": 2, "THAI": 4}
_SCRIPT_OF_NAME = {"IDEOGRAPHIC": "CJK", "HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA", "HALFWIDTH": "", "FULLWIDTH": ""}
_NOT_SCRIPTS = {
    "MATHEMATICAL",
    "DOUBLE-STRUCK",
    "SCRIPT",
    "MODIFIER",
    "SUPERSCRIPT",
    "SUBSCRIPT",
    "MICRO",
    "KELVIN",
    "ANGSTROM",
    "OHM",
    "CIRCLED",
    "FEMININE",
    "MASCULINE",
}
Detector = Callable[[str], str | None]
_SENTENCES = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_TOKENS = re.compile(r"\w+(?:['’]\w+)*")
_IDENTIFIER = re.compile(r"[\d_]")
_OPENERS = re.compile(r"```|`|\$\$|\$|\\\[|\\\(|\\begin\{|\\[a-zA-Z]+|https?://\S+|</?(?:think|answer)>")
_CLOSERS = {"```": "```", "`": "`", "$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)", "\\begin{": "\\end{"}


@lru_cache(maxsize=65536)
def script(character: str) -> str:
    """Script of one letter ("LATIN", "CJK", "KANA", ...), "" for what is no letter of a language."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    words = unicodedata.name(character, "").split()
    while words and words[0] in ("FULLWIDTH", "HALFWIDTH"):
        words = words[1:]
    if not words or words[0] in _NOT_SCRIPTS:
        return ""
    return _SCRIPT_OF_NAME.get(words[0], words[0])


def prose(text: str) -> str:
    """Text without LaTeX, code, URLs and tags.  An unclosed code fence runs to the end; other unclosed openers are literal.  Linear time."""
    kept, position, closed = [], 0, set()  # closed: openers that have no closer in the rest of the text
    while match := _OPENERS.search(text, position):
        kept.append(text[position : match.start()])
        opener, end = match.group(), match.end()
        closer = _CLOSERS.get(opener)
        position = end
        if closer is not None:
            close = -1 if opener in closed else text.find(closer, end)
            if close < 0:
                closed.add(opener)
                if opener == "```":
                    position = len(text)
            elif opener not in ("`", "$") or _is_inline(text, opener, end, close):
                position = close + len(closer)
                if opener == "\\begin{":
                    position = max(text.find("}", position) + 1, position)
        kept.append(" ")
    kept.append(text[position:])
    return "".join(kept)


def _is_inline(text: str, opener: str, end: int, close: int) -> bool:
    if close == end or "\n" in text[end:close]:
        return False
    if opener == "`":
        return True
    # pandoc's rule tells $x$ from "$5 and $6": no space inside the dollars, no digit after the closing one
    return not text[end].isspace() and not text[close - 1].isspace() and not text[close + 1 : close + 2].isdigit()


def count_words(text: str) -> dict[str, int]:
    """Words of a text by script (see the module for what counts)."""
    counts: dict[str, int] = {}
    for token in _TOKENS.findall(prose(text)):
        is_identifier = _IDENTIFIER.search(token) is not None
        if token.isascii():  # most tokens of most texts: Latin letters, digits, underscores, apostrophes
            runs = [] if is_identifier else [("LATIN", len(token))]
        else:
            runs = _script_runs(token)
        for name, length in runs:
            if name in ("LATIN", "GREEK") and (length == 1 or is_identifier):
                continue
            counts[name] = counts.get(name, 0) + -(-length // _CHARS_PER_WORD.get(name, length))
    return counts


def _script_runs(token: str) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for character in token:
        if unicodedata.category(character)[0] == "M" or character in "'’":
            continue  # marks and apostrophes belong to the word they stand in
        name = script(character)
        if name == "" or (runs and runs[-1][0] == name):
            if name:
                runs[-1] = (name, runs[-1][1] + 1)
            elif runs and runs[-1][0]:
                runs.append(("", 0))
        else:
            runs.append((name, 1))
    return [(name, length) for name, length in runs if name]


def language_consistency(text: str, language: str, *, prompt: str = "", empty: float = 1.0, detector: Detector | None = None) -> float:
    """Share, in [0, 1], of the words of a response's chain of thought that are in `language` (an ISO 639-1 code; unknown raises UserError)."""
    if language not in SCRIPTS:
        raise UserError(f"language consistency: unknown language {language!r}: {near_misses(language, list(SCRIPTS))}")
    think = parse_response(text, prompt=prompt).think
    thought = text if think is None else think
    sentences = [thought] if detector is None else _SENTENCES.split(prose(thought))
    total = right = 0
    for sentence in sentences:
        counts = count_words(sentence)
        total += sum(counts.values())
        own = sum(counts.get(name, 0) for name in SCRIPTS[language])
        right += own if detector is None or not own or (detector(sentence) or language) == language else 0
    return right / total if total else empty


def load_detector(name: str) -> Detector:
    """Import "module:function" with function(text) -> ISO 639-1 code, or a tuple that begins with it (py3langid:classify), or None = cannot tell."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'reward language: detector {name!r} cannot be loaded ({error}), wanted "module:function"') from None

    def detect(text: str) -> str | None:
        found = function(text)
        return found[0] if isinstance(found, tuple) else found

    return detect


@lru_cache
def _detector(name: str | None) -> Detector | None:
    return None if name is None else load_detector(name)


@dataclass(frozen=True)
class Language(Reward):
    """Language consistency of the chain of thought, in the problem's language unless `target` names one."""

    __name__ = "language"
    target: str | None = None
    """ISO 639-1 code; None = each problem's own language."""
    empty: float = 1.0
    """Value for a chain of thought without words."""
    detector: str | None = None
    """"module:function" that tells languages of one script apart, such as "py3langid:classify"; None = scripts alone."""

    def __post_init__(self):
        if self.detector is not None:
            load_detector(self.detector)
        if self.target is not None and self.target not in SCRIPTS:
            raise UserError(f"reward language: unknown target {self.target!r}: {near_misses(self.target, list(SCRIPTS))}")

    def score(self, sample: Sample, problem: Problem) -> float:
        detector = _detector(self.detector)
        return language_consistency(sample.text, self.target or problem.language, prompt=problem.prompt, empty=self.empty, detector=detector)


make = Language
