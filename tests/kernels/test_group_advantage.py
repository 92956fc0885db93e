import math

import numpy as np
import pytest
import torch

from athanor.kernels import group_advantage

SETTINGS = [(s, b) for s in ("std", "none", "batch") for b in ("mean", "leave_one_out")]


def oracle(rewards, ids, scale, baseline, eps):
    """Group by group, member by member, in numpy fp64."""
    r, ids = np.asarray(rewards, np.float64), np.asarray(ids)
    out, everything = np.zeros(len(r)), r[~np.isnan(r)]
    for i in range(len(r)):
        group = [r[j] for j in range(len(r)) if ids[j] == ids[i] and not np.isnan(r[j])]
        if np.isnan(r[i]) or len(group) < 2 or len(set(group)) == 1:
            continue
        others = list(group)
        others.remove(r[i])
        a = r[i] - (np.mean(group) if baseline == "mean" else np.mean(others))
        out[i] = a / {"std": np.std(group) + eps, "none": 1.0, "batch": np.std(everything) + eps}[scale]
    return torch.from_numpy(out)


def batch(S, generator, dtype=torch.float64):
    """Unequal groups in random order under arbitrary ids, rewards in quarters so that some groups are constant, a tenth of them NaN."""
    names = torch.tensor([-(2**62), -1, 0, 7, 2**62, 12345678901])
    ids = names[torch.randint(0, 6, (S,), generator=generator)]
    rewards = torch.randint(0, 5, (S,), generator=generator).to(dtype) / 4
    rewards[torch.rand(S, generator=generator) < 0.1] = torch.nan
    return rewards, ids


@pytest.mark.parametrize("scale, baseline", SETTINGS)
@pytest.mark.parametrize("S", [1, 2, 64, 97, 0])  # one, a pair, aligned, odd, empty
def test_matches_the_oracle(S, scale, baseline, close64, within_rule, generator):
    rewards, ids = batch(S, generator)
    want = oracle(rewards, ids, scale, baseline, 1e-6)
    close64(group_advantage(rewards, ids, scale=scale, baseline=baseline), want)
    got = group_advantage(rewards.float(), ids, scale=scale, baseline=baseline)
    within_rule(got, want.float(), want)


def test_one_success_in_sixteen():
    rewards = torch.tensor([1.0] + [0.0] * 15)
    a = group_advantage(rewards, torch.zeros(16, dtype=torch.int64))
    assert math.isclose(a[0], math.sqrt(15), rel_tol=1e-5) and f"{a[0]:.3f}" == "3.873"  # ddof 1 would give 3.750
    assert torch.allclose(a[1:], torch.tensor(-1 / math.sqrt(15)), rtol=1e-5)
    loo = group_advantage(rewards, torch.zeros(16, dtype=torch.int64), scale="none", baseline="leave_one_out")
    assert torch.allclose(loo, torch.tensor([1.0] + [-1 / 15] * 15))


def test_full_groups_have_mean_zero_and_population_std_one(generator):
    rewards = torch.randn(32, dtype=torch.float64, generator=generator)
    ids = torch.arange(32) % 4
    for group in group_advantage(rewards, ids).view(8, 4).T:
        assert abs(group.mean()) < 1e-12 and abs(group.std(correction=0) - 1) < 1e-5
        # T32: measured with ddof 1 the same group spreads by sqrt(G / (G - 1))
        assert abs(group.std(correction=1) - math.sqrt(8 / 7)) < 1e-5


@pytest.mark.parametrize("scale, baseline", SETTINGS)
def test_constant_groups_and_groups_of_one_get_exactly_zero(scale, baseline):
    # with eps 0 a constant group that is not recognised would give 0 / 0
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.7, 0.7, torch.nan, 1.0, 0.0])
    a = group_advantage(rewards, torch.tensor([1, 1, 1, 2, 3, 3, 3, 4, 4]), scale=scale, baseline=baseline, eps=0.0)
    assert torch.equal(a[:7], torch.zeros(7)) and a[7] > 0 > a[8]


def test_nan_rewards_take_no_part():
    rewards = torch.tensor([1.0, torch.nan, 0.0, torch.nan, torch.nan])
    ids = torch.tensor([0, 0, 0, 1, 1])
    a = group_advantage(rewards, ids)
    assert torch.equal(a[[0, 2]], group_advantage(rewards[[0, 2]], ids[[0, 2]])) and torch.equal(a[[1, 3, 4]], torch.zeros(3))


def test_large_offset_does_not_lose_the_difference():
    a = group_advantage(torch.tensor([1e6 + 1, 1e6, 1e6, 1e6 + 1]), torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(a, torch.tensor([1.0, -1, -1, 1]), rtol=1e-5)  # E[x^2] - E[x]^2 in fp32 would be garbage


def test_order_of_the_batch_does_not_matter(generator):
    rewards, ids = batch(97, generator)
    shuffle = torch.randperm(97, generator=generator)
    assert torch.allclose(group_advantage(rewards, ids)[shuffle], group_advantage(rewards[shuffle], ids[shuffle]), rtol=1e-12, atol=1e-12)


def test_wrong_options_are_refused_with_near_misses():
    r, ids = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="group_advantage: scale is 'sdt'; did you mean 'std'"):
        group_advantage(r, ids, scale="sdt")
    with pytest.raises(ValueError, match="baseline is 'leave-one-out'; did you mean 'leave_one_out'"):
        group_advantage(r, ids, baseline="leave-one-out")
    with pytest.raises(ValueError, match=r"group_ids is \(3,\) torch.int64; wanted \(2,\) int64"):
        group_advantage(r, torch.zeros(3, dtype=torch.int64))
