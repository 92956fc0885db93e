"""The row kernels of logits_grpo, Triton's and CUDA's, against the formula in fp64 (fixture `grpo`).

Triton's interpreter has blocks of 16, so that 37 logits are three, the last one ragged; CUDA's emulation has 64 threads.
"""

import os
from typing import NamedTuple

import pytest
import torch

from athanor.kernels import LossVariant, logits_grpo, logits_grpo_cuda
from athanor.kernels._dispatch import OPS, Backend
from athanor.kernels.logits_grpo import REFERENCE, logits_loss, rows_reference

# every choice of every axis; the old policy given and not
CHOICES = [
    ("token", "clip", "token_mean", "k3", "tis"),
    ("token", "dual_clip", "sequence_mean", "k1", "token_mask"),
    ("token", "two_sided", "constant", "k2", "sequence_mask"),
    ("token", "cispo", "token_mean", "none", "none"),
    ("token", "sapo", "sequence_mean", "k3", "token_mask"),
    ("token", "reinforce", "constant", "none", "tis"),
    ("sequence", "clip", "sequence_mean", "k2", "sequence_mask"),
    ("sequence_token", "two_sided", "token_mean", "none", "none"),
]


class Place(NamedTuple):
    backend: str
    device: torch.device


def rows_emulated(logits, tokens, variant, temperature, dlogits=None):
    if dlogits is None:
        return rows_reference(logits, tokens, variant, temperature)
    return logits_grpo_cuda.rows_cuda(logits, tokens, variant, temperature, dlogits)


@pytest.fixture(params=["triton-interpreted", "cuda-emulated", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("triton", "cuda"))])
def place(request, monkeypatch):
    """A backend and where it runs.  Emulated, the steps beside the row kernel are the reference's."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "triton-interpreted" and not interpreting:
        pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: test_interpreter.py runs it in a process of its own")
    if request.param == "cuda-emulated":
        if interpreting:
            pytest.skip("needs no interpreter: runs without")
        request.getfixturevalue("emulated_cuda")(late=True, multiprocessors=3, shared=1 << 13)
        monkeypatch.setattr(logits_grpo_cuda, "THREADS", 64)
        emulated = Backend(lambda **call: logits_loss(REFERENCE._replace(rows=rows_emulated), **call))
        monkeypatch.setitem(OPS["logits_grpo"].backends, "cuda", emulated)
    backend, _, how = request.param.partition("-")
    return Place(backend, torch.device("cpu" if how else "cuda"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        from athanor.kernels import linear_grpo_triton, logits_grpo_triton

        monkeypatch.setattr(logits_grpo_triton, "BLOCK", {True: 16, False: 16})
        monkeypatch.setattr(linear_grpo_triton, "BLOCK", 16)


def move(x, device, dtype=torch.float32):
    return x if x is None else x.to(device, dtype) if x.is_floating_point() else x.to(device)


def run(logits, args, tokens, place, dtype=torch.float32, upstream=1.0, **options):
    leaf = logits.to(place.device, dtype).requires_grad_()
    args, tokens = [move(x, place.device) for x in args], {k: move(x, place.device) for k, x in tokens.items()}
    z = leaf * 1
    loss, stats = logits_grpo(z, *args, **tokens, backend=place.backend, **options)
    grad = torch.autograd.grad(loss * upstream, leaf)[0]
    if options.get("inplace"):
        assert torch.equal(z.detach(), grad) or grad.isnan().any()
    return loss.detach().cpu(), grad.cpu(), {k: x.cpu() for k, x in stats.items()}


def formula(grpo, logits, args, tokens, v, dtype=torch.float64, **options):
    wide = torch.promote_types(dtype, torch.float32)
    args, tokens = [move(move(x, "cpu"), "cpu", wide) for x in args], {k: move(move(x, "cpu"), "cpu", wide) for k, x in tokens.items()}
    logits = logits.to(wide).detach().requires_grad_()
    loss, entropy = grpo.loss(logits, *args, **tokens, v=v, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0].to(dtype), entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("i", range(len(CHOICES)), ids=lambda i: "-".join(CHOICES[i]))
def test_errs_no_more_than_the_eager_chain(i, dtype, place, grpo, within_rule):
    if dtype == torch.bfloat16 and place == ("triton", torch.device("cpu")):
        pytest.skip("the interpreter's casts to bf16 truncate")
    v, temperature = grpo.variant(*CHOICES[i]), (1.0, 0.5, 5.0)[i % 3]
    hidden, weight, (targets, old, *rest), tokens = grpo.batch(seed=i)
    z = (2 * hidden @ weight.T).to(dtype)
    args = (targets, None if i % 4 == 0 else old, *rest)
    loss, grad, stats = run(z, args, tokens, place, dtype, variant=v, temperature=temperature, inplace=i % 2 == 1)
    plain_loss, plain_grad, _ = formula(grpo, z, args, tokens, v, dtype, temperature=temperature)
    want_loss, want_grad, entropy = formula(grpo, z.double(), args, tokens, v, temperature=temperature)
    assert abs(loss - want_loss) <= 2 * abs(plain_loss - want_loss) + 4e-6
    within_rule(grad, plain_grad, want_grad)
    assert torch.isclose(stats["entropy_sum"].double(), entropy, rtol=1e-5)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("lengths, V", [((0, 0), 5), ((), 5), ((1,), 1), ((0, 7, 0), 16), ((3,), 17)])
def test_edges(lengths, V, ratio, place, grpo, within_rule):
    hidden, weight, args, tokens = grpo.batch(lengths, V)
    z, v = hidden @ weight.T, grpo.variant(ratio)
    loss, grad, _ = run(z, args, tokens, place, variant=v)
    plain_loss, plain_grad, _ = formula(grpo, z.float(), args, tokens, v, torch.float32)
    want_loss, want_grad, _ = formula(grpo, z.float().double(), args, tokens, v)
    assert abs(loss - want_loss) <= 2 * abs(plain_loss - want_loss) + 4e-6
    within_rule(grad, plain_grad, want_grad)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_rows_may_hold_garbage(garbage, inplace, place, grpo):
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch()
    z, keep = hidden @ weight.T, tokens["mask"] & (targets >= 0)
    for ratio in ("token", "sequence"):
        v = grpo.variant(ratio, kl="k3", correction="tis")
        loss, grad, stats = run(z, (targets, old, A, cu), tokens, place, variant=v)
        bad = {k: x if k == "mask" else torch.where(keep, x, garbage) for k, x in tokens.items()}
        got = run(torch.where(keep[:, None], z, garbage), (targets, torch.where(keep, old, garbage), A, cu), bad, place, variant=v,
                  inplace=inplace)  # fmt: skip
        assert got[0] == loss and torch.equal(got[1], grad) and got[2] == stats and not grad[~keep].any() and grad[keep].any()


def test_forbidden_tokens_and_broken_rows(place, grpo):
    """-inf: some of a row (a whole block of it, too), all but the target, the target, all.  A NaN or +inf poisons its row and the loss."""
    hidden, weight, (targets, old, A, cu), _ = grpo.batch((6, 6), V=37)
    targets, A = targets.clamp_min(0), torch.tensor([1.0, 0.7])
    z = hidden @ weight.T
    some, first_block, only, target, nothing, broken = range(6)
    columns = torch.arange(37)
    z[some, (targets[some] + columns[1:9]) % 37] = -torch.inf
    targets[first_block] = 20
    z[first_block, :16] = -torch.inf
    z[only] = torch.where(columns == targets[only], z[only], -torch.inf)
    z[target, targets[target]] = -torch.inf
    z[nothing] = -torch.inf
    z64 = z.float().double()
    v = LossVariant(surrogate="cispo", clip_low=1.0, clip_high=1e6, aggregation="constant", max_tokens=4)
    loss, grad, stats = run(z, (targets, old, A, cu), {}, place, variant=v)
    r = (z64.log_softmax(-1).gather(1, targets[:, None]).squeeze(1) - old.float().double()).clamp(-20, 20).exp()
    coefs = -r * A.repeat_interleave(6) / 8
    want = coefs[:, None] * (torch.nn.functional.one_hot(targets, 37) - z64.softmax(-1))
    want[nothing] = 0
    assert loss == torch.inf and torch.isfinite(grad).all() and torch.isfinite(stats["entropy_sum"])
    assert (grad.double() - want).abs().max() <= 2e-6 * want.abs().max() and not grad[only].any() and not grad[nothing].any()
    for bad in (torch.nan, torch.inf):
        for surrogate in ("clip", "cispo"):
            v = LossVariant(surrogate=surrogate, aggregation="constant", max_tokens=4, clip_high=1e6, clip_low=1.0)
            z[target, targets[target]] = 1.0
            z[nothing] = 0.5
            _, clean, _ = run(z, (targets, old, A, cu), {}, place, variant=v)
            poisoned = z.clone()
            poisoned[broken, 3] = bad
            loss, grad, stats = run(poisoned, (targets, old, A, cu), {}, place, variant=v)
            others = torch.arange(12) != broken
            assert loss.isnan() and grad[broken].isnan().all() and torch.equal(grad[others], clean[others]) and stats["entropy_sum"].isnan()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_far_offsets_and_one_hot_rows(offset, place, grpo):
    hidden, weight, (targets, old, A, cu), _ = grpo.batch((4, 4), V=37)
    targets, A = targets.clamp_min(0), torch.tensor([1.0, -1.0])
    z = (hidden @ weight.T * 64).round() / 64  # exact beside the offset in fp32
    z[1] = torch.where(torch.arange(37) == targets[1], 1e5, -1e5).double()
    loose = LossVariant(clip_low=1.0, clip_high=1e9)
    loss, grad, stats = run(z + offset, (targets, old, A, cu), {}, place, variant=loose)
    want = run(z, (targets, old, A, cu), {}, place, variant=loose)
    assert loss == want[0] and torch.equal(grad, want[1]) and stats == want[2] and not grad[1].any() and grad[0].any()


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient_dead_rows_and_repeats(inplace, place, grpo):
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch()
    z, args = hidden @ weight.T, (targets, old, A, cu)
    loss, once, stats = run(z, args, tokens, place, inplace=inplace)
    again = run(z, args, tokens, place, inplace=not inplace)
    assert torch.equal(loss, again[0]) and torch.equal(once, again[1]) and stats == again[2]
    assert torch.equal(run(z, args, tokens, place, upstream=4, inplace=inplace)[1], 4 * once)
    assert torch.allclose(run(z, args, tokens, place, upstream=3, inplace=inplace)[1], 3 * once, rtol=3e-7, atol=0)
    assert A[2] == 0 and not once[5:14].any() and once[14:].any()


def test_overwriting_what_another_backward_needs_raises(place, grpo):
    hidden, weight, args, tokens = grpo.batch()
    leaf = (hidden @ weight.T).to(place.device, torch.float32).requires_grad_()
    args, tokens = [move(x, place.device) for x in args], {k: move(x, place.device) for k, x in tokens.items()}
    loss, _ = logits_grpo(leaf.tanh(), *args, **tokens, backend=place.backend, inplace=True)  # tanh keeps its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_may_be_further_apart_than_they_are_long(place, grpo):
    hidden, weight, args, tokens = grpo.batch()
    z = hidden @ weight.T
    want = run(z, args, tokens, place)
    padded = torch.full((len(z), 48), torch.nan)
    padded[:, :37] = z
    wide = padded.to(place.device)
    leaf = wide.requires_grad_()
    view = (leaf * 1)[:, :37]
    moved = [move(x, place.device) for x in args], {k: move(x, place.device) for k, x in tokens.items()}
    loss, _ = logits_grpo(view, *moved[0], **moved[1], backend=place.backend, inplace=True)
    got = torch.autograd.grad(loss, leaf)[0].cpu()[:, :37]
    # CUDA's sums follow the addresses: 37 logits begin elsewhere in 16 bytes in every row, 48 do not
    assert torch.equal(got, want[1]) if place.backend == "triton" else torch.allclose(got, want[1], rtol=1e-5, atol=1e-7)


def test_no_new_length_or_temperature_compiles_anything(launches, grpo):
    from athanor.kernels.group_advantage_triton import group_advantage_triton  # noqa: F401
    from athanor.kernels.logits_grpo import loss_tokens
    from athanor.kernels.logits_grpo_triton import TRITON

    keys = None
    for i in range(50):
        hidden, weight, (targets, old, A, cu), tokens = grpo.batch((i + 1, 3, 0), V=64)
        z, v = (hidden @ weight.T).float(), grpo.variant(kl="k3", correction="tis")
        call = dict(old_logps=old.float(), advantages=A, cu_seqlens=cu, **tokens, variant=v, num_tokens=i + 1, num_sequences=None)
        _, tokens = loss_tokens(targets, 64, dtype=torch.float32, **call)
        rows = TRITON.rows(z, tokens, v, 0.5 + i / 10, torch.empty_like(z))
        TRITON.rows(z, tokens, None, 0.5 + i / 10)
        TRITON.dlogits(z, targets, rows.m, rows.S, rows.coefs, 0.5 + i / 10, torch.empty_like(z[1:]), torch.arange(1, len(z)))
        TRITON.scale(z, torch.tensor(1.0 + i))
        keys = keys or set(launches.keys)
        assert launches.keys == keys
    assert {name for name, *_ in keys} == {"logits_grpo_kernel", "dlogits_kernel", "scale_kernel"}


def test_65536_rows_and_more_are_one_dimension_of_the_grid(launches):
    from athanor.kernels.logits_grpo import Tokens
    from athanor.kernels.logits_grpo_triton import TRITON

    T = 70_000
    x = torch.zeros(T)
    TRITON.rows(torch.zeros(T, 1), Tokens(torch.zeros(T, dtype=torch.long), x, x, x, None, None), LossVariant(), 1.0)
    assert launches.grids == [(T,)]


@pytest.mark.slow  # the interpreter copies the 4.3 GB between the rows
def test_rows_beyond_two_to_the_31_elements(triton_device, grpo):
    """Three rows 2^30 + 16 elements apart: the same bits as side by side."""
    from athanor.kernels.logits_grpo import Tokens
    from athanor.kernels.logits_grpo_triton import TRITON

    stride = (1 << 30) + 16
    hidden, weight, *_ = grpo.batch((3,))
    near = (hidden @ weight.T).to(triton_device, torch.float16)
    far = torch.empty(2 * stride + 37, dtype=torch.float16, device=triton_device).as_strided((3, 37), (stride, 1)).copy_(near)
    targets, ones = torch.tensor([4, 0, 36], device=triton_device), torch.ones(3, device=triton_device)
    tokens = Tokens(targets, ones, ones, None, None, None)
    results = []
    for z in (near, far):
        rows = TRITON.rows(z, tokens, LossVariant(), 1.0)
        picked = torch.empty(2, 37, dtype=torch.float32, device=triton_device)
        TRITON.dlogits(z, targets, rows.m, rows.S, rows.coefs, 1.0, picked, torch.tensor([0, 2], device=triton_device))
        again = TRITON.rows(z, tokens, LossVariant(), 1.0, z)  # in place
        TRITON.scale(z, torch.tensor(3.0, device=triton_device))
        results.append([*rows, *again, picked, z])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][-1][2].any()
