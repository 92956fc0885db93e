"""APPS (arXiv 2105.09938) and sets in its format (TACO, CodeContests conversions):  make_task("apps:test.jsonl").

Columns question, starter_code, difficulty, input_output: JSON {"inputs": [...], "outputs": [...], "fn_name"?}.  With fn_name the inputs are lists of
arguments, and the tests of the problem's metadata (see _programs.py) hold values and not texts.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.tasks._files import FileTask, Item, column, loader, rest, text_column
from athanor.tasks._programs import check_language, json_column, program_metadata, program_question


@dataclass(kw_only=True, eq=False)
class APPS(FileTask):
    """Programs with input/output tests."""

    kind: ClassVar[str] = "apps"
    domain: ClassVar[str] = "code"
    template: str = "raw"
    program_language: str = "python"
    """Language that the model is asked for: python or cpp (problems with a function to write stay Python)."""

    def __post_init__(self):
        check_language(self.kind, self.program_language)
        super().__post_init__()

    def item(self, row: dict) -> Item:
        pairs = json_column(column(row, "input_output"), "input_output", dict)
        inputs, outputs, fn_name = pairs.get("inputs"), pairs.get("outputs"), pairs.get("fn_name") or None
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise UserError("column 'input_output' wants lists inputs and outputs of one length")
        make_test = _call if fn_name else _streams
        language = "python" if fn_name else self.program_language
        metadata = program_metadata([make_test(*pair) for pair in zip(inputs, outputs, strict=True)], fn_name, language)
        statement = text_column(row, "question")
        question = program_question(statement, fn_name, row.get("starter_code"), language)
        return Item(question, None, rest(row, "question", "input_output", "solutions") | metadata, bare=statement)


def _call(arguments, result) -> dict:
    """A test of a function.  APPS wraps some results in a list and some not, so arguments and result stay values for the reward to compare."""
    if not isinstance(arguments, list):
        raise UserError("column 'input_output': with fn_name each input is a list of arguments")
    return {"input": arguments, "output": result}


def _streams(given, wanted) -> dict:
    """A test of a program; a list of lines is joined."""
    return {"input": _lines(given), "output": _lines(wanted)}


def _lines(value):
    return "\n".join(map(str, value)) if isinstance(value, list) else value


make = loader(APPS)
