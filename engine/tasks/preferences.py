"""Preference pairs for reward models:  make_task("preferences", train="pairs.jsonl");  `pair(split, index)` gives (problem, chosen, rejected).

Columns prompt (or question), chosen, rejected.  The replies are texts or chat lists that end with the assistant's turn.  Without a prompt column the
prompt is what both conversations share up to the last turn: chat lists, or texts with "\\n\\nAssistant:" before each reply.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.samples import Problem
from athanor.tasks._files import FileTask, Item, column, loader, rest, shown
from athanor.tasks.jsonl import question_of

_TURN = "\n\nAssistant:"


@dataclass(kw_only=True, eq=False)
class Preferences(FileTask):
    """Two replies to a prompt, one of which people preferred."""

    kind: ClassVar[str] = "preferences"
    split_of_path: ClassVar[str] = "train"
    domain: ClassVar[str] = "general"
    template: str = "raw"

    def item(self, row: dict) -> Item:
        replies = {name: _reply(column(row, name), f"column {name!r}") for name in ("chosen", "rejected")}
        name = next((name for name in ("prompt", "question") if name in row), None)
        if name:
            question, messages = question_of(row[name], f"column {name!r}")
        else:
            shared, other = (context for context, _ in replies.values())
            if not shared or shared != other:
                raise UserError("no column 'prompt', and the two conversations do not share all but their last turn")
            question, messages = question_of(shared, "the shared conversation")
        chosen, rejected = (text for _, text in replies.values())
        if chosen == rejected:
            raise UserError("chosen and rejected are the same text")
        return Item(question, None, rest(row, "prompt", "question") | {"chosen": chosen, "rejected": rejected}, messages)

    def pair(self, split: str, index: int) -> tuple[Problem, str, str]:
        """(problem, chosen, rejected) of a row."""
        problem = self.problem(split, index)
        return problem, problem.metadata["chosen"], problem.metadata["rejected"]


def _reply(value, where: str) -> tuple[str | list | None, str]:
    """(conversation before the reply or None, the reply)."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        text = value[-1].get("content")
        if value[-1].get("role") == "assistant" and isinstance(text, str) and text.strip():
            return value[:-1], text.strip()
    elif isinstance(value, str) and value.strip():
        context, marker, text = value.rpartition(_TURN)
        if marker and text.strip():
            return context + marker, text.strip()
        if not marker:
            return None, value.strip()
    raise UserError(f"{where} is {shown(value)}, wanted a reply: a non-empty text or a chat list that ends with the assistant's turn")


make = loader(Preferences)
