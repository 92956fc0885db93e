"""dispatch: one rollout on several ranks, whose samples are dispatched as they have room and handed over when they run long, beside fixed shares.

A quarter of the prompts asks for long samples, other ones in every run, and how long each becomes nobody knows: after every token a sample of a
prompt ends with the same probability, so that lengths are geometric, and a prompt's mean is one of two.  Ranks are processes of one thread each over
gloo.  Where they have to share cores, seconds say little about ranks that have a device each; the row steps of the slowest rank (per step its rows,
at least 16, as `dispatch.pays` has it, and a quarter of each prefilled token) do not depend on that.
"""

import torch
from cases.rollout import MODELS
from workloads import Contender, Workload

SIZES = {"model": "0.8M", "prompts": 8, "G": 32, "prompt": 32, "rows": 64, "new": 512}  # new: at most


def workloads(device: str) -> list[Workload]:
    return [dispatch(device, SIZES | {"ranks": ranks}) for ranks in (2, 4)] if device == "cpu" else []


def dispatch(device: str, sizes: dict) -> Workload:
    def contender(mode: str, ours: bool = False) -> Contender:
        arguments = {name: sizes[name] for name in ("prompts", "G", "prompt", "rows", "new", "ranks")}
        return Contender("dispatch_ranks:RankedRollout", lambda: {"model": MODELS[sizes["model"]], **arguments, "mode": mode}, ours=ours)

    return Workload(
        "dispatch", "dispatch", device, sizes, torch.float32,
        {"whole groups": contender("group", ours=True), "single samples": contender("sample", ours=True), "fixed shares": contender("static")},
        rival="fixed shares", gate="samples = those of one process, to the bit", work="no formula: lengths are drawn",
    )  # fmt: skip
