"""HumanEval (arXiv 2107.03374):  make_task("humaneval:HumanEval.jsonl.gz").

Columns task_id, prompt, entry_point, test, canonical_solution.  The problem's metadata is what the code reward runs, {"test", "entry_point",
"prompt"}: the program that the model writes, after it `test`, after that `check(entry_point)`.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.tasks._files import FileTask, Item, loader, rest, text_column

FORM = "Think step by step, and end with the whole program, imports included, in one Python code block."


@dataclass(kw_only=True, eq=False)
class HumanEval(FileTask):
    """Python functions from signature and docstring."""

    kind: ClassVar[str] = "humaneval"
    domain: ClassVar[str] = "code"
    template: str = "raw"

    def item(self, row: dict) -> Item:
        prompt, test, entry_point = (text_column(row, name) for name in ("prompt", "test", "entry_point"))
        if not entry_point.isidentifier() or f"def {entry_point}" not in prompt:
            raise UserError(f"column 'entry_point' is {entry_point!r}, wanted the name of a function that the prompt begins")
        if "def check" not in test:
            raise UserError("column 'test' defines no function check, wanted check(candidate)")
        question = f"Complete the following Python function.\n\n```python\n{prompt.rstrip()}\n```\n\n{FORM}"
        metadata = {"test": test, "entry_point": entry_point, "prompt": prompt, "solution": row.get("canonical_solution")}
        return Item(question, None, rest(row, "canonical_solution") | metadata, bare=prompt)


make = loader(HumanEval)
