"""linear_logprob in Triton against the formula in fp64.

The interpreter's tiles are 16 x 16 x 16 and its vocabulary slices 48, so the sizes below have tails in every direction; with D a multiple of 8 (fp16)
or 4 (fp32) the operands come through tensor descriptors, else through masked pointers.  On a GPU the production tiles run.
"""

import mmap

import pytest
import torch

from athanor.kernels import linear_logprob

pytest.importorskip("triton")
from athanor.kernels import linear_logprob_triton as module  # noqa: E402
from athanor.kernels.linear_logprob_triton import LinearLogprobFunction, linear_logprob_triton, operands, tiles_of  # noqa: E402

inf, nan = torch.inf, torch.nan
MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# T, D, V: one token; everything a multiple of its tile; everything odd and V below a slice; above one slice by 1; above two; one word; empty
SIZES = [(1, 16, 7), (32, 32, 96), (19, 17, 37), (33, 24, 49), (37, 19, 101), (5, 8, 1), (0, 16, 50)]


def oracle(hidden, weight, targets, temperature, g, support=None):
    """logp, entropy, and the gradients of g . logp, by the formulas, in fp64; `support` is a mask (T, V) that includes the targets."""
    h, w, g = hidden.double().cpu(), weight.double().cpu(), g.double().cpu()
    x = h @ w.T
    if support is not None:
        x = x.masked_fill(~support, -inf)
    z = (x - x.max(1, keepdim=True).values) / temperature if x.numel() else x
    e = z.exp()
    p = e / e.sum(1, keepdim=True)
    keep = (targets >= 0) & (targets < len(w))
    onehot = torch.zeros_like(x)
    onehot[keep, targets[keep]] = 1
    logp = torch.where(keep, torch.where(onehot > 0, z, 0.0).sum(1) - e.sum(1).log(), 0.0)
    entropy = e.sum(1).log() - (p * torch.where(p > 0, z, 0.0)).sum(1)
    dz = torch.where(keep, g / temperature, 0.0)[:, None] * (onehot - p)
    return logp, entropy, dz @ w, dz.T @ h


def plain_fp32(hidden, weight, targets, temperature, g, support=None):
    """The textbook formula in fp32 from the same rounded numbers; gradients rounded to the inputs' dtype."""
    h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    z = (h @ w.T) / temperature
    log_p = (z if support is None else z.masked_fill(~support, -inf)).log_softmax(-1)
    keep = targets >= 0
    logp = torch.where(keep, log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1), 0.0)
    dh, dw = torch.autograd.grad(logp, (h, w), g)
    return logp.detach(), -torch.where(log_p > -inf, log_p.exp() * log_p, 0.0).sum(1).detach(), dh.to(hidden.dtype), dw.to(weight.dtype)


def run(hidden, weight, targets, g, temperature=1.0, device="cpu", **options):
    h, w = (x.detach().to(device).requires_grad_() for x in (hidden, weight))
    out = linear_logprob(h, w, targets.to(device), temperature=temperature, backend="triton", **options)
    grads = torch.autograd.grad(out.logps, (h, w), g.to(device))
    return tuple(x.detach().cpu() for x in (out.logps, out.entropy, *grads)) + (() if out.argmax is None else (out.argmax.cpu(),))


def inputs(T, D, V, generator, dtype=torch.float32, spread=1.0):
    hidden = (spread * torch.randn(T, D, generator=generator)).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    targets = torch.randint(0, V, (T,), generator=generator)
    if T > 2:
        targets[::5] = -100
    return hidden, weight, targets, torch.randn(T, generator=generator)


def assert_sqnr(got, want, what, decibels=45):
    """Signal to noise of a gradient of 16-bit GEMMs: kernels.md asks for 40 (40 = 1 % of the signal's amplitude)."""
    noise = (got.double() - want).square().sum()
    assert noise <= want.square().sum() * 10 ** (-decibels / 10), f"{what}: {10 * torch.log10(want.square().sum() / noise):.1f} dB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("T, D, V", SIZES)
def test_errs_no_more_than_the_plain_formula(T, D, V, dtype, triton_device, within_rule, generator):
    hidden, weight, targets, g = inputs(T, D, V, generator, dtype)
    got, want = run(hidden, weight, targets, g, 0.7, triton_device), oracle(hidden, weight, targets, 0.7, g)
    plain = plain_fp32(hidden, weight, targets, 0.7, g)
    for a, b, c, what in zip(got[:2], plain[:2], want[:2], ("logps", "entropy"), strict=True):
        assert a.dtype == torch.float32
        within_rule(a, b, c, what)
    for a, b, c, what in zip(got[2:], plain[2:], want[2:], ("d_hidden", "d_weight"), strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        if dtype == torch.float32:
            within_rule(a, b, c, what)
        elif V > 1:  # dz is rounded to 16 bits on its way into the GEMMs, which the plain formula in fp32 does not do
            assert_sqnr(a, c, what, 55 if dtype == torch.float16 else 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("T, D, V", SIZES)
def test_a_support_restricts_the_softmax_and_its_gradients(T, D, V, dtype, triton_device, within_rule, keep_largest, generator, monkeypatch):
    """Rows that keep everything, one token, a few with ties at the threshold, and nothing but the target, over several slices forward and back."""
    monkeypatch.setattr(module, "SLICE_BWD", 48)
    _, _, targets, g = inputs(T, D, V, generator)
    hidden, weight = (torch.randint(-3, 4, (n, D), generator=generator).to(dtype) / 4 for n in (T, V))  # exact, so that ties are ties
    logits = hidden.float() @ weight.float().T
    counts = [V, 1, 2, V // 2, 0, V - 1, 5]  # a skipped row keeps at least one token: of nothing there is no entropy
    support, keep = keep_largest(logits, [max(counts[t % 7], y < 0) for t, y in enumerate(targets.tolist())])
    keep |= torch.arange(V) == targets[:, None]
    plain, want = (f(hidden, weight, targets, 0.7, g, keep) for f in (plain_fp32, oracle))
    for argmax in (False, True):
        got = run(hidden, weight, targets, g, 0.7, triton_device, support=[s.to(triton_device) for s in support], return_argmax=argmax)
        assert not argmax or torch.equal(got[4], logits.argmax(1))  # of all tokens
        for a, b, c, what in zip(got[:4], plain, want, ("logps", "entropy", "d_hidden", "d_weight"), strict=True):
            if dtype == torch.float32 or what in ("logps", "entropy"):
                within_rule(a, b, c, what)
            elif V > 1:
                assert_sqnr(a, c, what, 55 if dtype == torch.float16 else 45)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 5.0])
def test_temperatures(temperature, triton_device, within_rule, generator):
    hidden, weight, targets, g = inputs(18, 24, 60, generator, spread=min(1.0, 3 * temperature))
    got, plain, want = (f(hidden, weight, targets, *rest) for f, rest in (
        (lambda *a: run(*a, device=triton_device), (g, temperature)), (plain_fp32, (temperature, g)), (oracle, (temperature, g))))  # fmt: skip
    for a, b, c, what in zip(got, plain, want, ("logps", "entropy", "d_hidden", "d_weight"), strict=True):
        within_rule(a, b, c, what)


def test_descriptors_and_pointers_give_equal_results(triton_device, generator, monkeypatch):
    dtype = torch.float16
    hidden, weight, targets, g = inputs(35, 40, 101, generator, dtype)
    chosen = operands(hidden.to(triton_device), weight.to(triton_device), tiles_of(hidden.to(triton_device)))["DESCRIPTORS"]
    assert chosen == (triton_device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0))
    aligned = run(hidden, weight, targets, g, device=triton_device, return_argmax=True)
    # a view into wider rows: the same numbers, at addresses that no descriptor takes
    wide_h, wide_w = (torch.full((len(x), 43), nan, dtype=dtype, device=triton_device) for x in (hidden, weight))
    wide_h[:, 1:41], wide_w[:, 1:41] = hidden, weight
    h, w = wide_h[:, 1:41].requires_grad_(), wide_w[:, 1:41].requires_grad_()
    assert not operands(h, w, tiles_of(h))["DESCRIPTORS"]
    out = linear_logprob(h, w, targets.to(triton_device), return_argmax=True, backend="triton")
    grads = torch.autograd.grad(out.logps, (h, w), g.to(triton_device))
    for a, b in zip(aligned, (out.logps, out.entropy, *grads, out.argmax), strict=True):
        assert torch.equal(a, b.detach().cpu())


def test_argmax_takes_the_lowest_of_equal_indices(triton_device, generator):
    _, _, targets, g = inputs(40, 16, 150, generator)
    hidden, weight = (torch.randint(-3, 4, (n, 16), generator=generator).float() for n in (40, 150))  # exact, so that equal logits are equal
    for first, second in ((3, 4), (20, 40), (7, 149)):  # in one tile, in one slice, in two slices
        weight[second] = weight[first] = torch.randint(-9, 10, (16,), generator=generator)
    argmax = run(hidden, weight, targets, g, device=triton_device, return_argmax=True)[-1]
    logits = hidden.double() @ weight.double().T
    assert argmax.dtype == torch.int64 and argmax.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert {3, 20, 7} <= set(argmax.tolist())


def test_backward_over_several_vocabulary_slices_and_row_chunks(triton_device, within_rule, generator, monkeypatch):
    monkeypatch.setattr(module, "SLICE_BWD", 48)
    monkeypatch.setattr(module, "ROWS_BWD", 16)
    for dtype in (torch.float32, torch.float16):
        hidden, weight, targets, g = inputs(37, 24, 101, generator, dtype)
        got, want, plain = (f(hidden, weight, targets, *rest) for f, rest in (
            (lambda *a: run(*a, device=triton_device), (g,)), (oracle, (1.0, g)), (plain_fp32, (1.0, g))))  # fmt: skip
        for a, b, c in zip(got[2:], plain[2:], want[2:], strict=True):
            within_rule(a, b, c) if dtype == torch.float32 else assert_sqnr(a, c, "gradient", 55)


def test_one_operand_may_need_no_gradient(triton_device, generator):
    hidden, weight, targets, g = (x.to(triton_device) for x in inputs(18, 16, 60, generator))
    both = run(hidden, weight, targets, g, device=triton_device)[2:]
    for i, leaves in enumerate(((hidden.clone().requires_grad_(), weight), (hidden, weight.clone().requires_grad_()))):
        logps = linear_logprob(*leaves, targets, backend="triton").logps
        assert torch.equal(torch.autograd.grad(logps, leaves[i], g)[0].cpu(), both[i])


def test_upstream_gradient_scales_down_to_what_fp16_cannot_hold(triton_device, generator):
    hidden, weight, targets, g = inputs(18, 16, 60, generator, torch.float16)
    hidden, weight = hidden * 64, weight / 64
    once = run(hidden, weight, targets, g, device=triton_device)
    assert all(torch.equal(a, 4 * b) for a, b in zip(run(hidden, weight, targets, 4 * g, device=triton_device)[2:], once[2:], strict=True))
    small = run(hidden, weight, targets, g * 2.0**-20, device=triton_device)
    want = oracle(hidden, weight, targets, 1.0, g * 2.0**-20)
    # d_weight is fp16, with steps of 2^-24 and 2^-11 of a number; a dz with steps of 2^-24 times hidden, about 64, would be 40 times as wrong
    assert (small[3].double() - want[3]).abs().max() <= 2.0**-24 + 2.0**-10 * want[3].abs().max() < 2.0**-20


def test_rows_without_gradient_are_exactly_zero_and_the_others_unchanged(triton_device, generator):
    hidden, weight, targets, g = inputs(50, 16, 60, generator)
    targets.clamp_(min=0)
    hidden[:, 0] = 1
    weight[:, 0] -= 1000  # a skipped tile has logits of 0, far above the others
    full = run(hidden, weight, targets, g, device=triton_device)[2]
    g[16:32] = 0  # a whole tile, and
    g[40] = 0
    dhidden, dweight = run(hidden, weight, targets, g, device=triton_device)[2:]
    dead = g == 0
    assert not dhidden[dead].any() and torch.equal(dhidden[~dead], full[~dead])
    alive = run(hidden[~dead], weight, targets[~dead], g[~dead], device=triton_device)[3]
    assert torch.allclose(dweight, alive, atol=1e-3)


@pytest.mark.parametrize("label", [-100, -1, 60, 63, 2**40, -(2**40)])
def test_labels_out_of_range_count_as_skipped(label, triton_device, generator):
    """60 to 63 lie in the last tile beyond the vocabulary.  The public function refuses all of them on CPU, where looking costs nothing."""
    hidden, weight, _, g = inputs(2, 16, 60, generator)
    hidden, weight = hidden.to(triton_device).requires_grad_(), weight.to(triton_device).requires_grad_()
    logps, entropy, argmax = linear_logprob_triton(hidden, weight, torch.tensor([label, 3], device=triton_device), 1.0, False)
    dhidden, dweight = torch.autograd.grad(logps, (hidden, weight), g.to(triton_device))
    want = oracle(hidden.detach(), weight.detach(), torch.tensor([label, 3]), 1.0, g)
    assert logps[0] == 0 and not dhidden[0].any() and entropy[0] > 0 and logps[1] < 0 and argmax is None
    assert torch.allclose(dweight.cpu().double(), want[3], atol=1e-5)


def test_forbidden_tokens_and_extreme_logits(triton_device, generator):
    """hidden = (1, ...), so that the first column of weight is a bias: -inf, 1e5, -1e5."""
    hidden, plain, _, g = inputs(3, 16, 150, generator)
    hidden[:, 0] = 1
    targets = torch.tensor([120, 7, 149])
    for bias in (1e5, -1e5):
        weight = plain.clone()
        weight[:, 0] += bias
        got, want = run(hidden, weight, targets, g, device=triton_device), oracle(hidden, weight, targets, 1.0, g)
        for a, c in zip(got[:2], want[:2], strict=True):
            assert torch.allclose(a.double(), c, atol=0.05)  # a logit of 1e5 is rounded to 0.008
        assert all(torch.isfinite(x).all() for x in got)
    weight = plain.clone()
    weight[:48, 0] = -inf  # the whole first slice, with row 1's target
    h = hidden.to(triton_device)
    got = linear_logprob(h, weight.to(triton_device), targets.to(triton_device), return_argmax=True, backend="triton")
    want = oracle(hidden, plain[48:], targets - 48, 1.0, g)
    assert torch.allclose(got.logps[[0, 2]].cpu().double(), want[0][[0, 2]], atol=1e-5) and got.logps[1] == -inf
    assert torch.allclose(got.entropy.cpu().double(), want[1], atol=1e-5) and (got.argmax >= 48).all()
    weight[:, 0] = -inf  # nothing is left
    got = linear_logprob(h, weight.to(triton_device), targets.to(triton_device), return_argmax=True, backend="triton")
    assert (got.logps == -inf).all() and not got.entropy.any() and not got.argmax.any()


@pytest.mark.parametrize("truncated", [False, True])
def test_nan_poisons_its_own_row_alone(truncated, triton_device, generator):
    hidden, weight, targets, g = inputs(20, 16, 100, generator)
    hidden[13, 2] = nan
    support = (torch.full((20,), 0.5, device=triton_device), torch.full((20,), 99, device=triton_device)) if truncated else None
    logps, entropy, dhidden, _, argmax = run(hidden, weight, torch.arange(20), g, device=triton_device, support=support, return_argmax=True)
    for x in (logps[:, None], entropy[:, None], dhidden):
        assert torch.isnan(x).any(1).nonzero().flatten().tolist() == [13]
    assert ((0 <= argmax) & (argmax < 100)).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_row_has_the_same_bits_wherever_it_stands(dtype, triton_device, generator):
    """The forward of a row depends on nothing but the row: not on T, not on its place.  Repeats give equal bits, gradients included."""
    hidden, weight, targets, g = inputs(130, 24, 101, generator, dtype)
    if triton_device.type == "cpu":  # numpy's product rounds by a row's place in the tile, a GPU's does not: leave nothing to round
        hidden, weight = (torch.randint(-3, 4, x.shape, generator=generator).to(dtype) / 4 for x in (hidden, weight))
    whole = run(hidden, weight, targets, g, device=triton_device, return_argmax=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(hidden, weight, targets, g, device=triton_device, return_argmax=True), strict=True))
    order = torch.randperm(130, generator=generator)
    for rows in (slice(0, 1), slice(129, 130), slice(60, 67), order):
        part = run(hidden[rows], weight, targets[rows], g[rows], device=triton_device, return_argmax=True)
        for i in (0, 1, 4):
            assert torch.equal(part[i], whole[i][rows]), i
        assert torch.allclose(part[2].float(), whole[2][rows].float(), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)


def test_offsets_beyond_two_to_the_31_elements(triton_device, generator, monkeypatch):
    """Rows 1.5 2^30 elements apart in memory of which nothing else is touched: row 2 of hidden and of weight starts at element 3 2^30 > 2^31."""
    stride, D = 3 << 29, 24
    if triton_device.type == "cuda":
        memory = [torch.empty((3 << 30) + D + 1, dtype=torch.float16, device="cuda") for _ in range(3)]
    else:
        memory = [torch.frombuffer(mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=torch.float16)
                  for _ in range(3)]  # fmt: skip
    hidden, weight, targets, g = inputs(3, D, 3, generator, torch.float16)
    targets[:] = torch.tensor([2, 0, 1])
    want = run(hidden, weight, targets, g, device=triton_device)
    far_h, far_w, far_dz = (m.as_strided((3, n), (stride, 1)) for m, n in zip(memory, (D, D, 3), strict=False))
    far_h.copy_(hidden)
    far_w.copy_(weight)
    x, y = (t.clone() for t in (far_h, far_w))
    assert torch.equal(x.cpu(), hidden) and torch.equal(y.cpu(), weight)
    out = linear_logprob(far_h, far_w, targets.to(triton_device), backend="triton")
    assert torch.equal(out.logps.cpu(), want[0]) and torch.equal(out.entropy.cpu(), want[1])
    # without descriptors, and the backward's kernel, whose output is as far apart
    tiles = tiles_of(far_h)
    logits = hidden.float() @ weight.float().T
    m, S = logits.max(1).values, (logits - logits.max(1, keepdim=True).values).exp().sum(1)
    dz = torch.softmax(logits.double(), 1)
    dz = g[:, None].double() * (torch.eye(3).double()[targets] - dz)
    for offset in (0, 1):  # an offset of one element: no descriptor
        h, w = (t.as_strided((3, D), (stride, 1), storage_offset=offset) for t in memory[:2])
        h.copy_(hidden)
        w.copy_(weight)
        call = operands(h, w, tiles)
        assert not (offset and call["DESCRIPTORS"])
        far_dz.zero_()
        rest = dict(zip(("targets_ptr", "coef_ptr", "m_ptr", "S_ptr"), (t.to(triton_device) for t in (targets, g, m, S)), strict=True))
        rest |= {"thresholds_ptr": rest["m_ptr"], "last_kept_ptr": rest["targets_ptr"], "SUPPORT": False}
        module.linear_logprob_bwd_kernel[(1,)](**rest, dz_ptr=far_dz, T=3, V=3, first=0, dz_stride=stride, inv_temperature=1.0, **call)
        assert torch.allclose(far_dz.cpu().double(), dz, atol=2e-3)
        assert torch.equal(linear_logprob(h, w, targets.to(triton_device), backend="triton").logps.cpu(), want[0])


def test_neither_lengths_nor_temperatures_compile_anew(launches, generator):
    """50 lengths, 18 temperatures, labels and supports at any address: one specialisation per kernel, with descriptors (D = 32) and with pointers."""
    for D, argmax, truncated in ((32, True, False), (19, False, False), (32, False, False), (32, False, True), (32, True, True)):
        launches.keys.clear()
        weight = torch.randn(64, D, generator=generator).requires_grad_()
        for n in range(50):
            hidden = torch.randn(n + 1, D, generator=generator).requires_grad_()
            targets = torch.randint(0, 64, (n + 2,), generator=generator)[n % 2 :][: n + 1]
            support = (torch.zeros(n + 2)[n % 2 :][: n + 1], targets) if truncated else None
            out = linear_logprob_triton(hidden, weight, targets, [1.0, 2.0, 0.5 + n / 100][n % 3], argmax, support)
            out[0].backward(torch.ones(n + 2)[1:])
        names = sorted(name for name, *_ in launches.keys)
        assert names == ["linear_logprob_bwd_kernel", "linear_logprob_fwd_kernel", "linear_logprob_merge_kernel"], launches.keys


def test_slices_do_not_depend_on_the_number_of_tokens(launches, generator):
    weight = torch.randn(500, 16, generator=generator)
    slices = []
    for T in (1, 7, 130, 1000):
        launches.grids.clear()
        LinearLogprobFunction.apply(torch.randn(T, 16, generator=generator), weight, torch.zeros(T, dtype=torch.int64), 1.0, False, None)
        slices.append(launches.grids[0][0] / -(-T // 16))
    assert set(slices) == {-(-500 // 48)}


def test_refuses_what_it_cannot_serve(triton_device):
    h, y = torch.ones(4, 8, device=triton_device), torch.zeros(4, dtype=torch.int64, device=triton_device)
    with pytest.raises(ValueError, match="numbers of a row of weight are not neighbours in memory"):
        linear_logprob(h, torch.ones(8, 6, device=triton_device).T, y, backend="triton")
    for a, b in ((torch.float64, torch.float64), (torch.float32, torch.float16)):
        with pytest.raises(ValueError, match="the kernels take both in fp32, fp16 or bf16"):
            linear_logprob(h.to(a), torch.ones(6, 8, device=triton_device).to(b), y, backend="triton")


def test_hidden_may_be_transposed_and_entropy_and_argmax_have_no_gradient(triton_device, generator):
    hidden, weight, targets, g = inputs(18, 16, 60, generator)
    want = run(hidden, weight, targets, g, device=triton_device)
    turned = hidden.T.contiguous().to(triton_device).T.requires_grad_()
    out = linear_logprob(turned, weight.to(triton_device), targets.to(triton_device), return_argmax=True, backend="triton")
    assert torch.equal(out.logps.detach().cpu(), want[0]) and out.logps.requires_grad and not (out.entropy.requires_grad or out.argmax.requires_grad)
    assert torch.equal(torch.autograd.grad(out.logps, turned, g.to(triton_device))[0].cpu(), want[2])
