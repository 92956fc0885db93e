"""Equality of short final answers without evaluating anything: exact numbers, otherwise normalised text.

`answer_key(text)` maps an answer to a hashable key, so equal keys are an equivalence relation and voting (cons@k) can count them.

Numbers, compared exactly as fractions.Fraction:  integers, decimals, a/b, mixed numbers "1 1/2", \\frac{a}{b}, thousands separators "1,234" (also
LaTeX "1{,}234"), a percent sign (50% = 1/2), a small decimal exponent (1.5e3), a currency sign in front, one trailing full stop; a sign may be apart
from its digits.  Everything is bounded: longer than 80 characters is text, and powers, brackets and names are never computed ("9**9**9" is text).
Options:  "(B)", "B)" and "B." are B.
Text:  LaTeX spacing and sizing, \\text{} and enclosing $...$ or \\boxed{} removed, white space collapsed (dropped beside punctuation), letter case
folded.
No algebra: "x+1" and "1+x" differ.
"""

import re
from collections.abc import Hashable
from fractions import Fraction

_MAX_NUMBER_CHARS = 80
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS = _FULL_WIDTH | {0x2212: "-", 0x2010: "-", 0x2011: "-", 0x00A0: " ", 0x2009: " ", 0x202F: " ", 0x3000: " ", 0x2044: "/", 0x00D7: "*"}
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?[$€£¥]? ?(?P<sign2>[+-]?)"
    rf"(?:(?P<whole>[0-9]+) (?=[0-9]+ ?/))?(?P<num>{_DECIMAL})(?:[eE](?P<exp>[+-]?[0-9]{{1,3}}))?"
    rf"(?: ?/ ?(?P<den>{_DECIMAL}))? ?(?P<percent>%?)\.?"
)
_FRAC = re.compile(r"\\[dt]?frac *(?:\{([^{}]{1,40})\} *\{([^{}]{1,40})\}|([0-9]) *([0-9]))")
_OPTION = re.compile(r"^\(?([A-Za-z])\)$")
_NEGATIVE_SPACE = re.compile(r"\\! *")  # 10,\!080 is 10,080
_LATEX_NOISE = re.compile(r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|limits)(?![a-zA-Z])|\\[,;: ]|\\q?quad(?![a-zA-Z])")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox|mathbf)\s*\{([^{}]*)\}")
_BESIDE_PUNCTUATION = re.compile(r" *([^\w\s]) *")


def last_boxed(text: str) -> str | None:
    """Content of the last complete \\boxed{...} or \\fbox{...}, nested braces allowed, escaped braces literal; None without one.  Linear time."""
    found = None
    openings: list[bool] = []  # one per open brace: does it belong to a box that no other box encloses
    start = open_boxes = 0
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        token = match.group()
        if token == "}":
            if openings and openings.pop():
                open_boxes -= 1
                found = text[start : match.start()]
        elif token == "{":
            openings.append(False)
        elif token.endswith("{") and len(token) > 2:
            outermost = open_boxes == 0
            openings.append(outermost)
            if outermost:
                open_boxes, start = 1, match.end()
    return None if found is None else found.strip()


def parse_number(text: str) -> Fraction | None:
    """Exact value of a number in one of the module's notations, or None.  Bounded time and memory on any text."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    text = _FRAC.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]} ", text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$"))
    match = _NUMBER.fullmatch(" ".join(text.split()).replace("- -", "--"))
    if match is None or (match["sign"] and match["sign2"]):
        return None
    value = _decimal(match["num"])
    if match["exp"]:
        value *= Fraction(10) ** int(match["exp"])
    if match["den"]:
        den = _decimal(match["den"])
        if den == 0:
            return None
        value /= den
    if match["whole"]:
        value += int(match["whole"])
    if match["percent"]:
        value /= 100
    return -value if "-" in (match["sign"], match["sign2"]) else value


def _decimal(digits: str) -> Fraction:
    whole, _, places = digits.replace(",", "").partition(".")
    return Fraction(int(whole + places or "0"), 10 ** len(places))


def normalize(text: str) -> str:
    """Canonical text of an answer (see the module)."""
    text = text.translate(_CHARACTERS).strip()
    for _ in range(3):  # boxes inside dollars inside boxes: three layers are more than anyone writes
        if text.startswith("\\boxed") or text.startswith("\\fbox"):
            inner = last_boxed(text)
            text = inner if inner is not None and text.endswith("}") else text
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
                text = text[len(left) : -len(right)].strip()
                break
    text = _NEGATIVE_SPACE.sub("", text)
    text = _LATEX_TEXT.sub(r" \1 ", _LATEX_NOISE.sub(" ", text))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = " ".join(text.split())
    if text.endswith(".") and len(text) > 1:
        text = text[:-1].rstrip()
    return _OPTION.sub(r"\1", text)


def answer_key(text: str, *, ignore_case: bool = True) -> Hashable:
    """Key under which equal answers collide: a Fraction for a number, otherwise normalised text."""
    text = normalize(text)
    number = parse_number(text)
    if number is not None:
        return number
    text = _BESIDE_PUNCTUATION.sub(r"\1", text)
    return text.casefold() if ignore_case else text


def same_answer(answer: str, gold: str, *, ignore_case: bool = True) -> bool:
    """Are two answers equal by `answer_key`?  Never raises; an answer far longer than the gold one is unequal without being read."""
    if len(answer) > 4 * len(gold) + 1000:
        return False
    return answer_key(answer, ignore_case=ignore_case) == answer_key(gold, ignore_case=ignore_case)
