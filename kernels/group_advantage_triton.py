"""Group-relative advantages in Triton; the equations are those of group_advantage.py.

One launch, without a sort: a program has MEMBERS sequences and compares their group with that of all others, OTHERS at a time, twice: count and sum,
then squares and extremes.  So the order of every sum is that of the sequences, whichever of a group's members it is for.  Making members neighbours
first took a sort and nine more launches, 61 us for S = 1024 on an H200 (PyTorch's own operations: 15); S^2 comparisons are 1.5 ms at S = 64k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of

MEMBERS, OTHERS, WARPS = 4, 1024, 4


def group_advantage_triton(rewards: Tensor, group_ids: Tensor, scale: str, baseline: str, eps: float) -> Tensor:
    S = rewards.numel()
    advantages = torch.empty(S, dtype=torch.float32, device=rewards.device)
    if S:
        with on_device_of(rewards):
            group_advantage_kernel[(triton.cdiv(S, MEMBERS),)](rewards.contiguous(), group_ids.contiguous(), advantages, S, eps, SCALE=scale,
                                                               LEAVE_ONE_OUT=baseline == "leave_one_out", MEMBERS=MEMBERS, OTHERS=OTHERS,
                                                               num_warps=WARPS)  # fmt: skip
    return advantages


@triton.jit
def members_in(rewards_ptr, ids_ptr, at, S):
    """Group and reward of sequences `at`, and which of them count: those that exist and have a verdict."""
    r = tl.load(rewards_ptr + at, mask=at < S, other=float("nan")).to(tl.float32)
    there = r == r
    return tl.load(ids_ptr + at, mask=at < S, other=0), tl.where(there, r, 0.0), there


# rewards and ids may be slices of larger tensors: their alignment must not compile anything, nor must the number of sequences
@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["rewards_ptr", "ids_ptr"])
def group_advantage_kernel(rewards_ptr, ids_ptr, advantages_ptr, S, eps, SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, MEMBERS: tl.constexpr,
                           OTHERS: tl.constexpr):  # fmt: skip
    mine = tl.program_id(0).to(tl.int64) * MEMBERS + tl.arange(0, MEMBERS)
    group, reward, valid = members_in(rewards_ptr, ids_ptr, mine, S)
    count, total = tl.zeros([MEMBERS], tl.float32), tl.zeros([MEMBERS], tl.float32)
    all_count, all_total = tl.zeros([OTHERS], tl.float32), tl.zeros([OTHERS], tl.float32)
    for start in range(0, S, OTHERS):
        ids, r, there = members_in(rewards_ptr, ids_ptr, start + tl.arange(0, OTHERS).to(tl.int64), S)
        same = (group[:, None] == ids[None, :]) & there[None, :]
        count += tl.sum(tl.where(same, 1.0, 0.0), 1)
        total += tl.sum(tl.where(same, r[None, :], 0.0), 1)
        all_count += tl.where(there, 1.0, 0.0)
        all_total += r
    n, everyone = tl.maximum(count, 1.0), tl.maximum(tl.sum(all_count, 0), 1.0)
    mean, all_mean = total / n, tl.sum(all_total, 0) / everyone
    squares, all_squares = tl.zeros([MEMBERS], tl.float32), tl.zeros([OTHERS], tl.float32)
    low, high = tl.full([MEMBERS], float("inf"), tl.float32), tl.full([MEMBERS], float("-inf"), tl.float32)
    for start in range(0, S, OTHERS):
        ids, r, there = members_in(rewards_ptr, ids_ptr, start + tl.arange(0, OTHERS).to(tl.int64), S)
        same = (group[:, None] == ids[None, :]) & there[None, :]
        centred = tl.where(same, r[None, :] - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
        low = tl.minimum(low, tl.min(tl.where(same, r[None, :], float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(same, r[None, :], float("-inf")), 1))
        from_all = tl.where(there, r - all_mean, 0.0)
        all_squares += from_all * from_all
    advantage = reward - mean
    if LEAVE_ONE_OUT:
        advantage = advantage * (count / tl.maximum(count - 1.0, 1.0))
    if SCALE == "std":
        advantage = advantage / (tl.sqrt_rn(squares / n) + eps)
    if SCALE == "batch":
        advantage = advantage / (tl.sqrt_rn(tl.sum(all_squares, 0) / everyone) + eps)
    # a constant group is recognised by its extremes: the fp32 mean of equal numbers need not equal them
    tl.store(advantages_ptr + mine, tl.where(valid & (low < high), advantage, 0.0), mask=mine < S)


def ahead_of_time() -> list[AheadOfTime]:
    pointers = {"rewards_ptr": "*fp32", "ids_ptr": "*i64", "advantages_ptr": "*fp32:16", "S": "i32", "eps": "fp32"}
    return [
        AheadOfTime(f"group_advantage {scale} {loo}", group_advantage_kernel, pointers,
                    {"SCALE": scale, "LEAVE_ONE_OUT": loo, "MEMBERS": MEMBERS, "OTHERS": OTHERS}, WARPS)
        for scale, loo in (("std", False), ("none", True), ("batch", False))
    ]  # fmt: skip
