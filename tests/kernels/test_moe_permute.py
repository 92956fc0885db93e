"""moe_permute and moe_unpermute against loops in Python: places, padding, sums in their order, gradients, choices that go nowhere."""

import pytest
import torch

from athanor.kernels import moe_permute, moe_places, moe_unpermute
from athanor.kernels.moe_permute import num_rows


def choices(T, k, E, generator, nowhere=()):
    ids = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(T)]) if T else torch.zeros(0, k)
    ids = ids.to(torch.int32)
    ids[list(nowhere)] = -1
    return ids


def places_by_hand(ids, E, align):
    """Rows of each expert in the order of the tokens, padded."""
    rows, offsets = [], [0]
    for e in range(E):
        rows += [t * len(row) + j for t, row in enumerate(ids) for j, choice in enumerate(row) if choice == e]
        rows += [-1] * (-len(rows) % align)
        offsets.append(len(rows))
    return offsets, rows


# one token, several, an expert with all, nobody at all
@pytest.mark.parametrize(
    "T, k, E, nowhere", [(1, 2, 3, ()), (37, 3, 8, (4, 11)), (20, 1, 1, ()), (0, 2, 4, ()), (5, 2, 64, ()), (3, 2, 4, (0, 1, 2))]
)
@pytest.mark.parametrize("align", [1, 4, 16])
def test_places_are_a_stable_sort_with_padding(T, k, E, nowhere, align, generator):
    ids = choices(T, k, E, generator, nowhere)
    got = moe_places(ids, E, align=align)
    offsets, rows = places_by_hand(ids.tolist(), E, align)
    assert got.offsets.tolist() == offsets and got.source.shape == (num_rows(T * k, E, align),)
    assert got.source.tolist() == rows + [-1] * (len(got.source) - len(rows))
    assert got.inverse.tolist() == [[rows.index(t * k + j) if ids[t, j] >= 0 else -1 for j in range(k)] for t in range(T)]
    assert all(x.dtype == torch.int32 for x in got)


@pytest.mark.parametrize("align", [1, 16])
def test_rows_go_to_their_experts_and_come_back_weighted(align, generator, close64):
    ids = choices(13, 3, 5, generator, (6,))
    x = torch.randn(13, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(13, 3, generator=generator, dtype=torch.float64)
    rows, places = moe_permute(x, ids, 5, align=align)
    for p, slot in enumerate(places.source.tolist()):
        assert torch.equal(rows[p], x[slot // 3] if slot >= 0 else torch.zeros(4, dtype=torch.float64))
    y = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    want = torch.stack([sum((weights[t, j] * y[places.inverse[t, j]] for j in range(3) if ids[t, j] >= 0), torch.zeros(4)) for t in range(13)])
    close64(moe_unpermute(y, weights, places), want)
    used = int(places.offsets[-1])
    close64(moe_unpermute(y[:used], weights, places), want)  # what is behind the last expert may be cut off


@pytest.mark.parametrize("align", [1, 4])
def test_gradients_are_those_of_finite_differences(align, generator):
    ids = choices(6, 2, 4, generator, (2,))
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe_permute(x, ids, 4, align=align)[0], x)
    places = moe_places(ids, 4, align=align)
    y = torch.randn(len(places.source), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, w: moe_unpermute(y, w, places), (y, weights))


def test_sums_run_in_the_order_of_the_choices_in_fp32(generator):
    ids = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    places = moe_places(ids, 3)
    y = torch.zeros(3, 1, dtype=torch.bfloat16)
    y[places.inverse[0].long(), 0] = torch.tensor([1.0, 2.0**-20, -1.0], dtype=torch.bfloat16)
    assert moe_unpermute(y, torch.ones(1, 3), places).item() == 2.0**-20
    y[places.inverse[0].long(), 0] = torch.tensor([2.0**-30, 1.0, -1.0], dtype=torch.bfloat16)
    assert moe_unpermute(y, torch.ones(1, 3), places).item() == 0.0


def test_padding_and_rows_of_nobody_have_no_influence(generator):
    ids = choices(7, 2, 4, generator)
    places = moe_places(ids, 4, align=8)
    y = torch.randn(len(places.source), 3, generator=generator)
    weights = torch.rand(7, 2, generator=generator).requires_grad_()
    want = moe_unpermute(y, weights, places)
    y[places.source < 0] = torch.nan
    y.requires_grad_()
    got = moe_unpermute(y, weights, places)
    assert torch.equal(got, want)
    dy, dweights = torch.autograd.grad(got.sum(), (y, weights))
    assert not dy[places.source < 0].any() and dy.isfinite().all() and dweights.isfinite().all()


def test_a_choice_that_goes_nowhere_gives_nan_where_its_weight_is():
    places = moe_places(torch.tensor([[-1, -1], [0, 1]], dtype=torch.int32), 2)
    out = moe_unpermute(torch.ones(4, 2), torch.tensor([[torch.nan, torch.nan], [0.5, 0.25]]), places)
    assert out[0].isnan().all() and out[1].tolist() == [0.75, 0.75]


def test_mismatches_are_refused():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"moe_places: ids is \(3, 2\) torch.int64"):
        moe_places(ids.long(), 4)
    with pytest.raises(ValueError, match="align 0"):
        moe_places(ids, 4, align=0)
    with pytest.raises(ValueError, match=r"moe_permute: x is \(4, 5\) torch.float32, ids is \(3, 2\)"):
        moe_permute(torch.ones(4, 5), ids, 4)
    with pytest.raises(ValueError, match=r"moe_unpermute: y is \(9, 5\)"):
        moe_unpermute(torch.ones(9, 5), torch.ones(3, 2), moe_places(ids, 4))
    with pytest.raises(ValueError, match=r"weights is \(3, 1\)"):
        moe_unpermute(torch.ones(6, 5), torch.ones(3, 1), moe_places(ids, 4))
