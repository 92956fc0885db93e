"""Mixtures of experts of both families against transformers, one by one against packed, and the layer against a dense loop over experts in fp64.

Tolerance as in test_transformer.py.  Where logits are compared in bf16, every expert is chosen: a choice that flips by rounding is no error.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, assert_close, in_stack, in_transformers, our_logits, random_decoder, sequences, their_logits

from athanor.hf_tensors import hf_tensors
from athanor.model.moe import MixtureOfExperts, Routes, imbalance, rebalance_, routers, sequence_balance_loss, use_fp8_

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")


pytestmark = pytest.mark.usefixtures("threads")


def all_chosen(config):
    return config.model_copy(update={"num_experts_per_tok": config.num_experts, "topk_group": config.n_group})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_logits_equal_transformers_one_by_one(name, dtype):
    config = FAMILIES[name] if dtype == torch.float32 else all_chosen(FAMILIES[name])
    model, ids = random_decoder(config).to(dtype), sequences()
    truth = their_logits(in_transformers(model, torch.float64), ids)
    assert_close(our_logits(model, ids), their_logits(in_transformers(model, dtype), ids), truth, name)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fp64_logits_equal_transformers_in_fp64(name):
    model, ids = random_decoder(FAMILIES[name]).double(), sequences()
    truth = their_logits(in_transformers(model, torch.float64), ids)
    assert float((our_logits(model, ids) - truth).abs().max()) <= 1000 * torch.finfo(torch.float64).eps * float(truth.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_all_parameters_equal_transformers(name):
    model, ids = random_decoder(FAMILIES[name]), sequences()
    targets = torch.cat([torch.roll(x, -1) for x in ids])
    theirs, truth = in_transformers(model, torch.float32), in_transformers(model, torch.float64)
    for logits in (our_logits(model, ids), their_logits(theirs, ids), their_logits(truth, ids)):
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    # One comparison per fused matrix and per stack of experts: the gradient of one expert with two tokens is two roundings.
    fused = [{n: torch.zeros_like(p, dtype=dtype) for n, p in model.named_parameters()} for dtype in (torch.float32, torch.float64)]
    for grads, m in zip(fused, (theirs, truth), strict=True):
        named = {n: p.grad for n, p in m.named_parameters()}
        for hf_name, source in hf_tensors(model.config).items():
            if not hf_name.endswith("e_score_correction_bias"):
                source.of(grads).copy_(in_stack(named, hf_name))
    for n, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, *(grads[n] for grads in fused), n)
    assert not any(router.bias is not None and router.bias.requires_grad for router in routers(model))


def loop_over_experts(moe: MixtureOfExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every expert over every token, weighted by what it has of it."""
    out = moe.shared.down_proj.weight @ silu_mul(moe.shared.gate_up_proj.weight @ x.T) if moe.shared is not None else torch.zeros_like(x).T
    for e in range(moe.num_experts):
        share = (weights * (ids == e)).sum(1)
        out = out + share * (moe.down_proj[e] @ silu_mul(moe.gate_up_proj[e] @ x.T))
    return out.T


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2)
    return torch.nn.functional.silu(gate) * up


def a_layer(name: str, dtype: torch.dtype) -> MixtureOfExperts:
    model = random_decoder(FAMILIES[name])
    return next(layer.moe for layer in model.layers if layer.moe is not None).to(dtype)


def all_gradients(moe, x, dy, forward):
    x = x.detach().requires_grad_()
    parameters = [p for p in moe.parameters() if p.requires_grad]
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 33])  # most experts without tokens; odd
def test_the_layer_and_its_gradients_are_those_of_a_dense_loop_in_fp64(name, tokens):
    generator = torch.Generator().manual_seed(tokens)
    x, dy = (torch.randn(tokens, 48, generator=generator, dtype=torch.float64) for _ in range(2))
    moe = a_layer(name, torch.float64)
    logits_of = moe.router.logits

    def dense(x):
        logits = logits_of(x)
        ids = moe.router(x.detach())[0].long()
        scores = logits.softmax(-1) if moe.router.bias is None else logits.sigmoid()
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(1, keepdim=True) if moe.router.options["normalize"] else weights
        return loop_over_experts(moe, x, ids, weights * moe.router.options.get("scale", 1.0))

    for got, want in zip(all_gradients(moe, x, dy, moe), all_gradients(moe, x, dy, dense), strict=True):
        assert float((got - want).abs().max()) <= 1e-12 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_layer_in_fp32_errs_no_more_than_the_loop(name):
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(50, 48, generator=generator) for _ in range(2))
    moe, wide = a_layer(name, torch.float32), a_layer(name, torch.float64)
    ids, weights = moe.router(x)
    routes = Routes(replay=ids[None])
    truth = all_gradients(wide, x.double(), dy.double(), lambda x: wide(x, Routes(replay=ids[None])))
    assert torch.equal(wide.router(x.double())[0], ids)  # fp32 chooses no other experts here
    plain = all_gradients(moe, x, dy, lambda x: loop_over_experts(moe, x, ids, moe.router(x)[1]))
    for got, theirs, want in zip(all_gradients(moe, x, dy, lambda x: moe(x, routes)), plain, truth, strict=True):
        assert_close(got, theirs, want, name)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_a_tokens_bits_do_not_depend_on_the_others(name):
    moe, generator = a_layer(name, torch.float32), torch.Generator().manual_seed(0)
    x = torch.randn(160, 48, generator=generator)
    together = moe(x)
    for rows in (16, 48, 160):
        order = torch.randperm(160, generator=generator)[:rows]
        assert torch.equal(moe(x[order]), together[order])


def test_replayed_experts_are_taken_and_disagreement_is_counted():
    model, ids = random_decoder(FAMILIES["deepseek_v3"]), sequences()
    first = Routes()
    with torch.no_grad():
        want = our_logits(model, ids, first)
    recorded = torch.stack(first.ids)
    assert recorded.shape == (2, 53, 3) and first.disagreement == 0
    same = Routes(replay=recorded)
    logits = our_logits(model, ids, same)
    assert torch.equal(logits.detach(), want) and same.disagreement == 0 and torch.equal(torch.stack(same.ids), recorded)
    changed = recorded.clone()
    changed[1, :5] = torch.tensor([0, 1, 2], dtype=torch.int32)
    changed[0, 7:] = -1  # not recorded: routed as usual
    other = Routes(replay=changed)
    logits = our_logits(model, ids, other)
    assert torch.equal(other.ids[1], changed[1]) and torch.equal(other.ids[0], recorded[0]) and not torch.equal(logits[:5].detach(), want[:5])
    strange = sum(int(e) not in recorded[1, t].tolist() for t in range(5) for e in (0, 1, 2))
    assert strange > 0 and float(other.disagreement) == pytest.approx(strange / (7 * 3 + 53 * 3))
    logits.square().mean().backward()
    assert all(router.weight.grad.any() for router in routers(model))  # the weights of replayed experts are the router's own


def test_biases_move_towards_balance_and_select_without_weighing():
    model, ids = random_decoder(FAMILIES["deepseek_v3"]), sequences()
    routes = Routes(num_tokens=50)
    with torch.no_grad():
        our_logits(model, ids, routes)
    brute = [[sum(int(e) == expert for row in layer[:50].tolist() for e in row) for expert in range(8)] for layer in routes.ids]
    assert [c.tolist() for c in routes.counts] == brute and sum(brute[0]) == 150
    before = [router.bias.clone() for router in routers(model)]
    rebalance_(model, routes.counts, 0.01)
    for router, old, counts in zip(routers(model), before, brute, strict=True):
        wanted = [0.01 * ((150 / 8 > c) - (150 / 8 < c)) for c in counts]
        assert (router.bias - old).tolist() == pytest.approx(wanted, abs=1e-7)
    assert imbalance(routes.counts) == pytest.approx(max(max(c) / (150 / 8) for c in brute) - 1)
    for _ in range(60):  # the bias alone levels the load
        routes = Routes()
        with torch.no_grad():
            our_logits(model, ids, routes)
        rebalance_(model, routes.counts, 0.02)
    assert imbalance(routes.counts) < 0.5 < max(max(c) / (150 / 8) for c in brute) - 1
    with pytest.raises(ValueError, match="counts of 3 layers"):
        rebalance_(random_decoder(FAMILIES["qwen3_moe"]), [torch.ones(8)] * 3, 0.1)


def test_the_sequence_balance_loss_is_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    scores, cu = torch.rand(9, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 5, 5, 9])
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)]).to(torch.int32)
    total = 0.0
    for first, end in ((0, 5), (5, 9)):
        for e in range(4):
            f = 4 / (2 * (end - first)) * sum(e in ids[t].tolist() for t in range(first, end))
            total += f * sum(float(scores[t, e] / scores[t].sum()) for t in range(first, end)) / (end - first) / 2
    assert float(sequence_balance_loss(scores, ids, cu)) == pytest.approx(total, rel=1e-12)
    alone = [float(sequence_balance_loss(scores[a:b], ids[a:b], torch.tensor([0, b - a]))) for a, b in ((0, 5), (5, 9))]
    weighted = sequence_balance_loss(scores, ids, cu, torch.tensor([0.3, 9.0, 0.7]))
    assert float(weighted) == pytest.approx(0.3 * alone[0] + 0.7 * alone[1], rel=1e-6)
    level = torch.ones(8, 4), torch.arange(16, dtype=torch.int32).view(8, 2) % 4
    assert float(sequence_balance_loss(*level, torch.tensor([0, 8]))) == pytest.approx(1.0)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, ids, cu), scores)


def test_the_balance_loss_comes_with_a_forward():
    model, ids = random_decoder(FAMILIES["deepseek_v3"]), sequences()
    routes = Routes(cu_seqlens=torch.tensor([0, 1, 8, 53]))
    our_logits(model, ids, routes)
    assert len(routes.balance) == 2 and all(float(loss.detach()) > 0.9 for loss in routes.balance)
    torch.stack(routes.balance).sum().backward()
    assert all(router.weight.grad.any() for router in routers(model))


def test_a_cast_keeps_the_selection_biases_in_fp32():
    model = random_decoder(FAMILIES["deepseek_v3"])
    before = [router.bias.clone() for router in routers(model)]
    model.to(torch.bfloat16)
    assert all(torch.equal(router.bias, old) for router, old in zip(routers(model), before, strict=True))
    assert model.layers[1].moe.gate_up_proj.dtype == torch.bfloat16 and not routers(model)[0].bias.requires_grad


def test_a_nan_token_poisons_itself_alone():
    moe = a_layer("deepseek_v3", torch.float32)
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = moe(x)
        x[5] = torch.nan
        got = moe(x)
    assert got[5].isnan().all() and torch.equal(got[torch.arange(32) != 5], want[torch.arange(32) != 5])


def test_experts_in_fp8_are_near_those_in_fp32():
    config = FAMILIES["qwen3_moe"].model_copy(update={"hidden_size": 256, "moe_intermediate_size": 128})
    generator = torch.Generator().manual_seed(0)
    moe, x = MixtureOfExperts(config), torch.randn(64, 256, generator=generator)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    plain = all_gradients(moe, x, x, moe)
    use_fp8_(moe, "dgrad")
    for a, b in zip(all_gradients(moe, x, x, moe), plain, strict=True):
        assert 0 < float((a - b).norm() / b.norm()) < 0.1  # e4m3 keeps 3 bits: some 3 % per product
