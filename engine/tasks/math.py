"""MATH (arXiv 2103.03874) and its subset MATH-500:  make_task("math:math500.jsonl").

Columns problem, solution and, in MATH-500, answer; without it the gold answer is the last \\boxed{} of the solution.  level, subject (or type) and
unique_id go into the metadata.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.rewards.answers import last_boxed
from athanor.tasks._files import FileTask, Item, loader, number_text, rest, text_column


@dataclass(kw_only=True, eq=False)
class Math(FileTask):
    """Competition mathematics with a final answer."""

    kind: ClassVar[str] = "math"
    template: str = "boxed"

    def item(self, row: dict) -> Item:
        answer = number_text(row.get("answer"), "column 'answer'")
        if answer is None:
            answer = last_boxed(text_column(row, "solution"))
        if not (answer or "").strip():
            raise UserError("no gold answer, wanted the column 'answer' or a \\boxed{} in the column 'solution'")
        return Item(text_column(row, "problem"), answer.strip(), rest(row, "problem", "answer"))


make = loader(Math)
