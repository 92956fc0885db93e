"""What the kernel tests share: the tolerance rule of the design, as a fixture because tests/ is no package."""

import os
from dataclasses import dataclass, field

import pytest
import torch


def _within_rule(got, plain, oracle, what=""):
    """Error against fp64 <= 2 x the error of the textbook formula in the same dtype + 2 ulp of the largest value."""
    assert got.dtype == plain.dtype and got.shape == oracle.shape, what
    if oracle.numel() == 0:
        return
    oracle = oracle.double()
    ulp = torch.finfo(got.dtype).eps * oracle.abs().max()
    error, allowed = (got.double() - oracle).abs().max(), 2 * (plain.double() - oracle).abs().max() + 2 * ulp
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def _close64(got, oracle, what=""):
    """fp64 in, fp64 out: 1e-12 of the largest value."""
    assert got.dtype == torch.float64 and got.shape == oracle.shape, what
    if oracle.numel():
        error = (got - oracle).abs().max()
        assert error <= 1e-12 * max(1.0, oracle.abs().max()), f"{what}: {error:.3e}"


@pytest.fixture
def within_rule():
    return _within_rule


@pytest.fixture
def close64():
    return _close64


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request):
    """Device for a test of a Triton kernel: the GPU, or the CPU where this very process has the interpreter on (see test_interpreter.py)."""
    if request.param == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: test_interpreter.py runs it in a process of its own")
    return torch.device("cpu")


@dataclass
class Launches:
    keys: set = field(default_factory=set)  # (kernel, specialisation, options): what Triton would compile
    grids: list = field(default_factory=list)


@pytest.fixture
def launches(monkeypatch):
    """Records every launch with the cache key that it has on an H100, and runs nothing.  Needs no GPU; outputs keep what their memory held."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler in this process")
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend, recorded = make_backend(GPUTarget("cuda", 90, 32)), Launches()
    binders = {}

    def run(self, *args, grid, warmup, **kwargs):
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        _, specialisation, options = binders[self](*args, **kwargs)
        recorded.keys.add((self.__name__, str(specialisation), str(sorted(options.items()))))
        recorded.grids.append(grid)

    monkeypatch.setattr(JITFunction, "run", run)
    return recorded
