"""A patched transformers model beside its twin that is not: logits, loss, gradients, generation, and what undoing leaves.

Tolerance as in test_transformer.py: the patched model's error against fp64 is at most twice the plain one's plus 2 ulp, in the Euclidean norm.
"""

import copy
import subprocess
import sys

import pytest
import torch

from athanor.adapters import transformers as adapter
from athanor.adapters.shared_decoder import shared_decoder, shares_weights
from athanor.adapters.transformers import SUPPORTED, patch, unpatch
from athanor.errors import UserError
from athanor.model.transformer import PackedAttention

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")

SHAPE = dict(
    vocab_size=67, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "llama": dict(tie_word_embeddings=True, mlp_bias=True),
    "llama3": dict(architecture="llama", tie_word_embeddings=False, rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "qwen2": dict(tie_word_embeddings=False, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": dict(tie_word_embeddings=True, head_dim=20),
}
B, L = 3, 11  # odd, so that no axis is a tile


def plain_model(name: str, dtype=torch.float32, **changes):
    """Random weights everywhere, norms and biases too, so that none can be left out unseen; the same for every dtype."""
    own = {**FAMILIES[name], **changes}
    config = transformers.AutoConfig.for_model(own.pop("architecture", name), **SHAPE, **own)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    model.model.rotary_emb.inv_freq = frequencies  # a cast rounds them, loading in bf16 does not
    return model.eval()


def in_fp64(name: str, dtype):
    """The truth: the weights of that dtype, and norms that compute in fp64, which transformers' own do in fp32 whatever comes in."""
    model = plain_model(name, dtype)
    frequencies = model.model.rotary_emb.inv_freq
    model.double().model.rotary_emb.inv_freq = frequencies
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
    return model


def batch() -> dict:
    """Left-padded rows; labels without the padding, one row's prompt and one whole row."""
    ids = torch.randint(SHAPE["vocab_size"], (B, L), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :5] = labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_close(ours, theirs, truth, what):
    error, allowed = (ours.double() - truth).norm(), 2 * (theirs.double() - truth).norm() + 2 * torch.finfo(ours.dtype).eps * truth.norm()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def forwards_of(model) -> dict:
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_equal_those_of_the_plain_model(name, dtype):
    inputs = batch()
    shown = inputs["attention_mask"].bool()  # behind padding nothing is defined
    logits = [model(**inputs).logits[shown] for model in (patch(plain_model(name, dtype)), plain_model(name, dtype), in_fp64(name, dtype))]
    assert_close(*logits, name)
    assert not torch.equal(logits[0], logits[1])  # else nothing was replaced


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in FAMILIES), ("llama3", torch.bfloat16), ("qwen3", torch.bfloat16)])
@torch.no_grad()
def test_losses_equal_those_of_the_plain_model(name, dtype):
    """One token at a time, because the error of a single mean is a matter of luck."""
    ids, losses = batch()["input_ids"], []
    for model in (patch(plain_model(name, dtype)).train(), plain_model(name, dtype).train(), in_fp64(name, dtype).train()):
        one = ((row, row.masked_fill(torch.arange(L) != t, -100)) for row in ids.split(1) for t in range(1, L))
        losses.append(torch.stack([model(row, labels=labels, num_items_in_batch=2).loss for row, labels in one]))
    assert_close(*losses, name)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items, checkpointing", [(None, False), (29, True)])  # mean of the call, and Trainer's sum over the optimizer step
def test_gradients_equal_those_of_the_plain_model(name, dtype, num_items, checkpointing):
    models = patch(plain_model(name, dtype)).train(), plain_model(name, dtype).train(), in_fp64(name, dtype).train()
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    if checkpointing:
        models[0].gradient_checkpointing_enable()
    outputs = [model(**batch(), **extra) for model in models]
    assert outputs[0].logits is None and outputs[1].logits is not None
    for output in outputs:
        output.loss.backward()
    for (key, ours), theirs, truth in zip(models[0].named_parameters(), models[1].parameters(), models[2].parameters(), strict=True):
        if not key.endswith("k_proj.bias"):  # cancels to rounding alone: softmax does not see it, but for the rotation
            assert_close(ours.grad, theirs.grad, truth.grad, key)


@pytest.mark.parametrize("kwargs", [{}, {"ignore_index": 3}, {"return_dict": False}, {"output_hidden_states": True}, {"shifted": True}])
def test_options_of_the_host_mean_the_same(kwargs):
    kwargs, inputs = dict(kwargs), batch()
    if kwargs.pop("shifted", False):
        kwargs["shift_labels"] = inputs["labels"].roll(-1, 1)
    if "ignore_index" in kwargs:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] < 0, 3)
    positional = inputs.pop("input_ids"), inputs.pop("attention_mask"), None, None, None, inputs.pop("labels")
    ours, theirs = (model(*positional, **kwargs) for model in (patch(plain_model("qwen3").train()), plain_model("qwen3").train()))
    torch.testing.assert_close(ours[0], theirs[0])
    if kwargs.get("output_hidden_states"):
        assert len(ours.hidden_states) == len(theirs.hidden_states) == SHAPE["num_hidden_layers"] + 1
        torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)


def test_without_a_label_the_loss_is_nan_like_the_hosts():
    inputs = batch() | {"labels": torch.full((B, L), -100)}
    assert patch(plain_model("llama").train())(**inputs).loss.isnan() and plain_model("llama").train()(**inputs).loss.isnan()


@pytest.mark.parametrize("case", ["eval", "logits_to_keep", "own loss", "LoRA"])
def test_where_the_loss_is_not_ours_the_host_computes_it(case):
    inputs, models = batch(), (patch(plain_model("llama").train()), plain_model("llama").train())
    for model in models:
        if case == "eval":
            model.eval()
        elif case == "own loss":
            model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() + labels.sum() + vocab_size
        elif case == "LoRA":
            model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Linear(SHAPE["vocab_size"], SHAPE["vocab_size"], bias=False))
            torch.nn.init.eye_(model.lm_head[1].weight)
    if case == "logits_to_keep":
        inputs |= {"logits_to_keep": L}
    ours, theirs = (model(**inputs) for model in models)
    assert ours.logits.shape == (B, L, SHAPE["vocab_size"])
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_autocast_computes_in_its_type():
    inputs = batch()
    truth = in_fp64("qwen3", torch.float32).train()(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model(**inputs).loss for model in (patch(plain_model("qwen3").train()), plain_model("qwen3").train()))
    assert 1e-6 < abs(ours - truth) < 2 * abs(theirs - truth) + 0.01 * truth


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_chooses_the_tokens_of_the_plain_model(name):
    inputs = batch()
    del inputs["labels"]
    ours, theirs = (model.generate(**inputs, max_new_tokens=12, do_sample=False) for model in (patch(plain_model(name)), plain_model(name)))
    assert torch.equal(ours, theirs) and ours.shape == (B, L + 12)


@pytest.mark.parametrize("name", FAMILIES)
def test_undoing_gives_the_bits_back(name):
    model, inputs = plain_model(name).train(), batch()
    before, empty, state = model(**inputs), forwards_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert patch(patch(model)) is model  # twice is once
    assert model(**inputs).logits is None
    assert unpatch(model) is model and forwards_of(model) == empty and not any(empty.values())
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert model.state_dict().keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_lines_of_the_docstring_run():
    lines = [line[4:] for line in adapter.__doc__.splitlines() if line.startswith("    ") and not line.startswith("     ")]
    scope = {"model": plain_model("llama").train()}
    exec("\n".join(lines), scope)
    assert len(lines) == 2 and scope["model"](**batch()).logits is None
    scope["unpatch"](scope["model"])


def test_other_instances_stay_as_they_are_and_a_copy_is_patched():
    model, other = patch(plain_model("llama").train()), plain_model("llama").train()
    assert other(**batch()).logits is not None
    twin = copy.deepcopy(model)
    unpatch(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the copy must read its own weights
    assert twin(**batch()).logits is None
    torch.testing.assert_close(twin(**batch()).loss, other(**batch()).loss)


def test_other_architectures_are_refused_with_the_list():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=7)
    subclass = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {})
    for model in (transformers.GPT2LMHeadModel(config), subclass(plain_model("llama").config), torch.nn.Linear(1, 1)):
        with pytest.raises(UserError, match=f"model is .*{type(model).__name__}; wanted one of transformers' {', '.join(SUPPORTED)}"):
            patch(model)
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        patch(plain_model("llama", hidden_act="gelu"))


def test_a_forward_that_somebody_else_replaced_is_left_alone():
    model = plain_model("qwen2")
    mlp = model.model.layers[1].mlp
    mlp.forward = theirs = lambda x: x
    with pytest.raises(UserError, match="forward of model.layers.1.mlp is replaced already"):
        patch(model)
    assert {name for name, forward in forwards_of(model).items() if forward} == {"model.layers.1.mlp"} and mlp.forward is theirs
    del mlp.forward
    patch(model).forward = theirs
    with pytest.raises(UserError, match="forward of Qwen2ForCausalLM was replaced by .*after patch"):
        unpatch(model)
    del model.forward  # all of it undone by hand is fine, too
    with pytest.raises(UserError, match="replaced by None"):
        unpatch(model)


DECODABLE = [("llama", {"mlp_bias": False}), ("llama3", {}), ("qwen2", {"use_sliding_window": False, "sliding_window": None}), ("qwen3", {})]


@pytest.mark.parametrize("name, changes", DECODABLE)
@torch.no_grad()
def test_a_shared_decoder_is_the_model_before_and_after_a_step(name, changes):
    model = plain_model(name, **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    decoder = shared_decoder(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # an optimizer may hold them
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ids, cu_seqlens = torch.randint(SHAPE["vocab_size"], (L,), generator=torch.Generator().manual_seed(2)), torch.tensor([0, L], dtype=torch.int32)
    seen = []
    for _ in range(2):
        ours = decoder(ids, torch.arange(L), PackedAttention(cu_seqlens)) @ decoder.lm_head_weight.T
        torch.testing.assert_close(ours, model(ids[None]).logits[0], rtol=1e-4, atol=1e-4)
        seen.append(ours)
        for parameter in parameters:  # as an optimizer does, in place
            parameter.mul_(1.1).add_(0.01)
    assert (seen[0] - seen[1]).abs().max() > 0.1
    model.load_state_dict(before)
    assert torch.equal(decoder(ids, torch.arange(L), PackedAttention(cu_seqlens)) @ decoder.lm_head_weight.T, seen[0])
    assert shares_weights(decoder, model)
    for parameter in model.parameters():  # how the docstring undoes it
        parameter.data = parameter.data.clone()
    assert not shares_weights(decoder, model)


@pytest.mark.parametrize("key", ["mlp_bias", "attention_bias"])
def test_a_config_that_the_decoder_does_not_have_is_named(key):
    with pytest.raises(UserError, match=f"{key} is True"):
        shared_decoder(plain_model("llama", **{"mlp_bias": False, key: True}))


def test_importing_the_adapters_imports_no_host():
    code = "import sys, athanor, athanor.adapters; print([name for name in ('torch', 'transformers', 'trl', 'verl') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
