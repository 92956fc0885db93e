import numpy as np
import pytest
import torch

from athanor.advantages import advantages_of, gdpo_advantages, groups_with_contrast, whiten
from athanor.losses import resolve_preset


def batch():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 0.5, torch.nan, 0], dtype=torch.float64)
    return rewards, torch.tensor([1, 1, 1, 2, 2, 2, 3, 3, 3]), torch.tensor([4, 10, 3, 7, 7, 7, 1, 50, 2])


def test_grpo_divides_by_the_group_std_and_dr_grpo_does_not():
    rewards, ids, _ = batch()
    a = advantages_of(rewards, ids, resolve_preset("grpo")).numpy()
    assert np.allclose(a[:3], (np.array([1, 0, 0]) - 1 / 3) / (np.std([1, 0, 0]) + 1e-6)) and not a[3:6].any() and a[7] == 0
    b = advantages_of(rewards, ids, resolve_preset("dr_grpo", max_tokens=64)).numpy()
    assert np.allclose(b[:3], np.array([2, -1, -1]) / 3) and np.allclose(b[[6, 8]], [0.25, -0.25])


def test_rloo_subtracts_the_mean_of_the_others():
    rewards, ids, _ = batch()
    a = advantages_of(rewards, ids, resolve_preset("rloo")).numpy()
    assert np.allclose(a, [1, -0.5, -0.5, 0, 0, 0, 0.5, 0, -0.5])


def test_reinforce_pp_whitens_over_tokens():
    rewards, ids, n = batch()
    a = advantages_of(rewards, ids, resolve_preset("reinforce_pp"), num_tokens=n)
    centred = np.array([2 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0.25, np.nan, -0.25])
    tokens = np.concatenate([np.full(k, c) for k, c in zip(n.tolist(), centred, strict=True) if not np.isnan(c)])
    want = np.where(np.isnan(centred), 0, (centred - tokens.mean()) / (tokens.std() + 1e-8))
    assert np.allclose(a.numpy(), want, rtol=1e-12) and a[7] == 0
    once = advantages_of(rewards, ids, resolve_preset("reinforce_pp")).numpy()
    known = centred[~np.isnan(centred)]
    assert np.allclose(once[~np.isnan(centred)], (known - known.mean()) / (known.std() + 1e-8), rtol=1e-12)
    with pytest.raises(ValueError, match=r"advantages_of: num_tokens is \(8,\); wanted \(9,\)"):
        advantages_of(rewards, ids, resolve_preset("reinforce_pp"), num_tokens=n[:8])


def test_whitening_a_batch_without_contrast_gives_exactly_zero():
    a = advantages_of(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1]), resolve_preset("reinforce_pp"), num_tokens=torch.ones(4))
    assert torch.equal(a, torch.zeros(4)) and torch.equal(whiten(torch.zeros(3), torch.zeros(3)), torch.zeros(3))


def test_groups_with_contrast_are_kept_whole():
    rewards, ids, _ = batch()
    assert groups_with_contrast(rewards, ids).tolist() == [True] * 3 + [False] * 3 + [True] * 3
    # the middle member of 0, 0.5, 1 has advantage 0, yet its group has contrast
    assert groups_with_contrast(torch.tensor([0.0, 0.5, 1.0, 0.1, 0.1, 0.1]), torch.tensor([0, 0, 0, 1, 1, 1])).tolist() == [True] * 3 + [False] * 3
    assert groups_with_contrast(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)


def gdpo_by_hand(parts, weights, groups):
    """The three lines of the formula, in numpy, group by group."""
    total = np.zeros(len(parts))
    for k, weight in enumerate(weights):
        for g in set(groups):
            rows = [i for i in range(len(parts)) if groups[i] == g and not np.isnan(parts[i][k])]
            values = np.array([parts[i][k] for i in rows])
            if len(rows) > 1:
                total[rows] += weight * (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    there = [i for i in range(len(parts)) if not np.isnan(parts[i]).all()]
    result = np.zeros(len(parts))
    result[there] = (total[there] - total[there].mean()) / (total[there].std(ddof=1) + 1e-4)
    return result


def test_gdpo_normalises_each_reward_in_its_group_and_then_the_batch():
    nan = float("nan")
    parts = np.array([[1, 0.1, nan], [0, 0.3, 2], [0, 0.2, 4], [1, 0.2, nan], [1, 0.5, 1], [1, 0.5, 2], [nan, nan, nan], [0, nan, nan]])
    groups, weights = [0, 0, 0, 0, 1, 1, 1, 1], [1.0, 0.5, -0.25]
    found = gdpo_advantages(torch.tensor(parts), torch.tensor(weights), torch.tensor(groups))
    np.testing.assert_allclose(found.numpy(), gdpo_by_hand(parts, weights, groups), atol=1e-12)
    assert found[6] == 0
    # a reward in other units counts the same, up to the epsilon, which is what the method is for
    scaled = gdpo_advantages(torch.tensor(parts * [1, 1e6, 1]), torch.tensor(weights), torch.tensor(groups))
    np.testing.assert_allclose(scaled.numpy(), found.numpy(), atol=2e-3)


def test_gdpo_without_contrast_is_zero_and_shapes_are_checked():
    assert gdpo_advantages(torch.ones(4, 2), torch.ones(2), torch.tensor([0, 0, 1, 1])).tolist() == [0.0] * 4
    # three times 0.1 has another mean than 0.1, and the group is constant all the same: exactly 0 beside one that is not
    mixed = gdpo_advantages(torch.tensor([[0.1], [0.1], [0.1], [0.0], [1.0], [1.0]]).double(), torch.ones(1), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert mixed[:3].tolist() == [0.0] * 3 and (mixed[3:] != 0).all()
    assert gdpo_advantages(torch.full((2, 1), float("nan")), torch.ones(1), torch.tensor([0, 0])).tolist() == [0.0] * 2
    with pytest.raises(ValueError, match=r"wanted \(S, K\), \(K,\) and \(S,\)"):
        gdpo_advantages(torch.ones(4, 2), torch.ones(3), torch.tensor([0, 0, 1, 1]))
