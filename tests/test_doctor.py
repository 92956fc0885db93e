"""athanor doctor: what it says of a machine that can run the default and of ones that cannot, and that it imports little."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from athanor import doctor
from athanor.__main__ import COMMANDS, main
from athanor.kernels._dispatch import OPS


def test_a_machine_that_can_run_the_default_gets_0_and_a_full_account(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (torch.__version__, "GPU", "g++", "bwrap", "cupy", "flash-attn", "threads", "backend cpu", "backend triton", "can work here"):
        assert word in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    for name, op in OPS.items():
        assert all(backend in lines[name] for backend in op.backends), name
    if not torch.cuda.is_available():
        assert "not here: no CUDA device" in lines["backend"] or "no CUDA device" in out


def test_what_is_missing_is_named_with_the_command_that_installs_it(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("matplotlib", "cupy") else found(name, *rest))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "pip install -c constraints.txt matplotlib" in out and "pip install cupy-cuda13x" in out and "can work here" not in out


def test_a_host_module_that_was_not_built_is_a_problem(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "athanor._host", None)  # as an import that fails
    assert doctor.main([]) == 1
    assert "athanor._host is not built" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_a_problem(capsys, monkeypatch):
    monkeypatch.chdir("/proc")
    assert doctor.main([]) == 1
    assert "/proc: cannot write there" in capsys.readouterr().out


def test_a_backend_that_gives_wrong_numbers_is_not_called_working(monkeypatch):
    from athanor.kernels import _cpu

    assert doctor.why_not_here("cpu", []) is None
    monkeypatch.setattr(doctor, "_try_norm", lambda backend, device: False)
    assert "other numbers" in doctor.why_not_here("cpu", [])
    monkeypatch.setattr(_cpu, "native_there", lambda: False)
    assert "not built" in doctor.why_not_here("cpu", [])
    assert doctor.why_not_here("triton", []) == doctor.why_not_here("cuda", []) == "no CUDA device"


@pytest.mark.gpu
def test_on_a_gpu_triton_kernels_are_tried():
    assert doctor.why_not_here("triton", [0]) is None


def test_the_commands_exist_and_a_wrong_one_is_one_line(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert all(importlib.util.find_spec(f"athanor.{name}") for name in COMMANDS)
    assert main(["docter"]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert doctor.main(["--all"]) == 2


def test_importing_the_package_is_fast_and_brings_neither_triton_nor_matplotlib():
    """0.3 s is for `import athanor`; kernels and engine add torch's own second, and still neither of the two."""
    code = (
        "import sys, time; start = time.perf_counter(); import athanor; took = time.perf_counter() - start\n"
        "import athanor.kernels, athanor.config, athanor.generator\n"
        "print(took, [name for name in ('triton', 'matplotlib') if name in sys.modules])"
    )
    took, rest = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout.split(" ", 1)
    assert float(took) < 0.3 and rest == "[]\n"
