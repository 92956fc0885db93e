"""Experts in FP8 as a setting: what is quantised and when, equal bytes in sampler and trainer, gradients, and a run of the recipe."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import OptimizerConfig, RecipeConfig, SamplingConfig
from athanor.generator import Generator
from athanor.kernels import strict_mode
from athanor.kernels.fp8_quantize import dequantize, fp8_quantize, fp8_quantize_dual
from athanor.model.fp8 import Fp8Weight
from athanor.model.moe import mixtures, use_fp8_
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.samples import Request
from athanor.stages.training import completion_logprobs

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, random_decoder  # noqa: E402

PRODUCTS = sys.modules["athanor.kernels.fp8_mixture"]  # `athanor.kernels.fp8_mixture` is the function
RANKS = Ranks(threads=1)
EOS = 1
# Widths above, at and below a block of 128, none a multiple of it but one.
WIDE = {name: FAMILIES[name].model_copy(update={"hidden_size": 144, "moe_intermediate_size": 128}) for name in ("qwen3_moe", "deepseek_v3")}


pytestmark = pytest.mark.usefixtures("threads")


def a_model(name: str, mode: str):
    return use_fp8_(random_decoder(WIDE[name]), mode)


def requests(num=4, samples=4, length=None, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [length or int(rng.integers(1, 24)) for _ in range(num)]
    return [Request(rng.integers(2, 67, size=n), rng.integers(0, 2**62, size=samples)) for n in lengths]


def scored(model, asked, groups, micro_batch_tokens=10**6):
    """The trainer's log-probs and the sampler's, of every token."""
    prompts, samples = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g], [c for g in groups for c in g]
    found = []
    for batch in pack(prompts, [c.token_ids for c in samples], micro_batch_tokens):
        logps = completion_logprobs(model, batch).logps
        found.append((logps, np.concatenate([samples[i].logps for i in batch.sequences])))
    return torch.cat([logps for logps, _ in found]), np.concatenate([logps for _, logps in found])


@pytest.mark.parametrize("name, mode", [("qwen3_moe", "dgrad"), ("deepseek_v3", "wgrad")])
def test_sampled_log_probs_equal_the_trainers_bit_for_bit(name, mode):
    model, asked = a_model(name, mode), requests()
    groups = Generator(model, {EOS}, max_rows=11).generate(asked, SamplingConfig(max_tokens=16))
    for micro_batch_tokens in (64, 10**6):
        trained, sampled = scored(model, asked, groups, micro_batch_tokens)
        assert trained.requires_grad and np.array_equal(trained.detach().numpy(), sampled)
    plain = scored(use_fp8_(copy.deepcopy(model), "off"), asked, groups)[0]
    assert not np.array_equal(plain.detach().numpy(), sampled)  # the setting does something
    for moe in mixtures(model):  # scales of another kind on one side only
        for name, copied in moe.fp8.weights.items():
            other = fp8_quantize_dual(getattr(moe, name), block=(128, 128), power_of_two=False)
            for old, new in zip(copied.copy, other, strict=True):
                old.q.copy_(new.q)
                old.scales.copy_(new.scales)
    assert not np.array_equal(scored(model, asked, groups)[0].detach().numpy(), sampled)


def operands_of(run, monkeypatch) -> tuple[set, set]:
    """Weights, as (address, bytes and scales), and rows, as (expert's weight, bytes and scales), of all FP8 products of `run`."""
    weights, rows, matmul = set(), set(), PRODUCTS.fp8_grouped_matmul

    def watched(x, w, offsets, **options):
        q, scales = (t.contiguous().view(torch.uint8).numpy() for t in (w.q, w.scales))
        weights.add((w.q.data_ptr(), q.tobytes(), scales.tobytes()))
        for e, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            for row in range(first, end):
                if x.q[row].view(torch.uint8).any():  # rows of zeros are filler
                    rows.add((w.q.data_ptr(), e, x.q[row].view(torch.uint8).numpy().tobytes(), x.scales[row].contiguous().numpy().tobytes()))
        return matmul(x, w, offsets, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PRODUCTS, "fp8_grouped_matmul", watched)
        run()
    return weights, rows


@pytest.mark.parametrize("name", WIDE)
def test_sampler_and_trainer_multiply_the_same_bytes(name, monkeypatch):
    model, asked = a_model(name, "dgrad"), requests(num=2, samples=2, length=8)
    groups = []
    sampled = operands_of(lambda: groups.extend(Generator(model, {66}).generate(asked, SamplingConfig(max_tokens=9))), monkeypatch)
    assert all(c.finish == "length" for group in groups for c in group)  # 4 x 16 tokens: the trainer has no filler
    with torch.no_grad():
        trained = operands_of(lambda: scored(model, asked, groups), monkeypatch)
    assert trained[0] == sampled[0] and len(trained[0]) == 2 * len(mixtures(model))
    assert trained[1] <= sampled[1] and len(trained[1]) > 100


def calls_to_quantise(monkeypatch) -> list[int]:
    """How many stacks each call that makes copies anew is for, as they come."""
    module, calls = sys.modules["athanor.model.fp8"], []
    original = module.fp8_quantize_many

    def watched(weights, *rest, **options):
        calls.append(len(weights))
        return original(weights, *rest, **options)

    monkeypatch.setattr(module, "fp8_quantize_many", watched)
    return calls


def test_weights_are_quantised_once_per_optimizer_step_and_in_place(monkeypatch):
    model, asked, calls = a_model("deepseek_v3", "dgrad"), requests(num=3), calls_to_quantise(monkeypatch)
    generator, optimizer, places = Generator(model, {EOS}), Optimizer(model, OptimizerConfig(lr=1e-2), RANKS), None
    for step in range(3):
        groups = generator.generate(asked, SamplingConfig(max_tokens=12))
        trained, sampled = scored(model, asked, groups, 64)
        assert np.array_equal(trained.detach().numpy(), sampled)
        assert calls == [4] * (step + 1)  # two layers of two stacks in one call, for some 12 decode steps, micro-batches and prefills
        (-trained.sum() / 100).backward()
        assert calls == [4] * (step + 1)
        masters = [moe.gate_up_proj.detach().clone() for moe in mixtures(model)]
        optimizer.step(1e-2)
        optimizer.zero_grad()
        assert all(not torch.equal(moe.gate_up_proj, old) for moe, old in zip(mixtures(model), masters, strict=True))
        now = [w.copy[i].q.data_ptr() for moe in mixtures(model) for w in moe.fp8.weights.values() for i in (0, 1)]
        assert places in (None, now)
        places = now
    assert [p for p in model.state_dict() if "fp8" in p] == []


def test_a_trainer_alone_makes_all_copies_anew_in_one_call(monkeypatch):
    """In its first forward it meets one stack after the other; from then on the first that is found old has all that are old made anew."""
    model, calls = a_model("deepseek_v3", "dgrad"), calls_to_quantise(monkeypatch)
    batch = pack([np.arange(2, 40)], [np.arange(10, 66)], 10**6)[0]
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-2), RANKS)
    for _ in range(3):
        (-completion_logprobs(model, batch).logps.sum() / 100).backward()
        optimizer.step(1e-2)
    assert calls == [1, 1, 1, 1, 4, 4]
    with torch.no_grad():
        completion_logprobs(model, batch)
        twin = copy.deepcopy(model)
        mixtures(model)[1].down_proj.mul_(2)
        changed = completion_logprobs(model, batch).logps
        assert calls == [1, 1, 1, 1, 4, 4, 4, 1]  # one stack was written to
        assert not torch.equal(completion_logprobs(twin, batch).logps, changed)
        mixtures(twin)[1].down_proj.mul_(2)
        assert torch.equal(completion_logprobs(twin, batch).logps, changed) and calls[8:] == [4, 1]  # a deepcopy has copies of its own
    for moe in mixtures(model):
        for name, made in moe.fp8.weights.items():
            want = fp8_quantize_dual(getattr(moe, name), block=(128, 128))
            assert all(torch.equal(a.q.float(), b.q.float()) and torch.equal(a.scales, b.scales) for a, b in zip(made.copy, want, strict=True))


def test_a_step_between_two_windows_reaches_a_running_stream():
    model, (asked,) = a_model("qwen3_moe", "dgrad"), requests(num=1, samples=3)
    with Generator(model, {66}).stream([asked], SamplingConfig(max_tokens=12)) as stream:
        stream.step(), stream.step()
        before = [w.num_made for moe in mixtures(model) for w in moe.fp8.weights.values()]
        with torch.no_grad():
            for moe in mixtures(model):
                moe.down_proj.mul_(2)
        done = list(stream)
    after = [w.num_made for moe in mixtures(model) for w in moe.fp8.weights.values()]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 1] * len(mixtures(model))  # down_proj alone was written to
    assert all(set(finished.completion.versions.tolist()) == {0, 1} for finished in done)


def test_a_copy_follows_what_happens_to_its_stack():
    stack, copied = torch.nn.Parameter(torch.randn(3, 130, 40, generator=torch.Generator().manual_seed(0))), Fp8Weight()
    with torch.inference_mode():
        rows, columns = copied.of(stack)
    assert not rows.q.is_inference() and copied.of(stack)[0].q is rows.q and copied.num_made == 1
    want = fp8_quantize(stack.detach(), block=(128, 128))
    assert torch.equal(rows.q.float(), want.q.float()) and torch.equal(rows.scales, want.scales) and torch.equal(columns.q.float(), want.q.float())
    with torch.no_grad():
        stack.mul_(3)
    address = rows.q.data_ptr()
    assert torch.equal(copied.of(stack)[0].scales, fp8_quantize(stack.detach(), block=(128, 128)).scales) and copied.copy[0].q.data_ptr() == address
    stack.data = stack.data + 1  # other memory, the same counter
    assert torch.equal(copied.of(stack)[0].q.float(), fp8_quantize(stack.detach(), block=(128, 128)).q.float()) and copied.num_made == 3
    stack.data = stack.data.to(torch.bfloat16)
    assert torch.equal(copied.of(stack)[0].scales, fp8_quantize(stack.detach(), block=(128, 128)).scales) and copied.num_made == 4
    twin = copy.deepcopy((stack, copied))
    with torch.no_grad():
        stack.neg_()
    assert torch.equal(twin[1].of(twin[0])[0].q.float(), -copied.of(stack)[0].q.float())


@pytest.mark.parametrize("mode", ["dgrad", "wgrad"])
def test_gradients_are_those_of_the_dequantised_operands_in_fp64(mode):
    """One layer, written out: every operand that the mode quantises is quantised here, and everything else is fp64."""
    moe = mixtures(a_model("qwen3_moe", mode))[0]
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(40, 144, generator=generator) for _ in range(2))
    x.requires_grad_()
    ids, weights = moe.router(x)
    moe(x).backward(dy)

    def through(t, block=(1, 128)):
        return dequantize(fp8_quantize(t.detach(), block=block), block, torch.float64)

    wgrad = {"dgrad": lambda t: t.detach().double(), "wgrad": lambda t: through(t.detach(), (128, 1))}[mode]
    gate_up, down = (through(w, (128, 128)) for w in (moe.gate_up_proj, moe.down_proj))
    for e in range(moe.num_experts):
        chosen = (ids == e).any(1)
        rows, factor = x.detach()[chosen], (weights.detach() * (ids == e)).sum(1)[chosen]
        h = (through(rows) @ gate_up[e].T).float()
        gate, up = h.chunk(2, 1)
        a = torch.nn.functional.silu(gate) * up
        d_out = (dy[chosen] * factor[:, None]).float()
        d_a = through(d_out) @ down[e]
        sig = gate.double().sigmoid()
        d_h = torch.cat((d_a * up * sig * (1 + gate * (1 - sig)), d_a * gate * sig), 1).float()
        for grad, d, operand in ((moe.down_proj.grad[e], d_out, a), (moe.gate_up_proj.grad[e], d_h, rows)):
            want = wgrad(d).T @ wgrad(operand)
            # a rounding of fp32 may move a number to the next of e4m3's, here and there
            assert float((grad - want).norm()) <= 2e-3 * float(want.norm()), e


def test_bf16_and_fp8_weight_gradients_differ_and_both_are_near():
    grads = {}
    for mode in ("off", "dgrad", "wgrad"):
        model, batch = a_model("deepseek_v3", mode), pack([np.arange(2, 40)], [np.arange(10, 66)], 10**6)[0]
        (-completion_logprobs(model, batch).logps.sum()).backward()
        grads[mode] = mixtures(model)[-1].down_proj.grad
    relative = {mode: float((grads[mode] - grads["off"]).norm() / grads["off"].norm()) for mode in ("dgrad", "wgrad")}
    assert not torch.equal(grads["dgrad"], grads["wgrad"]) and all(0 < r < 0.5 for r in relative.values())


def test_the_setting_is_refused_where_nothing_would_be_in_fp8():
    sparse = {"main": WIDE["deepseek_v3"].model_dump()}
    assert RecipeConfig(fp8="wgrad", models=sparse).fp8 == "wgrad" and RecipeConfig().fp8 == "off"
    with pytest.raises(ValueError, match="fp8 is dgrad, wanted off: no model of the run has experts"):
        RecipeConfig(fp8="dgrad", models={"main": {}})
    with pytest.raises(ValueError, match="mode is 'on'"):
        use_fp8_(random_decoder(WIDE["qwen3_moe"]), "on")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["dgrad", "wgrad"])
def test_captured_steps_read_the_new_copies_and_strict_log_probs_are_the_trainers_on_cuda(mode):
    """The weights change between two rollouts: a captured step reads what was quantised in place."""
    config = FAMILIES["qwen3_moe"].model_copy(update={"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128})
    model, asked = use_fp8_(random_decoder(config).to("cuda", torch.bfloat16), mode), requests(num=8)
    with strict_mode():
        generator, optimizer = Generator(model, {EOS}, max_rows=32), Optimizer(model, OptimizerConfig(lr=1e-2), RANKS)
        for _ in range(3):
            groups = generator.generate(asked, SamplingConfig(max_tokens=24))
            prompts, samples = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g], [c for g in groups for c in g]
            for batch in pack(prompts, [c.token_ids for c in samples], 300, "cuda"):
                logps = completion_logprobs(model, batch).logps
                assert np.array_equal(logps.detach().cpu().numpy(), np.concatenate([samples[i].logps for i in batch.sequences]))
                (-logps.sum() / 1000).backward()
            optimizer.step(1e-2)
            optimizer.zero_grad()
        assert all(w.num_made == 3 for moe in mixtures(model) for w in moe.fp8.weights.values())
