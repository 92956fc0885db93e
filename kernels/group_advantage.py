"""Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2):  A_i = (r_i - mean(r)) / (std(r) + eps)  within a group.

std is the population one (ddof 0), eps is added to it and is 1e-6.  scale="none" drops the division (Dr. GRPO, arXiv 2503.20783),
scale="batch" divides by the population standard deviation of all valid rewards of the call.  baseline="leave_one_out" subtracts the mean of
the other members (RLOO, arXiv 2402.14740).  A NaN reward means "no verdict": it takes no part in any statistic and gets advantage 0.
A group whose valid rewards are all equal gets exactly 0, and so does a group of one.
"""

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, late, near_misses, register
from ._triton import why_not_triton

SCALES = ("std", "none", "batch")
BASELINES = ("mean", "leave_one_out")


def group_advantage(rewards: Tensor, group_ids: Tensor, *, scale: str = "std", baseline: str = "mean", eps: float = 1e-6,
                    backend: str | None = None) -> Tensor:  # fmt: skip
    """Turn rewards into advantages relative to the group that shares a prompt.

    rewards: (S,) floating, finite or NaN.  group_ids: (S,) int64, any values in any order, groups of any size.
    Returns (S,) fp32 (fp64 for fp64 rewards), not differentiable.  Raises ValueError on a shape mismatch or an unknown option.
    """
    check_advantage_options("group_advantage", rewards, group_ids, scale, baseline, eps)
    return op(backend, rewards=rewards.detach(), group_ids=group_ids, scale=scale, baseline=baseline, eps=float(eps))


def check_advantage_options(where: str, rewards: Tensor, group_ids: Tensor, scale: str, baseline: str, eps: float) -> None:
    check(rewards.ndim == 1 and rewards.is_floating_point(), f"{where}: rewards is {tuple(rewards.shape)} {rewards.dtype}; wanted (S,) floating")
    check(group_ids.shape == rewards.shape and group_ids.dtype == torch.int64,
          f"{where}: group_ids is {tuple(group_ids.shape)} {group_ids.dtype}; wanted {tuple(rewards.shape)} int64")  # fmt: skip
    check(scale in SCALES, f"{where}: scale is {scale!r}; {near_misses(scale, SCALES)}")
    check(baseline in BASELINES, f"{where}: baseline is {baseline!r}; {near_misses(baseline, BASELINES)}")
    check(eps >= 0, f"{where}: eps is {eps}; wanted >= 0")


def group_advantage_reference(rewards: Tensor, group_ids: Tensor, scale: str, baseline: str, eps: float) -> Tensor:
    r = rewards.to(accumulation_dtype(rewards.dtype))
    valid = ~torch.isnan(r)
    r = torch.where(valid, r, 0.0)
    names, group = torch.unique(group_ids, return_inverse=True)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(names)).index_add_(0, group, x)[group]

    count = total(valid.to(r.dtype))
    mean = total(r) / count.clamp_min(1)
    centred = torch.where(valid, r - mean, 0.0)
    advantages = centred
    if baseline == "leave_one_out":  # r_i - (n mean - r_i) / (n - 1) = (r_i - mean) n / (n - 1)
        advantages = centred * (count / (count - 1).clamp_min(1))
    if scale == "std":
        advantages = advantages / ((total(centred.square()) / count.clamp_min(1)).sqrt() + eps)
    if scale == "batch":
        n = valid.sum().clamp_min(1)
        spread = torch.where(valid, r - r.sum() / n, 0.0)
        advantages = advantages / ((spread.square().sum() / n).sqrt() + eps)
    # the mean of equal numbers need not equal them in floating point, so a constant group is recognised by its extremes
    low = r.new_full((len(names),), torch.inf).scatter_reduce_(0, group, torch.where(valid, r, torch.inf), "amin")
    high = r.new_full((len(names),), -torch.inf).scatter_reduce_(0, group, torch.where(valid, r, -torch.inf), "amax")
    return torch.where(valid & (low < high)[group], advantages, 0.0)


op = register("group_advantage", triton=Backend(late("group_advantage_triton.group_advantage_triton"), why_not_triton),
              reference=Backend(group_advantage_reference))  # fmt: skip
