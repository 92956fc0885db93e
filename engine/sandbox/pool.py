"""Sandboxes for several threads: how many at a time, whether this machine can isolate at all, and the two ways to use one."""

import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from athanor.errors import UserError
from athanor.sandbox.box import COMPILER, LANGUAGES, Box, Limits, Result
from athanor.sandbox.isolation import SandboxError, why_unavailable

# Run once per process before anything else: a sandbox that does not hold what it promises is not used.
_PROBE = """
import _socket, os, time

def network():
    _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)

def processes():
    for _ in range(12):
        if os.fork() == 0:
            time.sleep(60)

def files():
    open("/probe", "w")

def refused(attempt):
    try:
        attempt()
    except OSError:
        return True

ways = [attempt.__name__ for attempt in (network, processes, files) if not refused(attempt)]
ways += [path for path in ("/home", "/root", "/etc/passwd", "/sys") if os.path.exists(path)]
ways += ["the host's processes"] if os.getpid() > 20 else []
print(", ".join(ways))
"""


@functools.lru_cache(maxsize=1)
def _why_not() -> str | None:
    reason = why_unavailable()
    if reason:
        return reason
    try:
        with Box(_PROBE, language="python", limits=Limits(processes=4), isolated=True) as box:
            result = box.run()
    except SandboxError as error:
        return (
            f"{error}; the kernel has to allow user namespaces to bubblewrap: sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile for bwrap; in a container, --security-opt seccomp=unconfined"
        )
    if result.status != "ok":
        return f"the trial program ended with {result.status}: {(result.stderr or result.stdout)[-300:]}"
    return f"the trial program could reach: {result.stdout.strip()}" if result.stdout.strip() else None


def why_not() -> str | None:
    """Why programs cannot be isolated on this machine; None where they can.  Tries it out once per process (some 0.1 s)."""
    return _why_not()


@dataclass(frozen=True)
class Checked:
    """Outcome of `Sandbox.check`."""

    status: str
    """"pass", "fail", "timeout", or "unusable": the test itself cannot be loaded."""
    detail: str
    num_calls: int
    last: Result | None
    """How the program's last call ended."""


class Sandbox:
    """Runs untrusted programs, each in a sandbox of its own (isolation.py says what that is).  Safe to call from several threads; may be pickled.

    workers: sandboxes at a time; callers beyond that wait, and waiting counts into no limit.  0 = one per usable CPU core.
    packages: folders of importable Python packages, read only for the programs.  What lies in them can be read by the programs.
    unsafe: where this machine cannot isolate, go on with resource limits alone.  Raises UserError there otherwise.
    """

    def __init__(self, *, limits: Limits | None = None, workers: int = 0, packages: tuple[str, ...] = (), unsafe: bool = False):
        if workers < 0:
            raise UserError(f"sandbox: workers is {workers}, wanted at least 0")
        for folder in packages:
            if not Path(folder).is_dir():
                raise UserError(f"sandbox: packages names {folder!r}, which is no folder")
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self.packages = tuple(os.path.realpath(folder) for folder in packages)
        self.unsafe = unsafe
        reason = why_not()
        if reason and not unsafe:
            raise UserError(
                f"sandbox: cannot isolate programs here: {reason}.  To run them all the same, with this user's rights and resource limits alone, "
                "pass unsafe=True (reward code: unsafe = true)"
            )
        if reason:
            warnings.warn(f"sandbox: programs run WITHOUT isolation (unsafe=True): {reason}", stacklevel=2)
        self.isolated = reason is None
        self._slots = threading.BoundedSemaphore(self.workers)

    def __reduce__(self):
        return functools.partial(Sandbox, limits=self.limits, workers=self.workers, packages=self.packages, unsafe=self.unsafe), ()

    def run(self, program: str, *, language: str = "python", stdin: str = "", limits: Limits | None = None) -> Result:
        """Run a program once.  Raises SandboxError when the sandbox itself fails, never because of what the program does."""
        with self.open(program, language=language, limits=limits) as box:
            return box.run(stdin)

    @contextlib.contextmanager
    def open(
        self, program: str, *, language: str = "python", limits: Limits | None = None, entry: str | None = None, preload: str = ""
    ) -> Iterator[Box]:
        """A sandbox with a program, to run it on several inputs: C++ is compiled once, and each run is a fresh process (see Box).

        Files that a run leaves in /tmp are there in the next one; processes are not.
        """
        if language not in LANGUAGES:
            raise UserError(f"sandbox: language is {language!r}, wanted one of {', '.join(LANGUAGES)}")
        if language == "cpp" and not os.path.exists(COMPILER):
            raise UserError(f"sandbox: {COMPILER} is missing, so no C++ can be run: apt-get install g++")
        if entry is not None and language != "python":
            raise UserError(f"sandbox: entry calls a Python function, the language is {language!r}")
        with self._slots, self._box(program, language, limits, entry=entry, preload=preload) as box:
            yield box

    def _box(self, program, language, limits, **how) -> Box:
        return Box(program, language=language, limits=limits or self.limits, isolated=self.isolated, packages=self.packages, **how)

    def check(self, program: str, *, setup: str, test: str, entry: str, limits: Limits | None = None, total_s: float = 60.0) -> Checked:
        """Run a test of the form check(candidate) against a program's function `entry`, as HumanEval has them.

        The test runs in a sandbox of its own, where `candidate` stands for a call that leaves as data, runs in the program's sandbox in a fresh
        process and comes back as data, rebuilt from plain types.  So the program can neither see nor change the assertions, nor answer with an
        object that equals everything.  What this costs: functions and other objects cannot be passed, an argument that the program changes in
        place is not changed for the test, and the program keeps no state from call to call.

        setup: code before the test, such as the stub with its helper functions.  limits: per call.  total_s: wall-clock seconds of the whole test.
        """
        limits = limits or self.limits
        parts = {"setup": setup, "test": test, "entry": entry}
        num_calls, last = 0, None
        with (
            self._slots,
            self._box(program, "python", limits, entry=entry) as candidate,
            self._box("", "python", Limits(cpu_s=total_s, wall_s=total_s), check=parts) as checker,
        ):
            deadline = time.monotonic() + total_s
            while True:
                try:
                    message = checker.next_message(deadline)
                except TimeoutError:
                    return Checked("timeout", f"the test took more than {total_s:g} s", num_calls, last)
                if not message.startswith(b"call"):
                    status, _, detail = message.decode(errors="replace").partition(" ")
                    return Checked(status, detail, num_calls, last)
                num_calls += 1
                last = candidate.run(message[4:].decode())
                if last.status != "ok":
                    return Checked("timeout" if last.status == "timeout" else "fail", _why(last), num_calls, last)
                with contextlib.suppress(TimeoutError):
                    checker.send(last.stdout.encode(), deadline)


def _why(result: Result) -> str:
    return f"{result.status}: {(result.stderr.strip().splitlines() or [f'exit code {result.exit_code}'])[-1][:300]}"
