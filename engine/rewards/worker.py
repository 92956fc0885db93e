"""The processes that judge text which can hang, crash or fill the memory: a template, and workers that it forks.

The template is a fresh interpreter with one thread and no CUDA, so forking it is safe and takes milliseconds; it imports what workers need once.
It takes commands over a socket: `fork` comes with a worker's socket, `reap` ends a worker and tells how it died.  A worker reads one job at a time
and answers with JSON, so that nothing which a worker says is executed by the trainer.

What holds a worker:
- processor time of one job: ITIMER_PROF, whose signal ends the process even inside C code;
- address space, no core files, no files written (RLIMIT_AS, RLIMIT_CORE, RLIMIT_FSIZE);
- an audit hook that refuses to start programs, open sockets, write files and load libraries.  It keeps accidents away and is no sandbox: programs
  run in the sandbox alone;
- threads of numeric libraries: one (set by the pool);  hash seed: fixed, so sympy orders its sets the same way everywhere;
- the parent's death: the template sees its socket close, a worker is told by the kernel (PR_SET_PDEATHSIG).
"""

import ctypes
import gc
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys

from athanor.rewards.base import judge

_HEADER = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1
_REFUSED = frozenset(
    "os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn os.kill os.remove os.rename os.rmdir os.mkdir os.truncate os.chmod os.chown "
    "os.link os.symlink subprocess.Popen socket.connect socket.bind socket.__new__ shutil.rmtree pty.spawn ctypes.dlopen".split()
)


def send_frame(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_HEADER.pack(len(data)) + data)


def receive_frame(connection: socket.socket, max_bytes: int = 1 << 30) -> bytes | None:
    """One message, None where the other side is gone.  Raises TimeoutError as the socket's timeout says, ValueError for an absurd length."""
    head = _receive(connection, _HEADER.size)
    if head is None:
        return None
    size = _HEADER.unpack(head)[0]
    if size > max_bytes:
        raise ValueError(f"a message of {size} bytes, wanted at most {max_bytes}")
    return _receive(connection, size)


def _receive(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        try:
            part = connection.recv(min(size, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def template_main(fd: int) -> None:
    """Import what workers need, then fork and reap them until the parent is gone."""
    parent = os.getppid()
    control = socket.socket(fileno=fd)
    settings = json.loads(receive_frame(control) or b"{}")
    sys.path[:] = settings["path"]
    try:
        import logging

        logging.disable(logging.CRITICAL)  # libraries that cannot parse a text say so to nobody
        for name in settings["preload"]:
            getattr(importlib.import_module(name), "warm_up", int)()
    except Exception as error:
        send_frame(control, json.dumps({"error": f"{type(error).__name__}: {error}", "missing": getattr(error, "name", None)}).encode())
        return
    gc.collect()
    gc.freeze()  # the collector does not touch, hence not copy, what workers share
    send_frame(control, b"{}")
    control.settimeout(1.0)
    workers: set[int] = set()
    while os.getppid() == parent:
        try:
            command, fds, _, _ = socket.recv_fds(control, 64, 1)
        except TimeoutError:
            continue
        if not command:
            return
        word, _, argument = command.decode().partition(" ")
        if word == "fork":
            pid = os.fork()
            if pid == 0:
                control.close()
                _worker_main(socket.socket(fileno=fds[0]), settings["memory_bytes"])
            os.close(fds[0])
            workers.add(pid)
            send_frame(control, json.dumps({"pid": pid}).encode())
            continue
        pid, cause = int(argument), signal.SIGKILL
        if pid in workers:  # otherwise another template's, which has taken it along
            workers.remove(pid)
            os.kill(pid, signal.SIGKILL)  # a process that is dying already keeps its own cause
            _, status = os.waitpid(pid, 0)
            cause = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        send_frame(control, json.dumps({"signal": cause}).encode())


def _worker_main(connection: socket.socket, memory_bytes: int) -> None:
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
            resource.setrlimit(limit, (value, value))
        sys.addaudithook(_refuse)
        while (frame := receive_frame(connection)) is not None:
            cpu_s, reward, sample, problem = pickle.loads(frame)
            send_frame(connection, _judge(cpu_s, reward, sample, problem))
        code = 0
    finally:
        os._exit(code)


def _judge(cpu_s: float, reward, sample, problem) -> bytes:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        outcome = judge(reward, sample, problem)
        return json.dumps([outcome.status, outcome.value, outcome.message]).encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _refuse(event: str, arguments: tuple) -> None:
    if event in _REFUSED or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        raise PermissionError(f"a reward worker refuses {event}")
