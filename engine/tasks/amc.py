"""AMC 12 with numeric answers, as the validation set of the AIMO prize has it:  make_task("amc:amc.jsonl").

Columns problem (or question) and answer, a number such as 142.0.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.rewards.answers import parse_number
from athanor.tasks._files import FileTask, Item, column, loader, number_text, rest, shown, text_column


@dataclass(kw_only=True, eq=False)
class AMC(FileTask):
    """American Mathematics Competitions; the answer is a number, not a letter."""

    kind: ClassVar[str] = "amc"
    template: str = "boxed"

    def item(self, row: dict) -> Item:
        value = column(row, "answer")
        answer = (number_text(value, "column 'answer'") or "").strip()
        if parse_number(answer) is None:
            raise UserError(f"column 'answer' is {shown(value)}, wanted a number")
        return Item(text_column(row, "problem", "question"), answer, rest(row, "problem", "question", "answer"))


make = loader(AMC)
