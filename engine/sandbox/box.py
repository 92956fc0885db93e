"""One sandbox around one program: open it, run the program on inputs, close it.  The host's half of launcher.py's conversation."""

import marshal
import os
import select
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from athanor.errors import UserError
from athanor.sandbox.isolation import PROGRAM_USER, Process, SandboxError, resident_mb

LANGUAGES = ("python", "cpp")
COMPILER = "/usr/bin/g++"
_HERE = Path(__file__).parent
# The interpreter inside is this one's base, so code travels compiled: that saves 10 ms of the 30 that a short program takes.
_BOOTSTRAP = """
import marshal, os
def read(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data
for code in marshal.loads(read(int.from_bytes(read(4), "little"))):
    exec(code)
"""
_GRACE_S = 5.0  # beyond a program's wall-clock limit, for what the launcher does around it
_START_S = 60.0
_WATCH_S = 0.1
_MAX_MESSAGE_BYTES = 8 << 20  # of a check's frames


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use."""

    wall_s: float = 10.0
    """Wall-clock seconds."""
    cpu_s: float = 5.0
    """CPU seconds of its first process, waited-for children included; the wall clock bounds the others."""
    memory_mb: int = 512
    """Address space of each process, and resident memory of all of them together, in MB (2**20 bytes)."""
    output_kb: int = 1024
    """Largest file that it may write, stdout and stderr included, in kB (1,024 bytes)."""
    disk_mb: int = 64
    """Size of /tmp and of /dev/shm, each, in MB.  Fixed when the sandbox is opened; inputs and outputs lie in /tmp too."""
    processes: int = 16
    """Processes and threads at a time."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 < value < 2**31:
                raise UserError(f"sandbox limits: {name} is {value}, wanted more than 0")
        if self.memory_mb < 32:
            raise UserError(f"sandbox limits: memory_mb is {self.memory_mb}, wanted at least 32: the interpreter itself takes most of that")


COMPILE_LIMITS = Limits(wall_s=60, cpu_s=30, memory_mb=2048, output_kb=32 * 1024)


@dataclass(frozen=True)
class Result:
    """How one run ended."""

    status: str
    """"ok" (exit status 0), "error" (any other end), "timeout", "memory", "output" (too much of it) or "compile" (C++ that does not compile)."""
    stdout: str
    stderr: str
    exit_code: int | None
    """Exit status, minus the signal's number after a signal, None where the whole sandbox was ended."""
    seconds: float
    """Wall clock, without the start of the sandbox."""
    cpu_seconds: float


@lru_cache(maxsize=2)
def _code(with_values: bool) -> bytes:
    names = ("values.py", "launcher.py") if with_values else ("launcher.py",)
    return marshal.dumps([compile((_HERE / name).read_text(), name, "exec", dont_inherit=True) for name in names])


class Box:
    """A sandbox that holds one program.  Not for several threads at once; close it in the thread that opened it.

    entry: name of a function: `run` then takes packed (args, kwargs) and stdout is the packed outcome (values.py); without it, `run` takes stdin.
    preload: trusted Python text, run once before the first program: what it imports is there in every run.
    check: (setup, test, entry) makes it a checker instead: see `next_message`.
    """

    def __init__(self, program, *, language, limits, isolated, packages=(), entry=None, preload="", check=None):
        self.limits = limits
        self._compiled: Result | None = None
        self._process = Process(_BOOTSTRAP, isolated=isolated, disk_mb=limits.disk_mb, packages=packages)
        self._poll_in, self._poll_out = select.poll(), select.poll()
        self._poll_in.register(self._process.channel_in, select.POLLOUT)
        self._poll_out.register(self._process.channel_out, select.POLLIN)
        try:
            self._isolated = isolated
            job = {
                "source": program,
                "language": language,
                "entry": entry,
                "preload": preload,
                "check": check,
                "packages": [f"/packages/{i}" for i in range(len(packages))] if isolated else list(packages),
                "isolated": isolated,
                "user": PROGRAM_USER if isolated and os.geteuid() == 0 else None,
                "unset": ["LD_LIBRARY_PATH"],
                "limits": self._plain(limits),
                "compiler": COMPILER,
                "compile_limits": self._plain(replace(COMPILE_LIMITS, disk_mb=limits.disk_mb)),
            }
            deadline = time.monotonic() + _START_S
            self.send(_code(entry is not None or check is not None), deadline)
            self.send(marshal.dumps(job), deadline)
            if self.receive(16, deadline) != b"ready":
                raise SandboxError(f"sandbox: did not come up: {self._process.complaint() or 'no message'}")
            if language == "cpp":
                result = self._answer(COMPILE_LIMITS)
                self._compiled = None if result.status == "ok" else replace(result, status="compile")
        except BaseException:
            self.close()
            raise

    def _plain(self, limits: Limits) -> dict:
        kept_kb = min(limits.output_kb, self.limits.output_kb)
        return asdict(limits) | {"output_kb": kept_kb, "file_kb": limits.output_kb, "processes": limits.processes if self._isolated else 0}

    def run(self, stdin: str = "", limits: Limits | None = None) -> Result:
        """Run the program once.  limits: those of this run; disk_mb stays as it is.  Raises SandboxError when the sandbox fails."""
        if self._compiled is not None:
            return self._compiled
        limits = limits or self.limits
        deadline = time.monotonic() + limits.wall_s + _GRACE_S
        try:
            self.send(marshal.dumps(self._plain(limits)), deadline)
            self.send(stdin.encode(errors="surrogateescape"), deadline)
        except TimeoutError:
            raise SandboxError("sandbox: takes no input any more") from None
        return self._answer(limits)

    def _answer(self, limits: Limits) -> Result:
        began = time.monotonic()
        try:
            frame = self.receive(2 * (limits.output_kb << 10) + 200, began + limits.wall_s + _GRACE_S, watch_mb=limits.memory_mb)
        except (TimeoutError, MemoryError) as error:
            self.close()
            seconds = time.monotonic() - began
            return Result("timeout" if isinstance(error, TimeoutError) else "memory", "", "", None, seconds, seconds)
        if frame is None:
            raise SandboxError("sandbox: ended in the middle of a run")
        return _result(frame, limits)

    def next_message(self, deadline: float) -> bytes:
        """Next frame of a checker: b"call" + packed (args, kwargs), to be answered by `send`, or a verdict.  Raises TimeoutError, SandboxError."""
        frame = self.receive(_MAX_MESSAGE_BYTES, deadline)
        if frame is None:
            raise SandboxError("sandbox: a checker ended without a verdict")
        return frame

    def send(self, body: bytes, deadline: float) -> None:
        """Write one frame.  Raises TimeoutError at the deadline (time.monotonic()) and SandboxError when nobody reads."""
        if self._process is None:
            raise SandboxError("sandbox: is closed")
        data = memoryview(len(body).to_bytes(4, "little") + body)
        while data:
            if not self._poll_in.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            try:
                data = data[os.write(self._process.channel_in, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise SandboxError(f"sandbox: has ended: {self._process.complaint() or 'no message'}") from None

    def receive(self, max_bytes: int, deadline: float, watch_mb: float | None = None) -> bytes | None:
        """Read one frame; None when the other side has hung up.

        Raises TimeoutError at the deadline, MemoryError when all processes together hold more than `watch_mb`, SandboxError on a frame that the
        launcher cannot have sent.
        """
        data, size = b"", None
        parts: list[bytes] = []
        missing = 4
        while missing:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not self._poll_out.poll(min(left, _WATCH_S if watch_mb else left) * 1000):
                if watch_mb and resident_mb(self._process.init_pid) > watch_mb:
                    raise MemoryError
                continue
            data = os.read(self._process.channel_out, min(missing, 1 << 20))
            if not data:
                return None
            parts.append(data)
            missing -= len(data)
            if not missing and size is None:
                size = missing = int.from_bytes(b"".join(parts), "little")
                parts = []
                if size > max_bytes:
                    raise SandboxError(f"sandbox: a frame of {size} bytes, wanted at most {max_bytes}")
        return b"".join(parts)

    def close(self) -> None:
        """End everything inside.  Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _result(frame: bytes, limits: Limits) -> Result:
    head, _, body = frame.partition(b"\n")
    try:
        status, timed_out, wall_us, cpu_us, _, num_out, num_err = (int(number) for number in head.split())
    except ValueError:
        raise SandboxError(f"sandbox: an answer that begins with {head[:80]!r}") from None
    stdout, stderr = body[:num_out].decode(errors="replace"), body[num_out : num_out + num_err].decode(errors="replace")
    exit_code = None if status < 0 else os.waitstatus_to_exitcode(status & 0xFFFF)
    cpu = cpu_us / 1e6
    if timed_out or cpu > limits.cpu_s:
        kind = "timeout"
    elif max(num_out, num_err) >= limits.output_kb << 10:
        kind = "output"
    elif exit_code == 0:
        kind = "ok"
    elif any(sign in stderr[-1000:] for sign in ("MemoryError", "std::bad_alloc")):
        kind = "memory"
    else:
        kind = "error"
    return Result(kind, stdout, stderr, exit_code, wall_us / 1e6, cpu)
