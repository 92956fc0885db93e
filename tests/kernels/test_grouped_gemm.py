"""grouped_gemm's reference against sums of products, one token at a time."""

import pytest
import torch

from athanor.kernels import grouped_gemm, grouped_wgrad

# tokens per expert, rows that belong to none: all kinds of sizes; one expert with all; nobody; no row at all
GROUPS = [([3, 0, 5, 1], 2), ([0, 7, 0], 0), ([0, 0], 4), ([0], 0)]


def offsets_of(sizes, leading, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=dtype)[1 - leading :]


def inputs(sizes, outside, N, K, generator, dtype=torch.float64):
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    T = sum(sizes) + outside
    return randn(T, K), randn(len(sizes), N, K), randn(T, N)


def by_token(x, w, dy, sizes):
    """y, dx, dw as sums over tokens."""
    experts = [e for e, n in enumerate(sizes) for _ in range(n)]
    y, dx, dw = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(w)
    for t, e in enumerate(experts):
        y[t] = (w[e] * x[t]).sum(1)
        dx[t] = (w[e] * dy[t][:, None]).sum(0)
        dw[e] += dy[t][:, None] * x[t]
    return y, dx, dw


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("sizes, outside", GROUPS)
def test_matches_the_sums_in_fp64_with_gradients(sizes, outside, leading, close64, generator):
    x, w, dy = inputs(sizes, outside, 6, 4, generator)
    offsets = offsets_of(sizes, leading, [torch.int32, torch.int64][leading])
    x.requires_grad_(), w.requires_grad_()
    y = grouped_gemm(x, w, offsets)
    for got, want in zip((y, *torch.autograd.grad(y, (x, w), dy)), by_token(x.detach(), w.detach(), dy, sizes), strict=True):
        close64(got, want)
    close64(grouped_wgrad(dy, x, offsets, len(sizes)), by_token(x.detach(), w.detach(), dy, sizes)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_the_sums(dtype, within_rule, generator):
    sizes = [3, 0, 9]
    x, w, dy = inputs(sizes, 2, 21, 190, generator, dtype)
    wide = by_token(*(t.double() for t in (x, w, dy)), sizes)
    plain = by_token(x, w, dy, sizes)
    x.requires_grad_(), w.requires_grad_()
    y = grouped_gemm(x, w, offsets_of(sizes, 1))
    for got, b, c in zip((y, *torch.autograd.grad(y, (x, w), dy)), plain, wide, strict=True):
        within_rule(got, b, c)


def test_rows_of_no_expert_have_no_influence(generator):
    x, w, dy = inputs([2, 3], 2, 4, 5, generator)
    want = by_token(x, w, dy, [2, 3])
    x[5:], dy[5:] = torch.nan, torch.nan
    x.requires_grad_(), w.requires_grad_()
    y = grouped_gemm(x, w, offsets_of([2, 3], 1))
    got = y, *torch.autograd.grad(y, (x, w), dy)
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True)) and not got[0][5:].any() and not got[1][5:].any()
    late = torch.tensor([1, 2, 5])  # the first row belongs to none
    assert not grouped_gemm(x.detach(), w.detach(), late)[0].any()


def test_mismatches_are_refused():
    x, w, offsets = torch.ones(4, 3), torch.ones(2, 5, 3), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match=r"grouped_gemm: w is \(2, 5, 4\), x is \(4, 3\); wanted"):
        grouped_gemm(x, torch.ones(2, 5, 4), offsets)
    with pytest.raises(ValueError, match="contiguous, on cpu"):  # a kernel reads them one after the other
        grouped_gemm(torch.ones(4, 3), torch.ones(2, 5, 3), torch.zeros(3, 2, dtype=torch.int64)[:, 0])
    with pytest.raises(ValueError, match=r"grouped_gemm: offsets is \(4,\) torch.int64 on cpu; wanted \(2,\) or \(3,\)"):
        grouped_gemm(x, w, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"grouped_gemm: offsets is \(3,\) torch.float32"):
        grouped_gemm(x, w, offsets.float())
    with pytest.raises(ValueError, match="grouped_gemm: w is torch.float64, x is torch.float32"):
        grouped_gemm(x, w.double(), offsets)
    with pytest.raises(ValueError, match=r"grouped_wgrad: x is \(4, 3\) torch.float32, dy is \(3, 5\)"):
        grouped_wgrad(torch.ones(3, 5), x, offsets, 2)
    with pytest.raises(ValueError, match="w is not contiguous"):
        grouped_gemm(x, w.mT.contiguous().mT, offsets, backend="triton")
