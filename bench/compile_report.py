"""Compile every kernel without a GPU and report what it takes of one: registers, shared memory, spills, tensor-core instructions."""

import importlib
import pkgutil
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import athanor.kernels
from athanor.kernels._dispatch import OPS
from athanor.kernels._triton import limits_broken, resources, tensor_core_instruction


def cases_of(kind: str, ops: list[str] | None) -> list:
    """Every ahead-of-time case of the modules of a kind, triton or cuda, or of those that serve some operations."""
    found = sorted(m.name for m in pkgutil.iter_modules(athanor.kernels.__path__) if m.name.endswith(f"_{kind}") and not m.name.startswith("_"))
    wanted = found if ops is None else [name for name in found if any(name in files_of(op, found) for op in ops)]
    return [(name.removesuffix(f"_{kind}"), case) for name in wanted for case in importlib.import_module(f"athanor.kernels.{name}").ahead_of_time()]


def files_of(op: str, found: list[str]) -> set[str]:
    """Modules of an operation: those its backends are in, and those named <op>_..., of which a longer operation's name is not the beginning."""
    served = {backend.run.file for backend in OPS[op].backends.values() if hasattr(backend.run, "file")}
    return served | {name for name in found if op == max((known for known in OPS if name.startswith(f"{known}_")), key=len, default=None)}


def triton_cases(ops: list[str] | None = None) -> list:
    return cases_of("triton", ops)


def triton_rows(ops: list[str] | None = None) -> Iterator[dict]:
    """One row per case and architecture that its tiles are for."""
    for name, case in triton_cases(ops):
        for capability in case.capabilities:
            compiled = case.compile(capability)
            with tempfile.TemporaryDirectory() as folder:
                used = resources(compiled, Path(folder))
            yield {"kind": "compiled", "op": name, "kernel": case.kernel.__name__, "case": case.name, "arch": f"sm_{capability}",
                   "registers": used["reg"], "registers_limit": case.registers, "shared": compiled.metadata.shared, "stack": used["stack"],
                   "local": used["local"], "warps": case.num_warps, "matrix": tensor_core_instruction(compiled) or "-",
                   "broken": limits_broken(case, capability, compiled, used)}  # fmt: skip


def cuda_rows(ops: list[str] | None = None) -> Iterator[dict]:
    """One row per case of a CUDA kernel and architecture: through nvcc, warnings as errors."""
    for name, case in cases_of("cuda", ops):
        for capability in case.capabilities:
            with tempfile.TemporaryDirectory() as folder:
                used, complaint = case.compile(capability, Path(folder))
            yield {"kind": "compiled", "op": name, "kernel": f"{case.stem}.cu", "case": case.name, "arch": f"sm_{capability}",
                   "registers_limit": case.registers, "warps": case.warps,
                   "broken": [complaint[:2000]] if complaint else case.limits_broken(used), **used}  # fmt: skip


def why_no_cuda() -> str | None:
    """Why no CUDA source is compiled here; None if they are."""
    return None if shutil.which("nvcc") else "CUDA sources not compiled: nvcc is not installed"
