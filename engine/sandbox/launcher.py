"""Process 1 of a sandbox: runs one program again and again, each time in a fresh child, on inputs that come from outside.  Never imported.

box.py sends it, compiled, to the interpreter inside the sandbox, after values.py where values travel.  Frames are a 4-byte little-endian length and a
body; descriptor 0 brings marshalled jobs (from us, so they can be trusted), descriptor 1 takes raw answers (which nobody outside trusts beyond their
length).

Once the program has run, nothing in this sandbox is trusted: no expected output, no other program's data and no verdict is ever in it.  What protects
this process nevertheless, so that a program cannot end it and look like a defect of the machine: it is process 1 of its namespace (signals from
inside do not reach it), it is not dumpable (/proc/1/mem and ptrace are closed), and started by root it runs under another user than its programs.
"""

import _ctypes
import _signal
import builtins
import marshal
import os
import resource
import select
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_SIGINT, _SIGKILL, _SIGPIPE, _SIGXFSZ = 2, 9, 13, 25


def _prctl(option, value):
    _ctypes.call_function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl"), (option, value, 0, 0, 0))


def _read_exactly(fd, size):
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            os._exit(0)  # the other side is gone
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(fd):
    return _read_exactly(fd, int.from_bytes(_read_exactly(fd, 4), "little"))


def send(fd, body):
    data = memoryview(len(body).to_bytes(4, "little") + body)
    while data:
        data = data[os.write(fd, data) :]


def limit(limits, cpu_s):
    """Set the resource limits of the calling process; its children inherit them."""
    space = limits["memory_mb"] << 20
    cpu = int(cpu_s) + 1  # whole seconds; the exact time is compared outside
    for name, soft, hard in (
        ("AS", space, space),
        ("STACK", min(space, 64 << 20), min(space, 64 << 20)),
        ("CPU", cpu, cpu + 1),
        ("FSIZE", limits["file_kb"] << 10, limits["file_kb"] << 10),
        ("NOFILE", 256, 256),
        ("CORE", 0, 0),
        ("MEMLOCK", 0, 0),
        ("MSGQUEUE", 0, 0),
        ("SIGPENDING", 256, 256),
    ):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (soft, hard))
    if limits["processes"]:  # 0: not isolated, where the limit would count every process of the user
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"] + 1,) * 2)  # this process counts too


def become(user):
    """Leave the launcher's user for good, where there is another one to go to."""
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def _scratch_file(flags=0):
    return os.open(os.getcwd(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | flags, 0o666)


def _in_child(job, limits, files, body):
    """Fork a child that runs `body` with `files` as its first three descriptors.  Returns its pid and a descriptor that tells of its end."""
    pid = os.fork()
    if pid:
        return pid, os.pidfd_open(pid)
    try:
        os.setsid()
        for fd, source in enumerate(files):
            os.dup2(source, fd)
        os.closerange(3, 256)
        os.umask(0o022)
        for number in (_SIGPIPE, _SIGXFSZ):  # Python ignores these two, and what it executes would inherit that
            _signal.signal(number, _signal.SIG_DFL)
        if not job["isolated"]:
            _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        become(job["user"])
        limit(limits, limits["cpu_s"])
        body()
    except BaseException as error:
        os.write(2, f"sandbox: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


def _end_all(pid):
    """Kill the child and whatever it has left behind.  Process 1 sees every process of its namespace as its own child in the end."""
    try:
        os.kill(-1, _SIGKILL) if os.getpid() == 1 else os.killpg(pid, _SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _run_child(job, limits, data, body):
    """Run `body` in a child on `data`.  Returns the frame: status, timed out, wall and CPU time in us, peak memory in kB, sizes; stdout; stderr."""
    # outputs are files, so their size is limited; appended to, so that /dev/stdout opened anew writes behind what is there, as into a pipe
    files = [_scratch_file(), _scratch_file(os.O_APPEND), _scratch_file(os.O_APPEND)]
    try:
        written = 0
        while written < len(data):
            written += os.write(files[0], memoryview(data)[written:])
        os.lseek(files[0], 0, 0)
        began = time.monotonic()
        pid, pidfd = _in_child(job, limits, files, body)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        timed_out = not poll.poll(limits["wall_s"] * 1000)
        wall = time.monotonic() - began
        os.close(pidfd)
        _end_all(pid)
        _, status, usage = os.wait4(pid, 0)
        while os.getpid() == 1:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        outputs = [os.pread(fd, limits["output_kb"] << 10, 0) for fd in files[1:]]
    finally:
        for fd in files:
            os.close(fd)
    numbers = (status, timed_out, wall * 1e6, (usage.ru_utime + usage.ru_stime) * 1e6, usage.ru_maxrss, len(outputs[0]), len(outputs[1]))
    return b"".join([" ".join(str(int(number)) for number in numbers).encode() + b"\n", *outputs])


def _load(source, name):
    """Run the program as the module `name`, with exit() and quit() as `site` would give them."""
    builtins.exit = builtins.quit = sys.exit
    module = type(sys)(name)
    module.__file__ = "program.py"
    module.__builtins__ = builtins
    sys.modules[name] = module
    sys.argv = ["program.py"]
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, closefd=False) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module


def _python_body(job):
    def body():
        code = 0
        try:
            _load(job["source"], "__main__")
        except SystemExit as error:
            code = error.code
            if code is not None and not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            import traceback

            traceback.print_exc(limit=-8)
            code = 1
        try:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()  # wait for threads that are no daemons, as an interpreter does at its end
            if "atexit" in sys.modules:
                sys.modules["atexit"]._run_exitfuncs()
            sys.stdout.flush()
        except BaseException:
            code = code or 120
        sys.stderr.flush()
        os._exit((code or 0) & 255)

    return body


def _call_body(job):
    """Call the program's function `entry` with packed (args, kwargs) from stdin; stdout is the packed outcome and nothing else."""

    def body():
        out = os.dup(1)
        os.dup2(2, 1)
        data = b""
        while part := os.read(0, 1 << 20):
            data += part
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        try:
            args, kwargs = unpack(data.decode())  # noqa: F821  (values.py)
            module = _load(job["source"], "program")
            entry = getattr(module, job["entry"], None)
            if entry is None and hasattr(module, "Solution"):
                entry = getattr(module.Solution(), job["entry"], None)
            if entry is None:
                raise NameError(f"the program defines no {job['entry']}")
            outcome = pack({"return": entry(*args, **kwargs)})  # noqa: F821
        except Exception as error:
            outcome = pack({"raise": type(error).__name__, "message": str(error)[:500]})  # noqa: F821
            import traceback

            traceback.print_exc(limit=-8)
            sys.stderr.flush()
        data = memoryview(outcome.encode())
        while data:
            data = data[os.write(out, data) :]
        os._exit(0)

    return body


def _compile_cpp(job):
    """Compile the program.  Returns the frame of the compiler's run; the binary is ./program."""

    def body():
        os.execv(job["compiler"], ["g++", "-O2", "-std=gnu++17", "-x", "c++", "-o", "program", "-"])

    return _run_child(job, job["compile_limits"], job["source"].encode(), body)


def _check(job, channel_in, channel_out):
    """Run a data set's check(candidate), the candidate being elsewhere: each call goes out as a frame and its outcome comes back as one.

    Returns the frame of the verdict: b"pass", b"fail" and why, or b"unusable" and why where the test itself cannot be loaded.
    """

    def candidate(*args, **kwargs):
        send(channel_out, b"call" + pack((args, kwargs)).encode())  # noqa: F821
        outcome = unpack(receive(channel_in).decode())  # noqa: F821
        if "return" in outcome:
            return outcome["return"]
        kind = getattr(builtins, str(outcome["raise"]), None)
        is_error = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if is_error else RuntimeError)(outcome["message"])

    become(job["user"])
    limit(job["limits"], job["limits"]["cpu_s"])
    names = {"__name__": "check"}
    try:
        exec(compile(job["check"]["setup"], "setup", "exec"), names)
        names[job["check"]["entry"]] = candidate
        exec(compile(job["check"]["test"], "test", "exec"), names)
        check = names["check"]
    except BaseException as error:
        return f"unusable {type(error).__name__}: {error}".encode(errors="replace")[:1000]
    try:
        check(candidate)
    except BaseException as error:
        return f"fail {type(error).__name__}: {error}".encode(errors="replace")[:1000]
    return b"pass"


def main():
    """Set up for one program, say so, then answer one frame with one frame until the other side hangs up."""
    channel_in, channel_out = os.dup(0), os.dup(1)
    quiet = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(quiet, fd)
    _prctl(_PR_SET_DUMPABLE, 0)
    _signal.signal(_SIGINT, _signal.SIG_DFL)  # the only one that Python handles; unhandled signals from inside do not reach process 1
    job = marshal.loads(receive(channel_in))
    for name in job["unset"]:
        os.environ.pop(name, None)
    sys.path += job["packages"]
    os.umask(0)  # scratch files belong to the launcher, and programs may open /dev/stdout anew
    if job["preload"]:
        exec(compile(job["preload"], "preload", "exec"), {"__name__": "preload"})
    send(channel_out, b"ready")
    if job["check"]:
        return send(channel_out, _check(job, channel_in, channel_out))
    if job["language"] == "cpp":
        send(channel_out, _compile_cpp(job))
        body = lambda: os.execv("./program", ["program"])  # noqa: E731
    else:
        body = (_call_body if job["entry"] else _python_body)(job)
    while True:
        limits = marshal.loads(receive(channel_in))
        data = receive(channel_in)
        try:
            answer = _run_child(job, limits, data, body)
        except OSError as error:  # an earlier run has filled the disk
            answer = f"-1 0 0 0 0 0 {len(str(error))}\n{error}".encode()
        send(channel_out, answer)


if __name__ == "__main__":
    main()
