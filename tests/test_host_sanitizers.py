"""csrc/host under the address and undefined-behaviour sanitizers, driven by test_scheduler.cpp; the packing has a driver of its own."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]
HOST = ROOT / "csrc" / "host"
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Whatever has no Python in it is built here, so that a new source cannot be left out.
SOURCES = sorted(path for path in HOST.glob("*.cpp") if "pybind11" not in path.read_text() and path.name != "packing.cpp")


def gxx() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++")
    return found


def compiled(tmp_path: Path, sources: list[Path], name: str) -> Path:
    binary = tmp_path / name
    built = subprocess.run([gxx(), *WARNINGS, *SANITIZERS, f"-I{HOST}", *map(str, sources), "-o", str(binary)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return binary


def need_sanitizers(tmp_path: Path) -> None:
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    built = subprocess.run([gxx(), *SANITIZERS, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")], capture_output=True, text=True)
    if built.returncode or subprocess.run([tmp_path / "empty"]).returncode:
        pytest.skip("g++ has no working sanitizer runtime here: " + (built.stderr.strip().splitlines() or ["its program does not start"])[-1])


def test_pool_and_scheduler_are_clean_under_random_calls(tmp_path):
    need_sanitizers(tmp_path)
    assert {path.name for path in SOURCES} >= {"block_pool.cpp", "scheduler.cpp", "scheduler_step.cpp"}
    binary = compiled(tmp_path, [ROOT / "tests" / "test_scheduler.cpp", *SOURCES], "test_scheduler")
    ran = subprocess.run([binary], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stderr


FAULTS = {
    "int a[2] = {0, 0}; return a[n + 1];": ["stack-buffer-overflow", "index 2 out of bounds"],
    "int* a = new int(n); delete a; return *a;": ["heap-use-after-free"],
    "return 2147483647 + n;": ["signed integer overflow"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_sanitizers_catch_a_planted_fault(tmp_path, fault):
    need_sanitizers(tmp_path)
    source = tmp_path / "fault.cpp"
    source.write_text(f"int fault(int n) {{ {fault} }}\nint main(int argc, char**) {{ volatile int kept = fault(argc); return kept * 0; }}\n")
    ran = subprocess.run([compiled(tmp_path, [source], "fault")], capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0 and any(report in ran.stderr for report in FAULTS[fault]), ran.stderr


def test_the_bindings_compile_without_warnings():
    bindings = [str(path) for path in sorted(HOST.glob("*.cpp")) if path not in SOURCES]
    assert any("module.cpp" in path for path in bindings)
    headers = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    built = subprocess.run([gxx(), *WARNINGS, "-fsyntax-only", "-fvisibility=hidden", *headers, *bindings], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
