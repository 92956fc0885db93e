"""The grouped products of the C++ kernels against those of BLAS, expert by expert; test_grouped_gemm.py holds the rules."""

import pytest
import torch

from athanor.kernels import grouped_gemm, grouped_wgrad, linear
from athanor.kernels.grouped_gemm_cpu import grouped_gemm_cpu

# tokens per expert, rows in front of all of them, rows behind
GROUPS = [([70, 0, 5, 1], 0, 2), ([0, 97, 0], 3, 0), ([0, 0], 0, 4), ([0], 0, 0), ([33, 64], 2, 3)]


def inputs(sizes, before, behind, N, K, wide, generator):
    T = before + sum(sizes) + behind
    offsets = torch.tensor([before, *(before + torch.tensor(sizes).cumsum(0)).tolist()], dtype=torch.int64 if wide else torch.int32)
    x, dy, w = torch.randn(T, K, generator=generator), torch.randn(T, N, generator=generator), torch.randn(len(sizes), N, K, generator=generator)
    return x.requires_grad_(), w.requires_grad_(), dy, offsets


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("sizes, before, behind", GROUPS)
def test_errs_no_more_than_blas_among_poison(sizes, before, behind, wide, within_rule, poisoned, padded, generator):
    x, w, dy, offsets = inputs(sizes, before, behind, 51, 30, wide, generator)
    with torch.no_grad():
        for t in (x, dy):  # rows of no expert have no influence
            t[:before], t[len(t) - behind :] = torch.nan, torch.nan
    strided = padded(x)
    forms = [offsets] if before else [offsets, offsets[1:].contiguous()]
    for form in forms:
        y = grouped_gemm(strided, w, form, backend="cpu")
        got = (y, *torch.autograd.grad(y, (strided, w), padded(dy)))
        results = []
        for dtype in (torch.float32, torch.float64):
            a, b = (t.detach().to(dtype).requires_grad_() for t in (x, w))
            reference = grouped_gemm(a, b, offsets, backend="reference")
            results.append((reference, *torch.autograd.grad(reference, (a, b), dy.to(dtype))))
        for ours, plain, exact in zip(got, *results, strict=True):
            within_rule(ours, plain, exact)
        assert torch.equal(grouped_wgrad(padded(dy), strided, form, len(sizes), backend="cpu"), got[2])


def test_a_token_has_the_bits_that_its_expert_alone_gives_it(with_threads, generator):
    """However many others there are, at whatever place: mixtures on a CPU need no filler rows."""
    x, w, _, offsets = inputs([70, 0, 5, 1], 0, 2, 51, 530, False, generator)

    def run():
        y = grouped_gemm_cpu(x.detach(), w.detach(), offsets)
        for expert, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
            for row in range(begin, end, 13):
                assert torch.equal(y[row], linear(x.detach()[row : row + 1], w.detach()[expert])[0])
        return y

    first, *others = with_threads(run)
    assert all(torch.equal(first, other) for other in others)
