"""What the Triton kernels share: whether Triton can serve a call, launching on the right device, compiling ahead of time without one.

Importing this file does not import Triton.  The kernels themselves live beside their operation in `<op>_triton.py`.
"""

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def triton_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Is Triton's interpreter on?  Triton reads the variable when it is imported and when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(call: dict) -> str | None:
    """The reasons that hold for every Triton kernel here."""
    if not triton_there():
        return "triton is not installed (pip install triton)"
    tensors = [value for value in call.values() if isinstance(value, Tensor) and value.ndim]
    devices = {value.device for value in tensors}
    if len(devices) > 1:
        return f"tensors are on several devices ({', '.join(sorted(map(str, devices)))})"
    if any(value.dtype == torch.float64 for value in tensors):
        return "the kernels compute in fp32; fp64 is the reference's"
    if tensors and tensors[0].device.type == "cpu" and not interpreting():
        return "tensors are on cpu, which needs Triton's interpreter: TRITON_INTERPRET=1 before triton is imported"
    if tensors and tensors[0].device.type not in ("cpu", "cuda"):
        return f"tensors are on {tensors[0].device.type}"
    return None


def entry_for(table: dict, device: torch.device):
    """The entry of a table by compute capability (80, 90, 100) for a device: that of the newest generation which is no newer."""
    capability = 10 * torch.cuda.get_device_capability(device)[0]
    return table[max((c for c in table if c <= capability), default=80)]


def on_device_of(x: Tensor):
    """Context in which a launch goes to x's device: Triton launches on the current one, whichever that is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@dataclass(frozen=True)
class AheadOfTime:
    """One specialisation of a kernel to compile without a GPU: what the tests assert to compile and not to spill."""

    name: str
    kernel: Callable  # a @triton.jit function
    signature: dict[str, str]  # argument -> Triton type, compile-time values left out; "*bf16:16", "i32:16" = divisible by 16, as a launch would find
    constants: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    registers: int = 96  # allowed per thread
    matrix: bool = False  # tl.dot on tensor cores: wgmma on sm_90, mma on sm_80
    capabilities: tuple[int, ...] = (80, 90, 100)  # that these tiles are for
    stack: int = 16  # bytes per thread: the few that some ptxas versions reserve are a called slow path's frame
    maxnreg: int | None = None  # registers per thread that the launch allows the compiler
    contract: bool = True  # a product and a sum into one rounding, where the compiler likes: enable_fp_fusion of a launch

    def compile(self, capability: int):
        """Compile for sm_<capability>; returns Triton's CompiledKernel with asm["ptx"] and asm["cubin"]."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        if self.kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

        names = self.kernel.arg_names
        signature = {name: self.signature.get(name, "constexpr").removesuffix(":16") for name in names}
        assert {n for n in names if signature[n] == "constexpr"} == set(self.constants), (names, self.constants)
        divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if self.signature.get(name, "").endswith(":16")}
        source = ASTSource(self.kernel, signature, {(names.index(name),): value for name, value in self.constants.items()}, divisible)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.contract,
                                       "maxnreg": self.maxnreg})  # fmt: skip


def resources(compiled, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes per thread of a compiled kernel, from the cubin's own table; stack or local > 0 = spilled."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        raise FileNotFoundError(f"resources: {cuobjdump} is missing; this Triton ships no cuobjdump")
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text))
    assert {"REG", "STACK", "LOCAL"} <= set(found), text
    return {key.lower(): int(value) for key, value in found.items()}


# bytes of shared memory that one block may have
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def tensor_core_instruction(compiled) -> str | None:
    """The kind of tensor-core instruction in a compiled kernel, the newest kind first; None if there is none."""
    ptx = compiled.asm["ptx"]
    return next((name for name in reversed(MATRIX.values()) if name in ptx), None)


def limits_broken(case: AheadOfTime, capability: int, compiled, used: dict[str, int]) -> list[str]:
    """What a compiled case does that it must not, one line each; `used` is what `resources` returned."""
    ptx, broken = compiled.asm["ptx"], []
    if f".target sm_{capability}" not in ptx:
        broken.append(f"compiled for something else than sm_{capability}")
    # at the start of a line, after an optional predicate: a name that contains "red." is no reduction
    if atomics := sorted(set(re.findall(r"(?m)^\s*(?:@!?%\w+\s+)?((?:atom|red)\.\S+)", ptx))):
        broken.append(f"atomics {', '.join(atomics)}")
    if case.matrix and MATRIX[capability] not in ptx:
        broken.append(f"no {MATRIX[capability]}")
    if compiled.metadata.shared > SHARED[capability]:
        broken.append(f"{compiled.metadata.shared} bytes of shared memory; at most {SHARED[capability]}")
    # Far from the limit of 255 registers nothing needs to spill.
    if used["local"] or used["stack"] > case.stack:
        broken.append(f"spills: stack {used['stack']}, local {used['local']} bytes")
    if not 0 < used["reg"] <= case.registers:
        broken.append(f"{used['reg']} registers; at most {case.registers}")
    return broken
