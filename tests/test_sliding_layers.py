"""Layers with a sliding window: what config.json says, the sampler's bits against the trainer's, greedy tokens and loss against transformers."""

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import ModelConfig, SamplingConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.model.transformer import Decoder, PackedAttention
from athanor.samples import Request
from athanor.stages.training import completion_logprobs
from athanor.weights import load_model, model_config_from_hf, model_config_to_hf, save_model

EOS = 1
WINDOW = 6
SHAPE = dict(vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
             initializer_range=0.3)  # fmt: skip
SPARSE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
MIXED = ("full_attention", "sliding_attention", "sliding_attention")
CONFIGS = {
    "qwen2": ModelConfig(architecture="qwen2", sliding_window=WINDOW, layer_types=MIXED, tie_word_embeddings=False, **SHAPE),
    "qwen2_first_layer": ModelConfig(architecture="qwen2", sliding_window=WINDOW, layer_types=MIXED[::-1], **SHAPE),
    "qwen3": ModelConfig(architecture="qwen3", sliding_window=WINDOW, **SHAPE),
    "qwen3_moe": ModelConfig(architecture="qwen3_moe", sliding_window=WINDOW, **SPARSE, **SHAPE),
    "mistral": ModelConfig(architecture="mistral", sliding_window=WINDOW, **SHAPE),
    "mistral_without": ModelConfig(architecture="mistral", tie_word_embeddings=False, **SHAPE),
}


def make_model(name):
    return Decoder(CONFIGS[name]).initialize_(0)


def requests(lengths, samples=3):
    rng = np.random.default_rng(0)
    return [Request(rng.integers(2, 67, size=n), rng.integers(0, 2**62, size=samples)) for n in lengths]


# prompts shorter and longer than the window, one past a chunk of the cache so that the group shares it; in pieces and at once
@pytest.mark.parametrize("max_prefill_tokens", [64, 4096])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_the_packed_training_forward_bit_for_bit(name, max_prefill_tokens):
    model, asked = make_model(name), requests([1, 5, 9, 40, 300])
    groups = Generator(model, {EOS}, max_prefill_tokens=max_prefill_tokens).generate(asked, SamplingConfig(max_tokens=30))
    prompts, samples = [r.prompt_ids for r, group in zip(asked, groups, strict=True) for _ in group], [c for group in groups for c in group]
    for micro_batch_tokens in (500, 10**6):
        for batch in pack(prompts, [c.token_ids for c in samples], micro_batch_tokens):
            with torch.no_grad():
                trained = completion_logprobs(model, batch, 1.0).logps.numpy()
            assert np.array_equal(trained, np.concatenate([samples[i].logps for i in batch.sequences]))


def test_the_window_is_felt():
    full = Decoder(CONFIGS["qwen2"].model_copy(update={"sliding_window": 0, "layer_types": ()})).initialize_(0)
    ids = torch.arange(2, 42)
    a, b = (model(ids, torch.arange(40), PackedAttention(torch.tensor([0, 40], dtype=torch.int32))) for model in (make_model("qwen2"), full))
    assert torch.equal(a[:WINDOW], b[:WINDOW]) and bool((a[WINDOW:] != b[WINDOW:]).any(1).all())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_draws_the_same_greedy_tokens_and_has_the_same_loss(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    model = make_model(name)
    save_model(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="sdpa")
    for request in requests([4, 11], samples=1):
        ((ours,),) = Generator(model, {SHAPE["vocab_size"]}).generate([request], SamplingConfig(temperature=0, max_tokens=24))
        ids = torch.from_numpy(request.prompt_ids)[None]
        drawn = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert drawn.tolist() == ours.token_ids.tolist()
        whole = torch.cat((ids[0], drawn))
        hidden = model(whole, torch.arange(len(whole)), PackedAttention(torch.tensor([0, len(whole)], dtype=torch.int32)))
        loss = torch.nn.functional.cross_entropy((hidden @ model.lm_head_weight.T)[:-1], whole[1:])
        torch.testing.assert_close(loss, theirs(whole[None], labels=whole[None]).loss, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_model(tmp_path / "theirs").config == model.config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back_as_it_was(name):
    assert model_config_from_hf(model_config_to_hf(CONFIGS[name])) == CONFIGS[name]


def test_max_window_layers_says_which_layers_slide_where_layer_types_does_not():
    hf = {key: value for key, value in model_config_to_hf(CONFIGS["qwen2"]).items() if key != "layer_types"}
    assert hf["max_window_layers"] == 1 and model_config_from_hf(hf) == CONFIGS["qwen2"]
    assert model_config_from_hf({**hf, "max_window_layers": 0}).layer_types == ()  # all of them
    assert model_config_from_hf({**hf, "max_window_layers": 3}).sliding_window == 0
    assert model_config_from_hf({**hf, "sliding_window": None}).sliding_window == 0
    assert model_config_from_hf({**hf, "use_sliding_window": False}).sliding_window == 0
    assert "max_window_layers" not in model_config_to_hf(CONFIGS["qwen2_first_layer"])
    mistral = {key: value for key, value in model_config_to_hf(CONFIGS["mistral"]).items() if key != "sliding_window"}
    assert model_config_from_hf(mistral).sliding_window == 4096  # as transformers has it


@pytest.mark.parametrize("name, changes, message", [
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, r"layer_types is \['full_attention', 'chunked_attention"),
    ("qwen3", {"layer_types": list(MIXED), "use_sliding_window": False}, "layer_types has sliding_attention, but use_sliding_window is false"),
    ("qwen3", {"layer_types": list(MIXED), "sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
    ("qwen3", {"layer_types": list(MIXED)[:2]}, "layer_types has 2 entries, wanted one per layer of qwen2 or qwen3"),
    ("qwen3", {"sliding_window": 0}, "sliding_window is 0, wanted a positive number of tokens"),
    ("qwen3", {"sliding_window": "wide"}, "sliding_window is 'wide', wanted a positive number of tokens"),
    ("qwen3", {"layer_types": None, "max_window_layers": None}, "max_window_layers is None, wanted the number of layers"),
    ("qwen3_moe", {"layer_types": list(MIXED)}, "layer_types is .* in model_type qwen3_moe all layers have the sliding window or none"),
    ("mistral", {"layer_types": list(MIXED)}, "layer_types is .* in model_type mistral all layers have the sliding window or none"),
])  # fmt: skip
def test_what_a_config_cannot_mean_is_an_error_that_names_the_key(name, changes, message):
    with pytest.raises(UserError, match="config.json: " + message):
        model_config_from_hf({**model_config_to_hf(CONFIGS[name]), **changes})


@pytest.mark.parametrize("changes, message", [
    ({"architecture": "llama", "sliding_window": 4}, "sliding_window is 4, which the architecture llama does not have"),
    ({"layer_types": MIXED}, "sliding_window is 0 and layer_types has"),
    ({"sliding_window": 4, "layer_types": ("full_attention",) * 3}, "sliding_window is 4 and layer_types has"),
    ({"architecture": "mistral", "sliding_window": 4, "layer_types": MIXED}, "layer_types has 3 entries, wanted one per layer of qwen2 or qwen3"),
])  # fmt: skip
def test_a_recipe_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SHAPE, **changes)
