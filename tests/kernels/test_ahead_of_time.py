"""Every Triton kernel compiles without a GPU for A100, H100 and B200, keeps its variables in registers, and holds no atomics."""

import importlib
import importlib.util
import os
import pkgutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import athanor.kernels
from athanor.kernels._triton import limits_broken, resources

MODULES = [
    importlib.import_module(f"athanor.kernels.{found.name}")
    for found in pkgutil.iter_modules(athanor.kernels.__path__)
    if found.name.endswith("_triton") and not found.name.startswith("_")
]
CASES = [case for module in MODULES for case in module.ahead_of_time()]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_within_its_limits(case, capability, tmp_path):
    """No spills, no atomics, registers and shared memory within the case's limits, tensor cores where it says so."""
    if capability not in case.capabilities:
        pytest.skip(f"tiles for sm_{case.capabilities}")
    compiled = case.compile(capability)
    assert limits_broken(case, capability, compiled, resources(compiled, tmp_path)) == []


def test_a_broken_limit_is_seen(tmp_path):
    """Each limit against a compiled kernel that exceeds it, so that the empty list above means something."""
    case = next(case for case in CASES if case.kernel.__name__ == "finish_kernel")
    compiled = case.compile(90)
    used = resources(compiled, tmp_path)
    assert limits_broken(replace(case, registers=used["reg"] - 1), 90, compiled, used) == [f"{used['reg']} registers; at most {used['reg'] - 1}"]
    assert limits_broken(replace(case, matrix=True), 90, compiled, used) == ["no wgmma"]
    assert limits_broken(case, 90, compiled, used | {"local": 8}) == [f"spills: stack {used['stack']}, local 8 bytes"]
    greedy = SimpleNamespace(asm={"ptx": ".target sm_90a\n @%p1 atom.global.add.f32 %f1;"}, metadata=SimpleNamespace(shared=1 << 20))
    assert limits_broken(case, 90, greedy, used) == ["atomics atom.global.add.f32", f"{1 << 20} bytes of shared memory; at most {227 * 1024}"]
    assert limits_broken(case, 80, compiled, used) == ["compiled for something else than sm_80"]


def test_every_kernel_is_among_the_cases():
    from triton.runtime import JITFunction

    for module in MODULES:
        kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
        assert kernels <= {case.kernel.__name__ for case in CASES} and kernels
