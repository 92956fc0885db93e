"""MMLU (arXiv 2009.03300), MMLU-Pro and sets in their formats:  make_task("mmlu:test.parquet")  or, for the original files without a line of names,
make_task("mmlu:abstract_algebra_test.csv", header=["question", "A", "B", "C", "D", "answer"]).

Columns question; choices (or options), or A, B, C, D ...; answer: a letter or a 0-based index (MMLU-Pro: answer_index).  Column names are taken
without regard to case.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.tasks._choice import LETTERS, choice_item, correct_index
from athanor.tasks._files import FileTask, Item, column, loader, rest, text_column


@dataclass(kw_only=True, eq=False)
class MMLU(FileTask):
    """Multiple choice over school and university subjects."""

    kind: ClassVar[str] = "mmlu"
    template: str = "choice"
    shuffle: bool = False
    """Permute the options."""
    seed: int = 0
    """Key of the permutations."""

    def item(self, row: dict) -> Item:
        row = {key.lower() if isinstance(key, str) else key: value for key, value in row.items()}
        listed = row.get("choices", row.get("options"))
        if listed is None:
            taken = [letter.lower() for letter in LETTERS if letter.lower() in row]
            listed = [text_column(row, letter) for letter in (taken or ["a"])]
        else:
            taken = ["choices", "options"]
        answer = row["answer_index"] if row.get("answer") is None and "answer_index" in row else column(row, "answer")
        correct = correct_index(answer, len(listed) if isinstance(listed, list) else 0)
        metadata = rest(row, *taken, "question", "answer", "answer_index", "choices")
        return choice_item(text_column(row, "question"), listed, correct, metadata, shuffle=self.shuffle, seed=self.seed)


make = loader(MMLU)
