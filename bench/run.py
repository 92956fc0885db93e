"""Measure every kernel, and whole workloads of the engine, beside what a user would otherwise run.

    python bench/run.py [--op NAME ...] [--check] [--compile] [--list] [--json FILE] [--plot FILE] [--base REV] [--device cpu|cuda] [--repeats N]

No timing without a correct result (gate.py): a backend that errs more than twice plain PyTorch against fp64, plus a few ulp, is reported as WRONG,
not timed, and the exit code is 1.  Times are medians of at least 20 repetitions with p20 and p80 (timing.py); the ceilings, copy bandwidth and
matmul, are measured in the same run.  Peers that are installed run behind the same gate (peers.py).  --op rollout is a family of whole workloads
(workloads.py): sampling, a GRPO step, the prefill of a group.  --compile needs no GPU: it compiles every kernel for sm_80, sm_90 and sm_100 and exits
with 1 when one spills or passes a limit.  --check --compile does both, one after the other, with one exit code.  On a CPU shared with other work only
ratios within one run mean anything; OMP_NUM_THREADS sets the threads of all contenders.  The last line on stdout is one JSON object; exit codes:
0 good, 1 wrong or over a limit, 2 bad arguments.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import workloads  # noqa: E402
from measure import all_cases, base_rows, environment, measure, with_base  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import MIN_REPEATS, ceilings  # noqa: E402

from athanor.kernels._dispatch import OPS, near_misses  # noqa: E402

progress = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    progress.print(text, markup=False)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"run.py: {message}", file=sys.stderr)  # one line, without the usage
        raise SystemExit(2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--op", action="append", metavar="NAME", help="one operation, workload or family of workloads instead of all; repeatable")
    parser.add_argument("--check", action="store_true", help="run the correctness gate, without timing")
    parser.add_argument("--compile", action="store_true", help="compile for sm_80, sm_90, sm_100: registers, shared memory, spills, matrix products")
    parser.add_argument("--list", action="store_true", help="print the cases and their backends")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object per row to this file, and draw a plot beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw roofline and percent of the ceiling to this PNG")
    parser.add_argument("--base", metavar="REV", help="measure the same cases with the kernels of this git revision too and print the ratio per row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave a backend or peer out, torch.compile say; repeatable")
    parser.add_argument("--repeats", type=int, default=30, help=f"timed calls per row, at least {MIN_REPEATS} (default 30); of a workload a sixth")
    parser.add_argument("--older-kernels", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    timing = not (chosen.check or chosen.compile or chosen.list)
    if chosen.list and (chosen.check or chosen.compile):
        parser.error(f"--list: not with --{'check' if chosen.check else 'compile'}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if chosen.repeats < MIN_REPEATS:
        parser.error(f"--repeats {chosen.repeats}: wanted at least {MIN_REPEATS}")
    found = [] if chosen.older_kernels else workloads.all_workloads(chosen.device)
    whole = {name for workload in found for name in (workload.family, workload.op)}
    for name in chosen.op or []:
        if name in whole and (chosen.compile or chosen.base):
            parser.error(f"--{'compile' if chosen.compile else 'base'} is for kernels: {name} is a workload of the engine")
        if name not in OPS and name not in whole and not chosen.older_kernels:
            parser.error(f"--op: no operation {name!r}; {near_misses(name, [*OPS, *whole])}")
    for option in ("plot", "base"):
        if getattr(chosen, option) and not timing:
            parser.error(f"--{option} needs times: not with --check, --compile or --list")
    known = ["git", "-C", str(HERE), "rev-parse", "--verify", "--quiet", f"{chosen.base}^{{commit}}"]
    if chosen.base and subprocess.run(known, capture_output=True).returncode:
        parser.error(f"--base {chosen.base}: no such revision in this repository")
    for option in ("json", "plot"):
        path = getattr(chosen, option)
        if path and not path.resolve().parent.is_dir():
            parser.error(f"--{option} {path}: there is no folder {path.parent}")
    if chosen.json and not chosen.plot and timing and not chosen.older_kernels:
        chosen.plot = chosen.json.with_suffix(".png")
    return chosen


TEXT = ("op", "sizes", "dtype", "backend", "split", "note", "kernel", "case")  # columns that are not numbers


def table_of(rows: list[dict], columns: dict, title: str | None = None) -> Table:
    table = Table(title=title, box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", justify="left" if name in TEXT else "right")
    for row in rows:
        table.add_row(*(str(show(row)) for show in columns.values()))
    return table


def number(key: str, form: str):
    return lambda row: format(row[key], form) if key in row else ""


def note(row: dict) -> str:
    if "skipped" in row:
        return "skipped: " + row["skipped"].split("cannot serve this call: ")[-1]
    parts = [f"WRONG {row['wrong']}"] if "wrong" in row else ["correct"] if row.get("correct") else []
    parts += [f"largest gap {max(gap for gap, _ in row['errors']):.1e}"] if "family" in row and row.get("errors") else []
    parts += [f"slowest rank {row['slowest_row_steps']:.0f} row steps, mean {row['mean_row_steps']:.0f}, {row['handed_over']:.0f} handed over"
              for _ in range("slowest_row_steps" in row)]
    parts += [f"goal {row['goal']:g} x {row['rival']}"] if row["kind"] == "backend" and "goal" in row else []
    return "; ".join(parts + ([] if row.get("queued", True) else ["host-bound: holds Python's time"]))


def rate(row: dict) -> str:
    """In the unit of the ceiling that binds."""
    if "median_us" not in row:
        return ""
    by_bytes = row["gb_s"] / row["copy_gb_s"] >= row["tflop_s"] / row["matmul_tflop_s"]
    return f"{row['gb_s']:.1f} GB/s" if by_bytes else f"{row['tflop_s']:.3f} TFLOP/s"


UNTIMED = ("op", "sizes", "dtype", "backend", "note")
COLUMNS = {
    "op": lambda row: row["op"], "sizes": lambda row: " ".join(f"{k}={v}" for k, v in row["sizes"].items()), "dtype": lambda row: row["dtype"],
    "backend": lambda row: row["backend"], "median us": number("median_us", ".1f"),
    "p20-p80": lambda row: f"{row['p20_us']:.1f}-{row['p80_us']:.1f}" if "p20_us" in row else "", "rate": rate,
    "% ceiling": number("percent_of_ceiling", ".1f"), "x eager": number("times_eager", ".2f"), "x base": number("times_base", ".2f"),
    "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else "", "note": note,
}  # fmt: skip
WORKLOADS = {
    **{name: COLUMNS[name] for name in ("op", "sizes", "dtype", "backend")},
    "median s": lambda row: f"{row['median_us'] / 1e6:.3f}" if "median_us" in row else "",
    "p20-p80": lambda row: f"{row['p20_us'] / 1e6:.3f}-{row['p80_us'] / 1e6:.3f}" if "p20_us" in row else "",
    "tokens/s": number("tokens_per_s", ".0f"), "decode tokens/s": number("decode_tokens_per_s", ".0f"), "bound": number("bound_tokens_per_s", ".0f"),
    "% ceiling": COLUMNS["% ceiling"], "x rival": number("times_rival", ".2f"), "peak MiB": COLUMNS["peak MiB"],
    "split": lambda row: ", ".join(f"{key.removesuffix('_s').replace('_', ' ')} {row[key]:.3f} s" for key in workloads.SPLIT if key in row),
    "note": note,
}  # fmt: skip
COMPILED = {
    "op": lambda row: row["op"], "case": lambda row: row["case"], "arch": lambda row: row["arch"],
    "registers": lambda row: f"{row['registers']}/{row['registers_limit']}" if "registers" in row else "", "shared": number("shared", "d"),
    "stack": number("stack", "d"), "local": number("local", "d"), "warps": number("warps", "d"), "matrix": lambda row: row.get("matrix", ""),
    "note": lambda row: "OVER: " + "; ".join(row["broken"]) if row["broken"] else "ok",
}  # fmt: skip


def compile_all(chosen: argparse.Namespace, out: Console) -> dict:
    """The rows of every kernel and how many are over a limit."""
    from compile_report import cuda_rows, triton_cases, triton_rows, why_no_cuda

    rows, total = [], sum(len(case.capabilities) for _, case in triton_cases(chosen.op))
    for row in triton_rows(chosen.op):
        rows.append(row)
        say(f"[{len(rows)}/{total}] {row['case']} {row['arch']}")
    reason = why_no_cuda()
    rows += [] if reason else cuda_rows(chosen.op)
    out.print(table_of(rows, COMPILED) if rows else f"nothing to compile: {', '.join(chosen.op)} runs on other operations' kernels")
    if reason:
        out.print(reason)
    append(chosen.json, rows)
    return {"mode": "compile", "over": sum(bool(row["broken"]) for row in rows), "cuda": reason or "compiled", "rows": rows}


def append(path: Path | None, rows: list[dict]) -> None:
    if path:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def cases_and_workloads(chosen: argparse.Namespace) -> tuple[list, list]:
    cases = [case for case in all_cases(chosen.device, say if chosen.older_kernels else None) if not chosen.op or case.op in chosen.op]
    whole = [] if chosen.base or chosen.older_kernels else [
        workload for workload in workloads.all_workloads(chosen.device) if not chosen.op or {workload.family, workload.op} & set(chosen.op)
    ]  # fmt: skip
    return cases, whole


def list_all(chosen: argparse.Namespace) -> None:
    cases, whole = cases_and_workloads(chosen)
    for case in cases:
        sizes = " ".join(f"{k}={v}" for k, v in case.sizes.items())
        print(f"{case.op:<16}{sizes:<34}{str(case.dtype).removeprefix('torch.'):<10}{', '.join(OPS[case.op].backends)}")
    for workload in whole:
        sizes = " ".join(f"{k}={v}" for k, v in workload.sizes.items())
        print(f"{workload.op:<16}{sizes:<34} {str(workload.dtype).removeprefix('torch.'):<10}{', '.join(workload.contenders)}")


def measure_all(chosen: argparse.Namespace, out: Console) -> dict:
    """The rows of every case and workload, behind the gate, timed unless --check, and which of our backends are wrong."""
    cases, whole = cases_and_workloads(chosen)
    common = environment(chosen.device)
    out.print(" ".join(f"{k}={v}" for k, v in common.items()))
    if chosen.device == "cpu":
        out.print("CPU: Triton kernels are not measured; times depend on what else this machine does, only ratios within this run mean anything")
    ceiling = None
    if not chosen.check:
        say("measuring the ceilings")
        ceiling = ceilings(chosen.device)
        out.print("ceilings of this run: " + " ".join(f"{k}={v:.4g}" for k, v in ceiling.items()))
    rows = []
    for row in measure(cases, chosen.device, ceiling, chosen.repeats, say, chosen.skip):
        rows.append(row)
        append(chosen.json if not chosen.base else None, [row])  # at once: a long run that is killed keeps what it has
    if chosen.base:
        say(f"again with the kernels of {chosen.base}")
        again = ["--device", chosen.device, "--repeats", str(chosen.repeats), *(x for name in chosen.op or [] for x in ("--op", name))]
        with tempfile.TemporaryDirectory() as folder:
            with_base(rows, base_rows(chosen.base, again, Path(folder)))
        append(chosen.json, rows)
    columns = {k: v for k, v in COLUMNS.items() if (k != "x base" or chosen.base) and (ceiling or k in UNTIMED)}
    if rows:
        out.print(table_of(rows, columns))
    for row in workloads.measure(whole, chosen.device, ceiling, chosen.repeats // 6, say, chosen.skip):
        rows.append(row)
        append(chosen.json, [row])
    if whole:
        out.print(table_of([row for row in rows if "family" in row], {k: v for k, v in WORKLOADS.items() if ceiling or k in UNTIMED}))
    if chosen.plot and any("median_us" in row for row in rows):
        from plots import roofline

        roofline(rows, ceiling, f"{common['machine']}, commit {common['commit']}, torch {common['torch']}", chosen.plot)
        out.print(f"plot: {chosen.plot}")
    wrong = [f"{row['op']} {row['backend']}" for row in rows if row["kind"] == "backend" and "wrong" in row]
    if not rows:
        out.print("no case matched")
    return {"mode": "check" if chosen.check else "time"} | common | {"ceilings": ceiling, "wrong": wrong, "rows": rows}


def main() -> int:
    chosen = parse()
    if chosen.list:
        list_all(chosen)
        return 0
    out, reports = Console(highlight=False, width=None if sys.stdout.isatty() else 200), []
    if chosen.check or not chosen.compile:
        reports.append(measure_all(chosen, out))
    if chosen.compile:
        reports.append(compile_all(chosen, out))
    last = {key: value for report in reports for key, value in report.items()}
    last |= {"mode": " and ".join(report["mode"] for report in reports), "rows": [row for report in reports for row in report["rows"]]}
    print(json.dumps(last))
    unmeasured = any("wrong" in report and not report["rows"] for report in reports) and not chosen.older_kernels
    return int(bool(last.get("wrong") or last.get("over")) or unmeasured)


if __name__ == "__main__":
    sys.exit(main())
