"""The CUDA row kernel against the reference's row step: as host C++ here, and on a GPU.  What any row kernel must do: test_logits_grpo_triton.py."""

import pytest
import torch

from athanor.kernels import LossVariant, logits_grpo_cuda
from athanor.kernels._dispatch import strict_mode
from athanor.kernels.logits_grpo import Rows, Tokens, dlogits_reference, rows_reference

TEMPERATURE = 0.7
FULL = LossVariant(kl="k3", beta=0.1, correction="tis")


@pytest.fixture(params=["early", "late", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Here 3 processors, blocks of 64 threads and 8 KiB of shared memory: 8 granules of 16 bytes per thread, and as many as ever in registers."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    monkeypatch.setattr(logits_grpo_cuda, "THREADS", 64)
    request.getfixturevalue("emulated_cuda")(request.param == "late", 3, 1 << 13)
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


def check(z, tokens, rows, grad, within_rule, variant=FULL, temperature=TEMPERATURE, slack=0.0):
    """slack: of the largest S, allowed to S beyond the rule."""
    (plain, plain_grad), (want, want_grad) = (expected(z, tokens, variant, temperature, dtype) for dtype in (torch.float32, torch.float64))
    live = tokens.scale != 0  # the reference reads masked rows for m and S
    for name, got, a, b in zip(rows._fields, rows, plain, want, strict=True):
        allowed = a + slack * b.abs().max().to(a.dtype) if name == "S" else a
        within_rule(got[live].cpu(), allowed[live].cpu(), b[live].cpu(), name)
    within_rule(grad.cpu(), plain_grad.to(grad.dtype).cpu(), want_grad.cpu(), "gradient")
    assert not grad[~live].any() and not rows.logps[~live].any() and not rows.m[~live].any() and (rows.S[~live] == 1).all()


# One logit; less than a granule; a granule and a bit; odd, so that every row begins elsewhere in a granule; with 256 granules to a group of threads:
# a group's edge in fp32, one less and one more; a row that is all of shared memory, and one that is in registers, too.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 3, 9, 37, 1023, 1024, 1025, 2048, 3999, 4999])
def test_every_length_in_place_and_not(V, dtype, device, within_rule):
    z, tokens = batch(11, V, dtype, device)
    out = torch.full_like(z, torch.nan)
    rows = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, out)
    check(z, tokens, rows, out, within_rule)
    again = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, z)
    assert all(torch.equal(a, b) for a, b in zip((*rows, out), (*again, z), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_begin_elsewhere_in_16_bytes_than_the_logits(dtype, device, within_rule):
    z, tokens = batch(6, 4999, dtype, device)
    for shift in (1, 8):  # 8 bf16 are 16 bytes: the phase is the same, the stride is not
        wide = torch.full((6, 5016), torch.nan, dtype=dtype, device=device)
        out = wide[:, shift : shift + 4999]
        rows = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, out)
        check(z, tokens, rows, out, within_rule)
        assert wide[:, :shift].isnan().all() and wide[:, shift + 4999 :].isnan().all()


@pytest.mark.parametrize("T, live", [(1, []), (1, [0]), (7, []), (7, [6]), (7, [0]), (9, [0, 1, 2, 6, 7, 8]), (4, [0, 1, 2, 3])])
def test_runs_of_masked_rows_are_stepped_over(T, live, device, within_rule):
    """3 blocks here: block 0 has rows 0, 3, 6.  Garbage in a masked row shows if it is read."""
    z, tokens = batch(T, 700, torch.bfloat16, device)
    masked = torch.tensor([t not in live for t in range(T)], device=device)
    tokens = tokens._replace(scale=(~masked).float(), targets=tokens.targets.clamp_min(5))
    poisoned = z.masked_fill(masked[:, None], torch.nan)
    out = torch.full_like(z, torch.nan)
    rows = logits_grpo_cuda.rows_cuda(poisoned, tokens, FULL, TEMPERATURE, out)
    check(z, tokens, rows, out, within_rule)
    assert rows.entropy[masked].eq(0).all() and rows.coefs[masked].eq(0).all()


def test_a_length_temperature_or_bound_compiles_nothing(emulated_cuda, monkeypatch):
    emulated_cuda(late=False, multiprocessors=3, shared=1 << 12)
    seen, load = set(), logits_grpo_cuda._cuda.load
    monkeypatch.setattr(logits_grpo_cuda, "THREADS", 32)
    monkeypatch.setattr(logits_grpo_cuda._cuda, "load", lambda *key: seen.add(key) or load(*key))
    for T in range(1, 6):
        z, tokens = batch(T, 600 + 8 * T, torch.float32, torch.device("cpu"))
        logits_grpo_cuda.rows_cuda(z, tokens, LossVariant(clip_high=0.1 * T), 0.5 + T, torch.empty_like(z))
    assert len(seen) == 1


@pytest.mark.parametrize("V, itemsize, shared, fits", [
    (151936, 2, 232448, (28, 12)), (163840, 2, 232448, (28, 12)), (163848, 2, 232448, None), (128256, 2, 166912, (20, 12)),
    (32000, 2, 232448, (8, 0)), (73728, 4, 232448, (28, 8)), (73732, 4, 232448, None), (1, 4, 232448, (4, 0)),
])  # fmt: skip
def test_what_fits_on_a_multiprocessor(V, itemsize, shared, fits, monkeypatch):
    """H100 and H200 have 227 KiB of shared memory, an A100 163."""
    monkeypatch.setattr(logits_grpo_cuda._cuda, "limits", lambda device: (132, shared))
    z = torch.empty(1, V, dtype={2: torch.bfloat16, 4: torch.float32}[itemsize])
    reason = logits_grpo_cuda.why_not_on_chip(z)
    assert reason is None and logits_grpo_cuda.granules_per_thread(z, shared) == fits if fits else "does not fit" in reason


def test_strict_mode_leaves_rows_that_begin_anywhere_to_others():
    z = torch.empty(2, 37)
    assert logits_grpo_cuda.shifted(z) and not logits_grpo_cuda.shifted(torch.empty(2, 40))
    with strict_mode():
        assert "address modulo 16" in logits_grpo_cuda.why_not_on_chip(z)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [151936, 163840, 128256, 50257, 32000])  # 28 + 12, 28 + 12, 28 + 4, 16 and 8 granules per thread
def test_vocabularies_of_models(V, within_rule):
    z, tokens = batch(300, V, torch.bfloat16, torch.device("cuda", 0))
    out = torch.full_like(z, torch.nan)
    rows = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, out)
    again = logits_grpo_cuda.rows_cuda(z.clone(), tokens, FULL, TEMPERATURE, torch.empty_like(z))
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    some = torch.arange(0, 300, 30, device=z.device)
    # 150,000 terms, and a thread's sum is multiplied once more for each new maximum: up to 1.2e-5 of S was seen where the rule allowed 0.6e-5
    check(z[some], Tokens(*(x[some] for x in tokens)), Rows(*(x[some] for x in rows)), out[some], within_rule, slack=5e-7)


@pytest.mark.gpu
def test_follows_the_current_stream_and_may_be_captured():
    z, tokens = batch(40, 5000, torch.bfloat16, torch.device("cuda", 0))
    out = torch.empty_like(z)
    want = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, torch.empty_like(z))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = logits_grpo_cuda.rows_cuda(z, tokens, FULL, TEMPERATURE, out)
    out.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(rows, want, strict=True)) and torch.isfinite(out).all()
