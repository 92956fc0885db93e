"""Rows of a data file with the place of each:  JSON Lines, a JSON list, CSV (all three also .gz) or Parquet (needs pyarrow).

`read_rows` yields (source, row): source is "file:line" ("file:row N" in a JSON list or Parquet), row a dict or the UserError that says what is
wrong with that row alone.  What is wrong with the file as a whole is raised, so a reader that collects rows before it uses them never holds half a
file.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence

from athanor.errors import UserError


def read_rows(path: str, header: Sequence[str] = ()) -> Iterator[tuple[str, "dict | UserError"]]:
    """Yield (source, row or error) of every row; blank lines are none.  header: column names of a CSV file that has no line of them."""
    name = path.removesuffix(".gz").lower()
    if name.endswith(".parquet"):
        yield from _parquet(path)
        return
    if header and not name.endswith(".csv"):
        raise UserError(f"{path}: header names the columns of a CSV file, and this is none")
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            if name.endswith(".csv"):
                yield from _csv(path, file, list(header))
            elif name.endswith(".json") and file.read(64).lstrip()[:1] == b"[":
                file.seek(0)
                yield from _json_list(path, file.read())
            else:
                file.seek(0)
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", _guarded(_json, line, f"{path}:{number}")
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}), wanted a JSONL, JSON, CSV or Parquet file") from error


def _guarded(parse, value, source: str):
    """parse(value), or the UserError with its place."""
    try:
        return parse(value)
    except UserError as error:
        return UserError(f"{source}: {error}")


def _json(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at column {error.colno}), wanted one JSON object per line") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"not JSON ({error}), wanted one JSON object per line, in UTF-8") from error
    return _checked(row)


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _checked(row) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"a JSON {type(row).__name__}, wanted an object with the question and its answer")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise UserError("a text with half a surrogate pair, wanted Unicode") from None
    return row


def _json_list(path: str, data: bytes) -> Iterator[tuple[str, "dict | UserError"]]:
    try:
        rows = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error}), wanted a list of objects or one object per line") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:row {number}", _guarded(_checked, row, f"{path}:row {number}")


def _csv(path: str, file, header: list[str]) -> Iterator[tuple[str, "dict | UserError"]]:
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")  # a wrong byte spoils its row, not the file
    reader = csv.reader(text, strict=True)
    while True:
        source = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield source, UserError(f"{source}: not CSV ({error})")
            continue
        if not cells:
            continue
        if not header:
            header = cells
            if "" in header or len(set(header)) != len(header):
                raise UserError(f"{source}: column names {header}, wanted different ones (a file without them needs the setting header)")
        elif len(cells) != len(header):
            yield source, UserError(f"{source}: {len(cells)} cells, wanted {len(header)} ({', '.join(header)})")
        else:
            yield source, _guarded(_checked, dict(zip(header, cells, strict=True)), source)


def _parquet(path: str) -> Iterator[tuple[str, "dict | UserError"]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: a Parquet file needs the package pyarrow ({error}); pip install pyarrow, or convert the file to JSONL") from error
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", _guarded(_checked, row, f"{path}:row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}), wanted a Parquet file") from error
