"""Problems whose answer is a whole program with input/output tests: what LiveCodeBench and APPS share.

The problem's metadata is what the code reward runs: {"tests": [{"input", "output"}], "fn_name": str | None, "language": "python" | "cpp"}.
fn_name None: the program reads standard input and writes standard output.  Otherwise it is the method of a class Solution (or a plain function);
`input` then holds one JSON value per line and argument, `output` one JSON value.
"""

import json

from athanor.errors import UserError
from athanor.tasks._files import shown

LANGUAGES = {"python": "Python", "cpp": "C++"}


def program_question(statement: str, fn_name: str | None, starter_code: str | None, language: str) -> str:
    """The statement with what form the answer must have."""
    name = LANGUAGES[language]
    starter_code = starter_code or ""
    if not isinstance(starter_code, str):
        raise UserError(f"column 'starter_code' is {shown(starter_code)}, wanted a text")
    form = f"Write a {name} program that reads from standard input and writes to standard output."
    if fn_name:
        form = f"Write {name} code that defines `{fn_name}`"
        form += f", starting from this:\n\n```{language}\n{starter_code.rstrip()}\n```" if starter_code.strip() else "."
    return f"{statement.strip()}\n\n{form}\n\nThink step by step, and end with the whole program in one {name} code block."


def program_metadata(tests: list[dict], fn_name: str | None, language: str) -> dict:
    """Metadata of a problem.  Raises UserError when there is no test or one is not {"input": text, "output": text} (a function's may be values)."""
    if fn_name is not None and not (isinstance(fn_name, str) and fn_name.isidentifier()):
        raise UserError(f"the function to write is {shown(fn_name)}, wanted a name")
    if not tests:
        raise UserError("no tests, wanted at least one input with its output")
    for test in tests:
        if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
            raise UserError(f"a test is {shown(test)}, wanted an input and an output")
        as_values = fn_name and isinstance(test["input"], list)
        if not as_values and not (isinstance(test["input"], str) and isinstance(test["output"], str)):
            raise UserError(f"a test is {shown(test)}, wanted an input and an output, both texts")
    return {"tests": [{"input": test["input"], "output": test["output"]} for test in tests], "fn_name": fn_name, "language": language}


def json_column(value, name: str, wanted: type):
    """A column that holds JSON as text, or the value itself; "" and None give an empty one."""
    if value in ("", None):
        return wanted()
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"column {name!r} is {shown(value)}, which is not JSON ({error})") from None
    if not isinstance(value, wanted):
        raise UserError(f"column {name!r} is {shown(value)}, wanted a JSON {wanted.__name__}")
    return value


def check_language(kind: str, language: str) -> None:
    if language not in LANGUAGES:
        raise UserError(f"task {kind}: program_language is {language!r}, wanted {' or '.join(LANGUAGES)}")
