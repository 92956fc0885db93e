"""linear_grpo against its formula written out over fp64 autograd (fixture `grpo`), and what it promises about chunks, GEMMs and rows left out."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from athanor.kernels import LossVariant, group_advantage, linear_grpo, linear_logprob, policy_loss
from athanor.kernels.linear_grpo import chunk_length
from athanor.kernels.policy_loss import _CHOICES

LEAVES = ("loss", "dhidden", "dweight")


def to(x, dtype):
    return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x


def run(hidden, weight, args, tokens, dtype=torch.float64, upstream=1.0, **options):
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden.detach(), weight.detach()))
    loss, stats = linear_grpo(hidden, weight, *(to(x, dtype) for x in args), **{k: to(x, dtype) for k, x in tokens.items()}, **options)
    return (loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))), stats


def formula(grpo, hidden, weight, args, tokens, v, dtype=torch.float64, **options):
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden.detach(), weight.detach()))
    wide = torch.promote_types(dtype, torch.float32)
    args = (args[0], *(to(x, wide) for x in args[1:]))
    loss, entropy = grpo.loss(hidden.to(wide) @ weight.to(wide).T, *args, **{k: to(x, wide) for k, x in tokens.items()}, v=v, **options)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight))), entropy


def combinations(grpo, ratio, surrogate):
    for rest in itertools.product(*(_CHOICES[k] for k in ("aggregation", "kl", "correction"))):
        try:
            yield grpo.variant(ratio, surrogate, *rest)
        except ValueError:
            assert surrogate in ("cispo", "reinforce") and ratio != "token"


@pytest.mark.parametrize("ratio", _CHOICES["ratio"])
@pytest.mark.parametrize("surrogate", _CHOICES["surrogate"])
def test_every_combination_follows_the_formula(ratio, surrogate, grpo, close64):
    for i, v in enumerate(combinations(grpo, ratio, surrogate)):
        hidden, weight, (targets, old, *rest), tokens = grpo.batch(seed=i)
        args = (targets, None if i % 5 == 4 else old, *rest)  # every fifth one: the old policy is this one
        got, stats = run(hidden, weight, args, tokens, variant=v, chunk_tokens=(4, 1, 23, None)[i % 4], compact=i % 3 > 0)
        want, entropy = formula(grpo, hidden, weight, args, tokens, v)
        for a, b, what in zip(got, want, LEAVES, strict=True):
            close64(a, b, (what, v))
        assert torch.isclose(stats["entropy_sum"].double(), entropy, rtol=1e-6)


# every ratio, aggregation and KL in fp32, and in the half precisions, which a CPU computes in fp32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", [
    ("token", "clip", "token_mean", "k3", "tis"), ("token", "cispo", "sequence_mean", "none", "sequence_mask"),
    ("sequence", "sapo", "constant", "k2", "token_mask"), ("sequence_token", "clip", "token_mean", "k1", "none"),
])  # fmt: skip
def test_errs_no_more_than_the_eager_chain(choice, dtype, grpo, within_rule):
    hidden, weight, args, tokens = grpo.batch((40, 3, 70, 1, 30), V=301, D=33)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    args, tokens = [to(x, torch.float32) for x in args], {k: to(x, torch.float32) for k, x in tokens.items()}  # one rounding for all three
    v = grpo.variant(*choice)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = linear_grpo(h, w, *args, **tokens, variant=v, chunk_tokens=50)
    got = (loss.detach(), *torch.autograd.grad(loss, (h, w)))
    plain, _ = formula(grpo, hidden, weight, args, tokens, v, dtype)
    want, _ = formula(grpo, hidden.double(), weight.double(), args, tokens, v)
    # the loss is a sum with cancellation, whose ulp is that of the terms: of order 1 here
    assert abs(got[0] - want[0]) <= 2 * abs(plain[0] - want[0]) + 4e-6
    for a, b, c, what in zip(got[1:], plain[1:], want[1:], LEAVES[1:], strict=True):
        within_rule(a, b, c, what)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_temperature(temperature, ratio, grpo, close64):
    hidden, weight, args, tokens = grpo.batch()
    v = grpo.variant(ratio, kl="k3")
    got, stats = run(hidden, weight, args, tokens, variant=v, temperature=temperature)
    want, entropy = formula(grpo, hidden, weight, args, tokens, v, temperature=temperature)
    for a, b, what in zip(got, want, LEAVES, strict=True):
        close64(a, b, what)
    assert torch.isclose(stats["entropy_sum"].double(), entropy, rtol=1e-6)


# 23 rows: one row per chunk, a remainder of 3, of 1, one chunk exactly, a longer one; no rows; one row; no sequences; sequences without tokens
@pytest.mark.parametrize("lengths, chunk", [((5, 0, 9, 1, 8), c) for c in (1, 4, 22, 23, 100)] + [((0, 0), 4), ((1,), 4), ((), 4), ((0, 7, 0), 3)])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_chunk_edges(lengths, chunk, compact, ratio, grpo, close64):
    hidden, weight, args, tokens = grpo.batch(lengths)
    v = grpo.variant(ratio)
    got, _ = run(hidden, weight, args, tokens, variant=v, chunk_tokens=chunk, compact=compact)
    want, _ = formula(grpo, hidden, weight, args, tokens, v)
    for a, b, what in zip(got, want, LEAVES, strict=True):
        close64(a, b, what)


def test_rows_found_dead_in_a_later_chunk_are_dropped_where_no_row_was_before(grpo, close64):
    """Without mask or zero advantage the chunks are slices of all rows; what the clip then drops in the second one must be found again there."""
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch((9, 8))
    args, v = (targets.clamp_min(0), old, A, cu), grpo.variant()
    tokens["mask"] = torch.ones(17, dtype=torch.bool)
    got, stats = run(hidden, weight, args, tokens, variant=v, chunk_tokens=5)
    want, _ = formula(grpo, hidden, weight, args, tokens, v)
    dead = (want[1] == 0).all(1)
    assert A.all() and dead[5:].any() and not dead[5:].all() and stats["num_tokens"] == 17
    for a, b, what in zip(got, want, LEAVES, strict=True):
        close64(a, b, what)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_rows_dropped_from_chunks_of_neighbours(ratio, grpo, close64):
    """No row is dead beforehand, so that the chunks are slices, and every chunk has rows that its ratios cut."""
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch((8, 8, 7))
    targets, A = targets.clamp_min(0), torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    tokens["mask"] = torch.ones(23, dtype=torch.bool)
    v = LossVariant(ratio=ratio, clip_low=0.02, clip_high=0.02)
    got, _ = run(hidden, weight, (targets, old, A, cu), tokens, variant=v, chunk_tokens=8)
    want, _ = formula(grpo, hidden, weight, (targets, old, A, cu), tokens, v)
    for a, b, what in zip(got, want, LEAVES, strict=True):
        close64(a, b, what)
    dead = ~got[1].any(1)
    assert ratio == "sequence" or all(0 < dead[i : i + 8].sum() < len(dead[i : i + 8]) for i in (0, 8, 16))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_masked_tokens_may_hold_garbage(ratio, compact, grpo):
    """-100 and mask=False are one thing, and nothing of such a row is used: NaN in its hidden state, log-probs at infinity."""
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch()
    v = grpo.variant(ratio, kl="k3", correction="tis")
    keep = tokens["mask"] & (targets >= 0)
    assert keep.any() and not keep.all()
    clean, stats = run(hidden, weight, (targets, old, A, cu), tokens, variant=v, compact=compact)
    bad = lambda x: torch.where(keep, x, torch.inf)  # noqa: E731
    poisoned = torch.where(keep[:, None], hidden, torch.nan)
    some = torch.where(keep, targets, torch.where(torch.arange(len(targets)) % 2 == 0, -100, 3))
    rest = {"ref_logps": bad(tokens["ref_logps"]), "rollout_logps": bad(tokens["rollout_logps"]), "mask": keep | (some == -100)}
    got, stats2 = run(poisoned, weight, (some, bad(old), A, cu), rest, variant=v, compact=compact)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True)) and stats == stats2
    assert not got[1][~keep].any() and got[1][keep].any()


@pytest.mark.parametrize("compact", [True, False])
def test_a_batch_without_tokens_has_loss_zero(compact, grpo):
    hidden, weight, args, tokens = grpo.batch()
    for ratio in _CHOICES["ratio"]:
        for aggregation in _CHOICES["aggregation"]:
            v = grpo.variant(ratio, "clip", aggregation)
            masked = {"mask": torch.zeros(len(hidden), dtype=torch.bool)}
            (loss, *grads), stats = run(hidden, weight, args, masked, variant=v, compact=compact)
            assert loss == 0 and not any(g.any() for g in grads) and all(x == 0 for x in stats.values())
            assert grads[0].shape == hidden.shape and grads[1].shape == weight.shape


@pytest.mark.parametrize("ratio", ["token", "sequence_token"])
def test_nan_in_a_row_poisons_that_row_the_loss_and_dweight(ratio, grpo):
    hidden, weight, args, _ = grpo.batch()
    # constant: no other token's coefficient depends on the broken one but through the ratio of its sequence
    v = LossVariant(ratio=ratio, aggregation="constant", max_tokens=10, clip_low=0.9, clip_high=9.0)
    row = 6
    assert args[0][row] >= 0 and 5 <= row < 14
    args[2][2] = 1.0
    clean, _ = run(hidden, weight, args, {}, variant=v)
    hidden[row] = torch.nan
    (loss, dhidden, dweight), stats = run(hidden, weight, args, {}, variant=v)
    assert loss.isnan() and dhidden[row].isnan().all() and dweight.isnan().all() and stats["entropy_sum"].isnan()
    others = torch.ones(len(hidden), dtype=torch.bool)
    others[row if ratio == "token" else slice(5, 14)] = False
    assert others.sum() >= 14 and torch.allclose(dhidden[others], clean[1][others], rtol=1e-12, atol=0)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scales_with_the_upstream_gradient(ratio, dtype, grpo):
    hidden, weight, args, tokens = grpo.batch()
    v = grpo.variant(ratio, kl="k3")
    once, three, four = (run(hidden, weight, args, tokens, dtype, upstream, variant=v, chunk_tokens=5)[0] for upstream in (1, 3, 4))
    assert all(torch.equal(a, 4 * b) and b.any() for a, b in zip(four[1:], once[1:], strict=True))  # a power of two: no rounding
    for a, b in zip(three[1:], once[1:], strict=True):
        assert torch.allclose(a, 3 * b, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_second_backward_raises(grpo):
    hidden, weight, args, tokens = grpo.batch()
    hidden.requires_grad_()
    loss, _ = linear_grpo(hidden, weight, *args, **tokens)
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()
    loss, _ = linear_grpo(hidden, weight, *args, **tokens)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_grpo: its gradients were handed out by the first backward"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dweight_over_32_chunks_does_not_drift(dtype, grpo):
    """SQNR of at least 45 dB; in bf16 against the gradient of the same rounded inputs, whose own rounding to bf16 costs about 54 dB."""
    hidden, weight, args, _ = grpo.batch((64,) * 8, V=64, D=24)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = linear_grpo(h, w, *(to(x, torch.float32) for x in args), chunk_tokens=16, compact=False)
    got = torch.autograd.grad(loss, w)[0].double()
    tokens = dict(ref_logps=None, rollout_logps=None, mask=torch.ones(512, dtype=torch.bool))
    args = [to(to(x, torch.float32), torch.float64) for x in args]
    (_, _, want), _ = formula(grpo, hidden.double(), weight.double(), args, tokens, LossVariant())
    assert 10 * torch.log10(want.square().sum() / (got - want).square().sum()) >= (45 if dtype == torch.bfloat16 else 110)


@pytest.mark.parametrize("options", [{}, {"scale": "none", "baseline": "leave_one_out"}, {"scale": "batch", "eps": 1e-4}])
def test_rewards_give_what_their_advantages_give(options, grpo):
    hidden, weight, (targets, old, _, cu), tokens = grpo.batch()
    rewards, ids = torch.tensor([1.0, 0.0, 0.5, 0.5, torch.nan], dtype=torch.float64), torch.tensor([7, 7, 3, 3, 7])
    A = group_advantage(rewards, ids, **options)
    got, stats = run(hidden, weight, (targets, old, None, cu), tokens | {"rewards": rewards, "group_ids": ids}, **options)
    want, stats2 = run(hidden, weight, (targets, old, A, cu), tokens)
    assert stats.pop("num_nan_rewards") == 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and stats == stats2 and got[1].any()


@pytest.mark.parametrize("ratio", _CHOICES["ratio"])
def test_equals_linear_logprob_then_policy_loss(ratio, grpo, close64):
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch()
    tokens["mask"] &= targets >= 0
    v = grpo.variant(ratio, kl="k3", correction="token_mask")
    got, stats = run(hidden, weight, (targets, old, A, cu), tokens, variant=v)
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprob(hidden, weight, targets)
    loss, want_stats = policy_loss(out.logps, old, A, cu, **tokens, variant=v)
    for a, b, what in zip(got, (loss.detach(), *torch.autograd.grad(loss, (hidden, weight))), LEAVES, strict=True):
        close64(a, b, what)
    assert stats.keys() == want_stats.keys() | {"entropy_sum"}
    for name, value in want_stats.items():
        assert torch.isclose(stats[name], value, rtol=1e-6, atol=1e-7), name
    assert torch.isclose(stats["entropy_sum"].double(), out.entropy[tokens["mask"]].sum(), rtol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", _CHOICES["aggregation"])
def test_micro_batches_with_global_denominators_add_up_to_the_whole(ratio, aggregation, grpo, close64):
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch()
    v = grpo.variant(ratio, "clip", aggregation, "k3", "tis")
    whole, stats = run(hidden, weight, (targets, old, A, cu), tokens, variant=v)
    counts = {"num_tokens": stats["num_tokens"], "num_sequences": int(stats["num_sequences"])}
    parts = []
    for i, j in ((0, 2), (2, 3), (3, 5)):
        a, b = int(cu[i]), int(cu[j])
        cut = {k: x[a:b] for k, x in tokens.items()}
        parts.append(run(hidden[a:b], weight, (targets[a:b], old[a:b], A[i:j], cu[i : j + 1] - cu[i]), cut, variant=v, **counts)[0])
    close64(sum(p[0] for p in parts), whole[0])
    close64(torch.cat([p[1] for p in parts]), whole[1])
    close64(sum(p[2] for p in parts), whole[2])


class Gemms(TorchDispatchMode):
    """Records the shape (m, k, n) of every matrix product, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.shapes, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        assert name not in ("bmm", "baddbmm", "linear", "matmul", "addmv"), name
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.shapes.append((*a.shape, b.shape[1]))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


def gemms(hidden, weight, args, tokens, backward=True, **options):
    with Gemms() as seen:
        loss, stats = linear_grpo(hidden, weight, *args, **tokens, **options)
        if backward:
            loss.backward()
    return seen, stats


def test_three_gemms_for_token_losses_four_for_sequence_losses_one_without_gradient(grpo):
    T, V, D = 24, 37, 11
    hidden, weight, (targets, old, A, cu), tokens = grpo.batch((6, 6, 6, 6), V, D)
    targets, A, tokens = targets.clamp_min(0), torch.tensor([1.0, -1.0, 0.5, 2.0]), tokens | {"mask": None}
    args = targets, old, A, cu
    forward, dh, dw = (T, D, V), (T, V, D), (V, T, D)
    open_ = dict(clip_low=0.99, clip_high=50.0)  # nothing is clipped
    for leaves, options, want in [
        ("hw", {}, [forward, dh, dw]),
        ("hw", dict(variant=LossVariant(ratio="sequence", **open_)), [forward, forward, dh, dw]),
        ("hw", dict(variant=LossVariant(ratio="sequence_token", **open_)), [forward, forward, dh, dw]),
        ("hw", dict(variant=LossVariant(correction="sequence_mask", correction_high=1e9, **open_)), [forward, dh, dw]),
        ("h", {}, [forward, dh]), ("w", {}, [forward, dw]), ("", {}, [forward]),
    ]:  # fmt: skip
        options = {"variant": LossVariant(**open_)} | options
        h, w = hidden.clone().requires_grad_("h" in leaves), weight.clone().requires_grad_("w" in leaves)
        assert gemms(h, w, args, tokens, bool(leaves), **options)[0].shapes == want
        with torch.no_grad():
            assert gemms(h, w, args, tokens, False, **options)[0].shapes == [forward]
    # without old log-probs the weight of a sequence needs all of its new ones
    h = hidden.clone().requires_grad_()
    v = LossVariant(correction="sequence_mask", correction_high=1e9)
    assert len(gemms(h, weight, (targets, None, A, cu), tokens, variant=v)[0].shapes) == 3
    # three chunks: each its own three products
    seen, _ = gemms(h, weight.clone().requires_grad_(), args, tokens, variant=LossVariant(**open_), chunk_tokens=10)
    assert seen.shapes == [s for n in (10, 10, 4) for s in ((n, D, V), (n, V, D), (V, n, D))]


def test_rows_without_gradient_are_left_out_of_the_gemms(grpo):
    V, D = 37, 11
    hidden, weight, (targets, old, A, cu), _ = grpo.batch((6, 6, 6, 6), V, D)
    targets, A = targets.clamp_min(0), torch.tensor([1.0, 0.0, 0.5, 2.0])
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets).logps
    old[[0, 13, 19, 20, 21]] -= 1  # ratio e with A > 0: clipped
    mask = torch.ones(24, dtype=torch.bool)
    mask[[3, 7, 22]] = False
    # 24 tokens - 3 masked = 21, of which 5 have advantage 0; of the other 16 5 are clipped
    want = {True: [(16, D, V), (11, V, D), (V, 11, D), (5, D, V)], False: [(24, D, V), (24, V, D), (V, 24, D)]}
    for compact in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        seen, stats = gemms(h, w, (targets, old, A, cu), {"mask": mask}, compact=compact)
        assert sorted(seen.shapes) == sorted(want[compact]) and stats["clip_high"] == 5 and stats["num_tokens"] == 21
    # with a KL every unmasked row has a gradient
    h = hidden.clone().requires_grad_()
    seen, _ = gemms(h, weight, (targets, old, A, cu), {"mask": mask, "ref_logps": old + 0.1}, variant=LossVariant(kl="k3", beta=0.1))
    assert sorted(seen.shapes) == sorted([(21, D, V), (21, V, D)])
    # a sequence loss drops its dead rows from the recomputation as well: sequences 0 and 3, of mean log-ratio 0.2 and 0.6, are clipped whole
    h = hidden.clone().requires_grad_()
    seen, _ = gemms(h, weight, (targets, old, A, cu), {"mask": mask}, variant=LossVariant(ratio="sequence"))
    assert sorted(seen.shapes) == sorted([(21, D, V), (6, D, V), (6, V, D)])


def test_logits_never_exist_beyond_a_chunk(grpo):
    hidden, weight, args, tokens = grpo.batch((50, 50, 100), V=80, D=7)
    for ratio in ("token", "sequence"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        seen, _ = gemms(h, w, args, tokens, variant=grpo.variant(ratio), chunk_tokens=16)
        assert 16 * 80 <= seen.largest <= 200 * 11  # a chunk of logits, or hidden; all logits would be 16000


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_leaving_rows_out_changes_nothing_but_gemm_rounding(ratio, grpo):
    """On small integers the logits are exact in any order of summation, so loss, statistics and log-probs must agree bit for bit."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randint(-2, 3, (n, 8), generator=g).float() for n in (40, 50))
    targets, cu = torch.randint(0, 50, (40,), generator=g), torch.tensor([0, 10, 25, 40])
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets).logps + 0.3 * torch.randn(40, generator=g)
    A, mask = torch.tensor([1.0, 0.0, -1.0]), torch.rand(40, generator=g) < 0.8
    results = []
    for compact, chunk in ((True, 7), (False, 7), (True, None), (True, 7)):
        got, stats = run(hidden, weight, (targets, old, A, cu), {"mask": mask}, torch.float32, variant=grpo.variant(ratio), compact=compact,
                         chunk_tokens=chunk)  # fmt: skip
        assert not got[1][10:25].any() and not got[1][~mask].any()  # exactly 0
        results.append((got, stats))
    for got, stats in results[1:]:
        assert torch.equal(got[0], results[0][0][0]) and stats == results[0][1]
        for a, b in zip(got[1:], results[0][0][1:], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=4e-7 * b.abs().max()) and b.any()
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[3][0], strict=True))  # and the same call gives the same bits


def test_first_step_identities(grpo):
    hidden, weight, (targets, _, A, cu), tokens = grpo.batch()
    for ratio in _CHOICES["ratio"]:
        (loss, *_), stats = run(hidden, weight, (targets, None, A, cu), {}, variant=grpo.variant(ratio))
        keep = targets >= 0
        assert stats["ratio_sum"] == stats["num_tokens"] == keep.sum() and stats["ratio_max"] == 1
        assert stats["clip_low"] == stats["clip_high"] == stats["old_kl_sum"] == 0
        assert torch.isclose(loss, -A.repeat_interleave(cu.diff())[keep].mean(), rtol=1e-12)


def test_the_chunk_length_follows_from_the_vocabulary():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [chunk_length(V, cuda) for V in (32000, 128256, 151936)] == [16768, 4096, 3456]
    assert chunk_length(32000, cpu) == 256 and chunk_length(1 << 24, cpu) == 1


@pytest.mark.parametrize("change, message", [
    (dict(weight=torch.zeros(37, 12)), r"weight is \(37, 12\), hidden is \(23, 11\)"),
    (dict(weight=torch.zeros(37, 11, dtype=torch.bfloat16)), "hidden is torch.float32, weight is torch.bfloat16; wanted one floating dtype"),
    (dict(targets=torch.full((23,), 37)), r"targets run from 37 to 37; wanted \[0, 37\) or -100"),
    (dict(targets=torch.full((23,), -1)), "targets run from -1"),
    (dict(targets=torch.zeros(22, dtype=torch.long)), r"targets is \(22,\)"),
    (dict(old_logps=torch.zeros(22)), r"old_logps is \(22,\)"),
    (dict(advantages=torch.zeros(4)), r"advantages is \(4,\); wanted \(5,\)"),
    (dict(advantages=None), "give either advantages, or rewards and group_ids"),
    (dict(rewards=torch.zeros(5), group_ids=torch.zeros(5, dtype=torch.long)), "give either advantages, or rewards and group_ids"),
    (dict(rewards=torch.zeros(5), advantages=None), "give either advantages, or rewards and group_ids"),
    (dict(rewards=torch.zeros(4), group_ids=torch.zeros(4, dtype=torch.long), advantages=None), r"rewards is \(4,\); wanted \(5,\)"),
    (dict(cu_seqlens=torch.tensor([0, 5, 5, 14, 15, 22])), "cu_seqlens runs from 0 to 22; wanted 0 to 23"),
    (dict(chunk_tokens=0), "chunk_tokens is 0; wanted > 0"),
    (dict(temperature=0.0), "temperature is 0.0; wanted > 0"),
    (dict(variant=LossVariant(kl="k3", beta=0.1)), "kl 'k3' needs ref_logps"),
    (dict(mask=torch.ones(23)), "mask is torch.float32; wanted bool"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message, grpo):
    hidden, weight, (targets, old, A, cu), _ = grpo.batch()
    call = dict(hidden=hidden.float(), weight=weight.float(), targets=targets, old_logps=old.float(), advantages=A.float(), cu_seqlens=cu)
    with pytest.raises(ValueError, match=f"linear_grpo: {message}"):
        linear_grpo(**call | change)
