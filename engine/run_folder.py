"""The run folder: the lock against a second process, and the check that a folder belongs to this configuration.

Only the rank that writes (rank 0) calls these.
"""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

from athanor.atomic import write_file
from athanor.errors import UserError

RUN_FILES = ("manifest.json", "config.json", "metrics.jsonl", "samples.jsonl", "report.html", "transcripts", "transcripts.html", "data",
             "checkpoints", "evaluations", "tensorboard", "wandb", "skipped")  # fmt: skip
LOCK_NAME = ".lock"


def open_run_folder(run_dir: Path | str, config: dict, *, overwrite: bool = False, ignore: tuple[str, ...] = ()) -> "RunLock":
    """Make or re-enter the run folder of `config` (the resolved configuration as JSON data), lock it, and store config.json.

    A folder that was made with another configuration is refused unless `overwrite`, which empties it first; `ignore` names the
    dotted keys (with all below them) that may differ, such as where the run lies.  Returns the lock; release it at the end.
    Raises UserError when the folder cannot be written, is in use, holds something else, or was made with another configuration.
    """
    run_dir = Path(run_dir)
    _check_writable(run_dir)
    lock = RunLock(run_dir)
    try:
        _check_contents(run_dir, config, overwrite, ignore)
    except BaseException:
        lock.release()
        raise
    return lock


def changed_keys(old: dict, new: dict, ignore: tuple[str, ...] = ()) -> list[str]:
    """Say how two configurations differ, one `key: old -> new` per differing leaf, without the keys in `ignore` and those below them."""
    missing = object()
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changes = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == name or key.startswith(name + ".") for name in ignore):
            continue
        was, now = before.get(key, missing), after.get(key, missing)
        if was is missing or now is missing or was != now:
            changes.append(f"{key}: {'absent' if was is missing else json.dumps(was)} -> {'absent' if now is missing else json.dumps(now)}")
    return changes


def clean_run_folder(run_dir: Path | str) -> None:
    """Delete what a run writes into its folder (RUN_FILES and temporary files), and nothing else that lies there."""
    run_dir = Path(run_dir)
    for path in [run_dir / name for name in RUN_FILES] + [p for p in sorted(run_dir.iterdir()) if _is_leftover(p)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class RunLock:
    """Hold the run folder for this process.  The lock of a process that no longer lives on this host is taken over.

    The file keeps pid, host and start time; flock is held only while it is read and written, so that workers forked from a killed
    run (they inherit file descriptors) cannot keep a dead lock alive, and two heirs cannot both take it.
    """

    def __init__(self, run_dir: Path):
        self._path = Path(run_dir) / LOCK_NAME
        self._me = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}
        with self._exclusive() as file:
            holder = _read_holder(file)
            if holder and holder != self._me and _may_live(holder):
                raise UserError(
                    f"{run_dir} is in use by process {holder['pid']} on {holder['host']}: wait for it, end it, or give this run another name"
                    f" (if no such process runs, delete {self._path})"
                )
            _write_holder(file, self._me)
        atexit.register(self.release)

    def release(self) -> None:
        """Give the folder free.  Does nothing when it is not held, or in a forked child of the holder."""
        atexit.unregister(self.release)
        if os.getpid() != self._me["pid"] or not self._path.exists():
            return
        with self._exclusive() as file:
            if _read_holder(file) == self._me:
                file.truncate(0)  # never unlinked: a waiting process may have this very inode open

    @contextlib.contextmanager
    def _exclusive(self):
        with open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise UserError(f"run folder {run_dir}: cannot write there ({error.strerror or error}); give a folder that can be written") from None


def _check_contents(run_dir: Path, config: dict, overwrite: bool, ignore: tuple[str, ...]) -> None:
    config_path = run_dir / "config.json"
    strangers = sorted(p.name for p in run_dir.iterdir() if p.name != LOCK_NAME and not _is_leftover(p))
    if strangers and not config_path.exists() and not (run_dir / "manifest.json").exists():
        raise UserError(f"{run_dir} holds {', '.join(strangers[:3])} but no config.json: it is no run folder; wanted an empty or new one")
    if overwrite:
        clean_run_folder(run_dir)
    elif config_path.exists():
        try:
            old = json.loads(config_path.read_text())
        except ValueError as error:
            raise UserError(f"{config_path}: not readable as JSON ({error}); give the run a new name, or --overwrite") from None
        changes = changed_keys(old, config, ignore)
        if changes:
            shown = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
            raise UserError(f"{run_dir} was made with another configuration ({shown}): give the run a new name, or --overwrite to start it afresh")
    # stored again on every start: the ignored keys (where the run lies) may be new
    write_file(config_path, json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in (".tmp", ".old", ".removed")  # of a killed write, see atomic.py


def _leaves(value, prefix: str = ""):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


def _read_holder(file) -> dict | None:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return holder if {"pid", "host", "started"} <= holder.keys() else None
    except (ValueError, AttributeError):
        return None  # empty (released) or cut short by a kill while it was written


def _write_holder(file, holder: dict) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(holder))
    file.flush()


def _may_live(holder: dict) -> bool:
    """Whether the holder may still run: unknown on another host counts as yes."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # lives, under another user
    # pids are recycled: a process that started at another time is not the holder
    return holder["started"] == _start_time(holder["pid"])


def _start_time(pid: int) -> str:
    """Kernel start time of a process in clock ticks, "" where /proc does not tell, "dead" for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name in parentheses may hold spaces
    except OSError:
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]
