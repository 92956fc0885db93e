"""moe_route against brute force in Python: choice, ties, groups, weights, counts, replay, rows of NaN, and gradients by finite differences."""

import math

import pytest
import torch

from athanor.kernels import moe_route

# (E, k, options): both scorings, groups, a choice of all, one expert
OPTIONS = [
    (6, 2, {}),
    (6, 3, {"normalize": False, "scale": 2.0}),
    (8, 3, {"scoring": "sigmoid", "groups": (4, 2), "scale": 2.5, "bias": True}),
    (12, 4, {"scoring": "sigmoid", "groups": (3, 2), "normalize": False, "bias": True}),
    (5, 5, {"scoring": "sigmoid"}),
    (1, 1, {}),
]


def with_bias(options, E, generator):
    return {**options, "bias": torch.randn(E, generator=generator)} if options.get("bias") else options


def by_hand(row, k, scoring="softmax", bias=None, groups=(1, 1), normalize=True, scale=1.0):
    """ids and weights of one row of floats."""
    E, (n_group, topk_group) = len(row), groups
    if scoring == "softmax":
        top = max(row)
        scores = [math.exp(z - top) / sum(math.exp(y - top) for y in row) for z in row]
    else:
        scores = [1 / (1 + math.exp(-z)) for z in row]
    keys = [s + b for s, b in zip(scores, bias.tolist() if bias is not None else [0.0] * E, strict=True)]
    size = E // n_group
    worth = [sum(sorted(keys[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
    allowed = sorted(range(n_group), key=lambda g: (-worth[g], g))[:topk_group]
    ids = sorted((e for e in range(E) if e // size in allowed), key=lambda e: (-keys[e], e))[:k]
    weights = [scores[e] for e in ids]
    total = sum(weights) if normalize else 1.0
    return ids, [w / total * scale for w in weights]


@pytest.mark.parametrize("E, k, options", OPTIONS)
@pytest.mark.parametrize("T", [0, 1, 37])
def test_choice_weights_and_counts_are_those_of_the_definition(E, k, options, T, generator):
    options = with_bias(options, E, generator)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    got = moe_route(logits, k, **options)
    want = [by_hand(row, k, **options) for row in logits.tolist()]
    assert got.ids.dtype == got.counts.dtype == torch.int32 and got.ids.tolist() == [ids for ids, _ in want]
    torch.testing.assert_close(got.weights, torch.tensor([w for _, w in want], dtype=torch.float64).view(T, k), rtol=1e-12, atol=0)
    assert got.counts.tolist() == [sum(e in ids for ids, _ in want) for e in range(E)] and got.changed == 0


@pytest.mark.parametrize("E, k, options", OPTIONS)
def test_gradients_are_those_of_finite_differences(E, k, options, generator):
    options = with_bias(options, E, generator)
    logits = torch.randn(5, E, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = moe_route(logits.detach(), k, **options).ids  # fixed: finite differences must not change the choice
    assert torch.autograd.gradcheck(lambda z: moe_route(z, k, replay=ids, **options).weights, logits)


def test_ties_go_to_the_lowest_index():
    assert moe_route(torch.zeros(2, 7), 3).ids.tolist() == [[0, 1, 2]] * 2
    assert moe_route(torch.tensor([[1.0, 5.0, 1.0, 5.0, 1.0]]), 4).ids.tolist() == [[1, 3, 0, 2]]
    assert moe_route(torch.zeros(1, 8), 2, scoring="sigmoid", groups=(4, 1)).ids.tolist() == [[0, 1]]
    far = torch.tensor([[-200.0, -150.0, 0.0, -170.0]])  # their softmax is 0 in fp32, but the logits are in order
    assert moe_route(far, 3).ids.tolist() == [[2, 1, 3]]


def test_the_bias_selects_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    got = moe_route(logits, 2, scoring="sigmoid", bias=torch.tensor([0.0, 0.0, 0.0, 9.0]), normalize=False)
    assert got.ids.tolist() == [[3, 0]] and torch.equal(got.weights, logits.sigmoid()[:, [3, 0]])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_row_of_nan_is_flagged_and_changes_no_other(scoring, generator):
    logits = torch.randn(6, 8, generator=generator)
    want = moe_route(logits, 2, scoring=scoring)
    logits[2, 5] = torch.nan
    got = moe_route(logits, 2, scoring=scoring)
    others = [0, 1, 3, 4, 5]
    assert got.ids[2].tolist() == [-1, -1] and got.weights[2].isnan().all() and got.counts.sum() == 10
    assert torch.equal(got.ids[others], want.ids[others]) and torch.equal(got.weights[others], want.weights[others])
    assert moe_route(torch.tensor([[1.0, torch.inf, 0.0]]), 1).ids.tolist() == [[-1]]  # its softmax is NaN
    assert moe_route(torch.tensor([[1.0, -torch.inf, 0.0]]), 3).ids.tolist() == [[0, 2, 1]]


def test_replayed_rows_are_taken_and_counted(generator):
    logits = torch.randn(4, 6, generator=generator)
    own = moe_route(logits, 2).ids
    replay = own.clone()
    replay[1], replay[2] = torch.tensor([-1, -1]), own[2].flip(0)  # not recorded; another order
    worst = logits[3].argsort()[:2].to(torch.int32)
    replay[3] = torch.stack((worst[0], own[3, 0]))  # one that the logits would not choose
    got = moe_route(logits, 2, replay=replay)
    assert got.ids[[0, 2, 3]].tolist() == replay[[0, 2, 3]].tolist() and got.ids[1].tolist() == own[1].tolist() and got.changed == 1
    p = logits.softmax(-1)[3, replay[3].long()]
    torch.testing.assert_close(got.weights[3], p / p.sum())
    assert got.counts.tolist() == torch.bincount(got.ids.flatten(), minlength=6).tolist()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E", [7, 16, 60])
def test_a_rows_bits_do_not_depend_on_the_others(scoring, E, generator, with_threads):
    logits = torch.randn(1600, E, generator=generator)
    (whole, *others) = with_threads(lambda: moe_route(logits, 2, scoring=scoring))
    for other in others:
        assert torch.equal(other.weights, whole.weights) and torch.equal(other.ids, whole.ids)
    for rows in (1, 3, 16, 100):
        part = moe_route(logits[5 : 5 + rows], 2, scoring=scoring)
        assert torch.equal(part.weights, whole.weights[5 : 5 + rows])


def test_low_precision_scores_are_those_of_fp32(generator):
    logits = torch.randn(9, 8, generator=generator).bfloat16()
    a, b = moe_route(logits, 3, scoring="sigmoid"), moe_route(logits.float(), 3, scoring="sigmoid")
    assert a.weights.dtype == torch.float32 and torch.equal(a.weights, b.weights) and torch.equal(a.ids, b.ids)


@pytest.mark.parametrize("arguments, options, message", [
    ((torch.ones(2, 4), 5), {}, r"logits is \(2, 4\) torch.float32, k is 5"),
    ((torch.ones(2, 4), 2), {"scoring": "relu"}, "scoring is 'relu'"),
    ((torch.ones(2, 4), 2), {"bias": torch.ones(4)}, "softmax takes neither bias nor groups"),
    ((torch.ones(2, 4), 2), {"scoring": "sigmoid", "bias": torch.ones(3)}, r"bias is \(3,\)"),
    ((torch.ones(2, 4), 2), {"scoring": "sigmoid", "groups": (3, 1)}, r"groups is \(3, 1\)"),
    ((torch.ones(2, 4), 3), {"scoring": "sigmoid", "groups": (2, 1)}, "k is 3 for 4 experts"),
    ((torch.ones(2, 4), 2), {"replay": torch.ones(2, 2)}, "replay is .* torch.float32"),
    ((torch.ones(1, 4), 2), {"replay": torch.tensor([[0, 4]], dtype=torch.int32)}, "ids from 0 to 4"),
    ((torch.ones(1, 4), 2), {"replay": torch.tensor([[1, 1]], dtype=torch.int32)}, "names an expert twice"),
    ((torch.ones(1, 4), 2), {"replay": torch.tensor([[1, -1]], dtype=torch.int32)}, "has only some ids"),
])  # fmt: skip
def test_mismatches_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        moe_route(*arguments, **options)
