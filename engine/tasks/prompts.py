"""Open-ended prompts without a gold answer, for reward models:  make_task("prompts", train="prompts.jsonl").

Columns prompt, question, instruction (with input, if not empty) or messages.  A column `answer` stays in the metadata and judges nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.tasks._files import FileTask, Item, column, loader, rest
from athanor.tasks.jsonl import question_of

_NAMES = ("prompt", "question", "instruction", "messages")


@dataclass(kw_only=True, eq=False)
class Prompts(FileTask):
    """General requests."""

    kind: ClassVar[str] = "prompts"
    split_of_path: ClassVar[str] = "train"
    domain: ClassVar[str] = "general"
    template: str = "raw"

    def item(self, row: dict) -> Item:
        question, messages = question_of(column(row, *_NAMES), f"column {next((name for name in _NAMES if name in row), '')!r}")
        taken = next(name for name in _NAMES if name in row)
        context = row.get("input") if taken == "instruction" else None
        if isinstance(context, str) and context.strip():
            question = f"{question.rstrip()}\n\n{context.strip()}"
        return Item(question, None, rest(row, taken), messages)


make = loader(Prompts)
