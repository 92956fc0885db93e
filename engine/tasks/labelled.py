"""Responses labelled safe or unsafe, for the pointwise reward model:  make_task("labelled", train="safety.jsonl").

Columns prompt (or question), response, and label, which is "safe" or "unsafe", or is_safe, which is true or false.  The response is whole: with its
chain of thought, where it has one.  `labelled(split, index)` gives (problem, response, is it safe?).
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.samples import Problem
from athanor.tasks._files import FileTask, Item, column, loader, rest, shown, text_column
from athanor.tasks.jsonl import question_of


@dataclass(kw_only=True, eq=False)
class Labelled(FileTask):
    """A prompt, a response, and whether people found it safe."""

    kind: ClassVar[str] = "labelled"
    split_of_path: ClassVar[str] = "train"
    domain: ClassVar[str] = "safety"
    template: str = "raw"

    def item(self, row: dict) -> Item:
        name = "prompt" if "prompt" in row else "question"
        question, messages = question_of(column(row, "prompt", "question"), f"column {name!r}")
        metadata = rest(row, "prompt", "question") | {"response": text_column(row, "response"), "safe": _is_safe(row)}
        return Item(question, None, metadata, messages)

    def labelled(self, split: str, index: int) -> tuple[Problem, str, bool]:
        """(problem, response, is it safe?) of a row."""
        problem = self.problem(split, index)
        return problem, problem.metadata["response"], problem.metadata["safe"]


def _is_safe(row: dict) -> bool:
    value = column(row, "label", "is_safe")
    labels = {"safe": True, "unsafe": False}
    if "label" in row and isinstance(value, str) and value in labels:
        return labels[value]
    if "label" not in row and isinstance(value, bool):
        return value
    wanted = '"safe" or "unsafe"' if "label" in row else "true or false"
    raise UserError(f"column {'label' if 'label' in row else 'is_safe'!r} is {shown(value)}, wanted {wanted}")


make = loader(Labelled)
