"""Routing in Triton; the equations are those of moe_route.py.

`moe_route_fwd_kernel` holds the scores of ROWS tokens in registers, E of them side by side, and takes the largest k times: the maximum, then the
lowest index that has it.  Each program writes how many of its tokens went to each expert, and `moe_count_kernel` adds these up:
integers, without atomics.  `moe_route_bwd_kernel` recomputes the scores from the logits.

On an H200 T = 16384, E = 128, k = 8 takes 25 us forward and 13 backward, E = 256 in 8 groups 148 and 29: two reductions over E per choice decide,
not the 5 MB that move.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .moe_route import TINY as LEAST_SUM

TILE, WARPS = 1024, 4  # scores per program: 8 per thread
COUNT_ROWS, COUNT_EXPERTS = 256, 8  # 32 x 32 took 22 us of 70 for T = 16384, E = 128 on an H200; this entry has not been measured
TINY = tl.constexpr(LEAST_SUM)


def moe_route_triton(logits: Tensor, k: int, scoring: str, bias: Tensor | None, groups: tuple[int, int], normalize: bool, scale: float,
                     replay: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    return MoeRouteFunction.apply(logits, k, scoring, bias, groups, normalize, scale, replay)


def rows_of(E: int) -> int:
    return max(1, TILE // max(16, triton.next_power_of_2(E)))


def constants_of(E: int, k: int, scoring: str, normalize: bool) -> dict:
    return {"E": E, "K": k, "SIGMOID": scoring == "sigmoid", "NORMALIZE": normalize, "ROWS": rows_of(E), "BE": max(16, triton.next_power_of_2(E)),
            "BK": triton.next_power_of_2(k)}  # fmt: skip


class MoeRouteFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, scoring, bias, groups, normalize, scale, replay):
        (T, E), device = logits.shape, logits.device
        ids, weights = torch.empty(T, k, dtype=torch.int32, device=device), torch.empty(T, k, dtype=torch.float32, device=device)
        programs = triton.cdiv(T, rows_of(E))
        partial = torch.empty(programs, E + 1, dtype=torch.int32, device=device)
        totals = torch.empty(E + 1, dtype=torch.int32, device=device)
        with on_device_of(logits):
            if T:
                moe_route_fwd_kernel[(programs,)](
                    logits, logits if bias is None else bias.contiguous(), ids if replay is None else replay.contiguous(), ids, weights, partial, T,
                    logits.stride(0), scale, BIASED=bias is not None, GROUPS=groups[0], TOP_GROUPS=groups[1],
                    BG=max(2, triton.next_power_of_2(groups[0])), REPLAY=replay is not None, **constants_of(E, k, scoring, normalize),
                    num_warps=WARPS)  # fmt: skip
            moe_count_kernel[(triton.cdiv(E + 1, COUNT_EXPERTS),)](partial, totals, programs, E + 1, ROWS=COUNT_ROWS, EXPERTS=COUNT_EXPERTS,
                                                                   num_warps=WARPS)  # fmt: skip
        ctx.save_for_backward(logits, ids)
        ctx.options = scoring, normalize, scale
        counts, changed = totals[:E], totals[E]
        ctx.mark_non_differentiable(ids, counts, changed)
        return ids, weights, counts, changed

    @staticmethod
    def backward(ctx, _ids, dweights, _counts, _changed):
        logits, ids = ctx.saved_tensors
        (T, E), (scoring, normalize, scale) = logits.shape, ctx.options
        dlogits = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
        if T:
            with on_device_of(logits):
                moe_route_bwd_kernel[(triton.cdiv(T, rows_of(E)),)](logits, ids, dweights.contiguous(), dlogits, T, logits.stride(0), scale,
                                                                    **constants_of(E, ids.shape[1], scoring, normalize),
                                                                    num_warps=WARPS)  # fmt: skip
        return dlogits, *[None] * 7


@triton.jit
def scores_in(logits_ptr, T, stride, E: tl.constexpr, SIGMOID: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr):
    """Rows (ROWS,) int64, experts (1, BE), logits and scores (ROWS, BE) fp32; what does not exist has the logit -inf and the score 0."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BE)[None, :]
    there = (rows < T)[:, None] & (experts < E)
    z = tl.load(logits_ptr + rows[:, None] * stride + experts, mask=there, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.where(there, 1 / (1 + tl.exp(-z)), 0.0)
    else:
        p = tl.exp(z - tl.max(z, 1)[:, None])
        scores = tl.where(there, p / tl.sum(p, 1)[:, None], 0.0)
    return rows, experts, z, scores


@triton.jit
def largest(keys, candidates, lanes, NOTHING: tl.constexpr):
    """(rows,) the lane of the largest key among the candidates, of equal ones the lowest."""
    best = tl.max(tl.where(candidates, keys, float("-inf")), 1)
    return tl.min(tl.where(candidates & (keys == best[:, None]), lanes, NOTHING), 1)


# The number of tokens changes from step to step; k, E and the groups belong to the model.
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["replay_ptr", "ids_ptr", "weights_ptr", "partial_ptr"])
def moe_route_fwd_kernel(logits_ptr, bias_ptr, replay_ptr, ids_ptr, weights_ptr, partial_ptr, T, stride, scale, BIASED: tl.constexpr,
                         GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BG: tl.constexpr, REPLAY: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
                         SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    rows, experts, z, scores = scores_in(logits_ptr, T, stride, E, SIGMOID, ROWS, BE)
    inside = rows < T
    sound = tl.max(tl.where(scores == scores, 0, 1), 1) == 0
    if SIGMOID:
        keys = scores
        if BIASED:
            keys += tl.load(bias_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)
    else:
        keys = z  # the order of the scores, without their rounding
    candidates = (experts < E) & (rows[:, None] >= 0)
    if GROUPS > 1:
        SIZE: tl.constexpr = E // GROUPS
        group = tl.arange(0, BG)[None, :]
        worth = tl.full([ROWS, BG], float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            mine = candidates & (experts // SIZE == g)
            first = largest(keys, mine, experts, BE)
            top = tl.max(tl.where(mine, keys, float("-inf")), 1) + tl.max(tl.where(mine & (experts != first[:, None]), keys, float("-inf")), 1)
            worth = tl.where(group == g, top[:, None], worth)
        open_groups = (group < GROUPS) & (rows[:, None] >= 0)
        eligible = experts < 0
        for _ in tl.static_range(TOP_GROUPS):
            g = largest(worth, open_groups, group, BG)[:, None]
            open_groups = open_groups & (group != g)
            eligible = eligible | (experts // SIZE == g)
        candidates = candidates & eligible
    choice = tl.arange(0, BK)[None, :]
    ids = tl.full([ROWS, BK], -1, tl.int32)
    chosen = experts < 0
    for j in tl.static_range(K):
        best = largest(keys, candidates, experts, BE)[:, None]
        candidates = candidates & (experts != best)
        chosen = chosen | (experts == best)
        ids = tl.where(choice == j, best, ids)
    changed = tl.zeros([ROWS], tl.int32)
    if REPLAY:
        at = replay_ptr + rows[:, None] * K + choice
        replayed = tl.load(at, mask=inside[:, None] & (choice < K), other=-1)
        taken = sound & (tl.max(replayed, 1) >= 0)
        known, chosen_too = chosen, experts < 0
        for j in tl.static_range(K):
            expert = tl.max(tl.where(choice == j, replayed, -1), 1)[:, None]
            chosen_too = chosen_too | (experts == expert)
            changed += tl.where(taken & (tl.max(tl.where(known & (experts == expert), 1, 0), 1) == 0), 1, 0)
        ids = tl.where(taken[:, None], replayed, ids)
        chosen = tl.where(taken[:, None], chosen_too, chosen)
    weights = tl.zeros([ROWS, BK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(K):
        expert = tl.max(tl.where(choice == j, ids, -1), 1)[:, None]
        w = tl.sum(tl.where(experts == expert, scores, 0.0), 1)
        total += w
        weights = tl.where(choice == j, w[:, None], weights)
    if NORMALIZE:
        if SIGMOID:
            total += TINY
        weights = weights / total[:, None]
    store = inside[:, None] & (choice < K)
    tl.store(ids_ptr + rows[:, None] * K + choice, tl.where(sound[:, None], ids, -1), mask=store)
    tl.store(weights_ptr + rows[:, None] * K + choice, tl.where(sound[:, None], weights * scale, float("nan")), mask=store)
    counted = chosen & (inside & sound)[:, None]
    at = partial_ptr + tl.program_id(0).to(tl.int64) * (E + 1)
    lanes = tl.arange(0, BE)
    tl.store(at + lanes, tl.sum(tl.where(counted, 1, 0), 0), mask=lanes < E)
    tl.store(at + E, tl.sum(tl.where(inside, changed, 0), 0))


@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=["partial_ptr", "counts_ptr"])
def moe_count_kernel(partial_ptr, counts_ptr, programs, columns, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    lanes = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)[None, :]
    total = tl.zeros([ROWS, EXPERTS], tl.int32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial_ptr + rows.to(tl.int64) * columns + lanes, mask=(rows < programs) & (lanes < columns), other=0)
    out = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    tl.store(counts_ptr + out, tl.sum(total, 0), mask=out < columns)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["ids_ptr", "dweights_ptr"])
def moe_route_bwd_kernel(logits_ptr, ids_ptr, dweights_ptr, dlogits_ptr, T, stride, scale, E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr,
                         NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    rows, experts, _, scores = scores_in(logits_ptr, T, stride, E, SIGMOID, ROWS, BE)
    choice = tl.arange(0, BK)[None, :]
    mask = (rows < T)[:, None] & (choice < K)
    ids = tl.load(ids_ptr + rows[:, None] * K + choice, mask=mask, other=-1)
    g = tl.load(dweights_ptr + rows[:, None] * K + choice, mask=mask, other=0.0).to(tl.float32) * scale
    dscores = tl.zeros([ROWS, BE], tl.float32)
    total, dot = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(K):
        expert = tl.max(tl.where(choice == j, ids, -1), 1)[:, None]
        upstream = tl.sum(tl.where(choice == j, g, 0.0), 1)
        w = tl.sum(tl.where(experts == expert, scores, 0.0), 1)
        total += w
        dot += upstream * w
        dscores += tl.where(experts == expert, upstream[:, None], 0.0)
    if NORMALIZE:  # d(w_j / total) = (g_j - sum_i g_i w_i / total) / total
        if SIGMOID:
            total += TINY
        chosen = experts < 0
        for j in tl.static_range(K):
            chosen = chosen | (experts == tl.max(tl.where(choice == j, ids, -1), 1)[:, None])
        dscores = tl.where(chosen, (dscores - (dot / total)[:, None]) / total[:, None], 0.0)
    if SIGMOID:
        dlogits = dscores * scores * (1 - scores)
    else:
        dlogits = scores * (dscores - tl.sum(dscores * scores, 1)[:, None])
    at = dlogits_ptr + rows[:, None] * E + experts
    tl.store(at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (experts < E))


def ahead_of_time() -> list[AheadOfTime]:
    cases = []
    fwd = {"logits_ptr": "*bf16:16", "bias_ptr": "*fp32:16", "replay_ptr": "*i32", "ids_ptr": "*i32", "weights_ptr": "*fp32", "partial_ptr": "*i32",
           "T": "i32", "stride": "i32:16", "scale": "fp32"}  # fmt: skip
    bwd = {"logits_ptr": "*bf16:16", "ids_ptr": "*i32", "dweights_ptr": "*fp32", "dlogits_ptr": "*bf16:16", "T": "i32", "stride": "i32:16",
           "scale": "fp32"}  # fmt: skip
    for name, E, k, scoring, groups, replay in (("qwen3", 128, 8, "softmax", (1, 1), False), ("deepseek", 256, 8, "sigmoid", (8, 4), True)):
        shared = constants_of(E, k, scoring, True)
        more = {"BIASED": scoring == "sigmoid", "GROUPS": groups[0], "TOP_GROUPS": groups[1], "BG": max(2, groups[0]), "REPLAY": replay}
        dtype = "*bf16:16" if scoring == "softmax" else "*fp32:16"
        cases.append(AheadOfTime(f"moe_route_fwd {name}", moe_route_fwd_kernel, fwd | {"logits_ptr": dtype}, shared | more, WARPS, registers=136))
        pointers = bwd | {"logits_ptr": dtype, "dlogits_ptr": dtype}
        cases.append(AheadOfTime(f"moe_route_bwd {name}", moe_route_bwd_kernel, pointers, shared, WARPS, registers=136))
    counts = {"partial_ptr": "*i32", "counts_ptr": "*i32", "programs": "i32", "columns": "i32"}
    return [*cases, AheadOfTime("moe_count", moe_count_kernel, counts, {"ROWS": COUNT_ROWS, "EXPERTS": COUNT_EXPERTS}, WARPS)]
