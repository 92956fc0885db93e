"""The attack suite: programs that try to break out (attacks.toml), and what must be left as it was on the host afterwards."""

import contextlib
import os
import secrets
import socket
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from athanor.sandbox.box import Limits
from athanor.sandbox.pool import Sandbox

LIMITS = Limits(wall_s=15.0, cpu_s=5.0, memory_mb=256, output_kb=512, disk_mb=32, processes=12)
ENDLESS = replace(LIMITS, wall_s=1.5, cpu_s=1.0)  # for attacks that are right to end by timeout


@dataclass(frozen=True)
class Attack:
    name: str
    program: str
    language: str = "python"
    ends: tuple[str, ...] = ()  # statuses that are right; empty = any
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    attack: Attack
    status: str
    seconds: float  # wall clock, start of the sandbox and compiling included
    complaint: str  # what it reached, or ""


def attacks() -> list[Attack]:
    """All attacks, in the order of the file."""
    rows = tomllib.loads(Path(__file__).with_name("attacks.toml").read_text())["attack"]
    return [Attack(**{**row, "ends": tuple(row.get("ends", ()))}) for row in rows]


class Host:
    """What the attacks aim at: files in the home and the current folder, a secret in the environment, two listening sockets, this process.

    `complaints` says what an attack has changed out here: files, connections, processes that are left.
    """

    def __init__(self, stack: contextlib.ExitStack):
        self._secret = f"athanor-{secrets.token_hex(8)}"
        self._marker = str(10**6 + secrets.randbelow(10**6))
        self._files = []
        for folder in (os.path.expanduser("~"), os.getcwd()):
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".athanor-attack-", dir=folder))) / "secret"
            path.write_text(self._secret)
            self._files.append(path)
        os.environ["ATHANOR_ATTACK_SECRET"] = self._secret
        stack.callback(os.environ.pop, "ATHANOR_ATTACK_SECRET", None)
        self._tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._abstract.bind("\0" + self._secret)
        self._abstract.listen()
        for listener in (self._tcp, self._abstract):
            listener.setblocking(False)

    def aim(self, program: str) -> str:
        """The program with its targets filled in."""
        words = {
            "HOME_FILE": self._files[0],
            "RUN_FILE": self._files[1],
            "SECRET": self._secret,
            "MARKER": self._marker,
            "PORT": self._tcp.getsockname()[1],
            "PID": os.getpid(),
        }
        for word, value in words.items():
            program = program.replace(f"@{word}@", str(value))
        return program

    def leaked(self, text: str) -> bool:
        return "ESCAPED" in text or self._secret in text

    def complaints(self) -> list[str]:
        """What is not as it was."""
        found = [f"{path} was changed" for path in self._files if path.read_text() != self._secret]
        found += [f"{path.parent} has new files" for path in self._files if len(list(path.parent.iterdir())) != 1]
        for listener in (self._tcp, self._abstract):
            with contextlib.suppress(BlockingIOError):
                listener.accept()
                found.append("a connection came in")
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and self._marker.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                    found.append(f"process {folder.name} is left")
        return found


def run_attacks(sandbox: Sandbox, chosen: list[Attack]) -> Iterator[Outcome]:
    """Run attacks, several at a time, and after each see that the sandbox still works.  At the end one more outcome, for the host."""
    with contextlib.ExitStack() as stack:
        host = Host(stack)
        with ThreadPoolExecutor(sandbox.workers) as pool:
            yield from pool.map(lambda attack: _run(sandbox, host, attack), chosen)
        complaints = host.complaints()
        yield Outcome(Attack("the host is as it was", ""), "error" if complaints else "ok", 0.0, "; ".join(complaints))


def _run(sandbox: Sandbox, host: Host, attack: Attack) -> Outcome:
    began = time.monotonic()
    with sandbox.open(host.aim(attack.program), language=attack.language, limits=ENDLESS if "timeout" in attack.ends else LIMITS) as box:
        result = box.run()
    seconds = time.monotonic() - began
    complaint = ""
    if host.leaked(result.stdout) or (attack.language == "cpp" and result.status == "compile" and host.leaked(result.stderr.replace("ESCAPED", ""))):
        complaint = f"{result.stdout[:200]}{result.stderr[:200]}"
    elif attack.ends and result.status not in attack.ends:
        complaint = f"wanted {' or '.join(attack.ends)}; exit code {result.exit_code}, {(result.stderr.strip() or result.stdout)[-200:]}"
    elif sandbox.run("print(6 * 7)").stdout != "42\n":
        complaint = "the sandbox does not work any more"
    return Outcome(attack, result.status, seconds, complaint)
