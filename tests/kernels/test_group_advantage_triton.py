import numpy as np
import pytest
import torch

from athanor.kernels import group_advantage

SETTINGS = [(s, b) for s in ("std", "none", "batch") for b in ("mean", "leave_one_out")]


def oracle(rewards, ids, scale, baseline, eps=1e-6):
    r, out = rewards.double().numpy(), np.zeros(len(rewards))
    for i in np.flatnonzero(~np.isnan(r)):
        same = (ids == ids[i]).numpy() & ~np.isnan(r)
        group = r[same]
        if len(set(group)) < 2:
            continue
        base = group.mean() if baseline == "mean" else (group.sum() - r[i]) / (len(group) - 1)
        out[i] = (r[i] - base) / {"std": group.std() + eps, "none": 1, "batch": r[~np.isnan(r)].std() + eps}[scale]
    return torch.from_numpy(out)


# every setting on groups of about 16; then one row, a group in two blocks of 1024, and empty
CASES = [(48, 3, *setting) for setting in SETTINGS] + [(1, 1, "std", "mean"), (1100, 1, "std", "leave_one_out"), (0, 2, "batch", "mean")]


@pytest.mark.parametrize("S, groups, scale, baseline", CASES)
def test_errs_no_more_than_the_reference(S, groups, scale, baseline, triton_device, within_rule, generator):
    ids = torch.tensor([2**62, -9, 4])[torch.randint(0, groups, (S,), generator=generator)]
    rewards = torch.randn(S, generator=generator)
    rewards[torch.rand(S, generator=generator) < 0.1] = torch.nan
    got = group_advantage(rewards.to(triton_device), ids.to(triton_device), scale=scale, baseline=baseline, backend="triton")
    plain = group_advantage(rewards, ids, scale=scale, baseline=baseline, backend="reference")
    within_rule(got.cpu(), plain, oracle(rewards, ids, scale, baseline))


@pytest.mark.parametrize("scale, baseline", SETTINGS)
def test_constant_groups_and_groups_of_one_get_exactly_zero(scale, baseline, triton_device):
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.7, torch.nan, 0.7, 1.0, 0.0, torch.nan], device=triton_device)
    ids = torch.tensor([1, 1, 1, 2, 3, 3, 3, 4, 4, 5], device=triton_device)
    a = group_advantage(rewards, ids, scale=scale, baseline=baseline, eps=0.0, backend="triton")
    assert not a[:7].any() and a[9] == 0 and a[7] > 0 > a[8]


def test_bf16_rewards_and_repeats_give_equal_bits(triton_device, generator):
    rewards = torch.randint(0, 5, (37,), generator=generator).to(torch.bfloat16).to(triton_device) / 4
    ids = torch.randint(0, 7, (37,), generator=generator).to(triton_device)
    first = group_advantage(rewards, ids, backend="triton")
    assert torch.equal(first, group_advantage(rewards.float(), ids, backend="triton"))
    assert all(torch.equal(first, group_advantage(rewards, ids, backend="triton")) for _ in range(3))


def test_fp64_is_refused_with_the_reason(triton_device):
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this call: the kernels compute in fp32"):
        group_advantage(torch.ones(2, device=triton_device).double(), torch.zeros(2, dtype=torch.int64, device=triton_device), backend="triton")
