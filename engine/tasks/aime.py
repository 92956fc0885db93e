"""AIME, any year:  make_task("aime:aime2024.jsonl").  Columns problem (or question) and answer, an integer from 0 to 999; Problem and Answer, as one
published set has them, too.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.tasks._files import FileTask, Item, column, loader, number_text, rest, shown, text_column

_QUESTION = ("problem", "question", "Problem", "Question")
_ANSWER = ("answer", "Answer")


@dataclass(kw_only=True, eq=False)
class AIME(FileTask):
    """American Invitational Mathematics Examination."""

    kind: ClassVar[str] = "aime"
    template: str = "boxed"

    def item(self, row: dict) -> Item:
        value = column(row, *_ANSWER)
        answer = (number_text(value, "column 'answer'") or "").strip()
        if not re.fullmatch(r"[0-9]{1,3}", answer):
            raise UserError(f"column 'answer' is {shown(value)}, wanted an integer from 0 to 999")
        return Item(text_column(row, *_QUESTION), str(int(answer)), rest(row, *_QUESTION, *_ANSWER))


make = loader(AIME)
