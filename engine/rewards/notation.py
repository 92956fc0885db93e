"""One LaTeX notation for the ways in which people write a short mathematical answer.  Plain text work: linear, nothing is computed.

`canonical` turns Unicode signs, calculator notation (sqrt(2), x**2, pi/2, <=) and loose LaTeX (\\frac12, 2^10, \\dfrac) into LaTeX with braces, and
drops what does not change the meaning (spacing, sizing, \\text{}, dollars, boxes).  `split_unit` takes a unit off the end.
"""

import re

from athanor.rewards.answers import normalize, parse_number

_SIGNS = {
    "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∓": "\\mp ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/",
    "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in ", "°": "^\\circ ", "√": "\\sqrt ", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "ℝ": "\\mathbb{R}",
    "⟨": "\\langle ", "⟩": "\\rangle ", "→": "\\to ", "−": "-", "–": "-", "—": "-", "×": "\\times ", "*": "\\cdot ",
}  # fmt: skip
_ROW = "\ue000"
_SUPERSCRIPTS = {ord(c): str(i) for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {ord("⁻"): "-"}
_SUBSCRIPTS = {ord(c): str(i) for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}
_COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<",
    "gt": ">", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]",
    "degree": "^\\circ", "varnothing": "emptyset", "ast": "cdot", "lvert": "|",
    "rvert": "|", "mid": "|", "vert": "|", "infin": "infty",
}  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_ARGUMENT = r"(\\[a-zA-Z]+|[0-9a-zA-Z])"
_SCIENTIFIC = re.compile(r"^([-+]?[0-9.,]*[0-9])?\s*(?:\\times|\\cdot)?\s*10\s*\^\s*(?:\{\s*([-+]?[0-9]{1,3})\s*\}|([-+]?[0-9]{1,3}))$")
_REPEATING = re.compile(r"^(-?)([0-9]{0,12})\.([0-9]{0,12})\\overline\s*\{([0-9]{1,12})\}$")

_UNITS = {  # spellings -> one name each; a plural s is dropped first
    **dict.fromkeys(("degree", "deg", "^\\circ", "^{\\circ}"), "degree"), **dict.fromkeys(("radian", "rad"), "radian"),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), "cm"), **dict.fromkeys(("mm", "millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("m", "meter", "metre"), "m"), **dict.fromkeys(("km", "kilometer", "kilometre"), "km"),
    **dict.fromkeys(("in", "inch", "inche"), "inch"), **dict.fromkeys(("ft", "foot", "feet"), "foot"), **dict.fromkeys(("yd", "yard"), "yard"),
    **dict.fromkeys(("mi", "mile"), "mile"), **dict.fromkeys(("g", "gram"), "g"), **dict.fromkeys(("kg", "kilogram"), "kg"),
    **dict.fromkeys(("lb", "pound"), "pound"), **dict.fromkeys(("s", "sec", "second"), "second"), **dict.fromkeys(("min", "minute"), "minute"),
    **dict.fromkeys(("h", "hr", "hour"), "hour"), **dict.fromkeys(("l", "liter", "litre"), "l"), **dict.fromkeys(("ml", "milliliter"), "ml"),
    **dict.fromkeys(("mph", "mile per hour"), "mile/hour"), **dict.fromkeys(("dollar", "usd", "buck"), "dollar"),
    **{name: name for name in "unit cent euro day week month year gallon ounce square cubic".split()},
}  # fmt: skip
_WORD = r"(?:[A-Za-z]+\.?)"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?[1-9]\s*\}|-?[1-9]))?"
_TAIL = re.compile(rf"^(?P<value>.*?[0-9a-zA-Z}}).\]|])\s+(?P<unit>{_WORD}{_POWER}(?:(?:\s+|\s*/\s*){_WORD}{_POWER}){{0,4}})$", re.DOTALL)
_GLUED = re.compile(rf"^(?P<value>[-+]?[0-9][0-9.,]*)(?P<unit>(?:cm|mm|km|kg|ml|mph|ft|lb|hr|min|m/s|km/h){_POWER})$")
_DEGREES = re.compile(r"^(?P<value>.*?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)$", re.DOTALL)
_NO_UNITS = frozenset("pi sqrt sin cos tan cot sec csc log ln exp or and infty infinity mod in to if else undefined none all real".split())


def canonical(text: str) -> str:
    """The notation described in the module; other text comes back with its spaces collapsed."""
    text = text.strip()
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):  # Markdown
        text = text[2:-2]
    text = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = text.replace("**", "^").replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\ne ").replace("+/-", "\\pm ").replace("+-", "\\pm ")
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = normalize(text.replace("\\\\", _ROW)).replace(_ROW, "\\\\")  # normalize takes a row break and a blank for a space
    for sign in ("×", "*"):  # what normalize made of full-width signs
        text = text.replace(sign, "\\cdot ")
    text = _COMMAND.sub(_command, text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty ", text)
    text = re.sub(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi ", text)
    text = re.sub(rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?=[\s(^\\])", r"\\\1 ", text)
    text = re.sub(r"\\?(?<![a-zA-Z])sqrt\s*\(", r"\\sqrt(", text)
    text = _braced_after(text, "\\sqrt(", "\\sqrt")
    text = _braced_after(text, "^(", "^")
    text = re.sub(r"\^\s*(-?[0-9]+)", r"^{\1}", text)
    text = re.sub(rf"\\sqrt\s*{_ARGUMENT}", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(rf"(\\frac\s*\{{[^{{}}]*\}})\s*{_ARGUMENT}", r"\1{\2}", text)
    text = re.sub(r"^(?:\\approx(?![a-zA-Z])|\\sim(?![a-zA-Z])|=)\s*", "", text)
    text = re.sub(r"\s*\b(?:per ?cent|percent|pct)\b\.?$", "%", text).replace("\\%", "%")
    if scientific := _SCIENTIFIC.match(text):
        text = f"{scientific[1] or 1}e{scientific[2] or scientific[3]}"
    if repeating := _REPEATING.match(text):  # 0.1\overline{6} = (16 - 1) / 90
        whole, fixed, period = repeating[2] or "0", repeating[3], repeating[4]
        numerator = int(whole + fixed + period) - int(whole + fixed)
        text = f"{repeating[1]}{numerator}/{10 ** len(fixed) * (10 ** len(period) - 1)}"
    return " ".join(text.split())


def _command(match: re.Match) -> str:
    name = _COMMANDS.get(match[1], match[1])
    return f"\\{name}" if name.isalpha() else name


def _braced_after(text: str, opening: str, command: str) -> str:
    """Replace `opening ... )` by `command{...}` where the parenthesis closes."""
    parts, position = [], 0
    while (start := text.find(opening, position)) >= 0:
        first = start + len(opening)
        close = matching(text, first - 1)
        if close is None:
            break
        parts.append(f"{text[position:start]}{command}{{")
        parts.append(_braced_after(text[first:close], opening, command) + "}" if len(text) < 2000 else text[first:close] + "}")
        position = close + 1
    return "".join(parts) + text[position:]


def matching(text: str, start: int) -> int | None:
    """Index of the bracket that closes the one at `start`, of any kind, by depth; None where it stays open."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
    return None


def split_unit(text: str) -> tuple[str, str]:
    """(value, unit) of a canonical text; the unit is "" without one, otherwise one spelling of it.

    After a plain number any words are a unit ("18 eggs"), after an expression known ones alone ("12 \\pi cm" but "2 k" is a product).
    """
    if match := _DEGREES.match(text):
        return match["value"], "degree"
    if text.startswith(("$", "\\$")):
        return text.lstrip("\\").lstrip("$").strip(), "dollar"
    match = _GLUED.match(text) or _TAIL.match(text)
    if not match:
        return text, ""
    value, unit = match["value"].strip(), match["unit"]
    words = re.findall(r"[A-Za-z]+", unit)
    if any(word.lower() in _NO_UNITS - {"in"} for word in words):
        return text, ""
    names = [_unit_name(word) for word in words]
    is_number = parse_number(value) is not None
    if not (is_number and (len(words[0]) > 1 or names[0])) and not all(names):
        return text, ""
    spelled = re.sub(r"[A-Za-z]+\.?", lambda m: _unit_name(m[0].rstrip(".")) or m[0].lower().rstrip("."), unit)
    spelled = re.sub(r"\s*\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", spelled)
    for word, power in (("square", "^2"), ("cubic", "^3")):
        if spelled.startswith(f"{word} "):
            spelled = spelled[len(word) + 1 :] + power
    return value, spelled.replace(" per ", "/").replace(" / ", "/")


def _unit_name(word: str) -> str:
    word = word.lower()
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s"), "")
