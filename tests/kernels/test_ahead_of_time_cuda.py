"""Every CUDA kernel compiles with nvcc without a GPU, warnings being errors, keeps its variables in registers, and holds no atomics."""

import importlib
import pkgutil
import re
import shutil

import pytest

import athanor.kernels
from athanor.kernels import _cuda

MODULES = [importlib.import_module(f"athanor.kernels.{found.name}") for found in pkgutil.iter_modules(athanor.kernels.__path__)
           if found.name.endswith("_cuda") and not found.name.startswith("_")]  # fmt: skip
CASES = [(case, capability) for module in MODULES for case in module.ahead_of_time() for capability in case.capabilities]


@pytest.mark.parametrize("case, capability", CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_compiles_within_its_limits(case, capability, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    used, complaint = case.compile(capability, tmp_path)
    assert complaint == "" and case.limits_broken(used) == []


def test_every_source_has_a_case_and_nothing_is_included_from_elsewhere():
    """NVRTC has no folder of headers: what _cuda.py does not write out is not found."""
    stems = {path.stem for path in _cuda.FOLDER.glob("*.cu")}
    assert stems == {case.stem for case, _ in CASES} and stems
    for stem in stems:
        text = _cuda.source_of(stem)
        assert not re.search(r"(?m)^\s*#\s*include", text) and not re.search(r"\batomic\w+\s*\(", text)
        assert "__builtin_" not in text  # nvcc has them from the host's compiler, NVRTC has none
