"""Whole workloads beside what a user would otherwise run: contenders that take turns in one process, behind a gate of their own.

A file of cases/ that defines `workloads(device)` is a family of them.  What a contender needs before its first run (weights handed over, optimizer
state) is not timed; everything else of a run is, the host's part included.  All contenders have torch's number of threads (OMP_NUM_THREADS sets
it).  A contender that is not what it should be (another model's tokens, another number of them) is not timed.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gate import Verdict
from measure import environment, judged, sizes_of, speed
from timing import peak_bytes, quantile

MIN_RUNS = 5
ENGINE_NEEDS = {"pydantic": "pydantic", "safetensors": "safetensors", "tokenizers": "tokenizers"}  # beyond what the kernels and the bench import
SPLIT = ("first_token_s", "prefill_s", "forward_s", "sample_s", "host_s", "rollout_s", "update_s")  # parts of a run's seconds that a row may hold


@dataclass(frozen=True)
class Contender:
    """One way to do a workload's work, made only when its turn comes.

    maker: "module:Class", imported then, because the kernels are measured where the engine's packages are missing.  An object of the class has
    check() -> Verdict, which warms up too, and run() -> figures of one run, its "seconds" among them.
    """

    maker: str
    arguments: Callable[[], dict]  # of the class, beside the device
    ours: bool = False  # checked in every mode, before the others; wrong = nothing is timed
    needs: dict[str, str] = field(default_factory=dict)  # import name -> requirement for pip, beside the engine's

    def why_not(self) -> str | None:
        missing = [requirement for module, requirement in (ENGINE_NEEDS | self.needs).items() if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {' '.join(missing)}" if missing else None

    def make(self, device: str):
        module, name = self.maker.split(":")
        return getattr(importlib.import_module(module), name)(**self.arguments(), device=device)


@dataclass(frozen=True)
class Workload:
    """One workload at one size."""

    family: str  # the file in cases/, what --op names to run all of it
    op: str
    device: str
    sizes: dict[str, int | str]
    dtype: torch.dtype
    contenders: dict[str, Contender]  # in the order of the rows, ours first
    gate: str  # what the verdict on ours covers
    work: str  # the formula behind bytes and flops, for the reader
    bytes: float = 0  # that must be read and written at least
    flops: float = 0
    tokens: int = 0  # new tokens of one run; 0 = the row has no tokens/s
    bound_bytes: float = 0  # that one decode step of `rows` rows must read
    rows: int = 0
    rival: str = ""  # the contender whose time is divided by the others'
    goal: float = 0  # speed wanted of ours, in multiples of the rival's; 0 = none


def all_workloads(device: str) -> list[Workload]:
    names = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("*.py"))
    modules = [importlib.import_module(f"cases.{name}") for name in names]
    return [workload for module in modules if hasattr(module, "workloads") for workload in module.workloads(device)]


def seconds_of(function: Callable, device: str) -> tuple[object, float]:
    """Result and wall time of one call, the device's part included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def rows_of(workload: Workload, ceiling: dict | None, repeats: int, say: Callable[[str], None], skip: Sequence[str] = ()) -> list[dict]:
    """One row per contender that is not in `skip`; ceiling None: the gate of ours alone."""
    threads = torch.get_num_threads()
    rows, runners = [], {}
    for name, contender in workload.contenders.items():
        if name in skip or not contender.ours and (ceiling is None or not runners):
            continue
        row = {"kind": "backend" if contender.ours else "peer", "backend": name}
        reason = contender.why_not()
        if reason:
            rows.append(row | {"skipped": reason})
            continue
        say(f"{workload.op} {sizes_of(workload)}: {name}")
        made = []

        def check(contender=contender, made=made) -> Verdict:
            made.append(contender.make(workload.device))
            return made[0].check()

        row |= judged(name, check)
        row.pop("comparable", None)
        if row.get("correct"):
            runners[name] = made[0].run
        rows.append(row)
    torch.set_num_threads(threads)  # a peer's set-up may have changed it
    if ceiling is not None and runners:
        say(f"{workload.op} {sizes_of(workload)}: timing {', '.join(runners)}")
        figures = {name: [] for name in runners}
        for _ in range(max(MIN_RUNS, repeats)):
            for name, run in runners.items():
                figures[name].append(run())
        medians = {name: quantile(sorted(run["seconds"] for run in runs), 0.5) for name, runs in figures.items()}
        for row in rows:
            if row["backend"] in runners:
                row |= timed(workload, figures[row["backend"]], medians.get(workload.rival), ceiling)
                row["peak_bytes"] = peak_bytes(runners[row["backend"]], workload.device)
    head = {"family": workload.family, "op": workload.op, "sizes": workload.sizes, "dtype": str(workload.dtype).removeprefix("torch."),
            "work": workload.work, "bytes": workload.bytes, "flops": workload.flops}  # fmt: skip
    return [head | row | ({"gate": workload.gate} if row["kind"] == "backend" else {}) for row in rows]


def timed(workload: Workload, runs: list[dict], rival_s: float | None, ceiling: dict) -> dict:
    """Medians over the runs, of the time and of every other figure."""
    seconds = sorted(run["seconds"] for run in runs)
    median = quantile(seconds, 0.5)
    row = {"median_us": 1e6 * median, "p20_us": 1e6 * quantile(seconds, 0.2), "p80_us": 1e6 * quantile(seconds, 0.8), "repeats": len(seconds)}
    row |= speed(workload, 1e6 * median, ceiling)
    row |= {key: quantile(sorted(run[key] for run in runs), 0.5) for key in runs[0] if key != "seconds"}
    if workload.tokens:
        row["tokens_per_s"] = workload.tokens / median
    if workload.bound_bytes:
        row["bound_tokens_per_s"] = workload.rows * 1e9 * ceiling["copy_gb_s"] / workload.bound_bytes
    if rival_s is not None:
        row |= {"rival": workload.rival, "times_rival": rival_s / median} | ({"goal": workload.goal} if workload.goal else {})
    return row | ceiling


def measure(
    workloads: list[Workload], device: str, ceiling: dict | None, repeats: int, say: Callable[[str], None], skip: Sequence[str] = ()
) -> Iterator[dict]:
    common = environment(device, engine=True)
    for i, workload in enumerate(workloads, 1):
        for row in rows_of(workload, ceiling, repeats, lambda text, i=i: say(f"[{i}/{len(workloads)}] {text}"), skip):
            yield row | common
        if device == "cuda":
            torch.cuda.empty_cache()  # the next one may need most of the card
