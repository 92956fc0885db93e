"""MBPP (arXiv 2108.07732), full or sanitized:  make_task("mbpp:mbpp.jsonl").

Columns task_id, text (sanitized: prompt), code, test_list and test_setup_code (sanitized: the list test_imports).  The problem's metadata is what the
code reward runs: {"test_list": [assert ...], "test_setup_code"}.  As in the paper, the model sees the tests, because they name the function.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.tasks._files import FileTask, Item, column, loader, rest, shown, text_column
from athanor.tasks.humaneval import FORM


@dataclass(kw_only=True, eq=False)
class MBPP(FileTask):
    """Short Python programs from a sentence and three assertions."""

    kind: ClassVar[str] = "mbpp"
    domain: ClassVar[str] = "code"
    template: str = "raw"

    def item(self, row: dict) -> Item:
        tests = _texts(column(row, "test_list"), "test_list")
        if not tests:
            raise UserError("column 'test_list' is empty, wanted at least one assertion")
        setup = row.get("test_setup_code") or ""
        if not isinstance(setup, str):
            raise UserError(f"column 'test_setup_code' is {shown(setup)}, wanted a text")
        setup = "\n".join([*_texts(row.get("test_imports") or [], "test_imports"), *([setup] if setup else [])])
        text, listed = text_column(row, "text", "prompt").strip(), "\n".join(tests)
        question = f"{text}\nYour Python code should pass these tests:\n\n```python\n{listed}\n```\n\n{FORM}"
        metadata = rest(row, "text", "prompt", "code", "test_imports") | {"test_list": tests, "test_setup_code": setup, "solution": row.get("code")}
        return Item(question, None, metadata, bare=text)


def _texts(value, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"column {name!r} is {shown(value)}, wanted a list of texts")
    return value


make = loader(MBPP)
