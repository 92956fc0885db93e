"""Multi-token prediction: the layer against transformers' decoder layer in fp64, which tokens its loss covers, and what it trains."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import OptimizerConfig, RecipeConfig, SFTConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.model.moe import routers
from athanor.model.transformer import PackedAttention
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.samples import Request
from athanor.stages.routing import RouterBalance
from athanor.stages.training import TrainingLoop, completion_logprobs, cross_entropy_step, mtp_logprobs

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, in_transformers, packed, random_decoder, sequences  # noqa: E402

RANKS = Ranks(threads=1)
WITH = {name: FAMILIES[name].model_copy(update={"num_nextn_predict_layers": 1}) for name in ("deepseek_v3", "deepseek_v3_yarn")}


pytestmark = pytest.mark.usefixtures("threads")


def theirs_of(model):
    """transformers' model in fp64 with one layer more, which has the weights of ours."""
    config = model.config.model_copy(update={"num_hidden_layers": 4, "num_nextn_predict_layers": 0})
    deeper = random_decoder(config)
    ours, state = dict(model.named_parameters()), dict(deeper.named_parameters())
    with torch.no_grad():
        for name, parameter in state.items():
            parameter.copy_(ours[name.replace("layers.3.", "mtp.layer.") if name.startswith("layers.3.") else name])
    return in_transformers(deeper, torch.float64)


def their_states(model, theirs, ids):
    """The states of one sequence (n,) that predict token t + 2 from rows t = 0 .. n - 2, as the paper has it, one sequence on its own."""
    decoder, n = theirs.model, len(ids) - 1
    norm = decoder.norm
    decoder.layers, fourth = decoder.layers[:3], decoder.layers[3]
    hidden = decoder(ids[None]).last_hidden_state[0, :n]
    decoder.layers.append(fourth)

    def rms(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * weight.double()

    mtp = model.mtp
    both = torch.cat((rms(decoder.embed_tokens(ids[1:]), mtp.embed_norm.weight), rms(hidden, mtp.hidden_norm.weight)), -1)
    x = both @ mtp.input_proj.weight.double().T
    positions = torch.arange(n)[None]
    mask = torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out = fourth(x[None], attention_mask=mask, position_ids=positions, position_embeddings=decoder.rotary_emb(x[None], positions))
    return rms((out[0] if isinstance(out, tuple) else out)[0], mtp.norm.weight)


@pytest.mark.parametrize("name", WITH)
@torch.no_grad()
def test_states_are_those_of_the_formula_with_transformers_layer(name):
    model, ids = random_decoder(WITH[name]), sequences()
    hidden = model(*packed(ids))
    tokens, positions, attend = packed(ids)
    ours = model.look_ahead(hidden, tokens.roll(-1), positions, attend)
    theirs, start = theirs_of(model), 0
    for sequence in ids:
        if len(sequence) > 1:
            want = their_states(model, theirs, sequence)
            torch.testing.assert_close(ours[start : start + len(sequence) - 1].double(), want, rtol=2e-4, atol=2e-5)
        start += len(sequence)


def texts(num=5, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 67, size=n) for n in (0, 1, 2, 9, 17)[:num]]
    return prompts, [rng.integers(2, 67, size=n) for n in (7, 2, 1, 12, 5)[:num]]


@torch.no_grad()
def test_the_loss_covers_each_trained_token_that_has_two_before_it():
    model, (prompts, completions) = random_decoder(WITH["deepseek_v3"]).double(), texts()
    (batch,) = pack(prompts, completions, 10**6)
    hidden = model(batch.input_ids, batch.positions, PackedAttention(batch.cu_seqlens))
    filled = torch.cat((hidden, hidden.new_zeros(-len(hidden) % 16, hidden.shape[1])))
    got, want = mtp_logprobs(model, batch, filled), []
    for i in batch.sequences:  # one by one
        tokens = torch.from_numpy(np.concatenate((prompts[i], completions[i])))
        n = len(tokens)
        alone = PackedAttention(torch.tensor([0, n], dtype=torch.int32))
        states = model(tokens, torch.arange(n), alone)
        logps = (model.look_ahead(states, tokens.roll(-1), torch.arange(n), alone) @ model.lm_head_weight.T).log_softmax(-1)
        want += [logps[t - 2, tokens[t]] for t in range(max(len(prompts[i]), 2), n)]
    torch.testing.assert_close(got.double(), torch.stack(want).double(), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    model, (prompts, completions) = random_decoder(WITH["deepseek_v3"]).double(), texts(3)
    (batch,) = pack(prompts, completions, 10**6)

    def loss():
        hidden = model(*fill(batch))
        return -mtp_logprobs(model, batch, hidden).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name in ("mtp.input_proj.weight", "mtp.layer.moe.down_proj", "mtp.embed_norm.weight", "embed.weight", "layers.1.mla.o_proj.weight"):
        parameter = dict(model.named_parameters())[name]
        direction, step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), 1e-6
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.add_(direction, alpha=-2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        slope = float((parameter.grad * direction).sum())
        assert float(above - below) / (2 * step) == pytest.approx(slope, rel=1e-3, abs=1e-5), name


def fill(batch):
    missing = -len(batch.input_ids) % 16
    ids, positions = (torch.cat((x, x.new_zeros(missing))) for x in (batch.input_ids, batch.positions))
    return ids, positions, PackedAttention(torch.cat((batch.cu_seqlens, torch.tensor([len(ids)], dtype=torch.int32))))


def a_step(model, weight, micro_batch_tokens=10**6):
    config = SFTConfig(kind="sft", data=["x"], init="base", mtp_loss=weight, router_bias_rate=0.01)
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-2, grad_clip=0), RANKS)
    batches = pack(*texts(), micro_batch_tokens)
    balance = RouterBalance(model, config, RANKS)
    metrics = cross_entropy_step(model, optimizer, [batches], sum(b.num_targets for b in batches), 1e-2, balance, weight)
    return metrics | balance.finish()


def test_a_step_adds_the_loss_and_balances_the_layers_router():
    model, plain = random_decoder(WITH["deepseek_v3"]), random_decoder(WITH["deepseek_v3"])
    split = random_decoder(WITH["deepseek_v3"])
    plain.train_mtp_(False)
    before = [router.bias.clone() for router in routers(model)]
    assert len(before) == 3 and len(routers(plain)) == 2
    metrics, without, parts = a_step(model, 0.3), a_step(plain, 0.0), a_step(split, 0.3, 16)
    assert metrics["loss"] == pytest.approx(without["loss"], rel=1e-3) and "mtp_loss" not in without  # balance losses of 3 and of 2 layers
    assert 3 < metrics["mtp_loss"] < 20 and metrics["grad_norm"] != without["grad_norm"]
    # The last token of a sequence goes through the layer, too, and its experts are counted: not with the token that is packed behind it.
    assert all(parts[k] == pytest.approx(metrics[k], rel=1e-6) for k in ("loss", "mtp_loss", "grad_norm"))
    assert all(float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()) + 1e-9
               for p, q in zip(split.parameters(), model.parameters(), strict=True) if q.grad is not None)  # fmt: skip
    assert all(not torch.equal(router.bias, old) for router, old in zip(routers(model), before, strict=True))
    untouched = dict(random_decoder(WITH["deepseek_v3"]).named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, untouched[name])}
    assert "mtp.input_proj.weight" in moved and "mtp.layer.moe.router.weight" in moved
    assert not any("mtp" in name and not torch.equal(p, untouched[name]) for name, p in plain.named_parameters())
    before = metrics["mtp_loss"]
    for _ in range(5):
        metrics = a_step(model, 0.3)
    assert metrics["mtp_loss"] < before - 0.3


def test_a_stage_trains_the_layer_only_if_asked_and_refuses_a_model_without(tmp_path):
    context = SimpleNamespace(name="base", ranks=RANKS, recipe=RecipeConfig(), state_dir=tmp_path / "none", states=None,
                              metrics=SimpleNamespace(rewind=lambda *_: None))  # fmt: skip
    for weight in (0.0, 0.3):
        model = random_decoder(WITH["deepseek_v3"])
        loop = TrainingLoop(context, SFTConfig(kind="sft", data=["x"], init="base", mtp_loss=weight), model)
        mine = {id(p) for p in model.mtp.parameters()}
        assert any(id(p) in mine for p in loop.optimizer.parameters) == (weight > 0)
        assert not any(p is router.bias for p in loop.optimizer.parameters for router in routers(model))
    with pytest.raises(UserError, match="mtp_loss is 0.3, but the model has no num_nextn_predict_layers"):
        TrainingLoop(context, SFTConfig(kind="sft", data=["x"], init="base", mtp_loss=0.3), random_decoder(FAMILIES["deepseek_v3"]))


def test_the_sampler_does_not_know_the_layer():
    model, plain = random_decoder(WITH["deepseek_v3"]), random_decoder(FAMILIES["deepseek_v3"])
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("mtp.")})
    request = [Request(np.arange(3, 20), np.arange(4))]
    ((*a,),), ((*b,),) = Generator(model, {1}).generate(request), Generator(plain, {1}).generate(request)
    assert all(np.array_equal(x.token_ids, y.token_ids) and np.array_equal(x.logps, y.logps) for x, y in zip(a, b, strict=True))
    (batch,) = pack(*texts(), 10**6)
    assert torch.equal(completion_logprobs(model, batch).logps, completion_logprobs(plain, batch).logps)
