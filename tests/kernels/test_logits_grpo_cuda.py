"""The CUDA row kernel against the reference's row step: as host C++ here, and on a GPU.  What any row kernel must do: test_logits_grpo_triton.py."""

import pytest
import torch

from athanor.kernels import LossVariant, logits_grpo_cuda
from athanor.kernels.logits_grpo import Tokens, dlogits_reference, rows_reference

TEMPERATURE = 0.7
FULL = LossVariant(kl="k3", beta=0.1, correction="tis")


@pytest.fixture(params=["early", "late", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Here 3 processors, blocks of 32 threads and 4 KiB of shared memory: 8 granules of 16 bytes per thread, and as many as ever in registers."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    monkeypatch.setattr(logits_grpo_cuda, "THREADS", 32)
    request.getfixturevalue("emulated_cuda")(request.param == "late", 3, 1 << 12)
    return torch.device("cpu")


def batch(T, V, dtype, device, seed=0):
    """Rows 2, 7, ... are masked, rows 3, 8, ... have no gradient but for the KL."""
    g = torch.Generator().manual_seed(seed)
    z, targets = (3 * torch.randn(T, V, generator=g)).to(dtype), torch.randint(0, V, (T,), generator=g)
    logps = (z.float() / TEMPERATURE).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    scale, A = torch.rand(T, generator=g) + 0.5, torch.randn(T, generator=g)
    scale[2::5], A[3::5], targets[2::5] = 0, 0, -100
    old = logps + 0.1 * torch.randn(T, generator=g)
    return z.to(device), Tokens(*(x.to(device) for x in (targets, scale, A, old, logps + 0.1, old - 0.1)))


def expected(z, tokens, variant, temperature, dtype):
    """Rows and gradient by the reference in this dtype, the gradient rounded as the kernel's."""
    z, tokens = z.to(dtype), Tokens(*(x.to(dtype) if x.is_floating_point() else x for x in tokens))
    rows, grad = rows_reference(z, tokens, variant, temperature), torch.empty_like(z)
    dlogits_reference(z, tokens.targets, rows.m, rows.S, rows.coefs, temperature, grad)
    return rows, grad


def check(z, tokens, rows, grad, within_rule, variant=FULL, temperature=TEMPERATURE):
    (plain, plain_grad), (want, want_grad) = (expected(z, tokens, variant, temperature, dtype) for dtype in (torch.float32, torch.float64))
    live = tokens.scale != 0  # the reference reads masked rows for m and S
    for name, got, a, b in zip(rows._fields, rows, plain, want, strict=True):
        within_rule(got[live].cpu(), a[live].cpu(), b[live].cpu(), name)
    within_rule(grad.cpu(), plain_grad.to(grad.dtype).cpu(), want_grad.cpu(), "gradient")
    assert not grad[~live].any() and not rows.logps[~live].any() and not rows.m[~live].any() and (rows.S[~live] == 1).all()


# One logit; less than a granule; a granule and a bit; odd, so that every row begins elsewhere in a granule; with 128 granules to a group of 32 threads:
# a group's edge in fp32, one less and one more; a row that is all of shared memory, and one that is in registers besides.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 3, 9, 37, 511, 512, 513, 1024, 1801, 2047])
def test_every_length_in_place_and_not(V, dtype, device, within_rule):
    z, tokens = batch(11, V, dtype, device)
    out = torch.full_like(z, torch.nan)
    rows = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, out)
    check(z, tokens, rows, out, within_rule)
    again = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, z)
    assert all(torch.equal(a, b) for a, b in zip((*rows, out), (*again, z), strict=True))
