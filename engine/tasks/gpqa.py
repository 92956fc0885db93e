"""GPQA (arXiv 2311.12022), Diamond first of all:  make_task("gpqa:gpqa_diamond.csv", seed=0).

Columns Question, Correct Answer, Incorrect Answer 1 to 3.  The published order has the right option first, so the options are always permuted, by
(seed, question).
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.tasks._choice import choice_item
from athanor.tasks._files import FileTask, Item, loader, text_column

_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_KEPT = ("Record ID", "High-level domain", "Subdomain")


@dataclass(kw_only=True, eq=False)
class GPQA(FileTask):
    """Graduate-level multiple choice in biology, physics and chemistry."""

    kind: ClassVar[str] = "gpqa"
    template: str = "choice"
    seed: int = 0
    """Key of the permutations of the options."""

    def item(self, row: dict) -> Item:
        options = [text_column(row, name) for name in _OPTIONS]
        metadata = {name: row[name] for name in _KEPT if name in row}
        return choice_item(text_column(row, "Question"), options, 0, metadata, shuffle=True, seed=self.seed)


make = loader(GPQA)
