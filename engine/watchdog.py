"""Where a run is, and how long each phase of it may take: a run that hangs says where and ends, so that torchrun can start it again.

    with phase("rollout") as alive:      # or phase("collective", "sum_int")
        ...
        alive()                          # something has come out: the deadline begins anew

Naming phases costs nothing and needs no watchdog.  With a `Watchdog` running, a phase that is older than its deadline ends the process: rank, stage,
step, phase and operation on stderr, the stacks of all threads, exit status 3.  The thread needs the interpreter; should that be stuck in native code,
faulthandler's own timer prints the stacks and ends the process half a minute later.  An exception that leaves a phase carries the same facts as a
note.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

EXIT_STATUS = 3
GRACE_S = 30.0
STDERR = 2  # the descriptor: sys.stderr may have been replaced, and its lock may be held by what hangs


@dataclass(eq=False)
class _Phase:
    name: str
    operation: str
    since: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        self.since = time.monotonic()


@dataclass
class _Place:
    rank: int = 0
    world: int = 1
    stage: str = ""
    step: int = 0
    last_collective: str = ""


_place, _phases = _Place(), []  # innermost last


def at(stage: str, step: int = 0) -> None:
    """Note the stage and its 1-based step, 0 before the first."""
    _place.stage, _place.step = stage, step


@contextlib.contextmanager
def phase(name: str, operation: str = "") -> Iterator[Callable[[], None]]:
    """Name what the block does, one of the deadlines' names; yields what starts its deadline anew."""
    entered = _Phase(name, operation)
    _phases.append(entered)
    if name == "collective":
        _place.last_collective = operation
    try:
        yield entered.restart
    except Exception as error:
        note(error)
        raise
    finally:
        _phases.remove(entered)  # not always the last: an abandoned generator leaves its phase late


def note(error: Exception) -> None:
    """Add to an exception where the run was, unless it tells already."""
    if not getattr(error, "__notes__", None):
        error.add_note(where())


def where() -> str:
    """Rank, stage, step, phases and collective, in one line."""
    parts = [f"rank {_place.rank} of {_place.world}", f"stage {_place.stage or '-'}", f"step {_place.step}"]
    parts += [f"phase {entered.name}" + (f" ({entered.operation})" if entered.operation else "") for entered in _phases]
    return ", ".join([*parts, f"last collective {_place.last_collective or '-'}"])


class Watchdog:
    """Ends the process when a phase is older than its deadline.  deadlines_s: seconds by name of phase.  `stop` it at the end."""

    def __init__(self, deadlines_s: dict[str, float], rank: int, world: int):
        self.deadlines_s = deadlines_s
        _place.rank, _place.world = rank, world
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

        self._look()
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, min(self.deadlines_s.values()) / 4)):
            self._look()

    def _look(self) -> None:
        """End the process if a phase is too old; else set the timer that does it when nobody looks any more."""
        ends = [(entered.since + self.deadlines_s[entered.name], entered) for entered in list(_phases)]
        now = time.monotonic()
        left_s = max(self.deadlines_s.values())  # a phase that is entered before the next look has at most this
        if ends:
            end, entered = min(ends, key=lambda item: item[0])
            if (left_s := end - now) < 0:
                _end_process(entered, now - entered.since, self.deadlines_s[entered.name])
        faulthandler.dump_traceback_later(left_s + GRACE_S, exit=True, file=STDERR)


def _end_process(entered: _Phase, seconds: float, deadline_s: float) -> None:
    line = f"watchdog: {seconds:.0f} s in phase {entered.name}, deadlines.{entered.name}_s is {deadline_s:g}; {where()}; exit status {EXIT_STATUS}\n"
    os.write(STDERR, line.encode())
    faulthandler.dump_traceback(file=STDERR, all_threads=True)
    os._exit(EXIT_STATUS)
