"""What a sandboxed process is: the bubblewrap command, its user mapping, and whether this machine allows it.

Fresh user, pid, mount, network, ipc, uts and cgroup namespaces for every program; a read-only root that holds the system's /usr (and /bin, /lib*),
the interpreter's own folder as /python and nothing else of the host - no /etc but the linker's cache, no /home, no /sys, five device nodes; a /tmp
and a /dev/shm of limited size; no capability; no_new_privs; the filter of seccomp.py.

Memory is bounded by an address-space limit per process and by watching the sum of all ten times a second; no cgroup is used, so what the kernel keeps
for a program (inodes, pipe buffers) is bounded only by time.  What a program can learn: the machine's CPU, memory and kernel figures in /proc, what
is installed in /usr, and in /proc/self/mountinfo the host paths that /usr and /python were bound from.

Started by root, the sandbox maps two users: the launcher's (root outside, with three capabilities inside its own namespace) and the programs', 65534,
because the kernel exempts root from its limit on processes.  Started by anyone else, it maps that user alone.
"""

import contextlib
import functools
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile

from athanor.sandbox.seccomp import MACHINES, filter_program

PROGRAM_USER = 65534
_MIN_VERSION = (0, 8)
_START_S = 60  # a sandbox that is not up by then has failed; a loaded machine takes a second
_DEVICES = ("null", "zero", "full", "random", "urandom")


class SandboxError(RuntimeError):
    """The sandbox itself failed: nothing is known about the program, which therefore has no score."""


def why_unavailable() -> str | None:
    """Why no program can be isolated here, with what to do about it; None where it can.  Looks only; `Sandbox` also tries it out."""
    if sys.platform != "linux":
        return f"isolation needs Linux namespaces, this is {platform.system()}"
    if os.uname().machine not in MACHINES:
        return f"no system-call filter for {os.uname().machine}, only for {', '.join(MACHINES)}"
    if not os.path.exists("/proc/thread-self/children"):
        return "the kernel tells no children of a process (CONFIG_PROC_CHILDREN), so the memory of a whole program cannot be limited"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed: apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora)"
    version = _bwrap_version()
    if version < _MIN_VERSION:
        return f"bubblewrap is {'.'.join(map(str, version))}, wanted {'.'.join(map(str, _MIN_VERSION))} or newer (it limits the size of /tmp)"
    return None


@functools.lru_cache(maxsize=1)
def _bwrap_version() -> tuple[int, ...]:
    text = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=10).stdout
    return tuple(int(part) for part in re.findall(r"\d+", text))


@functools.lru_cache(maxsize=1)
def _interpreter() -> tuple[str, str]:
    """Path of this interpreter's binary and of the folder that it belongs to, outside any virtual environment."""
    binary = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return binary, os.path.realpath(sys.base_prefix)


def interpreter_command(isolated: bool) -> list[str]:
    """The interpreter as it is called inside: no site-packages, no environment variables, no user folder, UTF-8."""
    binary, prefix = _interpreter()
    if isolated and not prefix.startswith("/usr"):
        binary = "/python/" + os.path.relpath(binary, prefix)
    return [binary, "-I", "-S", "-B", "-X", "utf8"]


def bwrap_command(disk_mb: int, packages: tuple[str, ...], info_fd: int, block_fd: int, seccomp_fd: int) -> list[str]:
    """The command line up to the interpreter's.  packages: folders that become /packages/0, /packages/1 ..., read only."""
    command = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "sandbox", "--clearenv"]
    for name, value in (("PATH", "/usr/bin:/bin"), ("HOME", "/tmp"), ("LANG", "C.UTF-8"), ("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")):
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib64", "lib32"):
        if os.path.islink(f"/{name}"):
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    command += ["--perms", "0755", "--dir", "/etc"]
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        command += ["--ro-bind-try", path, path]
    prefix = _interpreter()[1]
    if not prefix.startswith("/usr"):
        command += ["--ro-bind", prefix, "/python", "--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    for i, folder in enumerate(packages):
        command += ["--ro-bind", folder, f"/packages/{i}"]
    for path in sorted({os.path.realpath(os.path.expanduser("~")), os.getcwd()}):
        if path.startswith("/usr/"):  # a project checked out below /usr is none of the program's business
            command += ["--tmpfs", path, "--remount-ro", path]
    command += ["--perms", "0755", "--dir", "/dev"]
    for name in _DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        command += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    size = str(disk_mb << 20)
    command += ["--symlink", "/proc/self/fd", "/dev/fd", "--proc", "/proc"]
    command += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp", "--perms", "1777", "--size", size, "--tmpfs", "/dev/shm"]
    command += ["--remount-ro", "/", "--chdir", "/tmp", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            command += ["--cap-add", capability]
    return command + ["--info-fd", str(info_fd), "--userns-block-fd", str(block_fd), "--seccomp", str(seccomp_fd)]


class Process:
    """A running interpreter that executes `script`: isolated, or merely a process of its own in a scratch folder (isolated=False).

    `channel_in` (to write) and `channel_out` (to read) are non-blocking pipes to it.  `init_pid` is its number out here.  Raises SandboxError when
    it cannot be started.  The thread that starts an isolated process has to outlive it: the kernel ends it with that thread.
    """

    def __init__(self, script: str, *, isolated: bool, disk_mb: int, packages: tuple[str, ...]):
        self._process = None
        self._pidfd = None
        self._files = contextlib.ExitStack()
        self._stderr = self._files.enter_context(tempfile.TemporaryFile())
        inside = [*interpreter_command(isolated), "-c", script]
        try:
            if isolated:
                self._start_isolated(inside, disk_mb, packages)
            else:
                folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="athanor-", ignore_cleanup_errors=True))
                environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
                self._open(inside, cwd=folder, env=environment, start_new_session=True)
                self.init_pid = self._process.pid
                self._pidfd = os.pidfd_open(self.init_pid)
        except BaseException as error:
            self.end()
            if isinstance(error, OSError):
                raise SandboxError(f"sandbox: cannot start: {error}") from error
            raise
        self.channel_in, self.channel_out = self._process.stdin.fileno(), self._process.stdout.fileno()
        for fd in (self.channel_in, self.channel_out):
            os.set_blocking(fd, False)

    def _open(self, command, **how):
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0, **how)

    def _start_isolated(self, inside, disk_mb, packages):
        with contextlib.ExitStack() as pipes:
            info, block, seccomp = (_pipe(pipes) for _ in range(3))
            with seccomp[1] as end:
                end.write(filter_program(os.uname().machine))
            given = [info[1], block[0], seccomp[0]]
            numbers = [pipe.fileno() for pipe in given]
            command = bwrap_command(disk_mb, packages, *numbers)
            self._open([*command, "--", *inside], pass_fds=numbers)
            for pipe in given:
                pipe.close()
            self.init_pid = _read_init_pid(info[0])
            if self.init_pid is None:
                raise SandboxError(f"sandbox: bubblewrap did not start: {self.complaint() or 'no message'}")
            self._pidfd = os.pidfd_open(self.init_pid)  # it waits for its user mapping, so this number is still its own
            _map_users(self.init_pid)
            block[1].write(b"1")

    def complaint(self) -> str:
        """What bubblewrap or the interpreter has said on stderr, at most 1,000 characters.  Waits up to a second for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._stderr.seek(0)
        return self._stderr.read(1000).decode(errors="replace").strip()

    def end(self) -> None:
        """Kill everything inside and wait until it is gone.  Safe to call twice."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
        elif self._process is not None:
            self._process.kill()
        if self._process is not None:
            try:
                self._process.wait(_START_S)  # bubblewrap ends when process 1 has, and that when all others have
            finally:
                self._process.kill()
                self._process.stdin.close()
                self._process.stdout.close()
        self._process = self._pidfd = None
        self._files.close()


def _pipe(stack: contextlib.ExitStack) -> tuple:
    return tuple(stack.enter_context(open(fd, mode, buffering=0)) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))


def _read_init_pid(info) -> int | None:
    """Process 1's number as bubblewrap tells it in JSON; None when it ends without a word."""
    text = b""
    poll = select.poll()
    poll.register(info, select.POLLIN)
    while poll.poll(_START_S * 1000):
        part = info.read(4096)
        text += part
        with contextlib.suppress(ValueError):
            return json.loads(text)["child-pid"]
        if not part:
            break
    return None


def _map_users(pid: int) -> None:
    """Write the user mapping that bubblewrap waits for (see the module)."""
    for name, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        lines = f"{own} {own} 1\n"
        if os.geteuid() == 0:
            lines = f"0 {own} 1\n{PROGRAM_USER} {PROGRAM_USER} 1\n"
        elif name == "gid":
            _write(f"/proc/{pid}/setgroups", "deny")
        _write(f"/proc/{pid}/{name}_map", lines)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def resident_mb(init_pid: int) -> float:
    """Memory of a process and all its descendants in MB, pages that they share counted once.  0 for a process that is gone."""
    pids, kilobytes = [init_pid], 0
    for pid in pids:  # grows while it is walked
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    pids += [int(child) for child in file.read().split()]
            with open(f"/proc/{pid}/smaps_rollup") as file:
                kilobytes += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return kilobytes / 1024
