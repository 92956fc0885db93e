"""Questions from JSON Lines files, one object per line, plain or .gz:  make_task("jsonl:all.jsonl") or make_task("jsonl", train=..., test=...).

Splits.  One file: each question goes where the SHA-256 of its text (white space collapsed) falls, so the split survives reordering and growth of the
file.  Files per split: validation is hashed out of `train` unless given (test too, unless given), and a question that also stands in the test (or
validation) file is dropped from the other ones; `num_dropped` counts them.  Splits are disjoint by question either way.
GSM8K: answer_after="####".  MATH-500: prompt_field="problem".
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator

from athanor.errors import UserError
from athanor.registry import near_misses
from athanor.samples import DOMAINS, Problem
from athanor.tasks._templates import check_template, render

_PROMPT_FIELDS = ("prompt", "question", "problem", "messages")


class JsonlTask:
    """Problems of one or more JSONL files (see the module); read when built."""

    def __init__(self, name: str, files: dict[str, list[str]], shares: dict[str, float], settings: dict):
        self.name = name
        self.domain = settings["domain"]
        self._settings = settings
        self.num_dropped = 0
        rows = {split: [row for path in paths for row in read_rows(path, settings)] for split, paths in files.items()}
        self._rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        seen: dict[str, str] = {}
        for split in ("test", "validation", "train"):
            for row in rows.get(split, []):
                key = " ".join(row["question"].split())
                place = split if split != "train" else _hashed_split(key, shares)
                if seen.setdefault(key, place) != place:
                    self.num_dropped += 1
                    continue
                self._rows[place].append(row)

    def size(self, split: str) -> int:
        self._check_split(split)
        return len(self._rows[split])

    def problem(self, split: str, index: int) -> Problem:
        self._check_split(split)
        rows = self._rows[split]
        if not 0 <= index < len(rows):
            raise IndexError(f"task {self.name}: split {split} has {len(rows)} problems, got index {index}")
        row = rows[index]
        settings = self._settings
        prompt, extra = render(row["question"], settings["template"], system=settings["system"])
        if row["messages"] and settings["template"] == "chat":
            has_system = row["messages"][0]["role"] == "system"
            extra = {"messages": row["messages"] if has_system else [*extra["messages"][:-1], *row["messages"]]}
        metadata = {**row["metadata"], **extra, "source": row["source"]}
        language = row["language"] or settings["language"]
        return Problem(prompt, row["answer"], index, self.name, self.domain, language, split, metadata)

    def _check_split(self, split: str) -> None:
        if split not in self._rows:
            raise UserError(f"task {self.name}: unknown split {split!r}, wanted train, validation or test")


def read_rows(path: str, settings: dict) -> Iterator[dict]:
    """Yield checked rows {question, messages, answer, language, metadata, source}.  Raises UserError naming file:line and what was wanted."""
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            found = False
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield _row(line, f"{path}:{number}", settings)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}), wanted a JSONL file") from error
    if not found:
        raise UserError(f"{path}: no lines, wanted one JSON object per line")


def _row(line: bytes, source: str, settings: dict) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not JSON ({error.msg} at column {error.colno}), wanted one JSON object per line") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{source}: not JSON ({error}), wanted one JSON object per line, in UTF-8") from error
    if not isinstance(row, dict):
        raise UserError(f"{source}: a JSON {type(row).__name__}, wanted an object with the question and its answer")
    metadata = dict(row)
    field = settings["prompt_field"] or next((name for name in _PROMPT_FIELDS if name in row), None)
    if field not in row:
        wanted = f"wanted the field {field!r}" if field else f"wanted one of the fields {', '.join(_PROMPT_FIELDS)} (or set prompt_field)"
        raise UserError(f"{source}: no question, {wanted}; {near_misses(field or 'prompt', [str(key) for key in row])}")
    question, messages = _question(metadata.pop(field), f"{source}: field {field!r}")
    answer = _text_or_none(metadata.pop(settings["answer_field"], None), f"{source}: field {settings['answer_field']!r}")
    marker = settings["answer_after"]
    if answer is not None and marker:
        if marker not in answer:
            raise UserError(f"{source}: field {settings['answer_field']!r} has no {marker!r}, wanted the gold answer after it (setting answer_after)")
        answer = answer.rpartition(marker)[2]
    if answer is not None:
        answer = answer.strip() or None
    if answer is None and settings["require_answers"]:
        have = near_misses(settings["answer_field"], [str(key) for key in row])
        raise UserError(f"{source}: task without answers, wanted a gold answer in the field {settings['answer_field']!r}; {have}")
    language = _text_or_none(row.get(settings["language_field"]), f"{source}: field {settings['language_field']!r}")
    return {"question": question, "messages": messages, "answer": answer, "language": language, "metadata": metadata, "source": source}


def _question(value, where: str) -> tuple[str, list | None]:
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in value):
        users = [message["content"] for message in value if message["role"] == "user"]
        if users and users[-1].strip():
            return users[-1], value
    if isinstance(value, str) and value.strip():
        return value, None
    raise UserError(f"{where} is {json.dumps(value, ensure_ascii=False)[:60]}, wanted a non-empty text or a list of chat messages with a user turn")


def _text_or_none(value, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise UserError(f"{where} is a JSON {type(value).__name__}, wanted a text or a number")


def _hashed_split(key: str, shares: dict[str, float]) -> str:
    point = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    for split, share in shares.items():
        if point < share:
            return split
        point -= share
    return "train"


def make(
    path: str = "",
    /,
    *,
    train: str | list[str] | None = None,
    validation: str | list[str] | None = None,
    test: str | list[str] | None = None,
    validation_share: float = 0.05,
    test_share: float = 0.05,
    prompt_field: str | None = None,
    answer_field: str = "answer",
    answer_after: str | None = None,
    language_field: str | None = None,
    require_answers: bool = False,
    template: str = "r1_zero",
    system: str = "",
    domain: str = "reasoning",
    language: str = "en",
    name: str | None = None,
) -> JsonlTask:
    """Build a task from JSONL files.  `path` is another way to say `train`; each split takes one path or a list.

    prompt_field: None = the first present of prompt, question, problem, messages.  answer_after: the gold answer is what follows the last
    occurrence of this text in the field.  template: raw, r1_zero, chat, or a text with {prompt}.  Shares apply to splits without files.
    """
    if path and train:
        raise UserError(f"task jsonl:{path}: got `train` ({train}) too, wanted one of them")
    given = {"train": path or train, "validation": validation, "test": test}
    files = {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in given.items() if paths}
    if not files:
        raise UserError('task jsonl: no files, wanted "jsonl:<path>" or one of the settings train, validation, test')
    shares = {"test": test_share, "validation": validation_share}
    for split, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"task jsonl: {split}_share is {share}, wanted 0 <= share < 1")
    if sum(shares.values()) >= 1:
        raise UserError(f"task jsonl: test_share + validation_share is {sum(shares.values())}, wanted less than 1")
    shares = {split: share for split, share in shares.items() if split not in files}
    check_template(template)
    if domain not in DOMAINS:
        raise UserError(f"task jsonl: domain is {domain!r}, wanted one of {', '.join(DOMAINS)}")
    settings = {
        "prompt_field": prompt_field, "answer_field": answer_field, "answer_after": answer_after, "language_field": language_field,
        "require_answers": require_answers, "template": template, "system": system, "domain": domain, "language": language,
    }  # fmt: skip
    default_name = "jsonl:" + os.path.basename(next(iter(files.values()))[0])
    return JsonlTask(name or default_name, files, shares, settings)
