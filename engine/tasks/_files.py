"""What all tasks of data files share: splits, templates, column names, and what is done with a bad row.

A set's file defines a subclass that turns one row of the published format into an `Item`, and `make = loader(TheSubclass)`.

Splits.  A file of several splits: each question goes where the SHA-256 of its text (white space collapsed) falls, so the split survives
reordering and growth of the file.  Files per split: validation is hashed out of `train` unless given (test too, unless given), and a question that
also stands in the test (or validation) file is dropped from the other ones; `num_dropped` counts them.  Splits are disjoint by question either way.
"""

import hashlib
import inspect
import json
import os
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from athanor.errors import UserError
from athanor.registry import near_misses
from athanor.samples import SPLITS, Problem
from athanor.tasks._rows import read_rows
from athanor.tasks._templates import check_template, render

_SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Item:
    """What a row becomes."""

    question: str
    answer: str | None = None
    metadata: dict = field(default_factory=dict)
    messages: list[dict] | None = None  # a conversation that ends with the question
    language: str | None = None
    letters: str = ""  # of a multiple-choice question
    bare: str = ""  # the question without instructions, by which texts are compared; empty = the question


@dataclass(kw_only=True, eq=False)
class FileTask:
    """Problems of data files, read when built.  A split takes one path or a list."""

    kind: ClassVar[str] = "file"
    split_of_path: ClassVar[str] = "test"  # what "kind:path" means
    domain: ClassVar[str] = "reasoning"

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    validation_share: float = 0.05
    test_share: float = 0.05
    """Shares that are hashed out of `train`; they apply to splits without files."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns by other names: published name = name in the file."""
    header: list[str] = field(default_factory=list)
    """Column names of a CSV file that has no line of them."""
    on_bad: str = "error"
    """A bad row is an "error", or it is reported and left out: "skip"."""
    template: str = "r1_zero"
    """raw, r1_zero, boxed, choice, chat, chat:<one of these>, or a text with {prompt}."""
    system: str = ""
    """System message of a chat."""
    language: str = "en"
    name: str | None = None

    def item(self, row: dict) -> Item | None:
        """Turn a row into an item; None = the settings leave it out.  Raises UserError without the place, which the caller adds."""
        raise NotImplementedError

    def __post_init__(self):
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        files = {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in given.items() if paths}
        if not files:
            raise UserError(f'task {self.kind}: no files, wanted "{self.kind}:<path>" or one of the settings train, validation, test')
        shares = {"test": self.test_share, "validation": self.validation_share}
        for split, share in shares.items():
            if not 0 <= share < 1:
                raise UserError(f"task {self.kind}: {split}_share is {share}, wanted 0 <= share < 1")
        if sum(shares.values()) >= 1:
            raise UserError(f"task {self.kind}: test_share + validation_share is {sum(shares.values())}, wanted less than 1")
        if self.on_bad not in ("error", "skip"):
            raise UserError(f"task {self.kind}: on_bad is {self.on_bad!r}, wanted error or skip")
        check_template(self.template)
        self.name = self.name or self.default_name(next(iter(files.values()))[0])
        self.bad_rows: list[str] = []
        self.num_dropped = 0
        rows = {split: [row for path in paths for row in self._read(path)] for split, paths in files.items()}
        self._rows: dict[str, list[tuple[str, Item]]] = {split: [] for split in SPLITS}
        shares = {split: share for split, share in shares.items() if split not in files}
        seen: dict[str, str] = {}
        for split in ("test", "validation", "train"):
            for source, item in rows.get(split, []):
                key = " ".join(item.question.split())
                place = split if split != "train" else _hashed_split(key, shares)
                if seen.setdefault(key, place) != place:
                    self.num_dropped += 1
                    continue
                self._rows[place].append((source, item))

    def default_name(self, path: str) -> str:
        return self.kind

    def size(self, split: str) -> int:
        self._check_split(split)
        return len(self._rows[split])

    def problem(self, split: str, index: int) -> Problem:
        self._check_split(split)
        rows = self._rows[split]
        if not 0 <= index < len(rows):
            raise IndexError(f"task {self.name}: split {split} has {len(rows)} problems, got index {index}")
        source, item = rows[index]
        prompt, extra = render(item.question, self.template, system=self.system, letters=item.letters)
        if item.messages and "messages" in extra:
            *system, last = extra["messages"]
            has_system = item.messages[0]["role"] == "system"
            extra["messages"] = [*(() if has_system else system), *item.messages[:-1], last]
        metadata = {**item.metadata, "question": item.bare or item.question, **extra, "source": source}
        return Problem(prompt, item.answer, index, self.name, self.domain, item.language or self.language, split, metadata)

    def _read(self, path: str) -> list[tuple[str, Item]]:
        """Checked rows of one file with their places; raises UserError naming file:line and what was wanted."""
        items, bad, found = [], [], 0
        for source, row in read_rows(path, self.header):
            found += 1
            try:
                if isinstance(row, UserError):
                    raise row
                item = self.item(self._renamed(row))
            except UserError as error:
                message = str(error) if isinstance(row, UserError) else f"{source}: {error}"
                if self.on_bad == "error":
                    raise UserError(message) from None
                bad.append(message)
                continue
            if item is not None:
                items.append((source, item))
        if not found:
            raise UserError(f"{path}: no lines, wanted one JSON object per line")
        if len(bad) == found:
            raise UserError(f"{path}: none of {found} rows can be used; the first: {bad[0]}")
        if bad:
            more = f"; and {len(bad) - _SHOWN_BAD_ROWS} more" if len(bad) > _SHOWN_BAD_ROWS else ""
            warnings.warn(f"task {self.name}: {len(bad)} of {found} rows left out: {'; '.join(bad[:_SHOWN_BAD_ROWS])}{more}", stacklevel=2)
            self.bad_rows += bad
        return items

    def _renamed(self, row: dict) -> dict:
        for name in self.columns.values():
            if name not in row:
                raise UserError(f"no column {name!r}, which the setting columns names; {near_misses(name, [str(key) for key in row])}")
        taken = set(self.columns.values())
        return {key: value for key, value in row.items() if key not in taken} | {wanted: row[name] for wanted, name in self.columns.items()}

    def _check_split(self, split: str) -> None:
        if split not in SPLITS:
            raise UserError(f"task {self.name}: unknown split {split!r}, wanted train, validation or test")


def loader(task: type[FileTask]):
    """`make` of a set: the task's settings as keywords, and "kind:path" for `split_of_path`."""
    settings = inspect.signature(task).parameters.values()

    def make(path: str = "", /, **given) -> FileTask:
        if path and given.get(task.split_of_path):
            raise UserError(f"task {task.kind}:{path}: got `{task.split_of_path}` ({given[task.split_of_path]}) too, wanted one of them")
        return task(**(given | {task.split_of_path: path} if path else given))

    path = inspect.Parameter("path", inspect.Parameter.POSITIONAL_ONLY, default="", annotation=str)
    make.__signature__ = inspect.Signature([path, *settings], return_annotation=task)
    make.__doc__ = f"Build the task from data files; the settings are the fields of {task.__name__} and FileTask."
    return make


def column(row: dict, *names: str):
    """The first of these columns that a row has.  Raises UserError when it has none."""
    for name in names:
        if name in row:
            return row[name]
    wanted = f"no column {names[0]!r}" if len(names) == 1 else f"none of the columns {', '.join(names)}"
    raise UserError(f"{wanted} (or set columns); {near_misses(names[0], [str(key) for key in row])}")


def text_column(row: dict, *names: str) -> str:
    """A non-empty text of the first of these columns that a row has."""
    value = column(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"column {next(name for name in names if name in row)!r} is {shown(value)}, wanted a non-empty text")
    return value


def number_text(value, where: str) -> str | None:
    """A gold answer as text; None stays None.  142.0 is "142"."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (int, float)):
        return str(value)
    raise UserError(f"{where} is a JSON {type(value).__name__}, wanted a text or a number")


def rest(row: dict, *taken: str) -> dict:
    """The columns that are not among `taken`."""
    return {key: value for key, value in row.items() if key not in taken}


def shown(value, limit: int = 60) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:limit]


def file_name(path: str) -> str:
    return os.path.basename(path)


def _hashed_split(key: str, shares: dict[str, float]) -> str:
    point = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    for split, share in shares.items():
        if point < share:
            return split
        point -= share
    return "train"
