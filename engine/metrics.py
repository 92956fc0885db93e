"""Metrics of a run: metrics.jsonl (one line per stage and step), TensorBoard events of the same numbers, and services such as Weights & Biases.

metrics.jsonl is the record: a line is on disk before the next step begins, and `rewind` cuts it back to a checkpoint, so that a run
that was killed and resumed has every step once.  TensorBoard is a view of it under tensorboard/<stage>/, so stages overlay.  Services
(`loggers`, modules with the interface of wandb: init, log, finish) get the same numbers as <stage>/<name> beside <stage>/step; what they have been
sent they keep, so steps that a resumed run repeats are there twice.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from athanor.atomic import write_file
from athanor.errors import UserError

METRICS_NAME = "metrics.jsonl"


def read_metrics(run_dir: Path | str) -> list[dict]:
    """Read metrics.jsonl of a run folder; [] when there is none.  A half-written last line (a kill) is left out, other damage is a UserError."""
    path = Path(run_dir) / METRICS_NAME
    return [row for _, row in _parse_lines(path)] if path.exists() else []


def rank_from_environment() -> int:
    """The rank that torchrun gave this process, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def check_loggers(loggers: Sequence[str]) -> None:
    """Raise UserError for a service whose package is not installed."""
    for name in loggers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"loggers: {name} is not installed; pip install {name}, or leave it out of loggers")


class MetricsWriter:
    """Append metrics of a run to <run_dir>/metrics.jsonl, to TensorBoard and to `loggers`.  On ranks other than 0 every method does nothing.

    config: what the loggers show as the run's settings.
    """

    def __init__(
        self, run_dir: Path | str, tensorboard: bool = True, *, rank: int | None = None, loggers: Sequence[str] = (), config: dict | None = None
    ):
        self._path = Path(run_dir) / METRICS_NAME
        self._active = (rank_from_environment() if rank is None else rank) == 0
        self._tensorboard_dir = Path(run_dir) / "tensorboard" if tensorboard else None
        self._loggers: list = []  # modules
        self._events = {}  # stage -> EventFileWriter
        self._purge_steps = {}  # stage -> first step that a TensorBoard reader must forget
        self._file = None
        if not self._active:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            _drop_half_line(self._path)
        self._file = open(self._path, "ab")
        check_loggers(loggers)
        for name in loggers:
            module, run = importlib.import_module(name), Path(run_dir).resolve().name
            # One run of the service for a run folder, however often it is resumed.
            own = {"id": run, "dir": str(run_dir)} if name == "wandb" else {}
            module.init(project=os.environ.get(f"{name.upper()}_PROJECT", "athanor"), name=run, config=config or {}, resume="allow", **own)
            self._loggers.append(module)

    def write(self, stage: str, step: int, values: dict) -> None:
        """Append one line {stage, step, **values}, flushed.  Values: numbers or 0-d tensors; NaN and infinities are written as null."""
        if not self._active:
            return
        numbers = {name: _as_number(name, value) for name, value in values.items()}
        if numbers.keys() & {"stage", "step"}:
            raise ValueError("MetricsWriter.write: `stage` and `step` are arguments, not names of values")
        row = {"stage": stage, "step": int(step), **numbers}
        with self._writing():
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._file.flush()
            if self._tensorboard_dir is not None:
                self._write_events(stage, int(step), numbers)
        for module in self._loggers:
            module.log({f"{stage}/step": int(step)} | {f"{stage}/{name}": value for name, value in numbers.items() if value is not None})

    def rewind(self, stage: str, step: int) -> None:
        """Forget the lines of `stage` after `step` (the checkpoint's): call it on resume.  -1 forgets the whole stage."""
        if not self._active:
            return
        self._file.close()
        kept = [line for line, row in _parse_lines(self._path) if not (row["stage"] == stage and row["step"] > step)]
        write_file(self._path, b"".join(kept))
        self._file = open(self._path, "ab")
        if stage in self._events:
            self._events.pop(stage).close()
        self._purge_steps[stage] = step + 1

    def flush(self) -> None:
        """Push the numbers to the disk, TensorBoard's too: call it beside every checkpoint."""
        if self._active:
            with self._writing():
                os.fsync(self._file.fileno())
                for events in self._events.values():
                    events.flush()

    def close(self) -> None:
        self._active = False
        if self._file is not None:
            self._file.close()
        for events in self._events.values():
            events.close()
        self._events.clear()
        for module in self._loggers:
            module.finish()
        self._loggers.clear()

    @contextlib.contextmanager
    def _writing(self):
        """Turn what the disk refuses into a UserError; then nothing more is written, and a half line is cut off by the next start."""
        try:
            yield
        except OSError as error:
            for part in (self._file, *self._events.values()):  # what is left in their buffers would be refused once more
                with contextlib.suppress(OSError):
                    part.close()
            self._events.clear()
            raise UserError(f"cannot write {self._path} or its TensorBoard events: {error.strerror or error}") from error

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _write_events(self, stage: str, step: int, numbers: dict) -> None:
        # TensorBoard's own writer: torch.utils.tensorboard costs another second of imports for the same file
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UserError(f"TensorBoard events were asked for, but {error.name} is missing: pip install tensorboard, or switch them off") from None
        now = time.time()
        if stage not in self._events:
            self._events[stage] = EventFileWriter(str(self._tensorboard_dir / stage), flush_secs=10)
            if stage in self._purge_steps:  # readers drop what earlier files of this stage hold from this step on
                start = SessionLog(status=SessionLog.START)
                self._events[stage].add_event(Event(step=max(0, self._purge_steps[stage]), wall_time=now, session_log=start))
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items() if value is not None])
        self._events[stage].add_event(Event(step=step, wall_time=now, summary=summary))


def _parse_lines(path: Path) -> list[tuple[bytes, dict]]:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["stage"], row["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a metrics line; wanted JSON with `stage` and `step`") from None
        parsed.append((line, row))
    return parsed


def _drop_half_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _as_number(name: str, value) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, int):
        return int(value) if isinstance(value, bool) else value
    if not isinstance(value, float):
        raise ValueError(f"MetricsWriter.write: {name} is {type(value).__name__}, wanted a number")
    return value if math.isfinite(value) else None
