"""Group-relative advantages in Triton; the equations are those of group_advantage.py.

Members of a group are made neighbours by one stable sort of the ids, then one program per group walks its members three times (count and sum;
squares and extremes; write), each time in fixed order.  The number of groups is not read back from the device: the grid has one program per
sequence, and those beyond the last group find an empty range and leave.  scale="batch" takes one more program, launched before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of

BLOCK = 128  # members per step; a group of 8 to 64 fits in one.  Not measured on a GPU yet: at S <= 64k the launch decides


def group_advantage_triton(rewards: Tensor, group_ids: Tensor, scale: str, baseline: str, eps: float) -> Tensor:
    S = rewards.numel()
    advantages = torch.empty(S, dtype=torch.float32, device=rewards.device)
    if S == 0:
        return advantages
    rewards = rewards.contiguous()
    names, order = torch.sort(group_ids, stable=True)
    group = torch.cat([names.new_zeros(1), (names[1:] != names[:-1]).long().cumsum(0)])
    offsets = torch.searchsorted(group, torch.arange(S + 1, device=group.device))
    spread = torch.empty(1, dtype=torch.float32, device=rewards.device)
    with on_device_of(rewards):
        if scale == "batch":
            batch_spread_kernel[(1,)](rewards, spread, S, BLOCK=1024, num_warps=4)
        group_advantage_kernel[(S,)](rewards, order, offsets, spread, advantages, eps, SCALE=scale, LEAVE_ONE_OUT=baseline == "leave_one_out",
                                     BLOCK=BLOCK, num_warps=1)  # fmt: skip
    return advantages


# the rewards may be a slice of a larger tensor: its alignment must not compile anything
@triton.jit(do_not_specialize_on_alignment=["rewards_ptr"])
def group_advantage_kernel(rewards_ptr, order_ptr, offsets_ptr, spread_ptr, advantages_ptr, eps,
                           SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets_ptr + p), tl.load(offsets_ptr + p + 1)
    lanes = tl.arange(0, BLOCK)
    count, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(start, end, BLOCK):
        member = tl.load(order_ptr + i + lanes, mask=i + lanes < end, other=0)
        r = tl.load(rewards_ptr + member, mask=i + lanes < end, other=float("nan")).to(tl.float32)
        count += tl.where(r == r, 1.0, 0.0)
        total += tl.where(r == r, r, 0.0)
    n = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(n, 1.0)
    squares = tl.zeros([BLOCK], tl.float32)
    low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    for i in range(start, end, BLOCK):
        member = tl.load(order_ptr + i + lanes, mask=i + lanes < end, other=0)
        r = tl.load(rewards_ptr + member, mask=i + lanes < end, other=float("nan")).to(tl.float32)
        centred = tl.where(r == r, r - mean, 0.0)
        squares += centred * centred
        low = tl.minimum(low, tl.where(r == r, r, float("inf")))
        high = tl.maximum(high, tl.where(r == r, r, float("-inf")))
    factor = 1.0
    if LEAVE_ONE_OUT:
        factor = n / tl.maximum(n - 1.0, 1.0)
    divisor = 1.0
    if SCALE == "std":
        divisor = tl.sqrt_rn(tl.sum(squares, 0) / tl.maximum(n, 1.0)) + eps
    if SCALE == "batch":
        divisor = tl.load(spread_ptr) + eps
    # a constant group is recognised by its extremes: the fp32 mean of equal numbers need not equal them
    constant = tl.min(low, 0) >= tl.max(high, 0)
    divisor = tl.where(constant, 1.0, divisor)
    for i in range(start, end, BLOCK):
        member = tl.load(order_ptr + i + lanes, mask=i + lanes < end, other=0)
        r = tl.load(rewards_ptr + member, mask=i + lanes < end, other=float("nan")).to(tl.float32)
        a = tl.where((r == r) & (not constant), (r - mean) * factor / divisor, 0.0)
        tl.store(advantages_ptr + member, a, mask=i + lanes < end)


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["rewards_ptr"])
def batch_spread_kernel(rewards_ptr, spread_ptr, S, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    count, total, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(0, S, BLOCK):
        r = tl.load(rewards_ptr + i + lanes, mask=i + lanes < S, other=float("nan")).to(tl.float32)
        count += tl.where(r == r, 1.0, 0.0)
        total += tl.where(r == r, r, 0.0)
    n = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(total, 0) / n
    for i in range(0, S, BLOCK):
        r = tl.load(rewards_ptr + i + lanes, mask=i + lanes < S, other=float("nan")).to(tl.float32)
        centred = tl.where(r == r, r - mean, 0.0)
        squares += centred * centred
    tl.store(spread_ptr, tl.sqrt_rn(tl.sum(squares, 0) / n))


def ahead_of_time() -> list[AheadOfTime]:
    pointers = {"rewards_ptr": "*fp32", "order_ptr": "*i64", "offsets_ptr": "*i64", "spread_ptr": "*fp32", "advantages_ptr": "*fp32", "eps": "fp32"}
    cases = [
        AheadOfTime(f"group_advantage {scale} {loo}", group_advantage_kernel, pointers, {"SCALE": scale, "LEAVE_ONE_OUT": loo, "BLOCK": BLOCK}, 1)
        for scale, loo in (("std", False), ("none", True), ("batch", False))
    ]
    return [*cases, AheadOfTime("batch_spread", batch_spread_kernel, {"rewards_ptr": "*fp32", "spread_ptr": "*fp32", "S": "i32"}, {"BLOCK": 1024})]
