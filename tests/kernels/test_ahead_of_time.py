"""Every Triton kernel compiles without a GPU for A100, H100 and B200, keeps its variables in registers, and holds no atomics."""

import importlib
import importlib.util
import os
import pkgutil
import re

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import athanor.kernels
from athanor.kernels._triton import resources

MODULES = [
    importlib.import_module(f"athanor.kernels.{found.name}")
    for found in pkgutil.iter_modules(athanor.kernels.__path__)
    if found.name.endswith("_triton") and not found.name.startswith("_")
]
CASES = [case for module in MODULES for case in module.ahead_of_time()]
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that one block may have
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_without_spilling(case, capability, tmp_path):
    if capability not in case.capabilities:
        pytest.skip(f"tiles for sm_{case.capabilities}")
    compiled = case.compile(capability)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    atomics = re.findall(r"(?m)^\s*(?:@!?%\w+\s+)?((?:atom|red)\.\S+)", compiled.asm["ptx"])
    assert not atomics, atomics
    if case.matrix:
        assert MATRIX[capability] in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED[capability], compiled.metadata.shared
    used = resources(compiled, tmp_path)
    # Far from the limit of 255 registers nothing needs to spill; the few bytes that some ptxas versions reserve are a called slow path's frame.
    assert used["local"] == 0 and used["stack"] <= 16 and 0 < used["reg"] <= case.registers, used


def test_every_kernel_is_among_the_cases():
    from triton.runtime import JITFunction

    for module in MODULES:
        kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
        assert kernels <= {case.kernel.__name__ for case in CASES} and kernels
