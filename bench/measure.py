"""From cases to rows: what each backend and each peer gave, behind the gate."""

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from gate import Gate, Verdict
from peers import peers_of
from timing import peak_bytes, quantile, times_us

import athanor
import athanor.kernels
from athanor.kernels._dispatch import OPS

HERE = Path(__file__).parent


def all_cases(device: str, say: Callable[[str], None] | None = None) -> list:
    """Every case of every file in cases/.

    say: given when the kernels are older than the cases (see run.py --base): what those kernels do not have is told to it and left out.
    """
    found = []
    for name in sorted(path.stem for path in (HERE / "cases").glob("*.py")):
        try:
            module = importlib.import_module(f"cases.{name}")
            cases = module.cases(device) if hasattr(module, "cases") else []  # a file of whole workloads has none, see workloads.py
        except (ImportError, AttributeError, TypeError) as error:
            if say is None:
                raise
            say(f"cases/{name}.py does not fit these kernels: {error}")
            continue
        for case in cases:
            if say is not None and case.op not in OPS:
                say(f"{case.op}: not among these kernels")
            else:
                found.append(case)
    return found


def counterpart(case, device: str) -> Callable:
    """Where the GPU's case is too large for the oracle: the CPU's case of the same operation, the one in the same place."""

    def find():
        if device == "cpu":
            return None
        here = [c for c in all_cases(device) if c.op == case.op]
        there = [c for c in all_cases("cpu") if c.op == case.op]
        place = [c.sizes for c in here].index(case.sizes)
        return there[min(place, len(there) - 1)] if there else None

    return find


def environment(device: str, *, engine: bool = False) -> dict:
    """Machine, versions, and the commit of the kernels that are measured (`-dirty` where their folder differs from it).

    engine: the engine and the C++ sources count too.  ATHANOR_COMMIT names the commit of a copy that is no repository.
    """
    kernels = athanor.kernels.__path__[0]
    measured = [".", athanor.__path__[0], str(HERE.parent / "csrc")] if engine else ["."]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", kernels, *arguments], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or os.environ.get("ATHANOR_COMMIT", "unknown")
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none"
    return {"machine": name, "device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "triton": triton, "commit": commit + ("-dirty" if git("status", "--porcelain", "--", *measured) else "")}  # fmt: skip


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def sizes_of(case) -> str:
    return " ".join(f"{k}={v}" for k, v in case.sizes.items())


def rows_of(case, device: str, ceiling: dict | None, repeats: int, say: Callable[[str], None], skip: Sequence[str] = ()) -> list[dict]:
    """One row per backend that can serve the case, then eager and the peers, without those in `skip`.  ceiling None: the gate alone."""
    say(f"{case.op} {sizes_of(case)}: gate")
    gate = Gate(case, device, counterpart(case, device))
    rows, contenders = [], {}
    for name in OPS[case.op].backends:
        if name in skip or device == "cpu" and name == "triton":
            continue  # the interpreter is for tests: its times mean nothing
        row = judged(name, lambda name=name: gate.check(lambda **inputs: case.run(**inputs, backend=name)))
        if row.get("correct"):
            contenders[name] = lambda name=name: case.run(**inputs, backend=name)
        rows.append({"kind": "backend"} | row)
    if ceiling is not None and contenders:
        inputs = gate.inputs
        contenders["eager"] = lambda: case.eager(**inputs)
        rows.append({"kind": "peer", "backend": "eager"})
        for name, peer in peers_of(case, device).items():
            if name.split()[0] in skip:
                continue
            say(f"{case.op} {sizes_of(case)}: {name}")
            row = judged(name, lambda peer=peer: gate.check(peer))
            # a peer beyond the rule (most round logits to bf16) is timed all the same, with its error beside it; nonsense is not
            if row.pop("comparable", False):
                contenders[name] = peer.timed(**inputs) if hasattr(peer, "timed") else lambda peer=peer: peer(**inputs)
            rows.append({"kind": "peer"} | row)
        for name, floor in case.floors.items():
            contenders[name] = lambda floor=floor: floor(**inputs)
            rows.append({"kind": "floor", "backend": name})
        say(f"{case.op} {sizes_of(case)}: timing {', '.join(contenders)}")
        times = times_us(contenders, device, repeats)
        eager_us = quantile(times["eager"][0], 0.5)
        for row in rows:
            if row["backend"] in times:
                row |= timed(case, *times[row["backend"]], eager_us, ceiling) | {"peak_bytes": peak_bytes(contenders[row["backend"]], device)}
    head = {"op": case.op, "sizes": case.sizes, "dtype": str(case.dtype).removeprefix("torch."), "work": case.work, "bytes": case.bytes,
            "flops": case.flops}  # fmt: skip
    for row in rows:
        row.pop("comparable", None)
    return [head | row | {"gate": gate.scope} for row in rows]


def judged(name: str, check: Callable[[], Verdict]) -> dict:
    """What a gate says of one contender.  What it raises goes into the row: one broken contender must not cost the rest of a run."""
    try:
        verdict = check()
    except ValueError as refusal:
        if "cannot serve this call" in str(refusal):
            return {"backend": name, "skipped": str(refusal)}
        return {"backend": name, "wrong": f"raised {refusal}"}
    except Exception as error:  # noqa: BLE001
        return {"backend": name, "wrong": f"raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
    row = {"backend": name, "correct": verdict.wrong is None, "errors": verdict.errors, "comparable": verdict.finite}
    return row if verdict.wrong is None else row | {"wrong": verdict.wrong}


def timed(case, times: list[float], queued: bool, eager_us: float, ceiling: dict) -> dict:
    median = quantile(times, 0.5)
    return {"median_us": median, "p20_us": quantile(times, 0.2), "p80_us": quantile(times, 0.8), "repeats": len(times), "queued": queued,
            "times_eager": eager_us / median} | speed(case, median, ceiling) | ceiling  # fmt: skip


def speed(case, median_us: float, ceiling: dict) -> dict:
    """Useful bytes and flops per time, and the percentage of the ceiling that binds."""
    gb_s, tflop_s = case.bytes / median_us * 1e-3, case.flops / median_us * 1e-6
    limit = max(gb_s / ceiling["copy_gb_s"], tflop_s / ceiling["matmul_tflop_s"])
    return {"gb_s": gb_s, "tflop_s": tflop_s, "percent_of_ceiling": 100 * limit}


def measure(cases: list, device: str, ceiling: dict | None, repeats: int, say: Callable[[str], None], skip: Sequence[str] = ()) -> Iterator[dict]:
    common = environment(device)
    for i, case in enumerate(cases, 1):
        for row in rows_of(case, device, ceiling, repeats, lambda text, i=i: say(f"[{i}/{len(cases)}] {text}"), skip):
            yield row | common
        if device == "cuda":
            torch.cuda.empty_cache()  # the next case's oracle may need most of the card


def base_rows(revision: str, arguments: list[str], folder: Path) -> list[dict]:
    """Rows of the same cases with the kernels of another revision, measured in a process of its own."""
    root, tree, output = HERE.parent, folder / "tree", folder / "rows.jsonl"
    subprocess.run(["git", "-C", str(root), "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True, stdout=subprocess.DEVNULL)
    try:
        command = [sys.executable, str(HERE / "overlay.py"), str(tree / "kernels"), str(HERE / "run.py"), "--older-kernels", "--json", str(output)]
        done = subprocess.run([*command, *arguments], stdout=subprocess.DEVNULL)
        if done.returncode not in (0, 1):  # 1: a kernel of that revision is wrong by today's gate, which its rows say
            raise RuntimeError(f"--base {revision}: the run with its kernels ended with exit code {done.returncode}")
    finally:
        subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], capture_output=True)
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def with_base(rows: list[dict], before: list[dict]) -> None:
    """Add to each row what the same case and backend gave at the base: its median, commit, and time before / time now."""

    def key(row: dict) -> tuple:
        return row["op"], tuple(row["sizes"].items()), row["dtype"], row["backend"]

    found = {key(row): row for row in before if "median_us" in row}
    for row in rows:
        old = found.get(key(row))
        if old and "median_us" in row:
            row |= {"base_us": old["median_us"], "base_commit": old["commit"], "times_base": old["median_us"] / row["median_us"]}
