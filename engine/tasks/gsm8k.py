"""GSM8K (arXiv 2110.14168):  make_task("gsm8k", train="train.jsonl", test="test.jsonl")  or  make_task("gsm8k:test.jsonl").

Columns question, answer; the gold answer is what follows the last `####`, the rest is the written solution.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.tasks._files import FileTask, Item, loader, rest, text_column


@dataclass(kw_only=True, eq=False)
class GSM8K(FileTask):
    """Grade-school mathematics."""

    kind: ClassVar[str] = "gsm8k"
    template: str = "boxed"

    def item(self, row: dict) -> Item:
        solution, marker, answer = text_column(row, "answer").rpartition("####")
        if not marker or not answer.strip():
            raise UserError("column 'answer' has no gold answer after '####'")
        return Item(text_column(row, "question"), answer.strip(), rest(row, "question", "answer") | {"solution": solution.strip()})


make = loader(GSM8K)
