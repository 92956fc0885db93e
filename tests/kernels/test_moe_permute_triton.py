"""moe_permute and moe_unpermute in Triton against the reference: equal places, equal copies, sums and gradients within the rule."""

import pytest
import torch

from athanor.kernels import moe_permute, moe_places, moe_unpermute

pytest.importorskip("triton")
from athanor.kernels import moe_permute_triton as module  # noqa: E402

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# T, k, E: choices around a block of 128, more experts than a tile of 64, a block more than a scan's 32, one of each, none
SIZES = [(64, 2, 8), (43, 3, 5), (1, 1, 1), (0, 2, 4)]
MANY = [(43, 3, 130), (1030, 4, 6)]


def choices(T, k, E, generator):
    ids = torch.rand(T, E, generator=generator).argsort(1)[:, :k].to(torch.int32)
    ids[2::5] = -1
    return ids


@pytest.mark.parametrize("T, k, E", [*SIZES, *MANY])
@pytest.mark.parametrize("align", [1, 16])
def test_places_are_the_references(T, k, E, align, triton_device, poisoned, generator):
    ids = choices(T, k, E, generator)
    want, got = moe_places(ids, E, align=align), moe_places(ids.to(triton_device), E, align=align, backend="triton")
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b)


def there_and_back(x, ids, weights, dy, dout, E, align, backend=None):
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    rows, places = moe_permute(x, ids, E, align=align, backend=backend)
    (dx,) = torch.autograd.grad(rows, x, dy[: len(rows)])
    y = dy[: len(rows)].detach().requires_grad_()
    out = moe_unpermute(y, weights, places, backend=backend)
    dyy, dweights = torch.autograd.grad(out, (y, weights), dout)
    return [t.detach().cpu() for t in (rows, dx, out, dyy, dweights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("D", [16, 37])
@pytest.mark.parametrize("T, k, E", SIZES)
def test_sums_and_gradients_err_no_more_than_the_reference(T, k, E, D, dtype, triton_device, within_rule, poisoned, generator):
    ids = choices(T, k, E, generator)
    x, dout = (torch.randn(T, D, generator=generator).to(dtype) for _ in range(2))
    dy, weights = torch.randn(T * k * 16 + 16, D, generator=generator).to(dtype), torch.rand(T, k, generator=generator)
    for align in (1, 16):
        plain = there_and_back(x, ids, weights, dy, dout, E, align)
        oracle = there_and_back(x.double(), ids, weights.double(), dy.double(), dout.double(), E, align)
        moved = [t.to(triton_device) for t in (x, ids, weights, dy, dout)]
        got = there_and_back(*moved, E, align, "triton")
        assert torch.equal(got[0], plain[0])
        for a, b, c, what in zip(got[1:4], plain[1:4], oracle[1:4], ("dx", "out", "dy"), strict=True):
            within_rule(a, b, c, what)
        # a weight's gradient is a sum over D that may cancel to anything: its error is one of the sum of magnitudes
        mass = there_and_back(x.double(), ids, weights.double(), dy.double().abs(), dout.double().abs(), E, align)[4]
        allowed = 2 * (plain[4].double() - oracle[4]).abs() + 2 * torch.finfo(torch.float32).eps * mass
        assert got[4].dtype == torch.float32 and ((got[4].double() - oracle[4]).abs() <= allowed).all()


def test_padding_and_rows_of_nobody_have_no_influence(triton_device, poisoned, generator):
    ids, weights = choices(20, 2, 4, generator).to(triton_device), torch.rand(20, 2, generator=generator).to(triton_device)
    places = moe_places(ids, 4, align=16, backend="triton")
    y = torch.randn(len(places.source), 24, generator=generator).to(triton_device)
    want = moe_unpermute(y, weights, places, backend="triton")
    y[places.source < 0] = torch.nan
    y.requires_grad_(), weights.requires_grad_()
    got = moe_unpermute(y, weights, places, backend="triton")
    dy, dweights = torch.autograd.grad(got.sum(), (y, weights))
    assert torch.equal(got, want) and not dy[places.source < 0].any() and dy.isfinite().all() and dweights.isfinite().all()
    used = int(places.offsets[-1])
    assert torch.equal(moe_unpermute(y[:used], weights, places, backend="triton"), want)


def test_a_choice_that_goes_nowhere_gives_nan_where_its_weight_is(triton_device):
    places = moe_places(torch.tensor([[-1, -1], [0, 1]], dtype=torch.int32, device=triton_device), 2, backend="triton")
    weights = torch.tensor([[torch.nan, torch.nan], [0.5, 0.25]], device=triton_device)
    out = moe_unpermute(torch.ones(4, 2, device=triton_device), weights, places, backend="triton")
    assert out[0].isnan().all() and out[1].tolist() == [0.75, 0.75]


def test_neither_tokens_nor_addresses_compile_anew(launches):
    flat, ints = torch.zeros(300 * 32), torch.zeros(300, dtype=torch.int32)
    for T in range(1, 51):
        ids = ints[T % 9 :][: 2 * T].view(T, 2)
        module.moe_places_triton(ids, 8, 16)
        x, y = flat[32 * (T % 4) :][: 32 * T].view(T, 32).requires_grad_(), flat[32 * (T % 3) :][: 64 * T].view(2 * T, 32).requires_grad_()
        source, weights = ints[T % 5 :][: 2 * T], flat[T % 7 :][: 2 * T].view(T, 2).requires_grad_()
        module.moe_permute_triton(x, source, ids).backward(y.detach())
        module.moe_unpermute_triton(y, weights, source, ids).backward(x.detach())
    names = sorted(name for name, *_ in launches.keys)
    assert sorted(set(names)) == ["moe_combine_kernel", "moe_dot_kernel", "moe_gather_kernel", "moe_histogram_kernel", "moe_offsets_kernel",
                                  "moe_place_kernel", "moe_scan_kernel"]  # fmt: skip
    assert len(names) == 9, launches.keys  # gather and combine come with weights and without


@pytest.mark.gpu
def test_a_captured_call_follows_the_choices_and_never_waits_for_the_device(generator):
    ids, others = (choices(500, 4, 16, generator).cuda() for _ in range(2))
    x, weights = torch.randn(500, 256, device="cuda"), torch.rand(500, 4, device="cuda")
    moe_unpermute(*[moe_permute(x, ids, 16)[0], weights, moe_places(ids, 16)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows, places = moe_permute(x, ids, 16)
            out = moe_unpermute(rows, weights, places)
        ids.copy_(others)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = moe_places(others.cpu(), 16)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(places, want, strict=True))
    torch.testing.assert_close(out, x * torch.where(others < 0, 0, weights).sum(1, keepdim=True))
