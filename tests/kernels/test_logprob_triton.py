"""logprob in Triton against the formula in fp64, and what only a kernel can get wrong: grids, offsets, strides, recompilation."""

import mmap

import pytest
import torch

from athanor.kernels import logprob

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from athanor.kernels.logprob_triton import logprob_bwd_kernel, logprob_triton  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
inf, nan = torch.inf, torch.nan
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def oracle(logits, targets, temperature, g):
    """logp, entropy and d (g . logp) / d logits by the formulas, in fp64."""
    x = logits.double().cpu()
    z = (x - x.max(1, keepdim=True).values) / temperature if x.numel() else x
    e = z.exp()
    p = e / e.sum(1, keepdim=True)
    keep = (targets >= 0) & (targets < x.shape[1])
    onehot = torch.zeros_like(x)
    onehot[keep, targets[keep]] = 1
    logp = torch.where(keep, (torch.where(onehot > 0, z, 0.0)).sum(1) - e.sum(1).log(), 0.0)
    entropy = e.sum(1).log() - (p * torch.where(p > 0, z, 0.0)).sum(1)
    return logp, entropy, torch.where(keep, g.double() / temperature, 0.0)[:, None] * (onehot - p)


def run(logits, targets, g, temperature=1.0, backend="triton", device="cpu"):
    x = logits.detach().to(device).requires_grad_()
    out = logprob(x, targets.to(device), temperature=temperature, backend=backend)
    return out.logps.detach().cpu(), out.entropy.cpu(), torch.autograd.grad(out.logps, x, g.to(device))[0].cpu()


def inputs(T, V, generator, dtype=torch.float32, spread=3.0):
    logits = (spread * torch.randn(T, V, generator=generator)).to(dtype)
    targets = torch.randint(0, V, (T,), generator=generator)
    if T > 2:
        targets[::5] = -100
    return logits, targets, torch.randn(T, generator=generator)


# one row; both odd; V one more than a block of 4096; V a power of two; one token; empty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("T, V", [(1, 7), (33, 257), (2, 4097), (5, 64), (3, 1), (0, 64)])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 5.0])
def test_errs_no_more_than_the_reference(T, V, temperature, dtype, triton_device, within_rule, generator):
    logits, targets, g = inputs(T, V, generator, dtype, 3 * min(1.0, temperature * 10))
    got, plain = (run(logits, targets, g, temperature, backend, triton_device) for backend in ("triton", "reference"))
    for a, b, c, what in zip(got, plain, oracle(logits, targets, temperature, g), ("logps", "entropy", "dlogits"), strict=True):
        within_rule(a, b, c, what)


def test_upstream_gradient_scales_and_zero_upstream_writes_zeros(triton_device, generator):
    logits, targets, g = inputs(6, 50, generator)
    targets[:] = torch.arange(6)
    g[2] = 0
    logits[2, 7] = nan  # is not even read by the backward
    once, thrice = (run(logits, targets, k * g, device=triton_device)[2] for k in (1.0, 4.0))
    assert torch.equal(4 * once, thrice) and not once[2].any() and once[[0, 1, 3, 4, 5]].all()


def test_padded_rows_and_offset_views(triton_device, generator):
    wide, targets, g = inputs(5, 90, generator)
    wide[:, 80:] = nan  # what lies beyond the vocabulary must not be read
    view = wide.to(triton_device)[:, 3:80].requires_grad_()
    got = logprob(view, targets.to(triton_device), backend="triton")
    grad = torch.autograd.grad(got.logps, view, g.to(triton_device))[0]
    plain = run(wide[:, 3:80].contiguous(), targets, g, device=triton_device)
    assert torch.equal(got.logps.cpu(), plain[0]) and torch.equal(got.entropy.cpu(), plain[1]) and torch.equal(grad.cpu(), plain[2])


def test_forbidden_tokens(triton_device, generator):
    V = 40
    logits = torch.randn(6, V, generator=generator)
    logits[0, :32] = -inf  # the first blocks of 16 would be empty
    logits[1], logits[1, 9] = -inf, 2.5  # all but one
    logits[2, 5] = -inf  # the target
    logits[3] = -inf  # all
    logits[4] = 0.75  # constant
    targets = torch.tensor([35, 9, 5, 7, 0, 1])
    logps, entropy, grad = run(logits, targets, torch.ones(6), device=triton_device)
    with torch.no_grad():
        want = torch.log_softmax(logits.double(), -1)
    assert torch.allclose(logps[[0, 4, 5]].double(), want[[0, 4, 5], targets[[0, 4, 5]]], atol=1e-6)
    assert logps[1] == 0 and entropy[1] == 0 and not grad[1].any()  # one-hot: p = 1 exactly
    assert logps[2] == -inf and torch.isfinite(grad[2]).all() and grad[2, 5] == 1
    assert logps[3] == -inf and entropy[3] == 0 and not grad[3].any()
    assert abs(entropy[4] - torch.tensor(float(V)).log()) < 1e-6
    assert torch.isfinite(entropy).all() and torch.isfinite(grad).all() and not grad[0, :32].any()


@pytest.mark.parametrize("offset, spread", [(-3e4, 1.0), (3e4, 1.0), (0.0, 1e5), (3e38, 0.0), (-3e38, 0.0)])
def test_extreme_logits(offset, spread, triton_device, generator):
    logits = (offset + spread * torch.randn(4, 4100, generator=generator)).requires_grad_()
    if spread == 0.0:  # the largest and the smallest number in different blocks: their difference overflows
        logits = torch.full((2, 4100), -offset).index_fill_(1, torch.tensor([4099]), offset)
    targets = logits.argmax(-1)
    g = torch.ones(len(logits))
    got = run(logits, targets, g, device=triton_device)
    for a, c in zip(got, oracle(logits.detach(), targets, 1.0, g), strict=True):
        assert torch.allclose(a.double(), c, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [nan, inf])
def test_nan_poisons_its_own_row_alone(bad, triton_device, generator):
    logits, _, g = inputs(3, 70, generator)
    logits[1, 50] = bad
    for x in run(logits, torch.tensor([0, 1, 2]), g, device=triton_device):
        assert torch.isnan(x.view(3, -1)).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("label", [-100, -1, 40, 2**40, -(2**40)])
def test_labels_out_of_range_count_as_skipped(label, triton_device, generator):
    logits = torch.randn(2, 40, generator=generator).to(triton_device).requires_grad_()
    # the public function refuses these on CPU, where looking costs nothing
    logps, entropy = logprob_triton(logits, torch.tensor([label, 3], device=triton_device), 1.0)
    grad = torch.autograd.grad(logps.sum(), logits)[0]
    assert logps[0] == 0 and not grad[0].any() and entropy[0] > 0 and logps[1] < 0 and grad[1].all()


def test_more_rows_than_a_grid_dimension_holds(launches, generator):
    """65,535 is the limit of the grid's y and z; 2^31 - 1 that of x."""
    logits, targets, g = inputs(65_537, 2, generator)
    logprob_triton(logits.requires_grad_(), targets, 1.0)[0].backward(g)
    assert launches.grids == [(65_537,), (65_537,)]


@pytest.mark.gpu
def test_more_rows_than_a_grid_dimension_holds_on_a_gpu(generator):
    logits, targets, g = inputs(65_600, 3, generator)
    for a, c in zip(run(logits, targets, g, device="cuda"), oracle(logits, targets, 1.0, g), strict=True):
        assert torch.allclose(a.double(), c, atol=2e-6)


def test_a_row_has_the_same_bits_wherever_it_stands(triton_device, generator):
    logits, targets, g = inputs(130, 97, generator)
    targets.clamp_(min=0)
    whole = run(logits, targets, g, device=triton_device)
    for T, start in ((1, 0), (1, 129), (7, 60)):
        rows = slice(start, start + T)
        for a, b in zip(run(logits[rows], targets[rows], g[rows], device=triton_device), whole, strict=True):
            assert torch.equal(a, b[rows])
    order = torch.randperm(130, generator=generator)
    for a, b in zip(run(logits[order], targets[order], g[order], device=triton_device), whole, strict=True):
        assert torch.equal(a, b[order])


def test_offsets_beyond_two_to_the_31_elements(triton_device, generator):
    """Three rows 1.5 2^30 elements apart in memory that is never touched but for those rows: row 2 starts at element 3 2^30 > 2^31."""
    if triton_device.type == "cuda":
        memory = torch.empty(2, 4 << 30, dtype=torch.float16, device="cuda")
    else:
        maps = [mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) for _ in range(2)]
        memory = [torch.frombuffer(m, dtype=torch.float16) for m in maps]
    stride, V = 3 << 29, 40
    far, far_grad = (m.as_strided((3, V), (stride, 1)) for m in memory)
    logits, targets, g = inputs(3, V, generator, torch.float16)
    targets[:] = torch.tensor([3, 0, 39])
    far.copy_(logits)
    plain = run(logits, targets, g, device=triton_device)
    got = logprob(far, targets.to(triton_device), backend="triton")
    assert torch.equal(got.logps.cpu(), plain[0]) and torch.equal(got.entropy.cpu(), plain[1])
    m, S = logits.float().max(1).values, (logits.float() - logits.float().max(1, keepdim=True).values).exp().sum(1)
    rest = [x.to(triton_device) for x in (targets, g, m, S)]
    logprob_bwd_kernel[(3,)](far, rest[0], rest[2], rest[0], *rest[1:], far_grad, V, stride, stride, 1.0, SUPPORT=False, BLOCK=64)
    assert torch.allclose(far_grad.cpu().float(), plain[2].float(), atol=1e-3) and far_grad[2].any()


def test_neither_lengths_nor_temperatures_nor_offsets_compile_anew(launches, generator):
    V = 48
    for n in range(50):
        whole = torch.randn(n + 1, V, generator=generator).requires_grad_()
        targets = torch.randint(0, V, (n + 2,), generator=generator)[n % 2 :][: n + 1]  # a slice that may be aligned to 8 bytes only
        logps, _ = logprob_triton(whole, targets, [1.0, 2.0, 0.5 + n / 100][n % 3])
        logps.backward(torch.ones(n + 2)[1:])
    assert sorted(name for name, *_ in launches.keys) == ["logprob_bwd_kernel", "logprob_fwd_kernel"], launches.keys


def test_the_count_of_compilations_can_fail(launches):
    """A kernel whose length is specialised, as those above must not be."""
    for T in (1, 16, 17):
        _specialised_kernel[(1,)](torch.zeros(T), T, BLOCK=16)
    assert len(launches.keys) == 3
    _specialised_kernel[(1,)](torch.zeros(20), 20, BLOCK=32)
    assert len(launches.keys) == 4


@triton.jit
def _specialised_kernel(x_ptr, T, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < T)


def test_refuses_what_it_cannot_serve(triton_device):
    y = torch.zeros(4, dtype=torch.int64, device=triton_device)
    with pytest.raises(ValueError, match="logits of a row are not neighbours in memory"):
        logprob(torch.ones(6, 4, device=triton_device).T, y, backend="triton")
    with pytest.raises(ValueError, match="fp64 is the reference's"):
        logprob(torch.ones(4, 6, device=triton_device).double(), y, backend="triton")


def test_repeats_give_equal_bits_and_entropy_has_no_gradient(triton_device, generator):
    logits, targets, g = inputs(9, 4099, generator)
    first = run(logits, targets, g, device=triton_device)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(logits, targets, g, device=triton_device), first, strict=True))
    out = logprob(logits.to(triton_device).requires_grad_(), targets.to(triton_device), backend="triton")
    assert out.logps.requires_grad and not out.entropy.requires_grad
