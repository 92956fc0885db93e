"""python -m athanor doctor  (or python -m athanor.doctor): what this machine has, which kernels it can run and why not, and whether the default
run can work.

Exit code 0 when `torchrun engine/train.py` can run here, else 1 with what to do.  Whatever is reported was looked at or tried here: a small rmsnorm
goes through every backend that claims to be there and is compared with the reference.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

REQUIRED = {  # import name: package, of the default run
    "torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "tokenizers": "tokenizers", "jinja2": "jinja2", "markupsafe": "markupsafe",
    "pydantic": "pydantic", "rich": "rich", "matplotlib": "matplotlib", "tensorboard": "tensorboard",
}  # fmt: skip
OPTIONAL = {  # import name: (package, what it serves)
    "triton": ("triton", "the kernels on CUDA"),
    "cupy": ("cupy-cuda13x", "CUDA C++ kernels"),
    "flash_attn": ("flash-attn", "attention on CUDA"),
    "math_verify": ("math-verify", "reward math"),
    "reasoning_gym": ("reasoning-gym", "tasks gym:<family>"),
    "pyarrow": ("pyarrow", "Parquet files"),
    "wandb": ("wandb", "loggers"),
    "trackio": ("trackio", "loggers"),
}


@dataclass
class Findings:
    """What was found: sections of (name, value) lines, and what keeps the default run from working with what to do about it."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, section: str, name: str, value: str) -> None:
        self.sections.setdefault(section, []).append((name, value))


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        print(__doc__ if arguments in (["--help"], ["-h"]) else f"error: unexpected argument {arguments[0]!r}, wanted none")
        return 0 if arguments in (["--help"], ["-h"]) else 2
    findings = examine()
    for title, lines in findings.sections.items():
        print(title)
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}")
    if not findings.problems:
        print("\nThe default run can work here: torchrun engine/train.py")
        return 0
    print("\nThe default run cannot work here yet:")
    for problem in findings.problems:
        print(f"  - {problem}")
    return 1


def examine() -> Findings:
    """Look at everything; nothing is written but one empty file that is deleted again."""
    findings = Findings()
    _packages(findings)
    if "torch" in importable(REQUIRED):
        gpus = _gpus(findings)
        _machine(findings)
        _kernels(findings, gpus)
    _run_folder(findings)
    return findings


def importable(names) -> list[str]:
    """Those of the import names that this Python finds."""
    return [name for name in names if importlib.util.find_spec(name) is not None]


def _packages(findings: Findings) -> None:
    python = sys.version_info[:2]
    findings.add("versions", "athanor", version_of("athanor"))
    findings.add("versions", "python", f"{platform.python_version()}  {platform.system()} {platform.machine()}")
    if not (3, 11) <= python <= (3, 13):
        findings.problems.append(f"Python is {platform.python_version()}, wanted 3.11 to 3.13")
    if platform.system() != "Linux":
        findings.problems.append(f"the system is {platform.system()}, wanted Linux")
    there = set(importable([*REQUIRED, *OPTIONAL]))
    for name, package in REQUIRED.items():
        findings.add("versions", package, version_of(package) if name in there else "not installed")
    for name, (package, serves) in OPTIONAL.items():
        findings.add("versions", package, version_of(package) if name in there else f"not installed (for {serves}: pip install {package})")
    if missing := [package for name, package in REQUIRED.items() if name not in there]:
        findings.problems.append(f"missing packages: pip install -c constraints.txt {' '.join(missing)}")


def version_of(package: str) -> str:
    """Installed version of a package; of one that can be imported but has no metadata (a checkout on the path), that it is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "there, version unknown"


def _gpus(findings: Findings) -> list[int]:
    """Indices of the CUDA devices that torch sees."""
    import torch

    listed = _nvidia_smi()
    if not torch.cuda.is_available():
        why = "no CUDA device"
        if listed:
            why = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else f"torch (CUDA {torch.version.cuda}) sees none"
            why += f", but the driver lists {'; '.join(listed)}: install a CUDA build of torch that fits the driver"
        findings.add("GPU", "none", why)
        return []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        capability = f"compute capability {facts.major}.{facts.minor}, {facts.multi_processor_count} multiprocessors"
        findings.add("GPU", str(i), f"{facts.name}, {capability}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        if (facts.major, facts.minor) < (8, 0):
            findings.problems.append(f"GPU {i} is sm_{facts.major}{facts.minor}, the kernels need sm_80: run with --device cpu")
    findings.add("GPU", "driver", (listed[0].split(", ")[1] if listed else "nvidia-smi not found") + f", torch's CUDA {torch.version.cuda}")
    return list(range(torch.cuda.device_count()))


def _nvidia_smi() -> list[str]:
    """ "name, driver, memory" of each GPU that the driver lists; [] without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return ran.stdout.strip().splitlines() if ran.returncode == 0 else []


def _machine(findings: Findings) -> None:
    import torch

    cores, own = len(os.sched_getaffinity(0)), torch.get_num_threads()
    findings.add("machine", "threads", f"{cores} usable cores; a run takes cores / local ranks (--threads), torch outside of runs {own}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings.add("machine", "memory", f"{memory / 2**30:.1f} GiB")
    compiler = shutil.which("g++")
    findings.add("machine", "g++", compiler or "not found (to install, and for C++ answers of the reward code: apt-get install g++)")
    findings.add("machine", "bwrap", _sandbox())


def _sandbox() -> str:
    from athanor.sandbox import why_not

    reason = why_not()
    return "programs can be isolated (reward code)" if reason is None else f"reward code and some gym tasks refuse to start: {reason}"


def _kernels(findings: Findings, gpus: list[int]) -> None:
    """Compiled modules, then each backend: whether a small call through it gives the reference's numbers; then which backends each kernel has."""
    section = "kernels"
    try:
        importlib.import_module("athanor._host")
        findings.add(section, "host module", "built")
    except ImportError as error:
        findings.add(section, "host module", f"cannot be imported ({error})")
        findings.problems.append("athanor._host is not built: pip install -e . (needs g++)")
    import athanor.kernels  # noqa: F401  (fills the table)
    from athanor.kernels._dispatch import BACKENDS, OPS

    reasons = {name: why_not_here(name, gpus) for name in BACKENDS}
    for name, reason in reasons.items():
        findings.add(section, f"backend {name}", "works" if reason is None else f"not here: {reason}")
    if gpus and reasons["triton"]:
        findings.problems.append(f"there is a GPU, but Triton kernels do not run on it ({reasons['triton']}): fix that, or run with --device cpu")
    for name, op in sorted(OPS.items()):
        lacking = {backend: reason for backend in op.backends if (reason := _why_not_op(name, backend, reasons[backend], gpus)) is not None}
        usable = ", ".join(backend for backend in op.backends if backend not in lacking)
        own = "; ".join(backend if reason == reasons[backend] else f"{backend}: {reason}" for backend, reason in lacking.items())
        findings.add(section, name, usable + (f"  (not here: {own})" if own else ""))


def why_not_here(backend: str, gpus: list[int]) -> str | None:
    """Why kernels of a backend cannot run on this machine; None when a small one just did and was right."""
    from athanor.kernels._cpu import why_not_cpu
    from athanor.kernels._cuda import why_not_cuda
    from athanor.kernels._triton import why_not_triton

    if backend == "reference":
        return None
    if backend in ("cuda", "triton") and not gpus:
        return "no CUDA device"
    reason = {"cpu": why_not_cpu, "cuda": why_not_cuda, "triton": why_not_triton}[backend]({})
    if reason is not None:
        return reason
    device = "cpu" if backend == "cpu" else "cuda"
    try:
        tried = _try_logits(device) if backend == "cuda" else _try_norm(backend, device)
    except Exception as error:  # whatever a compiler or a driver raises: that it failed is the finding
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if tried else "a small kernel gave other numbers than its reference"


def _why_not_op(name: str, backend: str, reason: str | None, gpus: list[int]) -> str | None:
    """The same for one kernel: `cuda` of attention is flash-attn or torch's, that of the FP8 products Gluon, and neither needs CuPy."""
    import torch

    if backend != "cuda" or not gpus or name == "logits_grpo":
        return reason
    if name == "attention":
        there = importlib.util.find_spec("flash_attn") or importlib.util.find_spec("torch.nn.attention.varlen")
        return None if there else "neither flash-attn nor torch.nn.attention.varlen is installed"
    from athanor.kernels.fp8_grouped_gemm import why_no_hopper

    return why_no_hopper(torch.empty(0, device="cuda"))


def _try_norm(backend: str, device: str) -> bool:
    import torch

    from athanor.kernels import rmsnorm

    x = torch.linspace(-2, 3, 4 * 64, device=device).view(4, 64)
    weight = torch.linspace(0.5, 1.5, 64, device=device)
    return torch.allclose(rmsnorm(x, weight, backend=backend), rmsnorm(x, weight, backend="reference"), rtol=1e-5, atol=1e-6)


def _try_logits(device: str) -> bool:
    import torch

    from athanor.kernels import logits_grpo

    logits = torch.linspace(-2, 3, 4 * 512, device=device).view(4, 512)
    call = dict(cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32, device=device))
    targets, old = torch.tensor([3, 5, 7, 11], device=device), torch.full((4,), -6.0, device=device)
    advantages = torch.tensor([1.0, -1.0], device=device)
    losses = [logits_grpo(logits, targets, old, advantages, **call, backend=name)[0] for name in ("cuda", "reference")]
    return torch.allclose(*losses, rtol=1e-4, atol=1e-5)


def _run_folder(findings: Findings) -> None:
    try:
        folder = Path("runs") if Path("runs").is_dir() else Path(".")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        findings.problems.append(f"{Path.cwd()}: cannot write there ({error.strerror}): change the folder or give --run_root")


if __name__ == "__main__":
    sys.exit(main())
