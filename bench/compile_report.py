"""Compile every kernel without a GPU and report what it takes of one: registers, shared memory, spills, tensor-core instructions."""

import importlib
import pkgutil
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import athanor.kernels
from athanor.kernels._triton import limits_broken, resources, tensor_core_instruction

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"


def triton_cases(op: str | None = None) -> list:
    """Every ahead-of-time case, of all modules or of those whose name starts with `op`."""
    found = sorted(m.name for m in pkgutil.iter_modules(athanor.kernels.__path__) if m.name.endswith("_triton") and not m.name.startswith("_"))
    wanted = [name for name in found if op is None or name == f"{op}_triton"]
    return [(name.removesuffix("_triton"), case) for name in wanted for case in importlib.import_module(f"athanor.kernels.{name}").ahead_of_time()]


def triton_rows(op: str | None = None) -> Iterator[dict]:
    """One row per case and architecture that its tiles are for."""
    for name, case in triton_cases(op):
        for capability in case.capabilities:
            compiled = case.compile(capability)
            with tempfile.TemporaryDirectory() as folder:
                used = resources(compiled, Path(folder))
            yield {"op": name, "kernel": case.kernel.__name__, "case": case.name, "arch": f"sm_{capability}", "registers": used["reg"],
                   "registers_limit": case.registers, "shared": compiled.metadata.shared, "stack": used["stack"], "local": used["local"],
                   "warps": case.num_warps, "matrix": tensor_core_instruction(compiled) or "-",
                   "broken": limits_broken(case, capability, compiled, used)}  # fmt: skip


def cuda_rows() -> Iterator[dict]:
    """Each CUDA source through nvcc, warnings as errors; nothing where there are no sources."""
    for source in sorted(CUDA.glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Werror", "all-warnings", "-cubin", "-o", f"{folder}/out.cubin",
                 str(source)], capture_output=True, text=True)  # fmt: skip
        message = (done.stderr + done.stdout).strip()
        yield {"op": source.stem, "kernel": source.name, "case": "nvcc", "arch": "sm_90a", "broken": [message[:2000]] if done.returncode else []}


def why_no_cuda() -> str | None:
    """Why no CUDA source is compiled here; None if they are."""
    if not any(CUDA.glob("*.cu")):
        return "no CUDA sources (csrc/cuda holds no .cu file)"
    return None if shutil.which("nvcc") else "CUDA sources not compiled: nvcc is not installed"
