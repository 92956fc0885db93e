"""Time what a kernel's tile table could hold, on the GPU at hand, each entry behind the gate of bench/run.py.

    python bench/tune.py [--op NAME ...] [--jobs N] [--seconds S] [--json FILE] [--compile-only | --no-compile]

The tables in kernels/*_triton.py are static, so that every rank computes the same bits; this is how their entries are chosen.  A candidate replaces
one constant of a kernel module while it is measured, after what the table holds now.  All candidates are first compiled, by N processes that run each
of them once, then timed by one process in the order of the list until S seconds have passed.  The last line on stdout is one JSON object.
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from gate import Gate, inputs_of  # noqa: E402
from measure import all_cases, counterpart, environment, judged, sizes_of  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import MIN_REPEATS, ceilings, quantile, times_us  # noqa: E402

HOPPER = 90


class Sweep(NamedTuple):
    """Values for one constant, measured on the cases of `op` whose sizes contain `where`."""

    op: str
    module: str  # of athanor.kernels
    constant: str
    values: list  # of the whole constant or, where it is a table, of its entry for sm_90 or else of all its entries
    where: dict = {}


def sweeps() -> list[Sweep]:
    """Those of the kernels farthest from their limit first."""
    wide, low = (128, 256, 64, 8, 3), (64, 128, 64, 4, 4)
    heads = [{True: a, False: b} for a, b in ((8192, 4096), (4096, 4096), (16384, 4096), (2048, 4096))]
    return [
        Sweep("linear_logprob", "linear_logprob_triton", "TILES",
              [(*wide, 1024), (128, 256, 64, 8, 4, 1024), (*wide, 4096), (*wide, 1024, 8), (*wide, 1024, 32), (128, 128, 64, 4, 4, 1024),
               (128, 128, 64, 8, 4, 1024), (256, 128, 64, 8, 3, 1024), (128, 256, 128, 8, 2, 1024), (64, 256, 64, 4, 4, 1024)], {"backward": 0}),
        Sweep("fp8_quantize", "fp8_quantize_triton", "TALL",
              [(16, 2, 1, 0, 64), (16, 2, 16, 0, 64), (16, 2, 32, 0, 64), (16, 2, 8, 0, 80), (16, 1, 8, 2, None), (16, 1, 8, 3, None),
               (16, 1, 16, 3, None), (16, 2, 8, 2, 64)], {"layouts": 2}),
        Sweep("group_advantage", "group_advantage_triton", "OTHERS", [128, 512, 1024]),
        Sweep("group_advantage", "group_advantage_triton", "MEMBERS", [2, 4, 16]),
        Sweep("moe_places", "moe_permute_triton", "SCAN_BLOCKS", [64, 256, 512]),
        Sweep("moe_places", "moe_permute_triton", "SCAN_EXPERTS", [4, 16, 32]),
        Sweep("moe_route", "moe_route_triton", "COUNT_ROWS", [64, 128, 512]),
        Sweep("moe_places", "moe_permute_triton", "PLACE_WARPS", [4, 16]),
        Sweep("mla_decode", "mla_decode_triton", "CHUNK", [256, 512, 2048]),
        Sweep("mla_decode", "mla_decode_triton", "TILES",
              [(64, 64, 8, 2), (64, 32, 4, 2), (64, 16, 4, 3), (64, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2)], {"H": 128}),
        Sweep("mla_decode", "mla_decode_triton", "TILES_FEW",
              [(16, 32, 4, 3), (16, 64, 4, 2), (16, 64, 8, 2), (16, 32, 8, 3), (16, 16, 4, 3), (16, 32, 2, 3)], {"H": 16}),
        Sweep("moe_route", "moe_route_triton", "TILE", [512, 2048, 256]),
        Sweep("moe_route", "moe_route_triton", "WARPS", [1, 2, 8]),
        Sweep("paged_attention", "paged_attention_triton", "TILES_DECODE",
              [(16, 64, 4, 4), (16, 64, 4, 5), (16, 64, 4, 3), (16, 32, 4, 6), (16, 64, 2, 6), (16, 128, 4, 4), (64, 32, 4, 5), (64, 32, 4, 6)]),
        Sweep("attention", "attention_triton", "TILES", [(64, 32, 4, 5), (128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3), (128, 128, 8, 2)]),
        Sweep("attention", "attention_triton", "TILES_DQ", [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3)]),
        Sweep("attention", "attention_triton", "TILES_DKV", [(64, 64, 8, 2), (64, 64, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3), (64, 128, 8, 3)]),
        Sweep("linear", "linear_triton", "HOPPER",
              [(64, 32, 128, 4, 5, 0), (64, 64, 128, 4, 4, 0), (128, 128, 64, 8, 4, 0), (*low, 0), (64, 32, 128, 4, 6, 0), (64, 64, 128, 4, 5, 0),
               (128, 64, 64, 4, 5, 0), (128, 64, 128, 8, 3, 0), (128, 128, 64, 8, 3, 0), (128, 128, 64, 4, 4, 0), (*wide, 0)], {"backward": 0}),
        Sweep("linear_sample", "linear_sample_triton", "TILES",
              [(*low, 128), (64, 128, 64, 4, 6, 128), (64, 128, 128, 4, 3, 128), (64, 128, 128, 4, 4, 128), (64, 128, 64, 8, 4, 128),
               (64, 128, 64, 4, 3, 128)]),
        Sweep("sample", "sample_tiles_triton", "TILES", [16, 32, 8]),
        Sweep("sample", "sample_tiles_triton", "TILE_WARPS", [4, 2, 8]),
        Sweep("sample", "sample_triton", "DRAW_WARPS", [1, 2, 4]),
        Sweep("sample", "sample_bracket_triton", "WARPS", [16, 8]),
        Sweep("sample", "sample_bracket_triton", "SAMPLED", [8, 4, 16]),
        Sweep("sample", "sample_bracket_triton", "STEPS", [9, 6, 12]),
        Sweep("sample", "sample_filter_triton", "COLLECT_WARPS", [4, 2, 8]),
        Sweep("sample", "sample_filter_triton", "RESOLVE_WARPS", [16, 8, 4]),
        Sweep("sample", "sample_filter_triton", "CHUNK", [2048, 1024, 4096]),
        Sweep("sample", "sample_filter_triton", "PIVOTS", [8, 4, 16]),
        Sweep("logits_grpo", "logits_grpo_triton", "BLOCK", heads),
        Sweep("logits_grpo", "logits_grpo_triton", "WARPS", [{True: n, False: 8} for n in (32, 16, 8)]),
        Sweep("logprob", "logprob_triton", "BLOCK", [4096, 2048, 8192]),
        Sweep("logprob", "logprob_triton", "WARPS", [8, 4, 16, 32]),
        Sweep("linear_grpo", "linear_grpo_triton", "BLOCK", [4096, 2048, 8192]),
        Sweep("swiglu", "swiglu_triton", "TILE", [2048, 1024, 4096, 8192]),
        Sweep("swiglu", "swiglu_triton", "WARPS", [4, 8]),
        Sweep("rmsnorm", "rmsnorm_triton", "TILE", [2048, 4096, 8192]),
        Sweep("rmsnorm", "rmsnorm_triton", "SLABS", [792, 396, 1584, 264]),
        Sweep("rope", "rope_triton", "TILE", [1024, 2048, 512, 4096]),
        Sweep("rope", "rope_triton", "BWD_TILE", [512, 1024, 2048]),
        Sweep("policy_loss", "policy_loss_triton", "BLOCK", [512, 1024, 256]),
    ]  # fmt: skip


@contextmanager
def replaced(sweep: Sweep, value) -> Iterator[None]:
    """value None: as it is."""
    module = importlib.import_module(f"athanor.kernels.{sweep.module}")
    before = getattr(module, sweep.constant)
    if value is None:
        value = before
    elif isinstance(before, dict) and isinstance(value, tuple):
        entries = [HOPPER] if HOPPER in before else before
        value = before | {name: type(before[name])(*value) for name in entries}
    elif isinstance(before, tuple):
        value = type(before)(*value)
    setattr(module, sweep.constant, value)
    try:
        yield
    finally:
        setattr(module, sweep.constant, before)


def cases_of(sweep: Sweep) -> list:
    return [case for case in all_cases("cuda") if case.op == sweep.op and sweep.where.items() <= case.sizes.items()]


def compile_once(task: tuple[Sweep, object]) -> None:
    """Run one candidate so that its binaries lie in Triton's cache; failures show when it is measured."""
    sweep, value = task
    for case in cases_of(sweep):
        inputs = {}
        try:
            inputs = inputs_of(case, "cuda")
            with replaced(sweep, value):
                case.run(**inputs, backend="triton")
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001
            print(f"{sweep.op} {sweep.constant} {value}: {type(error).__name__}", file=sys.stderr)
        del inputs
        torch.cuda.empty_cache()


def measured(sweep: Sweep, case, gate: Gate, value) -> dict:
    def run(**inputs):
        return case.run(**inputs, backend="triton")

    with replaced(sweep, value):
        row = judged("triton", lambda: gate.check(run))
        if row.get("correct"):
            times, queued = times_us({"triton": lambda: run(**gate.inputs)}, "cuda", MIN_REPEATS)["triton"]
            row |= {"median_us": quantile(times, 0.5), "p20_us": quantile(times, 0.2), "p80_us": quantile(times, 0.8), "queued": queued}
    row.pop("comparable", None)
    return {"op": sweep.op, "sizes": case.sizes, "constant": sweep.constant, "value": "as it is" if value is None else str(value)} | row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300, help="of timing; what is not reached is left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object per measurement")
    parser.add_argument("--compile-only", action="store_true", help="time nothing")
    parser.add_argument("--no-compile", action="store_true", help="the binaries lie in Triton's cache already")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    wanted = [sweep for sweep in sweeps() if not chosen.op or sweep.op in chosen.op]
    tasks = [(sweep, value) for sweep in wanted for value in (None, *sweep.values)]
    if not chosen.no_compile:
        with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
            for done, _ in enumerate(pool.imap_unordered(compile_once, tasks), 1):
                print(f"\rcompiled {done}/{len(tasks)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    if chosen.compile_only:
        return 0
    common, start, rows = environment("cuda") | ceilings("cuda"), time.monotonic(), []
    for sweep in wanted:
        for case in cases_of(sweep):
            if time.monotonic() - start > chosen.seconds:
                break
            print(f"{sweep.op} {sizes_of(case)} {sweep.constant}", file=sys.stderr)
            gate = Gate(case, "cuda", counterpart(case, "cuda"))
            for value in (None, *sweep.values):
                rows.append(measured(sweep, case, gate, value) | common)
                if chosen.json:
                    with chosen.json.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
            del gate
            torch.cuda.empty_cache()
    table = Table("op", "sizes", "constant", "value", "median us", "p20-p80", "note", box=None, pad_edge=False)
    for row in rows:
        time_us = (f"{row['median_us']:.1f}", f"{row['p20_us']:.1f}-{row['p80_us']:.1f}") if "median_us" in row else ("", "")
        table.add_row(row["op"], sizes_of(argparse.Namespace(**row)), row["constant"], row["value"], *time_us, row.get("wrong", ""))
    Console(highlight=False, width=200).print(table)
    print(json.dumps({"mode": "tune"} | common | {"measured": len(rows), "of": sum((1 + len(s.values)) * len(cases_of(s)) for s in wanted)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
