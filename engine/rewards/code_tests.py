"""Tests of a programming problem: the formats that a problem's metadata may bring, and the comparison of what a program gave with what was wanted.

stdin/stdout    {"tests": [{"input": "3 4\\n", "output": "7\\n"}, ...]}           Codeforces, LiveCodeBench (testtype "stdin")
                {"inputs": [text, ...], "outputs": [text, ...]}                  APPS; CodeContests names them input and output
function calls  the same with {"fn_name": "add"}: an input is the list of arguments and an output the value (APPS, which may wrap it in a list), or
                both are text, one JSON value per line (LiveCodeBench, testtype "functional").  `Solution().add` is taken where there is no `add`.
check           {"test": "def check(candidate): ...", "entry_point": "add", "prompt": "def add(a, b): ..."}        HumanEval; prompt is optional
                {"test_list": ["assert add(1, 2) == 3", ...]}                                                      MBPP
Lists may stand under `tests` or `input_output` too, as data or as JSON text.  Compressed and pickled tests have to be unpacked by the loader.

Optional: "time_limit" (seconds per test), "memory_limit" (MB), "language" (python or cpp) for an answer that names none.
Not covered: problems with several right outputs (special judges) and interactive ones.
"""

import ast
import builtins
import json
import math
import re
from dataclasses import dataclass
from itertools import chain

from athanor.errors import UserError


@dataclass(frozen=True)
class Tests:
    """What a problem asks of a program."""

    kind: str  # "stdio", "call" or "check"
    inputs: tuple = ()  # stdio: text; call: lists of arguments
    outputs: tuple = ()  # stdio: text; call: JSON values
    entry: str | None = None  # the function, for call and check
    setup: str = ""  # check: code that the test needs, such as the stub with its helpers
    test: str = ""  # check: source of check(candidate)
    wrapped: bool = False  # call: an output [x] also means x


def parse_tests(metadata: dict) -> Tests | None:
    """Tests of a problem, or None where its metadata has none.  Raises UserError on a format that is not one of the module's."""
    if metadata.get("test_list"):
        return _from_asserts(metadata)
    if metadata.get("test") and metadata.get("entry_point"):
        return Tests("check", entry=metadata["entry_point"], setup=metadata.get("prompt") or "", test=metadata["test"])
    found = metadata.get("tests") or metadata.get("input_output")
    if not found:
        found = {name: metadata[name] for name in ("inputs", "outputs") if metadata.get(name)}
    if not found:
        return None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise UserError(f"reward code: the problem's tests are text that is no JSON: {error}") from None
    if isinstance(found, dict):
        inputs, outputs = (found.get(name + "s", found.get(name)) for name in ("input", "output"))
        entry = found.get("fn_name")
    elif isinstance(found, list) and all(isinstance(row, dict) and {"input", "output"} <= row.keys() for row in found):
        inputs, outputs = ([row[name] for row in found] for name in ("input", "output"))
        entry = None
    else:
        raise UserError(f"reward code: tests are {str(found)[:80]!r}, wanted a list of {{input, output}} or lists `inputs` and `outputs`")
    entry = entry or metadata.get("fn_name") or metadata.get("func_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise UserError("reward code: tests need as many inputs as outputs, and at least one")
    if entry is None:
        return Tests("stdio", tuple(map(_as_text, inputs)), tuple(map(_as_text, outputs)))
    as_text = isinstance(inputs[0], str)
    if as_text:
        try:
            inputs = [[json.loads(line) for line in text.splitlines() if line.strip()] for text in inputs]
            outputs = [json.loads(text) for text in outputs]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"reward code: tests of {entry}: wanted JSON text, one argument a line: {error}") from None
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise UserError(f"reward code: tests of {entry}: an input is no list of arguments")
    return Tests("call", tuple(inputs), tuple(outputs), entry=entry, wrapped=not as_text)


def _as_text(value) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else str(value)


def _from_asserts(metadata: dict) -> Tests:
    lines = metadata["test_list"]
    try:
        calls = [node.func.id for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    except (SyntaxError, TypeError) as error:
        raise UserError(f"reward code: test_list cannot be read: {error}") from None
    own = [name for name in calls if not hasattr(builtins, name)]
    entry = metadata.get("entry_point") or (own[0] if own else None)
    if entry is None:
        raise UserError("reward code: test_list calls no function; name it in entry_point")
    test = "def check(candidate):\n" + "\n".join("    " + line for text in lines for line in text.splitlines())
    return Tests("check", entry=entry, setup="\n".join(metadata.get("test_imports") or []) or metadata.get("test_setup_code") or "", test=test)


def complete_stub(prompt: str) -> str:
    """A stub as it stands in a data set, as code that can be run: what ends in an open function gets `pass`."""
    for code in (prompt, prompt + "\n    pass\n"):
        try:
            ast.parse(code)
        except SyntaxError:
            continue
        return code
    raise UserError(f"reward code: prompt is no Python, with or without a body: {prompt[:80]!r}")


def program_for_check(code: str, tests: Tests) -> str:
    """The whole program: the stub's imports and helpers, then the answer; an answer without the function is the body that goes on from the stub."""
    if not tests.setup:
        return code
    if re.search(rf"^(?:async\s+)?(?:def\s+{re.escape(tests.entry)}\b|{re.escape(tests.entry)}\s*=)", code, re.MULTILINE):
        return complete_stub(tests.setup) + "\n\n" + code
    return tests.setup + "\n" + code


def same_output(got: str, wanted: str, *, tolerance: float) -> bool:
    """Do two outputs agree?  Line by line and token by token, outer blank lines and the amount of white space ignored.

    Where the wanted token is written with a decimal point or exponent, numbers within `tolerance` (relative, or absolute below 1) of it agree.
    """
    got_lines, wanted_lines = ([line.split() for line in text.strip().splitlines()] for text in (got, wanted))
    if got_lines == wanted_lines:
        return True
    if [len(line) for line in got_lines] != [len(line) for line in wanted_lines]:
        return False
    pairs = zip(chain.from_iterable(got_lines), chain.from_iterable(wanted_lines), strict=True)
    return all(_same_token(a, b, tolerance) for a, b in pairs)


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


def _same_token(got: str, wanted: str, tolerance: float) -> bool:
    if got == wanted:
        return True
    if wanted.lstrip("+-").isdigit() or len(got) > 400 or not _NUMBER.fullmatch(wanted) or not _NUMBER.fullmatch(got):
        return False
    return _close(float(got), float(wanted), tolerance)


def _close(a: float, b: float, tolerance: float) -> bool:
    return math.isfinite(a) and abs(a - b) <= tolerance * max(1.0, abs(b))


def same_value(data, wanted, *, tolerance: float, wrapped: bool = False) -> bool:
    """Does a returned value equal the wanted JSON value?  `data` is the parsed text of sandbox/values.py, read here without building sets or dicts
    from it: a program could choose keys that all collide.

    Tuples count as lists, as JSON has none; a wanted float allows `tolerance` as in `same_output`.
    """
    if wrapped and isinstance(wanted, list) and len(wanted) == 1 and same_value(data, wanted[0], tolerance=tolerance):
        return True
    if isinstance(data, dict):
        tag, body = next(iter(data.items()), ("", None))
        if tag == "t":
            data = body
        elif tag == "i":
            data = int(body, 16)
        elif tag == "d" and isinstance(wanted, dict) and len(body) == len(wanted):
            keys = {key if isinstance(key, str) else json.dumps(key) for key, _ in body if isinstance(key, (str, int, float))}
            return keys == wanted.keys() and all(
                same_value(item, wanted[key if isinstance(key, str) else json.dumps(key)], tolerance=tolerance) for key, item in body
            )
        else:
            return False
    if isinstance(wanted, list):
        return (
            isinstance(data, list)
            and len(data) == len(wanted)
            and all(same_value(a, b, tolerance=tolerance) for a, b in zip(data, wanted, strict=True))
        )
    if isinstance(data, list) or isinstance(wanted, dict):
        return False
    if isinstance(wanted, float) and isinstance(data, (int, float)):
        return data == wanted or (abs(data) < 1e300 and _close(float(data), wanted, tolerance))
    return data == wanted
