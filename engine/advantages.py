"""Rewards to advantages, as a preset prescribes: the group statistics of the kernel, then whitening where the preset asks for it.

Whitening (REINFORCE++, arXiv 2501.03262):  A <- (A - mu) / (sigma + 1e-8), with mu and the population sigma over all completion tokens of the
batch, so that a sequence counts by its length.  It runs after the group baseline; a batch without any contrast stays exactly 0.
"""

import torch
from torch import Tensor

from athanor.kernels import group_advantage
from athanor.losses.presets import Preset

WHITEN_EPS = 1e-8
GDPO_EPS = 1e-4


def advantages_of(rewards: Tensor, group_ids: Tensor, preset: Preset, *, num_tokens: Tensor | None = None) -> Tensor:
    """Compute one advantage per sequence, over a whole batch of whole groups.

    rewards: (S,), NaN = no verdict: excluded, advantage 0.  group_ids: (S,) int64.  num_tokens: (S,) completion tokens that bear loss, the weights
    where the preset whitens; None = every sequence counts once.  Returns (S,) fp32 (fp64 for fp64 rewards).  Raises ValueError on a shape mismatch.
    """
    advantages = group_advantage(rewards, group_ids, scale=preset.scale, baseline=preset.baseline, eps=preset.eps)
    if not preset.whiten:
        return advantages
    if num_tokens is None:
        num_tokens = torch.ones_like(rewards)
    if num_tokens.shape != rewards.shape:
        raise ValueError(f"advantages_of: num_tokens is {tuple(num_tokens.shape)}; wanted {tuple(rewards.shape)}")
    return whiten(advantages, torch.where(torch.isnan(rewards), 0, num_tokens))


def gdpo_advantages(parts: Tensor, weights: Tensor, group_ids: Tensor) -> Tensor:
    """Advantages (S,) fp64 of several rewards, each normalised in its group before they are added (GDPO, arXiv 2601.05242; TRL's variant).

        z_k = (R_k - mean_group R_k) / (std_group R_k + 1e-4)     S = sum_k w_k z_k     A = (S - mean_batch S) / (std_batch S + 1e-4)

    with sample standard deviations, so that a reward of small spread counts as much as one of large.  parts: (S, K), NaN = does not apply.
    weights: (K,).  A reward that is constant in a group, or has one value there, adds 0; a sample without any reward gets 0 and counts nowhere.
    """
    if parts.ndim != 2 or weights.shape != parts.shape[1:] or group_ids.shape != parts.shape[:1]:
        raise ValueError(f"gdpo_advantages: parts {tuple(parts.shape)}, weights {tuple(weights.shape)}, group_ids {tuple(group_ids.shape)}; wanted "
                         "(S, K), (K,) and (S,)")  # fmt: skip
    if not parts.shape[1]:
        return torch.zeros(len(parts), dtype=torch.float64)
    there = ~torch.isnan(parts)
    names, group = torch.unique(group_ids, return_inverse=True)

    def per_group(x: Tensor) -> Tensor:
        return torch.zeros(len(names), x.shape[1], dtype=torch.float64).index_add_(0, group, x)[group]

    # group_advantage leaves out NaN and knows a constant group, whose mean need not be its value in floating point: its members get exactly 0
    centred = torch.stack([group_advantage(column.contiguous(), group_ids, scale="none") for column in parts.double().unbind(1)], 1)
    std = (per_group(centred.square()) / (per_group(there.double()) - 1).clamp_min(1)).sqrt()
    total = ((centred / (std + GDPO_EPS)) * weights.double()).sum(1)  # of mean 0 over the batch, because each reward is in each group
    spread = (total.square().sum() / (there.any(1).sum() - 1).clamp_min(1)).sqrt()
    return total / (spread + GDPO_EPS)


def whiten(advantages: Tensor, weights: Tensor) -> Tensor:
    """Centre and scale to weighted population variance 1; weight 0 = takes no part and stays 0."""
    wide = advantages.double()
    w = weights.double()
    total = w.sum().clamp_min(1e-300)
    centred = wide - (w * wide).sum() / total
    sigma = ((w * centred.square()).sum() / total).sqrt()
    if not advantages.any():
        return advantages
    return torch.where(w > 0, centred / (sigma + WHITEN_EPS), 0.0).to(advantages.dtype)


def groups_with_contrast(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(S,) bool: does this sequence's group hold at least two different rewards?  What DAPO's dynamic sampling keeps, always whole groups.

    Give it the raw score: shaping (length, overlong) would make a group of all-wrong answers look informative.
    """
    different = group_advantage(rewards, group_ids, scale="none") != 0
    names, group = torch.unique(group_ids, return_inverse=True)
    return torch.zeros(len(names), dtype=torch.bool).scatter_(0, group[different].cpu(), True).to(group.device)[group]
