"""Are two mathematical answers equal?  Runs in reward workers alone: sympy can hang, crash and fill the memory.

An answer is taken apart by its outermost structure, as it is written, and the parts are compared:

    list       1, -2    x = 1 or x = -2    2 \\pm \\sqrt{3}      in any order; against a tuple in its order
    set        \\{1, 2\\}                                         in any order; never equal to a tuple
    tuple      (1, 2)   [0, 1)                                   same brackets, same order
    union      (-\\infty, 0) \\cup (1, 2)                         in any order; x < 0 or x > 1 and x \\in (2, 3) are intervals too
    matrix     pmatrix, bmatrix, array                           same shape, entry by entry
    equation   x = 5 is 5;  y = 2x is 2y - 4x = 0                the same line when the sides' differences are proportional
    based      1011_2                                            same digits, same base where both name one
    leaf       everything else

Leaves:  numbers are compared exactly (answers.py), words as text without case, units must agree where both have one, 50% is 1/2 and also 50.  A plain
decimal of six or more places equals the constant that it agrees with to its last place (3.141593 is pi), a shorter one does not.  Other leaves are
parsed by latex2sympy2_extended and evaluated to 30 digits, at points of both signs where they have variables: a difference disproves equality, none
at all proves it (polynomial identity testing).  What cannot be evaluated goes to `math_verify.verify`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from athanor.rewards.answers import parse_number, same_answer
from athanor.rewards.notation import canonical, matching, split_unit

_MAX_PARTS = 256
_OPEN = {"(": ")", "[": "]", "\\langle": "\\rangle", "\\{": "\\}"}
_MATRIX = re.compile(
    r"^\\begin\s*\{(p|b|B|small|)matrix\}(.*)\\end\s*\{\1matrix\}$"
    r"|^\\begin\s*\{array\}\s*\{[^{}]*\}(.*)\\end\s*\{array\}$", re.DOTALL
)
_BASED = re.compile(r"^([0-9A-Fa-f]+)\s*_\s*(?:\{\s*([0-9]{1,2}|[a-z]+)\s*\}|([0-9]))$")
_BASES = {name: str(i) for i, name in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)} | {"sixteen": "16"}
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>=]")
_NAME = re.compile(  # x, \theta, f(x), a_1, \angle ABC, the area, |AB|, (x, y)
    r"^(?:\\?[a-zA-Z]+|[a-zA-Z]+\s*\([a-zA-Z, ]+\)|\\?[a-zA-Z]+_\{?[a-zA-Z0-9]+\}?|\\angle\s*[A-Z]+"
    r"|\\(?:vec|hat|bar|overline)\s*\{\w+\}|[a-zA-Z ]+|\|\w+\||\([a-zA-Z, ]+\))$"
)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '’-][^\W\d_]+)*")
_DECIMAL = re.compile(r"^-?[0-9]*\.([0-9]{6,})$")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


class Unreadable(ValueError):
    """The gold answer is in no notation that can be compared: the sample cannot be scored."""


@dataclass(frozen=True)
class Node:
    """One answer, taken apart."""

    kind: str  # list, set, tuple, union, matrix, equation, inequality, based, leaf
    parts: tuple  # of nodes, except: equation and inequality (texts), based (digits, base), leaf (text,)
    mark: tuple = ()  # tuple: its brackets; matrix: its rows and columns; inequality: its relations


def equivalent(answer: str, gold: str) -> bool:
    """Is the answer equal to the gold one?  Raises Unreadable where the gold answer cannot be read; takes any time and memory on hostile text."""
    if same_answer(answer, gold, ignore_case=wordlike(gold)):
        return True
    return bool(compare(structure(canonical(answer)), structure(canonical(gold))))  # sympy has truth values of its own


def wordlike(text: str) -> bool:
    """Is a text words, or the letter of an option, so that case says nothing?"""
    text = canonical(text)
    return _WORDS.fullmatch(text) is not None and (len(max(text.split(), key=len)) > 2 or text.upper() in "ABCDEFGH")


# ---- taking apart


def structure(text: str) -> Node:
    """Take a canonical text apart."""
    text = text.strip()
    if parse_number(split_unit(text)[0]) is not None:
        return Node("leaf", (text,))
    if text.startswith("{") and matching(text, 0) == len(text) - 1:  # grouping, or a set written without backslashes
        return structure(f"\\{{{text[1:-1]}\\}}" if "," in text else text[1:-1])
    text = re.sub(r"^(?:\\?[a-zA-Z]+)\s*\\in(?![a-zA-Z])\s*", "", text)
    if match := _MATRIX.match(text):
        rows = [row for row in (match[2] or match[3] or "").split("\\\\") if row.strip()]
        cells = [[structure(cell) for cell in row.split("&")] for row in rows]
        return Node("matrix", tuple(cell for row in cells for cell in row), tuple(len(row) for row in cells))
    pieces = _split(text, r"\\cup(?![a-zA-Z])|(?<=[)\]])\s*U\s*(?=[(\[])")
    if len(pieces) > 1:
        return Node("union", tuple(structure(piece) for piece in pieces))
    pieces = [p for p in _split(text, r"[,;]\s*and\b|[,;]\s*or\b|\b(?:and|or)\b|[,;]|\\(?:text|mathrm|quad|lor|vee)(?![a-zA-Z])") if p.strip()]
    if len(pieces) > 1:
        nodes = tuple(_as_interval(structure(piece)) for piece in pieces)
        is_union = all(node.kind in ("tuple", "union") and node.mark for node in nodes) and any(_RELATION.search(piece) for piece in pieces)
        return Node("union" if is_union else "list", _flat(nodes))
    if enclosed := _enclosed(text):
        opening, inner, closing = enclosed
        parts = tuple(structure(piece) for piece in _split(inner, "[,;]"))
        if opening == "\\{":
            return Node("set", _flat(parts))
        if len(parts) > 1:
            return Node("tuple", parts, (opening.replace("\\langle", "("), closing.replace("\\rangle", ")")))
        if opening == "(":
            return structure(inner)
    if "\\pm" in text or "\\mp" in text:
        signs = (("+", "-"), ("-", "+"))
        return Node("list", tuple(structure(re.sub(r"\\pm", f" {a} ", re.sub(r"\\mp", f" {b} ", text)).strip().removeprefix("+ ")) for a, b in signs))
    sides = _split(text, _RELATION.pattern)
    if len(sides) > 1:
        relations = _RELATION.findall(text)
        if len(relations) == len(sides) - 1 and all(side.strip() for side in sides):
            sides = tuple(side.strip() for side in sides)
            if set(relations) == {"="}:
                return Node("equation", (sides[0], sides[-1]))
            return Node("inequality", sides, tuple(relations))
    if match := _BASED.match(text):
        base = match[2] or match[3]
        return Node("based", (match[1].lstrip("0").lower() or "0", _BASES.get(base, base)))
    return Node("leaf", (text,))


def _flat(nodes: tuple) -> tuple:
    """Members of lists and unions inside one (\\{1 \\pm \\sqrt{5}, -2\\}) are members of it."""
    return tuple(part for node in nodes for part in (node.parts if node.kind in ("list", "union") else (node,)))


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator outside all brackets, sets and environments."""
    pieces, start, depth = [], 0, 0
    for match in re.finditer(rf"\\[{{}}]|\\begin|\\end|\\langle|\\rangle|[(\[{{]|[)\]}}]|{separator}", text):
        token = match.group()
        if token in ("(", "[", "{", "\\{", "\\begin", "\\langle"):
            depth += 1
        elif token in (")", "]", "}", "\\}", "\\end", "\\rangle"):
            depth -= 1
        elif depth == 0:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [*pieces, text[start:]]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) where one pair of brackets of any kind, half-open ones too, encloses the whole text."""
    opening = next((o for o in _OPEN if text.startswith(o)), None)
    closing = next((c for c in _OPEN.values() if text.endswith(c)), None)
    if opening is None or closing is None or len(text) < len(opening) + len(closing):
        return None
    if (opening in ("(", "[")) != (closing in (")", "]")) or (opening == "\\{") != (closing == "\\}"):
        return None
    inner = text[len(opening) : -len(closing)]
    depth = 0
    for token in re.findall(r"\\[{}]|\\langle|\\rangle|[(\[{]|[)\]}]", inner):
        depth += 1 if token in ("(", "[", "{", "\\{", "\\langle") else -1
        if depth < 0:
            return None
    return (opening, inner.strip(), closing) if depth == 0 else None


def _as_interval(node: Node) -> Node:
    """x < 3, 3 > x and 1 < x \\le 2 as intervals; other nodes as they are."""
    if node.kind != "inequality":
        return node
    sides, relations = node.parts, node.mark
    if len(sides) == 2 and relations[0] in _FLIPPED:
        variable, bound, relation = (sides[0], sides[1], relations[0]) if _NAME.match(sides[0]) else (sides[1], sides[0], _FLIPPED[relations[0]])
        if _NAME.match(variable) and not _NAME.match(bound):
            closed = relation in ("\\le", "\\ge")
            if relation in ("<", "\\le"):
                return Node("tuple", (structure("-\\infty"), structure(bound)), ("(", "]" if closed else ")"))
            return Node("tuple", (structure(bound), structure("\\infty")), ("[" if closed else "(", ")"))
    if len(sides) == 3 and _NAME.match(sides[1]):
        if relations[0] in (">", "\\ge") and relations[1] in (">", "\\ge"):
            sides, relations = sides[::-1], tuple(_FLIPPED[r] for r in relations[::-1])
        if relations[0] in ("<", "\\le") and relations[1] in ("<", "\\le"):
            brackets = "[" if relations[0] == "\\le" else "(", "]" if relations[1] == "\\le" else ")"
            return Node("tuple", (structure(sides[0]), structure(sides[2])), brackets)
    return node


# ---- comparing


def compare(a: Node, g: Node) -> bool:
    """Is answer `a` equal to gold `g`?"""
    if a.kind == "equation" and g.kind == "equation":
        return _same_equation(a.parts, g.parts)
    if a.kind == "equation":
        return (_NAME.match(a.parts[0]) is not None or is_constant(a.parts[0])) and compare(structure(a.parts[1]), g)
    if g.kind == "equation":
        return _NAME.match(g.parts[0]) is not None and compare(a, structure(g.parts[1]))
    if a.kind == "inequality" or g.kind == "inequality":
        if a.kind == g.kind and _variable(a) != _variable(g):
            return False
        intervals = _as_interval(a), _as_interval(g)
        if all(node.kind == "tuple" for node in intervals):
            return compare(*intervals)
        return a.kind == g.kind and _verify(_chain(a), _chain(g))
    if a.kind == g.kind == "based":
        return a.parts == g.parts
    if g.kind == "based" or a.kind == "based":
        other, based = (a, g) if g.kind == "based" else (g, a)
        return other.kind == "leaf" and other.parts[0].lstrip("0").lower() == based.parts[0]
    if g.kind == "matrix" or a.kind == "matrix":
        return a.kind == g.kind and a.mark == g.mark and _in_order(a.parts, g.parts)
    if a.kind == g.kind == "tuple":
        return a.mark == g.mark and _in_order(a.parts, g.parts)
    if "tuple" in (a.kind, g.kind):
        other, own = (a, g) if g.kind == "tuple" else (g, a)
        return other.kind == "list" and own.mark == ("(", ")") and _in_order(a.parts, g.parts)
    if a.kind in ("list", "set", "union") and g.kind in ("list", "set", "union"):
        return (a.kind == "union") == (g.kind == "union") and _in_any_order(a.parts, g.parts)
    if a.kind == "leaf" and g.kind == "leaf":
        return same_leaf(a.parts[0], g.parts[0])
    single = next((node for node in (a, g) if node.kind == "set" and len(node.parts) == 1), None)
    return single is not None and compare(*(node.parts[0] if node is single else node for node in (a, g)))


def _in_order(a: tuple, g: tuple) -> bool:
    return len(a) == len(g) and all(compare(x, y) for x, y in zip(a, g, strict=True))


def _in_any_order(a: tuple, g: tuple) -> bool:
    if len(a) != len(g) or len(a) > _MAX_PARTS:
        return False
    left = list(g)
    for x in a:
        match = next((i for i, y in enumerate(left) if compare(x, y)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _variable(node: Node) -> str | None:
    return next((side for side in node.parts if _NAME.match(side)), None)


def _chain(node: Node) -> str:
    return " ".join(part for pair in zip(node.parts, (*node.mark, ""), strict=True) for part in pair)


def same_leaf(answer: str, gold: str) -> bool:
    """Compare two leaves (see the module)."""
    (answer, unit), (gold, gold_unit) = split_unit(answer), split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    numbers = parse_number(answer), parse_number(gold)
    if None not in numbers:
        return same_number(answer, gold)
    if same_answer(answer, gold, ignore_case=wordlike(gold)):
        return True
    if wordlike(gold) or wordlike(answer):
        return False
    if ":" in gold or ":" in answer:  # ratios and times
        pairs = answer.split(":"), gold.split(":")
        return len(pairs[0]) == len(pairs[1]) and all(same_leaf(x.strip(), y.strip()) for x, y in zip(*pairs, strict=True))
    if gold.endswith("%") != answer.endswith("%"):
        answer, gold = answer.rstrip("% "), gold.rstrip("% ")
    return _same_expression(answer, gold)


def same_number(answer: str, gold: str) -> bool:
    """Compare two texts that `parse_number` reads: exactly, a percent sign on one side alone being optional, and see `_DECIMAL`."""
    a, g = parse_number(answer), parse_number(gold)
    if a == g:
        return True
    percents = answer.rstrip(".").endswith("%"), gold.rstrip(".").endswith("%")
    if percents[0] != percents[1]:
        return parse_number(answer.replace("%", "")) == parse_number(gold.replace("%", ""))
    return percents == (False, False) and (_agrees(answer, g) or _agrees(gold, a))


def _agrees(text: str, value: Fraction) -> bool:
    """Is `text` a decimal of at least six places, and agrees to its last place with a value that no decimal of any length is?"""
    places = _DECIMAL.match(text.replace(",", ""))
    if places is None or (10**100) % value.denominator == 0:
        return False
    difference = abs(parse_number(text) - value)
    return difference <= Fraction(1, 10 ** len(places[1])) and difference * 1000 < abs(value)


# ---- sympy

_POINTS = ((7, 3), (-11, 5), (13, 17), (-5, 19), (29, 23), (31, 7), (-17, 11), (3, 2))
_DIGITS = 30


def is_constant(text: str) -> bool:
    return re.search(r"(?<!\\)[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)) is None


def parse(text: str):
    """Parse a canonical text to sympy, None where it is no expression.  MemoryError and RecursionError pass through."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex

    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)
    try:
        text = normalize_latex(text, config=rules)
        return latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None) if text else None
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises whatever it stumbles over
        return None


def _same_expression(answer: str, gold: str) -> bool:
    expected = parse(gold)
    if expected is None:
        raise Unreadable(f"gold answer {gold[:80]!r} cannot be read")
    given = parse(answer)
    if given is None:
        return False
    verdict = _same_values(given, expected, answer, gold)
    return _verify_parsed(given, expected) if verdict is None else verdict


def _same_values(given, expected, answer: str, gold: str) -> bool | None:
    """Equality by evaluation; None = cannot be evaluated."""
    import sympy

    if not all(isinstance(e, sympy.Expr) for e in (given, expected)):
        return None
    names = sorted({str(s) for e in (given, expected) for s in e.free_symbols})
    compared = 0
    for point in range(3 if names else 1):
        values = [_evaluate(e, names, point) for e in (given, expected)]
        if None in values:
            continue
        compared += 1
        x, y = values
        tolerance = 1e-10 if given.has(sympy.Float) or expected.has(sympy.Float) else 1e-20
        if abs(x - y) > tolerance * max(abs(x), abs(y)) and max(abs(x), abs(y)) > 1e-40:
            plain = next((text for text in (answer, gold) if _DECIMAL.match(text)), None) if not names else None
            return plain is not None and abs(x - y) <= 10.0 ** -len(_DECIMAL.match(plain)[1]) and abs(x - y) * 1000 < abs(y)
    return True if compared >= (2 if names else 1) else None


def _evaluate(expression, names: list[str], point: int):
    """Complex value of an expression with its variables at the given point, None where it has none.  i is the imaginary unit."""
    import sympy

    values = {}
    for symbol in expression.free_symbols:
        at = _POINTS[(names.index(str(symbol)) + 3 * point) % len(_POINTS)]
        values[symbol] = sympy.I if str(symbol) == "i" else sympy.Rational(at[0] + 8 * (names.index(str(symbol)) // 8), at[1])
    try:
        value = expression.doit().subs(values).evalf(_DIGITS)
        value = value if value.is_number else value.doit().evalf(_DIGITS)
        number = complex(value)
    except (TypeError, ValueError, AttributeError, NotImplementedError, ZeroDivisionError, OverflowError):
        return None
    return value if value.is_number and number == number and abs(number) != float("inf") else None


def _same_equation(a: tuple, g: tuple) -> bool:
    if same_or_equal(a[0], g[0]) and compare(structure(a[1]), structure(g[1])):
        return True
    sides = [parse(side) for side in (*a, *g)]
    if sides[2] is None or sides[3] is None:
        raise Unreadable(f"gold answer {' = '.join(g)[:80]!r} cannot be read")
    if None in sides:
        return False
    try:
        first, second = sides[0] - sides[1], sides[2] - sides[3]
        names = sorted({str(s) for e in (first, second) for s in e.free_symbols})
        ratios = []
        for point in range(3):
            x, y = (_evaluate(e, names, point) for e in (first, second))
            if x is None or y is None or abs(y) < 1e-40 or abs(x) < 1e-40:
                return False
            ratios.append(x / y)
    except TypeError:
        return False
    return bool(names) and all(abs(ratio - ratios[0]) <= 1e-15 * abs(ratios[0]) for ratio in ratios)


def same_or_equal(a: str, g: str) -> bool:
    return a.replace(" ", "") == g.replace(" ", "")


def _verify(answer: str, gold: str) -> bool:
    expected = parse(gold)
    if expected is None:
        raise Unreadable(f"gold answer {gold[:80]!r} cannot be read")
    given = parse(answer)
    return given is not None and _verify_parsed(given, expected)


def _verify_parsed(given, expected) -> bool:
    from math_verify import verify

    return bool(verify(expected, given, timeout_seconds=None))


def warm_up() -> None:
    """Fill what every comparison needs, before workers are forked."""
    for answer, gold in (("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt 2}"), ("2x+1", "1+2x"), ("x+y\\le 3", "y+x\\le 3"), ("\\sin x", "\\cos x")):
        equivalent(answer, gold)
