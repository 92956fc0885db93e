"""Questions from files of any columns, plain or chat:  make_task("jsonl:all.jsonl") or make_task("jsonl", train=..., test=...).

JSON Lines first of all; JSON lists, CSV, Parquet and .gz are read too (see _rows.py), and _files.py says how splits are made.
"""

from dataclasses import dataclass
from typing import ClassVar

from athanor.errors import UserError
from athanor.registry import near_misses
from athanor.samples import DOMAINS
from athanor.tasks._files import FileTask, Item, file_name, loader, number_text, shown

_PROMPT_FIELDS = ("prompt", "question", "problem", "messages")


@dataclass(kw_only=True, eq=False)
class JsonlTask(FileTask):
    """Problems of one or more files.  `path` of "jsonl:path" is another way to say `train`."""

    kind: ClassVar[str] = "jsonl"
    split_of_path: ClassVar[str] = "train"

    prompt_field: str | None = None
    """None = the first present of prompt, question, problem, messages."""
    answer_field: str = "answer"
    answer_after: str | None = None
    """The gold answer is what follows the last occurrence of this text in the field."""
    language_field: str | None = None
    require_answers: bool = False
    domain: str = "reasoning"

    def __post_init__(self):
        if self.domain not in DOMAINS:
            raise UserError(f"task jsonl: domain is {self.domain!r}, wanted one of {', '.join(DOMAINS)}")
        super().__post_init__()

    def default_name(self, path: str) -> str:
        return f"jsonl:{file_name(path)}"

    def item(self, row: dict) -> Item:
        metadata = dict(row)
        field = self.prompt_field or next((name for name in _PROMPT_FIELDS if name in row), None)
        if field not in row:
            wanted = f"wanted the field {field!r}" if field else f"wanted one of the fields {', '.join(_PROMPT_FIELDS)} (or set prompt_field)"
            raise UserError(f"no question, {wanted}; {near_misses(field or 'prompt', [str(key) for key in row])}")
        question, messages = question_of(metadata.pop(field), f"field {field!r}")
        answer = number_text(metadata.pop(self.answer_field, None), f"field {self.answer_field!r}")
        marker = self.answer_after
        if answer is not None and marker:
            if marker not in answer:
                raise UserError(f"field {self.answer_field!r} has no {marker!r}, wanted the gold answer after it (setting answer_after)")
            answer = answer.rpartition(marker)[2]
        if answer is not None:
            answer = answer.strip() or None
        if answer is None and self.require_answers:
            have = near_misses(self.answer_field, [str(key) for key in row])
            raise UserError(f"task without answers, wanted a gold answer in the field {self.answer_field!r}; {have}")
        language = number_text(row.get(self.language_field), f"field {self.language_field!r}")
        return Item(question, answer, metadata, messages, language)


def question_of(value, where: str) -> tuple[str, list[dict] | None]:
    """(question, conversation up to it) of a text or a list of chat messages: the last user turn asks."""
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in value):
        turns = [i for i, message in enumerate(value) if message["role"] == "user"]
        if turns and value[turns[-1]]["content"].strip():
            return value[turns[-1]]["content"], value[: turns[-1] + 1]
    if isinstance(value, str) and value.strip():
        return value, None
    raise UserError(f"{where} is {shown(value)}, wanted a non-empty text or a list of chat messages with a user turn")


make = loader(JsonlTask)
