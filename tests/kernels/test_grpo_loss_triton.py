"""The Triton losses against the fp64 reference, which test_policy_loss.py holds against appendix B token by token."""

import itertools

import pytest
import torch

from athanor.kernels import LossVariant, grpo_loss, policy_loss

# no tokens; one token; a few short ones with empty sequences; a sequence longer than a block of 512, the last token one past a block edge
LENGTHS = [[0, 0], [1], [5, 0, 33, 1, 90, 0], [600, 3, 421, 1]]
# an integer bound on purpose: it must reach the kernel as a float
# the bound 2 is an integer on purpose: the kernel must get it as a float
EXTRA = {"two_sided": {"delta": 1.7}, "dual_clip": {"dual_clip": 2}, "constant": {"max_tokens": 500}}
BOUNDS = {"tis": {"correction_high": 1.3}, "token_mask": {"correction_low": 0.7, "correction_high": 1.4}, "sequence_mask": {"correction_high": 1.5}}


def variant(ratio="token", surrogate="clip", aggregation="token_mean", kl="none", correction="none"):
    return LossVariant(ratio=ratio, surrogate=surrogate, aggregation=aggregation, kl=kl, correction=correction, beta=0.05 * (kl != "none"),
                       clip_high=0.3, **EXTRA.get(surrogate, {}), **EXTRA.get(aggregation, {}), **BOUNDS.get(correction, {}))  # fmt: skip


# every choice of every axis, each with several choices of the others
VARIANTS = [
    variant(),
    variant("token", "dual_clip", "sequence_mean", "k1", "tis"),
    variant("token", "two_sided", "constant", "k2", "token_mask"),
    variant("token", "cispo", "token_mean", "k3", "sequence_mask"),
    variant("token", "sapo", "sequence_mean", "none", "token_mask"),
    variant("token", "reinforce", "constant", "k3", "none"),
    variant("sequence", "clip", "sequence_mean", "none", "none"),
    variant("sequence", "clip", "token_mean", "k3", "tis"),
    variant("sequence", "dual_clip", "constant", "k2", "token_mask"),
    variant("sequence", "sapo", "sequence_mean", "k1", "sequence_mask"),
    variant("sequence_token", "clip", "token_mean", "k3", "token_mask"),
    variant("sequence_token", "two_sided", "sequence_mean", "none", "sequence_mask"),
]


def batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    n, S = sum(lengths), len(lengths)
    logps = -2 * torch.rand(n, generator=g)
    old, ref = (logps + s * torch.randn(n, generator=g) for s in (0.3, 0.4))
    tensors = {"ref_logps": ref, "rollout_logps": old + 0.02 * torch.randn(n, generator=g), "mask": torch.rand(n, generator=g) < 0.8}
    rewards, ids = torch.randint(0, 3, (S,), generator=g).float(), torch.arange(S) % 2
    return logps, old, rewards, ids, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), tensors


def run(args, tensors, dtype, device, backend, **options):
    move = lambda x: None if x is None else (x.to(device, dtype) if x.is_floating_point() else x.to(device))  # noqa: E731
    logps, *rest = map(move, args)
    logps.requires_grad_()
    loss, stats = grpo_loss(logps, *rest, **{k: move(v) for k, v in tensors.items()}, backend=backend, **options)
    return loss.detach().cpu(), torch.autograd.grad(loss, logps)[0].cpu(), {k: v.cpu() for k, v in stats.items()}


# the long batch for every variant; the small and empty ones, where the interpreter spends as much, for one variant of each ratio
@pytest.mark.parametrize(
    "v, lengths",
    [(v, n) for i, v in enumerate(VARIANTS) for n in (LENGTHS if i in (1, 7, 10) else LENGTHS[3:])],
    ids=lambda x: f"{x.ratio}-{x.surrogate}-{x.aggregation}-{x.kl}-{x.correction}" if isinstance(x, LossVariant) else str(sum(x)),
)
def test_errs_no_more_than_the_reference(v, lengths, triton_device, within_rule):
    *args, tensors = batch(lengths)
    loss, grad, stats = run(args, tensors, torch.float32, triton_device, "triton", variant=v)
    plain_loss, plain_grad, plain_stats = run(args, tensors, torch.float32, "cpu", "reference", variant=v)
    want_loss, want_grad, want_stats = run(args, tensors, torch.float64, "cpu", "reference", variant=v)
    # the loss is a sum with cancellation: its ulp is that of the sum of magnitudes, which no single value shows
    magnitude = sum(abs(x) for x in (want_stats["weight_sum"], want_stats["ratio_sum"])) / want_stats["num_tokens"].clamp_min(1)
    assert abs(loss - want_loss) <= 2 * abs(plain_loss - want_loss) + 8 * torch.finfo(torch.float32).eps * (magnitude + abs(want_loss))
    within_rule(grad, plain_grad, want_grad, "gradient")
    assert stats.keys() == want_stats.keys()
    for name, value in stats.items():
        if name in ("num_tokens", "num_sequences", "clip_low", "clip_high"):
            assert value == want_stats[name], name
        else:
            assert torch.isclose(value, want_stats[name], rtol=2e-6, atol=1e-6), (name, value, want_stats[name])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_positions_may_hold_garbage(garbage, triton_device):
    *args, tensors = batch(LENGTHS[2])
    bad_args, bad = list(args), dict(tensors)
    for i in (0, 1):
        bad_args[i] = torch.where(tensors["mask"], args[i], garbage)
    for name in ("ref_logps", "rollout_logps"):
        bad[name] = torch.where(tensors["mask"], tensors[name], garbage)
    for v in (variant("token", "clip", "sequence_mean", "k3", "tis"), variant("sequence", "clip", "token_mean", "k3", "sequence_mask")):
        clean, poisoned = (run(a, t, torch.float32, triton_device, "triton", variant=v) for a, t in ((args, tensors), (bad_args, bad)))
        assert clean[0] == poisoned[0] and torch.equal(clean[1], poisoned[1]) and clean[2] == poisoned[2]


def test_first_step_identities_are_exact(triton_device):
    logps, _, rewards, ids, cu, _ = batch(LENGTHS[2])
    logps = logps.to(triton_device).requires_grad_()
    A = torch.randn(len(rewards), generator=torch.Generator().manual_seed(1)).to(triton_device)
    loss, stats = policy_loss(logps, None, A, cu.to(triton_device), ref_logps=logps.detach(), variant=variant(kl="k3"), backend="triton")
    assert stats["ratio_sum"] == stats["num_tokens"] == 129 and stats["ratio_max"] == 1 and stats["num_sequences"] == 4
    assert all(stats[k] == 0 for k in ("clip_low", "clip_high", "old_kl_sum", "ref_kl_sum"))
    per_token = A.double().cpu().repeat_interleave(torch.tensor(LENGTHS[2]))
    assert abs(loss.item() + per_token.mean()) < 1e-6
    assert torch.allclose(torch.autograd.grad(loss, logps)[0].cpu().double(), -per_token / 129, rtol=1e-6, atol=0)


def test_groups_without_contrast_and_overflowing_ratios(triton_device):
    logps, old, rewards, ids, cu, _ = (x.to(triton_device) if torch.is_tensor(x) else x for x in batch(LENGTHS[2]))
    logps.requires_grad_()
    loss, _ = grpo_loss(logps, old, torch.full_like(rewards, 0.1), ids, cu, backend="triton")
    assert loss == 0 and not torch.autograd.grad(loss, logps)[0].any()
    loss, stats = policy_loss(logps, torch.full_like(old, -1e4), torch.where(rewards > 1, -1.0, 0.0), cu, backend="triton")
    # beyond the limit of the log-ratio the gradient is 0, as the clamp of the reference gives it, and not that of the limit
    assert torch.isfinite(loss) and not torch.autograd.grad(loss, logps)[0].any() and torch.isfinite(stats["old_kl_sum"])


def test_loss_scales_with_its_upstream_gradient_and_repeats_bit_for_bit(triton_device):
    *args, tensors = batch(LENGTHS[3])
    v = variant("sequence", "clip", "sequence_mean", "k3", "tis")
    first = run(args, tensors, torch.float32, triton_device, "triton", variant=v)
    again = run(args, tensors, torch.float32, triton_device, "triton", variant=v)
    assert first[0] == again[0] and torch.equal(first[1], again[1]) and first[2] == again[2]
    logps = args[0].to(triton_device).requires_grad_()
    loss, _ = grpo_loss(logps, *(x.to(triton_device) for x in args[1:]), backend="triton")
    one, three = (torch.autograd.grad(c * loss, logps, retain_graph=True)[0] for c in (1, 3))
    assert torch.equal(three, 3 * one) and one.any()


def test_global_denominators_as_numbers_or_device_tensors(triton_device):
    *args, tensors = batch(LENGTHS[2])
    for v, name in (
        (variant(), "num_tokens"),
        (variant(aggregation="sequence_mean"), "num_sequences"),
        (variant(aggregation="constant"), "num_sequences"),
    ):
        as_number = run(args, tensors, torch.float32, triton_device, "triton", variant=v, **{name: 777})
        as_tensor = run(args, tensors, torch.float32, triton_device, "triton", variant=v, **{name: torch.tensor(777, device=triton_device)})
        want = run(args, tensors, torch.float64, "cpu", "reference", variant=v, **{name: 777})
        assert torch.equal(as_number[1], as_tensor[1]) and torch.allclose(as_number[1].double(), want[1], rtol=1e-5, atol=1e-9)
