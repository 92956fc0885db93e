"""What the CUDA kernels share: whether they can serve a call, compiling a source of csrc/cuda for the device at hand, launching it.

CuPy compiles with NVRTC at first use and keeps the result on disk; a launch goes to torch's current stream with raw pointers, and may be captured in
a CUDA graph once the kernel is loaded.  Importing this file does not import CuPy.  A source takes what is fixed at compile time as macros.
"""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ._triton import SHARED

HERE = Path(__file__).parent
# In a checkout and an editable install the sources lie beside kernels/, in a wheel they come as a folder of the package.
FOLDER = next((folder for folder in (HERE / "csrc", HERE.parent / "csrc" / "cuda") if folder.is_dir()), HERE / "csrc")


@lru_cache(maxsize=1)
def cupy_there() -> bool:
    return importlib.util.find_spec("cupy") is not None


def why_not_cuda(call: dict) -> str | None:
    """The reasons that hold for every CUDA kernel here."""
    tensors = [value for value in call.values() if isinstance(value, Tensor)]
    if other := sorted({value.device.type for value in tensors} - {"cuda"}):
        return f"tensors are on {', '.join(other)}"
    if not cupy_there():
        return "cupy is not installed (pip install cupy-cuda13x)"
    if not FOLDER.is_dir():
        return f"the CUDA sources are not there: {FOLDER}"
    if tensors and (found := torch.cuda.get_device_capability(tensors[0].device)) < (8, 0):
        return f"the device is sm_{found[0]}{found[1]}; the kernels need sm_80"
    return None


def source_of(stem: str) -> str:
    """csrc/cuda/<stem>.cu with its headers written out, since CuPy's disk cache does not look into them."""

    def header(found: re.Match) -> str:
        return (FOLDER / found[1]).read_text()

    return re.sub(r'(?m)^#include "(\w+\.cuh)"$', header, (FOLDER / f"{stem}.cu").read_text())


def macros(constants: dict) -> tuple[str, ...]:
    return tuple(f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in constants.items())


class CurrentStream:
    """Torch's current stream in the CUDA stream protocol: (version, address)."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@cache
def load(stem: str, kernel: str, options: tuple[str, ...], shared: int, device: int) -> Callable:
    """The kernel, compiled with these macros for this device: call it with (blocks, threads, numpy scalars)."""
    import cupy

    with torch.cuda.device(device):
        function = cupy.RawModule(code=source_of(stem), options=("-std=c++17", *options)).get_function(kernel)
        function.max_dynamic_shared_size_bytes = shared

    def launch(blocks: int, threads: int, arguments: tuple) -> None:
        with torch.cuda.device(device), cupy.cuda.Stream.from_external(CurrentStream()):
            function((blocks,), (threads,), arguments, shared_mem=shared)

    return launch


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one block may have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@dataclass(frozen=True)
class AheadOfTime:
    """One specialisation of a CUDA kernel to compile with nvcc where there is no GPU."""

    name: str
    stem: str
    constants: dict[str, object]
    warps: int
    registers: int  # allowed per thread
    shared: int  # dynamic, bytes
    capabilities: tuple[str, ...] = ("80", "90a")

    def limits_broken(self, used: dict[str, int]) -> list[str]:
        """What the compiled kernel does that it must not, one line each; `used` is what `compile` returned."""
        most = SHARED[int(self.capabilities[0].rstrip("a"))]
        checks = {
            f"spills: stack {used['stack']}, local {used['local']} bytes": used["stack"] or used["local"],
            f"{used['registers']} registers; at most {self.registers}": not 0 < used["registers"] <= self.registers,
            f"{used['shared']} bytes of shared memory; at most {most}": used["shared"] > most,
        }
        return [line for line, broken in checks.items() if broken]

    def compile(self, capability: str, folder: Path) -> tuple[dict[str, int], str]:
        """Registers, stack, spilled and shared bytes as ptxas prints them, and the compiler's complaint; warnings are errors."""
        (folder / "kernel.cu").write_text(source_of(self.stem))
        command = ["nvcc", "-std=c++17", "-ftz=true", f"-gencode=arch=compute_{capability},code=sm_{capability}", "-Werror", "all-warnings",
                   "-Xptxas", "-v", *macros(self.constants), "-cubin", "-o", "kernel.cubin", "kernel.cu"]  # fmt: skip  -ftz: CuPy sets it
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        text = done.stderr + done.stdout
        if done.returncode:
            return {}, text.strip() or "nvcc failed"
        patterns = {"registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame", "local": r"(\d+) bytes spill stores",
                    "shared": r"(\d+) bytes smem"}  # fmt: skip
        used = {key: sum(map(int, re.findall(pattern, text))) for key, pattern in patterns.items()}
        return used | {"shared": used["shared"] + self.shared}, ""
