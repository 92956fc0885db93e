"""Every valid combination against appendix B's coefficients, token by token in Python floats; identities and known answers of the papers."""

import itertools
import math

import pytest
import torch

from athanor.kernels import LossVariant, policy_loss
from athanor.kernels.policy_loss import _CHOICES, k3

EXTRA = {"two_sided": {"delta": 1.7}, "dual_clip": {"dual_clip": 1.5}, "constant": {"max_tokens": 20}}
BOUNDS = {"tis": {"correction_high": 1.3}, "token_mask": {"correction_low": 0.7, "correction_high": 1.4}, "sequence_mask": {"correction_high": 1.5}}


def variant(ratio="token", surrogate="clip", aggregation="token_mean", kl="none", correction="none", **more):
    beta = {} if kl == "none" else {"beta": 0.05}
    return LossVariant(ratio=ratio, surrogate=surrogate, aggregation=aggregation, kl=kl, correction=correction, clip_high=0.3,
                       **EXTRA.get(surrogate, {}), **EXTRA.get(aggregation, {}), **BOUNDS.get(correction, {}), **beta, **more)  # fmt: skip


def batch(lengths=(5, 1, 9, 0, 4), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logps = (-2 * torch.rand(n, generator=g, dtype=torch.float64) - 0.1).to(dtype)
    noise = lambda s: logps + (s * torch.randn(n, generator=g, dtype=torch.float64)).to(dtype)  # noqa: E731
    old = noise(0.4)
    advantages = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    if len(lengths) > 2:
        advantages[1] = 0.0
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tensors = {"ref_logps": noise(0.5), "rollout_logps": old + 0.3 * torch.randn(n, generator=g).to(dtype), "mask": torch.rand(n, generator=g) < 0.8}
    return (logps.requires_grad_(), old, advantages, cu), tensors


def oracle(logps, old, A, cu, ref_logps, rollout_logps, mask, v, num_tokens=None, num_sequences=None):
    """Loss and gradient from the table of coefficients (reference/kernels.md, appendix B), one token at a time."""
    lp, old, A, ref, smp = (x.detach().double().tolist() for x in (logps, old, A, ref_logps, rollout_logps))
    keep, cu = mask.tolist(), cu.tolist()
    rows = [[t for t in range(a, b) if keep[t]] for a, b in itertools.pairwise(cu)]
    num_tokens = max(sum(map(len, rows)), 1) if num_tokens is None else num_tokens
    num_sequences = max(sum(1 for r in rows if r), 1) if num_sequences is None else num_sequences
    lo, hi = 1 - v.clip_low, 1 + v.clip_high
    loss, grad = 0.0, [0.0] * len(lp)
    for s, row in enumerate(rows):
        a, n = A[s], len(row)
        upstream = 0.0
        for t in row:
            w = {"token_mean": 1 / num_tokens, "sequence_mean": 1 / (num_sequences * n)}.get(v.aggregation)
            if w is None:
                w = 1 / (num_sequences * v.max_tokens)
            r = math.exp(lp[t] - old[t]) if v.ratio == "token" else math.exp(sum(lp[j] - old[j] for j in row) / n)
            if v.surrogate == "reinforce":
                term, coef = -a * lp[t], -a
            elif v.surrogate == "cispo":
                c = min(max(r, lo), hi)
                term, coef = -c * a * lp[t], -c * a
            elif v.surrogate == "sapo":
                tau = v.tau_positive if a > 0 else v.tau_negative
                sig = 1 / (1 + math.exp(-tau * (r - 1)))
                term, coef = -4 / tau * sig * a, -4 * sig * (1 - sig) * r * a
            else:
                cap = v.dual_clip or v.delta
                term = -min(r * a, min(max(r, lo), hi) * a)
                clipped = (a > 0 and r > hi) or (a < 0 and r < lo)
                if cap and a < 0 and term > -cap * a:
                    term, clipped = -cap * a, True
                coef = 0.0 if clipped else -r * a
            rho = math.exp(old[t] - smp[t]) if v.correction != "sequence_mask" else math.exp(sum(old[j] - smp[j] for j in row))
            c = 1.0
            if v.correction == "tis":
                c = min(rho, v.correction_high)
            elif v.correction != "none":
                c = rho if v.correction_low <= rho <= v.correction_high else 0.0
            e = ref[t] - lp[t]
            kl, dkl = {"none": (0, 0), "k1": (-e, 1), "k2": (e * e / 2, -e), "k3": (math.exp(e) - e - 1, 1 - math.exp(e))}[v.kl]
            loss += w * (c * term + v.beta * kl)
            grad[t] += w * v.beta * dkl
            if v.ratio == "sequence":
                upstream += w * c * coef / n
            else:
                grad[t] += w * c * coef
        if v.ratio == "sequence":
            for t in row:
                grad[t] += upstream
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(grad, dtype=torch.float64)


def valid_variants(ratio, surrogate):
    for rest in itertools.product(*(_CHOICES[k] for k in ("aggregation", "kl", "correction"))):
        try:
            yield variant(ratio, surrogate, *rest)
        except ValueError:
            assert surrogate in ("cispo", "reinforce") and ratio != "token"


@pytest.mark.parametrize("ratio", _CHOICES["ratio"])
@pytest.mark.parametrize("surrogate", _CHOICES["surrogate"])
def test_every_combination_follows_the_table(ratio, surrogate, close64, within_rule):
    for i, v in enumerate(valid_variants(ratio, surrogate)):
        args, tensors = batch(seed=i)
        want_loss, want_grad = oracle(*args, **tensors, v=v)
        loss, _ = policy_loss(*args, **tensors, variant=v)
        close64(loss, want_loss, v)
        close64(torch.autograd.grad(loss, args[0])[0], want_grad, v)
        args, tensors = batch(seed=i, dtype=torch.float32)
        want_loss, want_grad = oracle(*args, **tensors, v=v)
        loss, _ = policy_loss(*args, **tensors, variant=v)
        # fp32: T7's relative 1e-6 on the loss and 1e-5 on the gradient, of the largest entry
        assert abs(loss - want_loss) <= 1e-6 * max(1, abs(want_loss)), v
        assert (torch.autograd.grad(loss, args[0])[0] - want_grad).abs().max() <= 1e-5 * want_grad.abs().max().clamp_min(1e-3), v


def test_first_step_identities():
    """T31: with old = new, exactly: ratio 1, nothing clipped, both KL 0, loss = minus the mean advantage over tokens."""
    (logps, _, A, cu), _ = batch()
    loss, stats = policy_loss(logps, None, A, cu, ref_logps=logps.detach(), variant=variant(kl="k3"))
    same, _ = policy_loss(logps, logps.detach().clone(), A, cu, ref_logps=logps.detach(), variant=variant(kl="k3"))
    n = torch.tensor([5, 1, 9, 0, 4])
    assert loss == same and math.isclose(loss.item(), -(A * n).sum() / n.sum(), rel_tol=1e-14)
    assert stats["ratio_sum"] == stats["num_tokens"] == 19 and stats["ratio_max"] == 1 and stats["num_sequences"] == 4
    assert all(stats[k] == 0 for k in ("clip_low", "clip_high", "old_kl_sum", "ref_kl_sum"))


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("bound", ["low", "high"])
def test_ratio_exactly_on_a_clip_bound_keeps_its_gradient(advantage, bound):
    """As torch.min and torch.clamp give it (TRL); the bound is made of the very ratio that exp returns."""
    logps = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    r = math.exp(0.25 if bound == "high" else -0.25)
    v = LossVariant(clip_high=r - 1) if bound == "high" else LossVariant(clip_low=1 - r)
    edge = 1 + v.clip_high if bound == "high" else 1 - v.clip_low
    old = torch.tensor([-math.log(edge)], dtype=torch.float64)
    ratio = (logps - old).exp()
    if ratio.item() != edge:
        pytest.fail("the ratio must sit on the bound for this test to mean anything")
    A = torch.tensor([advantage], dtype=torch.float64)
    got = torch.autograd.grad(policy_loss(logps, old, A, torch.tensor([0, 1]), variant=v)[0], logps)[0]
    low, high = 1 - v.clip_low, 1 + v.clip_high
    trl = torch.autograd.grad(-torch.min(ratio * A, ratio.clamp(low, high) * A).sum(), logps)[0]
    assert torch.equal(got, trl) and got == -edge * advantage


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("ratio", _CHOICES["ratio"])
def test_masked_positions_may_hold_garbage(ratio, garbage):
    args, tensors = batch()
    for correction in _CHOICES["correction"]:
        v = variant(ratio, kl="k3", correction=correction, aggregation="sequence_mean")
        loss, stats = policy_loss(*args, **tensors, variant=v)
        grad = torch.autograd.grad(loss, args[0])[0]
        bad = [torch.where(tensors["mask"], x.detach(), garbage) for x in (*args[:2], tensors["ref_logps"], tensors["rollout_logps"])]
        bad[0].requires_grad_()
        loss2, stats2 = policy_loss(bad[0], bad[1], *args[2:], ref_logps=bad[2], rollout_logps=bad[3], mask=tensors["mask"], variant=v)
        assert loss2 == loss and torch.equal(torch.autograd.grad(loss2, bad[0])[0], grad) and stats2 == stats


@pytest.mark.parametrize("aggregation", _CHOICES["aggregation"])
@pytest.mark.parametrize("lengths", [(5, 3), (0, 0), ()])  # all masked; sequences without tokens; no sequences
def test_a_batch_without_tokens_has_loss_zero(aggregation, lengths):
    args, _ = batch(lengths)
    loss, stats = policy_loss(*args, mask=torch.zeros(sum(lengths), dtype=torch.bool), variant=variant(aggregation=aggregation))
    assert loss == 0 and not torch.autograd.grad(loss, args[0])[0].any()
    assert all(value == 0 for value in stats.values())


def test_overflowing_ratios_stay_finite():
    logps = torch.zeros(4, requires_grad=True)
    old = torch.tensor([-1e4, 1e4, -1e4, -1e4])
    A = torch.tensor([1.0, -1.0, -1.0, 0.0])
    loss, stats = policy_loss(logps, old, A, torch.arange(5), ref_logps=-old, variant=variant(kl="k3"))
    # two are cut by a bound; the third is beyond the limit of the log-ratio, as all are beyond that of the KL: gradient 0
    assert torch.isfinite(loss) and not torch.autograd.grad(loss, logps)[0].any()
    assert all(torch.isfinite(x) for x in stats.values())


def test_micro_batches_with_global_denominators_add_up_to_the_whole(close64):
    """T8: three calls over parts, told the whole step's counts, against one call; the statistics add (ratio_max: maximum)."""
    for v in (variant(a, b, c) for a in _CHOICES["ratio"] for b in ("clip", "dual_clip") for c in _CHOICES["aggregation"]):
        (logps, old, A, cu), tensors = batch()
        whole, stats = policy_loss(logps, old, A, cu, **tensors, variant=v)
        parts = []
        for i, j in ((0, 2), (2, 3), (3, 5)):
            a, b = int(cu[i]), int(cu[j])
            cut = {k: t[a:b] for k, t in tensors.items()}
            parts.append(policy_loss(logps[a:b], old[a:b], A[i:j], cu[i : j + 1] - cu[i], **cut, variant=v,
                                     num_tokens=stats["num_tokens"], num_sequences=int(stats["num_sequences"])))  # fmt: skip
        total = sum(loss for loss, _ in parts)
        close64(total, whole)
        close64(torch.autograd.grad(total, logps, retain_graph=True)[0], torch.autograd.grad(whole, logps)[0])
        for name, value in stats.items():
            combined = [s[name] for _, s in parts]
            assert torch.isclose(max(combined) if name == "ratio_max" else sum(combined), value), name


def test_gspo_forms_agree_per_sequence_and_differ_under_token_weights(close64):
    """T33: with l of shape (S,) averaged over sequences, GSPO's two forms have one gradient only under sequence_mean."""
    (logps, old, A, cu), _ = batch()
    rows = [(a, b) for a, b in itertools.pairwise(cu.tolist()) if b > a]
    s = torch.stack([(logps[a:b] - old[a:b]).mean().exp() for a, b in rows])
    advantage = A[[i for i, n in enumerate((5, 1, 9, 0, 4)) if n]]
    paper = -torch.minimum(s * advantage, s.clamp(0.8, 1.3) * advantage).mean()
    want = torch.autograd.grad(paper, logps)[0]
    for ratio in ("sequence", "sequence_token"):
        loss, _ = policy_loss(logps, old, A, cu, variant=variant(ratio, aggregation="sequence_mean"))
        close64(loss, paper.detach())
        close64(torch.autograd.grad(loss, logps)[0], want)
        other, _ = policy_loss(logps, old, A, cu, variant=variant(ratio, aggregation="token_mean"))
        assert (torch.autograd.grad(other, logps)[0] - want).abs().max() > 1e-3


def test_loss_scales_with_its_upstream_gradient(close64):
    args, tensors = batch()
    loss, _ = policy_loss(*args, **tensors, variant=variant(kl="k3"))
    one, three = (torch.autograd.grad(loss * c, args[0], retain_graph=True)[0] for c in (1, 3))
    close64(three, 3 * one)


def test_statistics_by_hand():
    logps = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0])
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0])
    cu, A = torch.tensor([0, 2, 4, 5]), torch.tensor([1.0, -1.0, 1.0])
    rho = torch.tensor([1.0, 3.0, 1.0, 0.5, 1.0])
    _, stats = policy_loss(logps, -ratios.log(), A, cu, rollout_logps=-ratios.log() - rho.log(), variant=LossVariant(correction="tis"))
    expected = {"num_tokens": 5, "num_sequences": 3, "ratio_sum": 5, "ratio_max": 1.5, "clip_high": 1, "clip_low": 1, "weight_sum": 5.5,
                "weight_sq_sum": 7.25, "old_kl_sum": (ratios - 1 - ratios.log()).sum(), "ref_kl_sum": 0,
                "rollout_kl_sum": (1 / rho - 1 + rho.log()).sum()}  # fmt: skip
    assert {k: pytest.approx(float(v), rel=1e-5) for k, v in expected.items()} == {k: float(v) for k, v in stats.items()}


def test_kl_estimators_agree_with_the_exact_divergence():
    """T34: samples of p; the means of k1 and k3 are KL(p || q), and k2's expected gradient is the gradient of KL."""
    g = torch.Generator().manual_seed(7)
    p_logits, q_logits = torch.randn(2, 6, dtype=torch.float64, generator=g)
    p_logits.requires_grad_()
    p, q = p_logits.log_softmax(0), q_logits.log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    draws = torch.multinomial(p.detach().exp(), 1_000_000, replacement=True, generator=g)
    e = (q - p.detach())[draws]
    for estimate in (-e, k3(e)):
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / 1000
    counts = torch.bincount(draws, minlength=6) / 1e6
    gradient = torch.autograd.grad((counts * (q - p).square() / 2).sum(), p_logits, retain_graph=True)[0]
    want = torch.autograd.grad(exact, p_logits)[0]
    assert (gradient - want).abs().max() < 4 * e.std() / 1000


@pytest.mark.parametrize("options, message", [
    ({"surrogate": "two_sided"}, "needs delta"),
    ({"delta": 4.0}, "delta is 4.0, but only surrogate 'two_sided' uses it"),
    ({"surrogate": "two_sided", "delta": 1.1}, r"delta is 1.1; wanted >= 1 \+ clip_high"),
    ({"aggregation": "constant"}, "needs max_tokens"),
    ({"max_tokens": 8}, "only aggregation 'constant' uses it"),
    ({"kl": "k3"}, "give both or neither"),
    ({"beta": 0.1}, "give both or neither"),
    ({"surrogate": "cispo", "ratio": "sequence"}, "ratio 'sequence' has no meaning"),
    ({"surrogate": "dualclip"}, "did you mean 'dual_clip'"),
    ({"correction": "tis", "correction_low": 0.5}, "correction 'tis' ignores"),
    ({"correction_high": 2.0}, "only a correction uses it"),
    ({"correction": "token_mask", "correction_low": 3.0}, "wanted 0 <= low < high"),
])  # fmt: skip
def test_contradictory_variants_are_refused_when_built(options, message):
    with pytest.raises(ValueError, match=f"LossVariant: .*{message}"):
        LossVariant(**options)


def test_missing_tensors_are_refused():
    args, _ = batch()
    with pytest.raises(ValueError, match="policy_loss: kl 'k3' needs ref_logps"):
        policy_loss(*args, variant=variant(kl="k3"))
    with pytest.raises(ValueError, match="policy_loss: correction 'tis' needs rollout_logps"):
        policy_loss(*args, variant=variant(correction="tis"))
    with pytest.raises(ValueError, match=r"policy_loss: advantages is \(4,\); wanted \(5,\)"):
        policy_loss(args[0], args[1], args[2][:4], args[3])
    with pytest.raises(ValueError, match="policy_loss: cu_seqlens runs from 0 to 15; wanted 0 to 19"):
        policy_loss(args[0], args[1], args[2][:4], args[3][:4].clone())
