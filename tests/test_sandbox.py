"""The sandbox: its parts where they need no isolation, and programs inside it where the machine has bubblewrap."""

import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from athanor.errors import UserError
from athanor.sandbox import Limits, Sandbox, SandboxError, isolation, pool, why_not
from athanor.sandbox.attacks import attacks, run_attacks
from athanor.sandbox.seccomp import MACHINES, allowed_calls, filter_program
from athanor.sandbox.values import pack, unpack

isolated = pytest.mark.skipif(why_not() is not None, reason=f"programs cannot be isolated here: {why_not()}")
needs_gxx = pytest.mark.skipif(not os.path.exists("/usr/bin/g++"), reason="needs /usr/bin/g++")
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(workers=2)


# ---- the system-call filter


def decide(machine: str, number: int, *args: int, arch: int | None = None) -> int:
    """Run the filter as the kernel would: a second reading of linux/filter.h."""
    words = struct.pack("<IIQ6Q", number, MACHINES[machine] if arch is None else arch, 0, *args, *[0] * (6 - len(args)))
    code = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    assert len(code) <= 4096
    i = accumulator = 0
    while True:
        instruction, jump_true, jump_false, value = code[i]
        i += 1
        if instruction == 0x06:
            return value
        if instruction == 0x20:
            accumulator = struct.unpack_from("<I", words, value)[0]
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[instruction]
            i += jump_true if test else jump_false


@pytest.mark.parametrize(
    "machine, clone, socket, prlimit, ioctl, ptrace",
    [("x86_64", 56, 41, 302, 16, 101), ("aarch64", 220, 198, 261, 29, 117)],
)
def test_the_filter_allows_and_refuses_as_it_says(machine, clone, socket, prlimit, ioctl, ptrace):
    for number in range(1024):
        by_argument = number in (clone, socket, socket + (12 if machine == "x86_64" else 1), prlimit, ioctl)
        wanted = ENOSYS if number > 452 or number == 435 else ALLOW if number in allowed_calls(machine).values() else EPERM
        assert by_argument or decide(machine, number) == wanted, number
    assert decide(machine, ptrace) == EPERM
    assert decide(machine, clone, 17) == ALLOW and decide(machine, clone, 0x3D0F00) == ALLOW  # fork, pthread_create
    assert decide(machine, clone, 0x10000000 | 17) == EPERM
    assert decide(machine, socket, 1) == ALLOW and decide(machine, socket, 2) == EPERM
    assert decide(machine, prlimit, 0) == ALLOW and decide(machine, prlimit, 1) == EPERM
    assert decide(machine, ioctl, 0, 0x5401) == ALLOW and decide(machine, ioctl, 0, 0x5412) == EPERM
    assert decide(machine, 0x40000000) == ENOSYS
    assert decide(machine, 0, arch=0x40000003) == KILL  # 32-bit x86


@pytest.mark.parametrize(
    "machine, header", [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")]
)
def test_call_numbers_are_those_of_the_kernel_headers(machine, header):
    if not Path(header).exists():
        pytest.skip(f"needs {header}")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    known.setdefault("newfstatat", known.get("fstatat"))
    for name, number in allowed_calls(machine).items():
        assert name not in known or int(known[name]) == number, name


def test_a_machine_without_a_table_is_refused():
    with pytest.raises(UserError, match="no system-call table for riscv64"):
        filter_program("riscv64")


# ---- values


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(2**63), 2**64, -(3**200), 1.5, -0.0, float("inf"), "", "é\ud800\x00", b"\x00\xff", 1 - 2j, [], [1, [2]], (1,), (), {1, 2}]
    + [{}, {"d": 1}, {(1, 2): {"t": [3]}}, frozenset({(1,)}), {"t": [1]}],
)
def test_values_come_back_as_they_went(value):
    back = unpack(pack(value))
    assert back == value and type(back) is type(value)


def test_subclasses_travel_as_their_base():
    class Equal(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    back = unpack(pack([Equal(3), type("Text", (str,), {})("x")]))
    assert [type(item) for item in back] == [int, str] and back != [4, "x"]
    assert unpack(pack(float("nan"))) != unpack(pack(float("nan")))


@pytest.mark.parametrize("value", [object(), len, (i for i in ())])
def test_what_is_no_data_does_not_travel(value):
    with pytest.raises(TypeError, match="cannot leave the sandbox"):
        pack(value)


@pytest.mark.parametrize("text", ["", "{", '{"t": [1], "s": []}', '{"x": 1}', '{"s": [[1]]}', '{"i": "z"}', '{"d": [1]}', "[" * 100_000, '{"c": []}'])
def test_a_text_that_is_no_value_is_refused(text):
    with pytest.raises(ValueError, match="not a packed value"):
        unpack(text)


# ---- settings and refusals


@pytest.mark.parametrize("field, value", [("wall_s", 0), ("processes", -1), ("memory_mb", 8), ("disk_mb", 2**40)])
def test_limits_are_checked(field, value):
    with pytest.raises(UserError, match=f"{field} is"):
        Limits(**{field: value})


def test_a_machine_without_bubblewrap_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    monkeypatch.setattr(isolation.sys, "platform", "linux")
    monkeypatch.setattr(pool, "why_not", pool._why_not.__wrapped__)
    with pytest.raises(UserError, match="apt-get install bubblewrap.*unsafe=True"):
        Sandbox()


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch):
    if why_not() is not None:
        pytest.skip("needs a machine that can isolate")
    monkeypatch.setattr(pool, "_PROBE", "print('the host')")
    assert pool._why_not.__wrapped__() == "the trial program could reach: the host"
    real = isolation.bwrap_command
    monkeypatch.setattr(isolation, "bwrap_command", lambda *a: [*real(*a), "--ro-bind", "/no/such/folder", "/x"])
    assert "kernel has to allow user namespaces" in pool._why_not.__wrapped__()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_unsafe_runs_without_isolation_and_says_so(monkeypatch):
    monkeypatch.setattr(pool, "why_not", lambda: "this is a test")
    with pytest.warns(UserWarning, match="WITHOUT isolation"):
        open_box = Sandbox(unsafe=True, limits=Limits(wall_s=1, cpu_s=1, memory_mb=256))
    assert open_box.run("print(input())", stdin="x").stdout == "x\n"
    assert open_box.run("while True: pass").status == "timeout"
    assert open_box.run("x = bytearray(2**30)").status == "memory"
    assert open_box.check("def f(x): return x + 1", setup="", test="def check(c): assert c(1) == 2", entry="f").status == "pass"


# ---- programs


@isolated
@pytest.mark.parametrize(
    "program, stdin, status, stdout, code",
    [
        ("print(int(input()) + int(input()))", "3\n4", "ok", "7\n", 0),
        ("import sys\nprint(sys.stdin.read()[::-1], end='')", "añb", "ok", "bña", 0),
        ("print(open('/dev/stdin').read(), flush=True)\nopen('/dev/stdout', 'a').write('more')\nprint(1)", "x", "ok", "x\nmore1\n", 0),
        ("if __name__ == '__main__': print(__name__)", "", "ok", "__main__\n", 0),
        ("print(1)\nexit()", "", "ok", "1\n", 0),
        ("print(1)\nraise SystemExit(3)", "", "error", "1\n", 3),
        ("import os\nprint(1, flush=True)\nos._exit(0)", "", "ok", "1\n", 0),
        ("import os\nos.abort()", "", "error", "", -6),
        ("print(1", "", "error", "", 1),
        ("import atexit\natexit.register(print, 2)\nprint(1)", "", "ok", "1\n2\n", 0),
        ("import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print(1))).start()", "", "ok", "1\n", 0),
        ("import sys\nsys.setrecursionlimit(10**6)\nf = lambda n: n and 1 + f(n - 1)\nprint(f(20000))", "", "ok", "20000\n", 0),
        ("import subprocess\nprint(subprocess.check_output(['echo', 'hi'], text=True))", "", "ok", "hi\n\n", 0),
        ("import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: print(p.map(abs, [-1, -2]))", "", "ok", "[1, 2]\n", 0),
        ("import asyncio\nasync def f(): print(1)\nasyncio.run(f())", "", "ok", "1\n", 0),
    ],
)
def test_python_programs_run_as_they_would_outside(sandbox, program, stdin, status, stdout, code):
    result = sandbox.run(program, stdin=stdin)
    assert (result.status, result.stdout, result.exit_code) == (status, stdout, code), result.stderr


@isolated
def test_long_inputs_and_outputs_come_through_whole(sandbox):
    text = "".join(f"{i}\n" for i in range(500_000))  # 3.4 MB, many times what a pipe holds
    result = sandbox.run("import sys\nsys.stdout.write(sys.stdin.read())", stdin=text, limits=Limits(output_kb=8192))
    assert result.status == "ok" and result.stdout == text


@isolated
def test_an_error_shows_where_it_was(sandbox):
    result = sandbox.run("def f():\n    return 1 / 0\nf()")
    assert "program.py" in result.stderr and "line 2, in f" in result.stderr and "ZeroDivisionError" in result.stderr


@isolated
@needs_gxx
def test_cpp_is_compiled_once_and_run_on_each_input(sandbox):
    program = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a * b; return a == 0; }"
    with sandbox.open(program, language="cpp") as box:
        assert [box.run(f"{i} 3").stdout for i in range(1, 4)] == ["3", "6", "9"]
        assert (box.run("0 3").status, box.run("0 3").exit_code) == ("error", 1)
    broken = sandbox.run("int main() { return x; }", language="cpp")
    assert broken.status == "compile" and "'x' was not declared" in broken.stderr.replace("‘", "'").replace("’", "'")


@isolated
def test_what_a_result_says_about_time(sandbox):
    result = sandbox.run("import time\ntime.sleep(0.3)\nsum(range(2_000_000))")
    assert 0.3 <= result.seconds < 5 and 0.005 < result.cpu_seconds < result.seconds
    slow = sandbox.run("import time\ntime.sleep(60)", limits=Limits(wall_s=0.2))
    assert slow.status == "timeout" and 0.2 <= slow.seconds < 3 and slow.cpu_seconds < 0.2
    busy = sandbox.run("while True: pass", limits=Limits(cpu_s=0.5, wall_s=30))
    assert busy.status == "timeout" and busy.cpu_seconds < 3


@isolated
def test_runs_in_one_box_are_fresh_processes(sandbox):
    program = "import os, sys\nn = input()\nprint(n, hasattr(sys, 'x'))\nsys.x = 1\nif n == '1': os.kill(os.getpid(), 9)\nif n == '2': os.fork()\n"
    with sandbox.open(program) as box:
        assert [box.run(str(i)).exit_code for i in range(4)] == [0, -9, 0, 0]
        assert box.run("5").stdout == "5 False\n"


@isolated
def test_two_programs_share_nothing(sandbox):
    leave = (
        "import os, socket\n"
        "for path in ('/tmp/x', '/dev/shm/x'): open(path, 'w').write('mine')\n"
        "os.environ['X'] = 'mine'\n"
        "if os.fork() == 0:\n"
        "    s = socket.socket(socket.AF_UNIX); s.bind('\\0mine'); s.listen()\n"
        "    import time; time.sleep(60)\n"
        "import time; time.sleep(0.1); print('left'); input()"
    )
    look = (
        "import os, socket, time\n"
        "print(os.listdir('/tmp'), os.listdir('/dev/shm'), 'X' in os.environ, sum(name.isdigit() for name in os.listdir('/proc')))\n"
        "try: socket.socket(socket.AF_UNIX).connect('\\0mine'); print('reached')\n"
        "except OSError: pass"
    )
    with sandbox.open(leave) as first, sandbox.open(look) as second:
        thread = threading.Thread(target=first.run)
        thread.start()
        time.sleep(0.1)
        results = [second.run().stdout, sandbox_alone(look)]
        thread.join()
    assert results == ["[] [] False 2\n"] * 2


def sandbox_alone(program: str) -> str:
    return Sandbox(workers=1).run(program).stdout


@isolated
def test_many_threads_get_their_own_results_and_leave_nothing_behind(sandbox):
    def children():
        return {pid for task in os.listdir("/proc/self/task") for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}

    sandbox.run("")
    before = len(os.listdir("/proc/self/fd")), children()
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda i: sandbox.run("print(int(input()) ** 2)", stdin=str(i)), range(40)))
    assert [result.stdout for result in results] == [f"{i * i}\n" for i in range(40)]
    assert (len(os.listdir("/proc/self/fd")), children()) == before


@isolated
def test_a_sandbox_that_fails_is_no_verdict_on_the_program(sandbox):
    with sandbox.open("import time\ntime.sleep(30)") as box:
        threading.Timer(0.3, os.kill, (box._process.init_pid, signal.SIGKILL)).start()
        with pytest.raises(SandboxError, match="ended in the middle of a run"):
            box.run()
        with pytest.raises(SandboxError):
            box.run()


@isolated
def test_a_sandbox_can_be_pickled():
    copy = pickle.loads(pickle.dumps(Sandbox(workers=3, limits=Limits(wall_s=7))))
    assert (copy.workers, copy.limits.wall_s) == (3, 7) and copy.run("print(1)").stdout == "1\n"


@isolated
def test_trusted_code_can_be_loaded_ahead_and_packages_be_shown(tmp_path):
    (tmp_path / "shown.py").write_text("number = 5")
    with Sandbox(packages=(str(tmp_path),)).open("def f(x): import shown; return x + shown.number", entry="f", preload="import shown") as box:
        assert unpack(box.run(pack(((2,), {}))).stdout) == {"return": 7}


@isolated
def test_wrong_calls_are_refused(sandbox):
    for how, message in (({"language": "rust"}, "language is 'rust'"), ({"language": "cpp", "entry": "f"}, "entry calls a Python function")):
        with pytest.raises(UserError, match=message), sandbox.open("", **how):
            pass
    with pytest.raises(UserError, match="no folder"):
        Sandbox(packages=("/no/such/folder",))


# ---- the attack suite


def test_there_are_enough_attacks_and_each_has_its_own_name():
    assert len(attacks()) >= 50 and len({attack.name for attack in attacks()}) == len(attacks())


@isolated
@needs_gxx
def test_every_attack_is_contained(sandbox):
    outcomes = list(run_attacks(sandbox, [attack for attack in attacks() if not attack.slow]))
    through = [f"{outcome.attack.name}: {outcome.status}: {outcome.complaint}" for outcome in outcomes if outcome.complaint]
    assert not through, "\n".join(through)


@isolated
@needs_gxx
@pytest.mark.slow
def test_the_command_line_runs_all_attacks_for_this_user_and_for_an_ordinary_one(tmp_path):
    command = ["-m", "athanor.sandbox", "--attack", "--bench"]
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and f"{len(attacks()) + 1} of {len(attacks()) + 1} contained" in ran.stdout and "programs/s" in ran.stdout
    if os.geteuid() != 0 or shutil.which("/usr/bin/python3") is None:
        return
    # a root user's interpreter and home are closed to others, so this takes the system's Python and a copy
    shutil.copytree(Path(isolation.__file__).parents[1] / "sandbox", tmp_path / "athanor" / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(isolation.__file__).parents[1] / "errors.py", tmp_path / "athanor")
    for path in [*tmp_path.parents][:-2]:
        path.chmod(0o755) if path.name.startswith("pytest") else None
    home = tmp_path / "home"
    home.mkdir()
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 65534, 65534)
    ran = subprocess.run(
        ["/usr/bin/python3", *command],
        cwd=home,
        env={"PYTHONPATH": str(tmp_path), "HOME": str(home), "PATH": "/usr/bin:/bin"},
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0 and "isolation: bubblewrap, tried out" in ran.stdout, ran.stdout + ran.stderr
