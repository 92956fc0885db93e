"""logits_grpo against its formula written out over fp64 autograd (fixture `grpo`), odd logits, and overwriting them."""

import itertools
import math

import pytest
import torch

from athanor.kernels import LossVariant, group_advantage, linear_grpo, logits_grpo, logprob, policy_loss
from athanor.kernels.policy_loss import _CHOICES

INPLACE = pytest.mark.parametrize("inplace", [False, True])
RATIO = pytest.mark.parametrize("ratio", ["token", "sequence"])


def batch(grpo, *args, **kwargs):
    hidden, weight, args, tokens = grpo.batch(*args, **kwargs)
    return hidden @ weight.T, args, tokens


def run(logits, args, tokens, upstream=1.0, **options):
    """Loss, gradient and statistics.  The logits are no leaf, as in a trainer; with inplace their gradient must be what then lies in them."""
    leaf = logits.detach().requires_grad_()
    z = leaf * 1
    loss, stats = logits_grpo(z, *args, **tokens, **options)
    grad = torch.autograd.grad(loss * upstream, leaf)[0]
    assert torch.equal(z.detach(), grad if options.get("inplace") else logits) or grad.isnan().any()
    return loss.detach(), grad, stats


def formula(grpo, logits, args, tokens, v, **options):
    logits = logits.detach().requires_grad_()
    loss, entropy = grpo.loss(logits, *args, **tokens, v=v, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0], entropy


@pytest.mark.parametrize("ratio", _CHOICES["ratio"])
@pytest.mark.parametrize("surrogate", _CHOICES["surrogate"])
def test_every_combination_follows_the_formula(ratio, surrogate, grpo, close64):
    for i, rest in enumerate(itertools.product(*(_CHOICES[k] for k in ("aggregation", "kl", "correction")))):
        try:
            v = grpo.variant(ratio, surrogate, *rest)
        except ValueError:
            assert surrogate in ("cispo", "reinforce") and ratio != "token"
            continue
        z, (targets, old, A, cu), tokens = batch(grpo, seed=i)
        args = (targets, None if i % 5 == 4 else old, A, cu)
        temperature = (0.5, 1.0, 5.0)[i % 3]
        loss, grad, stats = run(z, args, tokens, variant=v, temperature=temperature, inplace=i % 2 == 1)
        want_loss, want_grad, entropy = formula(grpo, z, args, tokens, v, temperature=temperature)
        close64(loss, want_loss, v)
        close64(grad, want_grad, v)
        assert torch.isclose(stats["entropy_sum"].double(), entropy, rtol=1e-6)


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", [("token", "clip", "token_mean", "k3", "tis"), ("sequence", "sapo", "constant", "k2", "token_mask")])
def test_errs_no_more_than_the_eager_chain(choice, dtype, inplace, grpo, within_rule):
    z, args, tokens = batch(grpo, (40, 3, 70, 1, 30), V=301)
    z, v = (4 * z).to(dtype), grpo.variant(*choice)
    single = lambda x: x.float() if x.is_floating_point() else x  # noqa: E731
    args, tokens = [single(x) for x in args], {k: single(x) for k, x in tokens.items()}
    loss, grad, _ = run(z, args, tokens, variant=v, inplace=inplace)
    plain_loss, plain_grad, _ = formula(grpo, z.float(), args, tokens, v)
    wide = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    want_loss, want_grad, _ = formula(grpo, z.double(), [wide(x) for x in args], {k: wide(x) for k, x in tokens.items()}, v)
    assert loss.dtype == torch.float32 and abs(loss - want_loss) <= 2 * abs(plain_loss - want_loss) + 4e-6
    within_rule(grad, plain_grad.to(dtype), want_grad)


# no rows, no sequences, one row, sequences without tokens; more rows than the reference works on at once: 3 x 1 << 18 logits
@INPLACE
@RATIO
@pytest.mark.parametrize("lengths, V", [((0, 0), 5), ((), 5), ((1,), 5), ((0, 7, 0), 1), ((2, 1), 1 << 18)])
def test_edges(lengths, V, ratio, inplace, grpo, close64):
    z, args, tokens = batch(grpo, lengths, V)
    v = grpo.variant(ratio)
    loss, grad, _ = run(z, args, tokens, variant=v, inplace=inplace)
    want_loss, want_grad, _ = formula(grpo, z, args, tokens, v)
    close64(loss, want_loss)
    close64(grad, want_grad)


@INPLACE
@RATIO
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_rows_may_hold_garbage(garbage, ratio, inplace, grpo):
    z, (targets, old, A, cu), tokens = batch(grpo)
    v = grpo.variant(ratio, kl="k3", correction="tis")
    keep = tokens["mask"] & (targets >= 0)
    loss, grad, stats = run(z, (targets, old, A, cu), tokens, variant=v)
    bad = lambda x: torch.where(keep, x, garbage)  # noqa: E731
    poisoned = torch.where(keep[:, None], z, garbage)
    rest = {"ref_logps": bad(tokens["ref_logps"]), "rollout_logps": bad(tokens["rollout_logps"]), "mask": tokens["mask"]}
    leaf = poisoned.requires_grad_()
    loss2, stats2 = logits_grpo(leaf * 1, targets, bad(old), A, cu, **rest, variant=v, inplace=inplace)
    grad2 = torch.autograd.grad(loss2, leaf)[0]
    assert loss2 == loss and torch.equal(grad2, grad) and stats2 == stats
    assert not grad[~keep].any() and grad[keep].any()


@RATIO
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "reinforce"])
def test_forbidden_tokens(surrogate, ratio, grpo, close64):
    """Logits of -inf: some of a row; all but the target; the target; all."""
    if surrogate != "clip" and ratio != "token":
        pytest.skip("no such variant")
    z, (targets, _, A, cu), _ = batch(grpo, (3, 3, 2), V=9)
    targets, A, v = targets.clamp_min(0), torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64), grpo.variant(ratio, surrogate, "constant")
    some, only, target, nothing = 0, 1, 3, 6
    z[some, (targets[some] + torch.arange(1, 5)) % 9] = -torch.inf
    z[only] = torch.where(torch.arange(9) == targets[only], z[only], -torch.inf)
    z[target, targets[target]] = -torch.inf
    z[nothing] = -torch.inf
    out = logprob(z, targets)
    old = torch.where(out.logps.isfinite(), out.logps + 0.05, -1.0)  # near enough that no ratio of a possible target is cut
    loss, grad, stats = run(z, (targets, old, A, cu), {}, variant=v)
    leaf = out.logps.clone().requires_grad_()
    want_loss, _ = policy_loss(leaf, old, A, cu, variant=v)
    coefs = torch.autograd.grad(want_loss, leaf)[0]
    want = coefs[:, None] * (torch.nn.functional.one_hot(targets, 9) - z.softmax(-1))
    want[nothing] = 0
    assert torch.equal(loss, want_loss.detach()) or torch.isclose(loss, want_loss.detach(), rtol=1e-12)
    close64(grad, want)
    assert torch.isfinite(grad).all() and not grad[only].any() and not grad[nothing].any()
    assert grad[some].any() and (surrogate == "clip" or grad[target].any())  # clip: the ratio of a token that is now forbidden is cut
    assert torch.isclose(stats["entropy_sum"].double(), out.entropy.sum(), rtol=1e-6)
    assert torch.isfinite(loss) == (surrogate == "clip")


@RATIO
@pytest.mark.parametrize("offset", [-1e4, 1e4, 0.0])
def test_far_offsets_wide_ranges_and_constant_rows(offset, ratio, grpo):
    """A common offset changes nothing; a row of equal logits has entropy log V; a row far apart is one-hot: gradient exactly 0, entropy 0."""
    z, (targets, old, A, cu), _ = batch(grpo, (4, 4), V=16)
    targets, A = targets.clamp_min(0), torch.tensor([1.0, -1.0])
    z[0] = 0.5
    z[1] = torch.where(torch.arange(16) == targets[1], 1e5, -1e5).double()
    loose = LossVariant(ratio=ratio, clip_low=1.0, clip_high=1e9)
    loss, grad, stats = run(z + offset, (targets, old, A, cu), {}, variant=loose)
    want, want_grad, want_stats = run(z, (targets, old, A, cu), {}, variant=loose)
    assert torch.isclose(loss, want, rtol=1e-10) and torch.allclose(grad, want_grad, rtol=1e-9, atol=1e-12)
    assert not grad[1].any() and grad[0].any()
    assert torch.isclose(stats["entropy_sum"], want_stats["entropy_sum"], rtol=1e-6)
    mask = torch.zeros(8, dtype=torch.bool)
    for row, entropy in ((0, math.log(16)), (1, 0.0)):
        one = mask.clone()
        one[row] = True
        assert abs(run(z + offset, (targets, old, A, cu), {"mask": one}, variant=loose)[2]["entropy_sum"] - entropy) < 1e-6


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nan_in_a_row_poisons_that_row_and_the_loss(dtype, inplace, grpo):
    z, (targets, *_), _ = batch(grpo)
    args = targets, *(x.to(torch.promote_types(dtype, torch.float32)) if x.is_floating_point() else x for x in grpo.batch()[2][1:])
    z = z.to(dtype)
    v = LossVariant(aggregation="constant", max_tokens=10, kl="k3", beta=0.1)
    ref = args[1] + 0.1
    _, clean, _ = run(z, args, {"ref_logps": ref}, variant=v)
    for bad in (torch.nan, torch.inf):
        broken = z.clone()
        broken[6, 3] = bad
        assert targets[6] >= 0
        loss, grad, stats = run(broken, args, {"ref_logps": ref}, variant=v, inplace=inplace)
        others = torch.arange(len(z)) != 6
        assert loss.isnan() and stats["entropy_sum"].isnan() and grad[6].isnan().all() and torch.equal(grad[others], clean[others])


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scales_with_the_upstream_gradient(dtype, inplace, grpo):
    z, args, tokens = batch(grpo)
    once, three, four = (run(z.to(dtype), args, tokens, upstream, inplace=inplace)[1] for upstream in (1, 3, 4))
    assert torch.equal(four, 4 * once) and once.any() and torch.allclose(three, 3 * once, rtol=2 * torch.finfo(dtype).eps, atol=0)


@INPLACE
def test_rows_of_a_group_without_contrast_have_gradient_exactly_zero(inplace, grpo):
    z, (targets, old, _, cu), tokens = batch(grpo)
    rewards, ids = torch.tensor([1.0, 1.0, 0.5, 0.7, 1.0]), torch.tensor([4, 4, 9, 9, 4])
    args = targets, old, None, cu
    loss, grad, stats = run(z, args, tokens | {"rewards": rewards, "group_ids": ids}, inplace=inplace)
    assert not grad[:5].any() and not grad[15:].any() and grad[5:15].any()
    want = run(z, (targets, old, group_advantage(rewards, ids), cu), tokens)
    assert torch.equal(loss, want[0]) and torch.equal(grad, want[1]) and stats == want[2] | {"num_nan_rewards": 0}


@RATIO
def test_equals_linear_grpo_and_logprob_then_policy_loss(ratio, grpo, close64):
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch()
    tokens["mask"] &= targets >= 0
    v = grpo.variant(ratio, kl="k3", correction="token_mask")
    hidden.requires_grad_(), weight.requires_grad_()
    loss, stats = logits_grpo(hidden @ weight.T, targets, old, A, cu, **tokens, variant=v, inplace=True)
    grads = torch.autograd.grad(loss, (hidden, weight))
    other, other_stats = linear_grpo(hidden, weight, targets, old, A, cu, **tokens, variant=v)
    composed, composed_stats = policy_loss(logprob(hidden @ weight.T, targets).logps, old, A, cu, **tokens, variant=v)
    for want_loss in (other, composed):
        close64(loss.detach(), want_loss.detach())
        for a, b in zip(grads, torch.autograd.grad(want_loss, (hidden, weight)), strict=True):
            close64(a, b)
    assert stats.keys() == other_stats.keys() == composed_stats.keys() | {"entropy_sum"}
    for name, value in stats.items():
        assert torch.isclose(value, other_stats[name], rtol=1e-6) and (name == "entropy_sum" or torch.isclose(value, composed_stats[name], rtol=1e-6))


def test_without_a_gradient_to_compute_the_logits_keep_their_values(grpo):
    z, args, tokens = batch(grpo)
    want = run(z, args, tokens)
    for leaf, mode in ((z.clone(), torch.enable_grad()), (z.clone().requires_grad_(), torch.no_grad())):
        with mode:
            loss, stats = logits_grpo(leaf, *args, **tokens, inplace=True)
        assert not loss.requires_grad and loss == want[0] and stats == want[2] and torch.equal(leaf.detach(), z)


def test_inplace_refuses_logits_that_must_keep_their_values(grpo):
    z, args, tokens = batch(grpo)
    leaf = z.clone().requires_grad_()
    with pytest.raises(ValueError, match="would overwrite a leaf"):
        logits_grpo(leaf, *args, **tokens, inplace=True)
    with pytest.raises(ValueError, match="would overwrite a leaf"):
        logits_grpo(leaf.view(z.shape), *args, **tokens, inplace=True)
    with pytest.raises(ValueError, match=r"rows that do not overlap; strides are \(0, 1\)"):
        logits_grpo((leaf[:1] * 1).expand(z.shape), *args, **tokens, inplace=True)
    # an operation that needs its own output: the loss itself works, that operation's backward refuses
    capped = leaf.tanh()
    loss, _ = logits_grpo(capped, *args, **tokens, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # and the other way round
    plain = leaf * 1
    loss, _ = logits_grpo(plain, *args, **tokens, inplace=True)
    plain.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@INPLACE
def test_a_second_backward_raises(inplace, grpo):
    z, args, tokens = batch(grpo)
    leaf = z.clone().requires_grad_()
    loss, _ = logits_grpo(leaf * 1, *args, **tokens, inplace=inplace)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="logits_grpo: its gradients were handed out by the first backward|modified by an inplace"):
        loss.backward()


@pytest.mark.parametrize("change, message", [
    (dict(logits=torch.zeros(23, 37, dtype=torch.float16)), "logits are float16"),
    (dict(logits=torch.zeros(23)), r"logits is \(23,\) torch.float32; wanted \(T, V\) floating"),
    (dict(logits=torch.zeros(23, 0), targets=torch.full((23,), -100)), "logits have no columns"),
    (dict(targets=torch.full((23,), 37)), r"targets run from 37 to 37; wanted \[0, 37\) or -100"),
    (dict(advantages=torch.zeros(4)), r"advantages is \(4,\); wanted \(5,\)"),
    (dict(advantages=None), "give either advantages, or rewards and group_ids"),
    (dict(temperature=-1.0), "temperature is -1.0; wanted > 0"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message, grpo):
    z, (targets, old, A, cu), _ = batch(grpo)
    with pytest.raises(ValueError, match=f"logits_grpo: {message}"):
        logits_grpo(**dict(logits=z.float(), targets=targets, old_logps=old, advantages=A, cu_seqlens=cu) | change)
