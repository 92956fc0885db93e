"""Files and folders that are complete or absent, whatever kills the process or the machine; and JSON read back with clear errors.

A new version is written beside its target under a hidden name, flushed to the disk and renamed over it.  A folder that exists cannot be renamed over
in one call, so it steps aside first (`.NAME.old`); `recover` puts it back when the process died between the two renames.
One writer per target is assumed: left-over hidden names of a dead writer are reused or removed by the next one.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from athanor.errors import UserError


def write_file(path: str | Path, data: str | bytes) -> None:
    """Replace one file by `data` (text as UTF-8), atomically and durably."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(tmp, path)
        _fsync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_json(path: str | Path, where: str) -> dict:
    """The JSON object in a file.  Raises UserError, which begins with `where`, when it is missing, malformed or no object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {path} holds a {type(value).__name__}, wanted an object")
    return value


@contextmanager
def replace_folder(path: str | Path, *, carry: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends well, it takes the place of `path`.

    carry: says by name which entries of the folder that is replaced are copied along; None = none.
    An exception in the block leaves `path` as it was.  An OSError (full disk, no permission) becomes a UserError.
    """
    path = Path(path).resolve()
    tmp, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"cannot write {path}: a file of that name exists, wanted a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        if tmp.exists():
            shutil.rmtree(tmp)
        _discard(old, tmp)
        tmp.mkdir()
        yield tmp
        for entry in sorted(path.iterdir()) if carry and path.exists() else ():
            if carry(entry.name) and not (tmp / entry.name).exists():
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, tmp / entry.name)
        for folder, _, names in os.walk(tmp):
            for name in names:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        if path.exists():
            os.rename(path, old)
        os.rename(tmp, path)
        _fsync(path.parent)
        _discard(old, tmp)
    except OSError as error:
        _put_back(path, tmp, old)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception:
        _put_back(path, tmp, old)
        raise


def recover(path: str | Path) -> None:
    """Finish what a killed `replace_folder` left: a `path` that is missing while its previous version stands aside is put back."""
    path = Path(path).resolve()
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and old.is_dir():
        with suppress(FileNotFoundError):  # another rank was quicker
            os.rename(old, path)


def _discard(old: Path, tmp: Path) -> None:
    # Renamed first: a half-deleted folder under the name that `recover` trusts could come back one day.
    if old.exists():
        os.rename(old, tmp)
        shutil.rmtree(tmp)


def _put_back(path: Path, tmp: Path, old: Path) -> None:
    shutil.rmtree(tmp, ignore_errors=True)
    if not path.exists() and old.is_dir():
        os.rename(old, path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
