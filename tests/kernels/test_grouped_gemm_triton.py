"""grouped_gemm in Triton against fp64: every size of a group, rows of no expert, descriptors and pointers.

The interpreter's tiles are 16 x 16 x 16; with K and N multiples of 8 (fp16) or 4 (fp32) the operands come through tensor descriptors, else through
masked pointers.
"""

import pytest
import torch

from athanor.kernels import grouped_gemm, grouped_wgrad

pytest.importorskip("triton")
from athanor.kernels import grouped_gemm_triton as module  # noqa: E402

nan = torch.nan
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# tokens per expert, rows of none, N, K: around a tile; one expert with all; nobody; odd everything; no row; one output more than a tile
CASES = [([0, 1, 15, 16, 17], 7, 32, 48), ([0, 40, 0], 0, 16, 16), ([0, 0], 5, 16, 24), ([3, 2], 1, 7, 19), ([0, 0], 0, 16, 16), ([20], 0, 24, 20)]
ON_GPU = [([0, 1, 127, 128, 129], 60, 264, 328), ([0, 700, 0], 0, 256, 128)]


def inputs(sizes, outside, N, K, generator, dtype=torch.float32):
    T = sum(sizes) + outside
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return *(torch.randn(*s, generator=generator).to(dtype) for s in ((T, K), (len(sizes), N, K), (T, N))), offsets


def differentiated(x, w, dy, offsets, backend=None):
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = grouped_gemm(x, w, offsets, backend=backend)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, (x, w), dy))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("sizes, outside, N, K", CASES + [pytest.param(*case, marks=pytest.mark.gpu) for case in ON_GPU])
def test_errs_no_more_than_pytorchs(sizes, outside, N, K, dtype, triton_device, within_rule, poisoned, generator):
    x, w, dy, offsets = inputs(sizes, outside, N, K, generator, dtype)
    plain, oracle = differentiated(x, w, dy, offsets), differentiated(x.double(), w.double(), dy.double(), offsets)
    got = differentiated(*(t.to(triton_device) for t in (x, w, dy, offsets)), backend="triton")
    for a, b, c, what in zip(got, plain, oracle, ("y", "dx", "dw"), strict=True):
        within_rule(a, b, c, what)
    empty = [e for e, n in enumerate(sizes) if n == 0]
    assert not got[2][empty].any() and not got[0][sum(sizes) :].any() and not got[1][sum(sizes) :].any()


@pytest.mark.parametrize("N, K", [(16, 24), (17, 19)])
def test_rows_of_no_expert_and_other_experts_have_no_influence(N, K, triton_device, poisoned, generator):
    x, w, dy, offsets = inputs([5, 0, 18, 3], 9, N, K, generator)
    want = differentiated(*(t.to(triton_device) for t in (x, w, dy, offsets)), backend="triton")
    x[26:], dy[26:], x[24], dy[25] = nan, nan, nan, nan  # none's rows, and two of the last expert's
    w[1] = nan  # of the expert without tokens
    y, dx, dw = differentiated(*(t.to(triton_device) for t in (x, w, dy, offsets)), backend="triton")
    same = [t for t in range(35) if t not in (24, 25)]
    assert torch.equal(y[same], want[0][same]) and torch.equal(dx[same], want[1][same]) and torch.equal(dw[:3], want[2][:3])
    assert y[24].isnan().all() and dx[25].isnan().all() and dw[3].isnan().all() and not y[26:].any() and not dx[26:].any()


def test_both_forms_of_offsets_give_equal_bits(triton_device, generator):
    x, w, dy, offsets = (t.to(triton_device) for t in inputs([3, 0, 17, 16], 4, 24, 40, generator))
    results = [differentiated(x, w, dy, form.to(kind), "triton") for form in (offsets, offsets[1:]) for kind in (torch.int32, torch.int64)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_rows_that_are_not_asked_for_are_not_touched(triton_device, generator):
    x, w, _, offsets = (t.to(triton_device) for t in inputs([3, 18], 4, 24, 40, generator))
    want = grouped_gemm(x, w, offsets, backend="triton")
    wide = torch.full((30, 40), 7.0, device=triton_device)
    module.grouped_product(x, w, offsets, out=wide[2:27, 4:28])
    assert torch.equal(wide[2:23, 4:28], want[:21])
    wide[2:23, 4:28] = 7.0
    assert (wide == 7.0).all()


def test_descriptors_and_pointers_give_equal_bits(triton_device, rowwise_products, generator):
    x, w, dy, offsets = (t.to(triton_device) for t in inputs([3, 0, 18], 4, 24, 40, generator, torch.float16))
    assert module.descriptors_allowed(x, w) == (triton_device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0))
    shifted = lambda t: torch.full((len(t), t.shape[1] + 9), nan, dtype=t.dtype, device=t.device)[:, 1:-8].copy_(t)  # noqa: E731
    assert not module.descriptors_allowed(shifted(x), w)
    assert torch.equal(grouped_gemm(shifted(x), w, offsets, backend="triton"), grouped_gemm(x, w, offsets, backend="triton"))
    got, want = (grouped_wgrad(f(dy), f(x), offsets, 3, backend="triton") for f in (shifted, lambda t: t))
    assert torch.equal(got, want) and not got[1].any()


def test_experts_are_mapped_in_order(triton_device):
    sizes, BM = [5, 0, 32, 1, 16, 0, 33], 16
    offsets = torch.tensor(sizes, device=triton_device).cumsum(0)
    tile_map, slots = module.tile_map_of(offsets, 100, 7, BM)
    want, first = [], 0
    for e, n in enumerate(sizes):
        want += [(e, first + at, first + n) for at in range(0, n, BM)]
        first += n
    planes = tile_map[:-1].view(3, slots)
    assert tile_map[-1] == len(want) and slots >= len(want)
    assert planes[:, : len(want)].T.tolist() == [list(t) for t in want] and (planes[0, len(want) :] == -1).all()


def test_neither_lengths_nor_addresses_compile_anew(launches):
    w, flat, offsets = torch.zeros(3, 16, 32), torch.zeros(100 * 32), torch.zeros(90, dtype=torch.int32)
    for T in range(1, 51):
        module.grouped_product(flat[32 * (T % 4) :][: 32 * T].view(T, 32), w, offsets[T % 9 :][:3])
        module.grouped_wgrad_triton(flat[: 16 * T].view(T, 16), flat[: 32 * T].view(T, 32), offsets[T % 9 :][:3], 3)
    assert sorted(name for name, *_ in launches.keys) == ["fill_outside_kernel", "grouped_gemm_kernel", "grouped_wgrad_kernel", "tile_map_kernel"]


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    T, K = 1 << 21, 1032  # 2.16e9
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(2, 16, K, device="cuda", dtype=torch.bfloat16) / K**0.5
    offsets = torch.tensor([0, T - 100, T], device="cuda")
    y = grouped_gemm(x, w, offsets, backend="triton")
    assert (y[-300:].double() - torch.cat([x[-300:-100].double() @ w[0].double().T, x[-100:].double() @ w[1].double().T])).abs().max() < 0.05
    dw = grouped_wgrad(y, x, offsets, 2, backend="triton")
    assert (dw[1].double() - y[-100:].double().T @ x[-100:].double()).abs().max() < 0.5


@pytest.mark.gpu
def test_a_captured_call_follows_the_offsets_and_never_waits_for_the_device(generator):
    x, w, dy, offsets = (t.cuda() for t in inputs([3, 200, 0, 57], 0, 64, 128, generator, torch.bfloat16))
    differentiated(x, w, dy, offsets, "triton")
    others = torch.tensor([0, 130, 130, 131, 250], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, dw = grouped_gemm(x, w, offsets, backend="triton"), grouped_wgrad(dy, x, offsets, 4, backend="triton")
        offsets.copy_(others)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, grouped_gemm(x, w, offsets, backend="triton")) and torch.equal(dw, grouped_wgrad(dy, x, offsets, 4, backend="triton"))
    assert not y[250:].any() and not dw[1].any()
