import pytest
import torch

from athanor.kernels import LossVariant, group_advantage, grpo_loss, policy_loss


def batch(S=12, longest=9, seed=0, dtype=torch.float32):
    """Three rewards' worth of groups in mixed order, one of them constant and one of a single member; some sequences empty."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (S,), generator=g)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    n = int(cu[-1])
    logps = -torch.rand(n, generator=g, dtype=torch.float64).to(dtype)
    old, ref, rollout = ((logps + 0.3 * torch.randn(n, generator=g)).to(dtype) for _ in range(3))
    rewards = torch.randint(0, 3, (S,), generator=g).to(dtype)
    ids = torch.tensor([5, -3, 99])[torch.randint(0, 3, (S,), generator=g)]
    if S > 3:
        rewards[2], ids[3] = torch.nan, 1000
    mask = torch.rand(n, generator=g) < 0.8
    return logps.requires_grad_(), old, rewards, ids, cu, {"ref_logps": ref, "rollout_logps": rollout, "mask": mask}


VARIANTS = [
    LossVariant(),
    LossVariant(ratio="sequence", aggregation="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    LossVariant(surrogate="dual_clip", kl="k3", beta=0.01, correction="sequence_mask"),
]


@pytest.mark.parametrize("v", VARIANTS)
@pytest.mark.parametrize("scale, baseline", [("std", "mean"), ("none", "leave_one_out"), ("batch", "mean")])
@pytest.mark.parametrize("S", [1, 12, 0])
def test_equals_the_composition_exactly(S, v, scale, baseline):
    logps, old, rewards, ids, cu, tensors = batch(S)
    loss, stats = grpo_loss(logps, old, rewards, ids, cu, scale=scale, baseline=baseline, eps=1e-4, **tensors, variant=v, num_tokens=100)
    A = group_advantage(rewards, ids, scale=scale, baseline=baseline, eps=1e-4)
    want, want_stats = policy_loss(logps, old, A, cu, **tensors, variant=v, num_tokens=100)
    assert torch.equal(loss, want) and stats.pop("num_nan_rewards") == rewards.isnan().sum() and stats == want_stats
    assert torch.equal(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(want, logps)[0])


def test_gradient_of_the_paper_by_hand():
    """Two answers to one prompt, one right: A = +-1, old = new, so token t of answer i gets -A_i / N."""
    logps = torch.full((5,), -0.5, dtype=torch.float64, requires_grad=True)
    loss, _ = grpo_loss(logps, None, torch.tensor([1.0, 0.0]).double(), torch.tensor([7, 7]), torch.tensor([0, 2, 5]), eps=0.0)
    assert torch.allclose(torch.autograd.grad(loss, logps)[0], torch.tensor([-1, -1, 1, 1, 1]).double() / 5, rtol=1e-14)


def test_groups_without_contrast_give_bitwise_zero_gradient():
    logps, old, rewards, ids, cu, _ = batch()
    loss, _ = grpo_loss(logps, old, torch.full_like(rewards, 0.1), ids, cu)
    assert loss == 0 and not torch.autograd.grad(loss, logps)[0].any()


def test_mismatched_rewards_are_refused():
    logps, old, rewards, ids, cu, _ = batch()
    with pytest.raises(ValueError, match="grpo_loss: 11 rewards for 12 sequences"):
        grpo_loss(logps, old, rewards[1:], ids[1:], cu)
    with pytest.raises(ValueError, match="grpo_loss: scale is 'sd'; did you mean 'std'"):
        grpo_loss(logps, old, rewards, ids, cu, scale="sd")
