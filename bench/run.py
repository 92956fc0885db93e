"""Measure every kernel beside what a user would otherwise run.

    python bench/run.py [--check] [--op NAME] [--json FILE] [--device cpu|cuda] [--list]

No timing without a correct result: each backend's outputs and gradients must err no more than twice plain PyTorch's own error against fp64, plus a
few ulp, or the case is reported as WRONG, not timed, and the exit code is 1.  Times are medians of at least 20 repetitions with p20 and p80; on CUDA
the L2 is cleared before each and the launches are queued ahead, so that a short kernel is not charged for Python.  The ceiling is measured in the
same run: copy bandwidth for memory-bound cases, a large matmul for the others.  On a CPU shared with other work only ratios within one run mean
anything.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from athanor.kernels._dispatch import OPS, near_misses  # noqa: E402

MIN_REPEATS = 20


def all_cases(device: str) -> list:
    modules = sorted(path.stem for path in (HERE / "cases").glob("*.py"))
    return [case for name in modules for case in importlib.import_module(f"cases.{name}").cases(device)]


def inputs_of(case, device: str, dtype: torch.dtype) -> dict:
    made = case.make(torch.Generator().manual_seed(0))
    rounded = {k: v.to(case.dtype) if v.is_floating_point() else v for k, v in made.items()}  # fp64 sees the same rounded numbers
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in rounded.items()}


def gate(case, device: str, backend: str) -> str | None:
    """None if this backend computes what fp64 PyTorch does, within the rule; else what differs."""
    inputs = inputs_of(case, device, case.dtype)
    got, plain = case.run(**inputs, backend=backend), case.eager(**inputs)
    # on a GPU the oracle of the largest cases would not fit in fp64: there it is computed on the CPU's memory
    oracle = case.eager(**inputs_of(case, "cpu", torch.float64))
    for i, (a, b, c) in enumerate(zip(got, plain, oracle, strict=True)):
        a, b = a.double().cpu(), b.double().cpu()
        # a zero-filled or NaN output must not pass because the eager one is as wrong
        if a.shape != c.shape or not torch.isfinite(a).all():
            return f"output {i}: shape {tuple(a.shape)}, finite {bool(torch.isfinite(a).all())}; wanted {tuple(c.shape)}, finite"
        ulp = torch.finfo(got[i].dtype).eps * c.abs().max()
        error, allowed = (a - c).abs().max(), 2 * (b - c).abs().max() + case.slack * ulp
        if error > allowed:
            return f"output {i}: error {error:.3e}, allowed {allowed:.3e}"
    return None


def times_us(function, device: str, repeats: int) -> list[float]:
    """Sorted times of single calls."""
    for _ in range(3):
        function()
    times = []
    if device == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - start))
        return sorted(times)
    cache = torch.empty(256 << 20, dtype=torch.int8, device=device)  # several times any L2
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # about 1 ms in which the launches below are queued
        cache.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return sorted(times)


def quantile(times: list[float], q: float) -> float:
    return times[min(len(times) - 1, round(q * (len(times) - 1)))]


def ceilings(device: str) -> dict[str, float]:
    """GB/s of a copy (read + write) and TFLOP/s of a large matmul in the dtype of the cases, on random numbers, now."""
    n, m = (1 << 28, 8192) if device == "cuda" else (1 << 23, 512)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, y = torch.randn(n, device=device), torch.empty(n, device=device)
    a, b = (torch.randn(m, m, device=device).to(dtype) for _ in range(2))
    copy, matmul = (quantile(times_us(f, device, MIN_REPEATS), 0.5) for f in (lambda: y.copy_(x), lambda: a @ b))
    return {"copy_gb_s": 8e-3 * n / copy, "matmul_tflop_s": 2e-6 * m**3 / matmul}


def environment(device: str) -> dict[str, str]:
    import importlib.util

    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none"
    return {"machine": name, "threads": torch.get_num_threads(), "commit": commit, "torch": torch.__version__, "triton": triton}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(case, device: str, check_only: bool, ceiling: dict, common: dict, repeats: int) -> list[dict]:
    """One row per backend that can serve the case, and one per rival."""
    inputs, rows = inputs_of(case, device, case.dtype), []
    contenders = {}
    for backend in OPS[case.op].backends:
        if device == "cpu" and backend == "triton":
            continue  # the interpreter is for tests: its times mean nothing
        try:
            case.run(**inputs, backend=backend)
        except ValueError as refusal:
            rows.append({"backend": backend, "skipped": str(refusal)})
            continue
        wrong = gate(case, device, backend)
        rows.append({"backend": backend, "correct": wrong is None} | ({} if wrong is None else {"wrong": wrong}))
        if wrong is None:
            contenders[backend] = lambda backend=backend: case.run(**inputs, backend=backend)
    if not check_only and contenders:
        contenders |= {"eager": lambda: case.eager(**inputs)} | {name: (lambda f=f: f(**inputs)) for name, f in case.rivals.items()}
        rows += [{"backend": name} for name in contenders if name not in {row["backend"] for row in rows}]
        measured = {name: times_us(f, device, repeats) for name, f in contenders.items()}
        for row in rows:
            if row["backend"] in measured:
                row |= timing(case, measured[row["backend"]], quantile(measured["eager"], 0.5), ceiling)
    head = {"op": case.op, "sizes": case.sizes, "dtype": str(case.dtype).removeprefix("torch."), "work": case.work}
    return [head | row | common for row in rows]


def timing(case, times: list[float], eager_us: float, ceiling: dict) -> dict:
    median = quantile(times, 0.5)
    gb_s, tflop_s = case.bytes / median * 1e-3, case.flops / median * 1e-6
    limit = max(gb_s / ceiling["copy_gb_s"], tflop_s / ceiling["matmul_tflop_s"])
    return {"median_us": median, "p20_us": quantile(times, 0.2), "p80_us": quantile(times, 0.8), "repeats": len(times), "gb_s": gb_s,
            "tflop_s": tflop_s, "percent_of_ceiling": 100 * limit, "times_eager": eager_us / median} | ceiling  # fmt: skip


def show(row: dict) -> str:
    sizes = " ".join(f"{k}={v}" for k, v in row["sizes"].items())
    start = f"{row['op']:<16}{sizes:<34}{row['dtype']:<10}{row['backend']:<20}"
    if "skipped" in row:
        return f"{start}skipped: {row['skipped']}"
    if "wrong" in row:
        return f"{start}WRONG {row['wrong']}"
    if "median_us" not in row:
        return f"{start}correct"
    rate = f"{row['gb_s']:.1f} GB/s" if row["gb_s"] else f"{row['tflop_s']:.3f} TFLOP/s"
    return (f"{start}{row['median_us']:10.1f} us  [{row['p20_us']:.1f}, {row['p80_us']:.1f}]  {rate:>16}"
            f"  {row['percent_of_ceiling']:5.1f} % of ceiling  {row['times_eager']:.2f}x eager")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="run the correctness gate only")
    parser.add_argument("--op", help="one operation instead of all")
    parser.add_argument("--json", type=Path, help="append one JSON object per row to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30, help=f"timed calls per row, at least {MIN_REPEATS}")
    parser.add_argument("--list", action="store_true", help="print the cases and their backends")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if arguments.repeats < MIN_REPEATS:
        parser.error(f"--repeats {arguments.repeats}: wanted at least {MIN_REPEATS}")
    cases = all_cases(arguments.device)
    if arguments.op and arguments.op not in {case.op for case in cases}:
        parser.error(f"--op: no case for {arguments.op!r}; {near_misses(arguments.op, {case.op for case in cases})}")
    cases = [case for case in cases if arguments.op in (None, case.op)]
    if arguments.list:
        for case in cases:
            print(f"{case.op:<16}{' '.join(f'{k}={v}' for k, v in case.sizes.items()):<34}{', '.join(OPS[case.op].backends)}")
        return 0
    common = environment(arguments.device) | {"device": arguments.device}
    ceiling = {} if arguments.check else ceilings(arguments.device)
    print(" ".join(f"{k}={v}" for k, v in common.items()), *(f"{k}={v:.3g}" for k, v in ceiling.items()))
    wrong = False
    for case in cases:
        for row in measure(case, arguments.device, arguments.check, ceiling, common, arguments.repeats):
            print(show(row), flush=True)
            wrong |= "wrong" in row
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
