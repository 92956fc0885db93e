"""linear_grpo with the Triton row kernels; the loop around them is the one of test_linear_grpo.py: formula, chunks, rows left out."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from athanor.kernels import LossVariant, linear_grpo

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":  # 37 logits in three blocks, the last one ragged
        from athanor.kernels import linear_grpo_triton, logits_grpo_triton

        monkeypatch.setattr(logits_grpo_triton, "BLOCK", {True: 16, False: 16})
        monkeypatch.setattr(linear_grpo_triton, "BLOCK", 16)


def move(x, device, dtype=torch.float32):
    return x if x is None else x.to(device, dtype) if x.is_floating_point() else x.to(device)


def run(hidden, weight, args, tokens, device, dtype=torch.float32, upstream=1.0, **options):
    hidden, weight = (x.detach().to(device, dtype).requires_grad_() for x in (hidden, weight))
    args, tokens = [move(x, device) for x in args], {k: move(x, device) for k, x in tokens.items()}
    loss, stats = linear_grpo(hidden, weight, *args, **tokens, backend="triton", **options)
    grads = torch.autograd.grad(loss * upstream, (hidden, weight))
    return (loss.detach().cpu(), *(g.cpu() for g in grads)), {k: x.cpu() for k, x in stats.items()}


def formula(grpo, hidden, weight, args, tokens, v, wide=torch.float64, **options):
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    args, tokens = [move(move(x, "cpu"), "cpu", wide) for x in args], {k: move(move(x, "cpu"), "cpu", wide) for k, x in tokens.items()}
    loss, entropy = grpo.loss(hidden.to(wide) @ weight.to(wide).T, *args, **tokens, v=v, **options)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight))), entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice, chunk, compact", [
    (("token", "clip", "token_mean", "k3", "tis"), 5, True), (("token", "clip", "sequence_mean", "none", "token_mask"), 23, True),
    (("token", "cispo", "constant", "k1", "sequence_mask"), 5, False), (("token", "sapo", "token_mean", "none", "none"), None, True),
    (("sequence", "dual_clip", "sequence_mean", "k2", "tis"), 5, True), (("sequence_token", "clip", "token_mean", "none", "none"), 22, False),
])  # fmt: skip
def test_follows_the_formula(choice, chunk, compact, dtype, triton_device, grpo, within_rule):
    hidden, weight, args, tokens = grpo.batch()
    hidden, weight, v = hidden.to(dtype), weight.to(dtype), grpo.variant(*choice)
    temperature = 0.5 if compact else 5.0
    got, stats = run(hidden, weight, args, tokens, triton_device, dtype, variant=v, chunk_tokens=chunk, compact=compact, temperature=temperature)
    plain, _ = formula(grpo, hidden, weight, args, tokens, v, torch.float32, temperature=temperature)
    want, entropy = formula(grpo, hidden.double(), weight.double(), args, tokens, v, temperature=temperature)
    assert abs(got[0] - want[0]) <= 2 * abs(plain[0] - want[0]) + 4e-6
    assert torch.isclose(stats["entropy_sum"].double(), entropy, rtol=1e-5)
    for a, b, c in zip(got[1:], plain[1:], want[1:], strict=True):
        if dtype == torch.float32:
            within_rule(a, b, c)
        else:  # dz is rounded to bf16 before two of the products, which the chain with an fp32 gradient of the logits does not do
            assert 10 * torch.log10(c.double().square().sum() / (a.double() - c.double()).square().sum()) >= 40


class Rows(TorchDispatchMode):
    """The number of rows that each matrix product sums over or makes."""

    def __init__(self, V):
        super().__init__()
        self.V, self.forward, self.dhidden, self.dweight = V, [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            matrices = [x for x in args if torch.is_tensor(x)][-2:]
            (m, k), n = matrices[0].shape, matrices[1].shape[1]
            (self.forward if n == self.V else self.dweight if m == self.V else self.dhidden).append(k if m == self.V else m)
        return function(*args, **(kwargs or {}))


def test_rows_without_gradient_are_left_out_of_the_gemms(triton_device, grpo):
    hidden, weight, (targets, old, _, cu), _ = grpo.batch((6, 6, 6, 6))
    targets, A = targets.clamp_min(0), torch.tensor([1.0, 0.0, 0.5, 2.0])
    old = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    old[[0, 13, 19, 20, 21]] -= 1  # ratio e with A > 0: clipped
    mask = torch.ones(24, dtype=torch.bool)
    mask[[3, 7, 22]] = False
    results = []
    for compact, want in ((True, ([16, 5], [11], [11])), (False, ([24], [24], [24]))):
        with Rows(37) as seen:
            results.append(run(hidden, weight, (targets, old, A, cu), {"mask": mask}, triton_device, compact=compact))
        assert (sorted(seen.forward, reverse=True), seen.dhidden, seen.dweight) == want
    (loss, dhidden, dweight), stats = results[0]
    dead = torch.tensor([0, 3, *range(6, 12), 13, 19, 20, 21, 22])
    assert not dhidden[dead].any() and (dhidden != 0).any(1).sum() == 11 and stats["clip_high"] == 5 and stats["num_tokens"] == 21
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6 * b.abs().max())


def test_garbage_in_masked_rows_and_nan_in_others(triton_device, grpo):
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch()
    keep, v = tokens["mask"] & (targets >= 0), LossVariant(aggregation="constant", max_tokens=9)
    tokens = {"mask": tokens["mask"]}
    clean, stats = run(hidden, weight, (targets, old, A, cu), tokens, triton_device, variant=v, chunk_tokens=6)
    for compact in (True, False):
        poisoned = torch.where(keep[:, None], hidden, torch.nan)
        got, stats2 = run(poisoned, weight, (targets, old, A, cu), tokens, triton_device, variant=v, chunk_tokens=6, compact=compact)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6 * b.abs().max()) for a, b in zip(got, clean, strict=True))
        assert stats2["num_tokens"] == stats["num_tokens"] == keep.sum()
    row = int((keep & (torch.arange(23) > 14)).nonzero()[0])
    hidden[row] = torch.nan
    (loss, dhidden, dweight), _ = run(hidden, weight, (targets, old, A, cu), tokens, triton_device, variant=v, chunk_tokens=6)
    others = torch.arange(23) != row
    assert loss.isnan() and dhidden[row].isnan().all() and dweight.isnan().all() and torch.isfinite(dhidden[others]).all()
    assert torch.allclose(dhidden[others], clean[1][others], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("lengths", [(0, 0), (), (1,)])
@pytest.mark.parametrize("compact", [True, False])
def test_edges(lengths, compact, triton_device, grpo):
    hidden, weight, args, _ = grpo.batch(lengths)
    every = dict(ref_logps=None, rollout_logps=None, mask=torch.ones(len(hidden), dtype=torch.bool))
    for ratio in ("token", "sequence"):
        v = grpo.variant(ratio)
        got, _ = run(hidden, weight, args, {}, triton_device, variant=v, compact=compact)
        want, _ = formula(grpo, hidden, weight, args, every, v)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


def test_rewards_upstream_gradient_and_repeats(triton_device, grpo):
    hidden, weight, (targets, old, _, cu), tokens = grpo.batch()
    rewards, ids = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0]), torch.tensor([7, 7, 3, 3, 7])
    more = tokens | {"rewards": rewards, "group_ids": ids}
    (loss, *once), stats = run(hidden, weight, (targets, old, None, cu), more, triton_device, chunk_tokens=8)
    again, stats2 = run(hidden, weight, (targets, old, None, cu), more, triton_device, chunk_tokens=8)
    assert all(torch.equal(a, b) for a, b in zip((loss, *once), again, strict=True)) and stats == stats2
    four, _ = run(hidden, weight, (targets, old, None, cu), more, triton_device, upstream=4, chunk_tokens=8)
    assert all(torch.equal(a, 4 * b) and b.any() for a, b in zip(four[1:], once, strict=True))
    assert not once[0][5:15].any()  # the group of equal rewards
