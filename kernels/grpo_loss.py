"""Group statistics and policy loss in one call:  policy_loss(logps, old_logps, group_advantage(rewards, group_ids), ...).

The equations are those of group_advantage and policy_loss, and the result equals their composition exactly.  Every group must be whole within
the call: a micro-batch that holds half a group would centre on the wrong mean (use group_advantage over the batch, then policy_loss).
"""

from torch import Tensor

from ._dispatch import Backend, check, register
from ._triton import why_not_triton
from .group_advantage import check_advantage_options, group_advantage_reference
from .policy_loss import LossVariant, check_loss_tensors, policy_loss_reference


def grpo_loss(logps: Tensor, old_logps: Tensor | None, rewards: Tensor, group_ids: Tensor, cu_seqlens: Tensor, *, scale: str = "std",
              baseline: str = "mean", eps: float = 1e-6, ref_logps: Tensor | None = None, rollout_logps: Tensor | None = None,
              mask: Tensor | None = None, variant: LossVariant = LossVariant(), num_tokens: int | Tensor | None = None,
              num_sequences: int | Tensor | None = None, backend: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Compute the loss of `variant` from rewards.

    rewards, group_ids: (S,) as in group_advantage; all else, and the result, as in policy_loss, with one more statistic: num_nan_rewards (sequences
    without a verdict, whose advantage is 0).  Raises ValueError as those two do.
    """
    check_loss_tensors("grpo_loss", logps, old_logps, ref_logps, rollout_logps, mask, cu_seqlens, variant)
    check_advantage_options("grpo_loss", rewards, group_ids, scale, baseline, eps)
    check(rewards.numel() == cu_seqlens.numel() - 1, f"grpo_loss: {rewards.numel()} rewards for {cu_seqlens.numel() - 1} sequences")
    loss, stats = op(backend, logps=logps, old_logps=old_logps, rewards=rewards.detach(), group_ids=group_ids, cu_seqlens=cu_seqlens, scale=scale,
              baseline=baseline, eps=float(eps), ref_logps=ref_logps, rollout_logps=rollout_logps, mask=mask, variant=variant,
              num_tokens=num_tokens, num_sequences=num_sequences)  # fmt: skip
    return loss, stats | {"num_nan_rewards": rewards.isnan().sum().float()}


def grpo_loss_reference(rewards, group_ids, scale, baseline, eps, **call):
    return policy_loss_reference(advantages=group_advantage_reference(rewards, group_ids, scale, baseline, eps), **call)


def _triton(rewards, group_ids, scale, baseline, eps, **call):
    from .group_advantage_triton import group_advantage_triton
    from .policy_loss_triton import policy_loss_triton

    return policy_loss_triton(advantages=group_advantage_triton(rewards, group_ids, scale, baseline, eps), **call)


op = register("grpo_loss", triton=Backend(_triton, why_not_triton), reference=Backend(grpo_loss_reference))
