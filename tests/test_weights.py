"""HuggingFace folders in and out: same tensors, same names, same logits in transformers, and one clear error for whatever does not fit."""

import json
import os

import pytest
import safetensors.torch
import torch

from athanor.config import ModelConfig
from athanor.errors import UserError
from athanor.model.transformer import Decoder, PackedAttention
from athanor.weights import hf_tensors, load_model, model_config_from_hf, model_config_to_hf, save_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SHAPE = dict(
    vocab_size=67, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
    max_position_embeddings=256,
)  # fmt: skip
CONFIGS = {
    "llama": ModelConfig(architecture="llama", tie_word_embeddings=False, rope_theta=5e5, rope_scaling=LLAMA3, rms_norm_eps=1e-5, **SHAPE),
    "llama_tied": ModelConfig(architecture="llama", **SHAPE),
    "qwen2": ModelConfig(architecture="qwen2", tie_word_embeddings=False, rope_theta=1e6, **SHAPE),
    "qwen3": ModelConfig(architecture="qwen3", **SHAPE),
    "qwen3_wide_heads": ModelConfig(architecture="qwen3", head_dim=20, tie_word_embeddings=False, **SHAPE),
}


def random_decoder(config: ModelConfig) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def assert_same(a: Decoder, b: Decoder) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.config == b.config and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(a.inv_freq, b.inv_freq)


def logits(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    hidden = model(ids, torch.arange(len(ids)), PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32)))
    return hidden @ model.lm_head_weight.T


@pytest.fixture
def folder(tmp_path):
    save_model(random_decoder(CONFIGS["qwen3_wide_heads"]), tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, **changes):
    """Replace tensors, or drop those given as None."""
    tensors = {**safetensors.torch.load_file(path), **changes}
    safetensors.torch.save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000, 1])  # one file, several, one tensor per file
def test_a_saved_model_loads_unchanged(name, max_shard_bytes, tmp_path):
    model = random_decoder(CONFIGS[name])
    save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    assert_same(model, load_model(tmp_path / "m"))
    shards = sorted(tmp_path.glob("m/*.safetensors"))
    if max_shard_bytes == 1:
        assert len(shards) == len(hf_tensors(model.config))
    if len(shards) > 1:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        stored = {name: shard.name for shard in shards for name in safetensors.torch.load_file(shard)}
        assert index["weight_map"] == stored and index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        for shard in shards:
            tensors = safetensors.torch.load_file(shard)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_shard_bytes


def test_fused_matrices_are_split_under_huggingface_names(tmp_path):
    model = random_decoder(CONFIGS["qwen2"])
    save_model(model, tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    ours = dict(model.named_parameters())
    qkv = [tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert [t.shape[0] for t in qkv] == [48, 24, 24] and torch.equal(torch.cat(qkv), ours["layers.1.qkv_proj.weight"])
    assert torch.equal(torch.cat([tensors[f"model.layers.1.self_attn.{x}_proj.bias"] for x in "qkv"]), ours["layers.1.qkv_proj.bias"])
    gate_up = [tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(torch.cat(gate_up), ours["layers.0.gate_up_proj.weight"])


def test_every_parameter_is_covered_exactly_once():
    for config in CONFIGS.values():
        covered = {name: torch.zeros(p.shape[0]) for name, p in Decoder(config).named_parameters()}
        for source in hf_tensors(config).values():
            covered[source.parameter][source.start : source.start + source.shape[0]] += 1
        assert all(bool((rows == 1).all()) for rows in covered.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_cast_on_load_and_kept_on_save(dtype, folder, tmp_path):
    full = load_model(folder)
    model = load_model(folder, dtype=dtype)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(model.parameters(), full.parameters(), strict=True))
    assert model.inv_freq.dtype == torch.float32
    save_model(model, tmp_path / "cast")
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert_same(model, load_model(tmp_path / "cast", dtype=dtype))


def test_a_loaded_model_can_be_trained(folder):
    model = load_model(folder)
    logits(model, torch.arange(5)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_saving_over_a_folder_replaces_its_weights_and_keeps_other_files(folder):
    (folder / "tokenizer.json").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("too")
    before = load_model(folder)
    save_model(before, folder, max_shard_bytes=20_000)
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").read_text() == "mine" and (folder / "notes" / "a.txt").read_text() == "too"
    assert_same(before, load_model(folder))
    save_model(before, folder)
    assert not list(folder.glob("model-*")) and not (folder / "model.safetensors.index.json").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_tied_head_may_be_stored_when_it_is_the_embedding(tmp_path):
    model = random_decoder(CONFIGS["qwen3"])
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    edit_tensors(file, **{"lm_head.weight": model.embed.weight.detach().clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    assert_same(model, load_model(tmp_path / "m"))
    edit_tensors(file, **{"lm_head.weight": model.embed.weight.detach() + 1})
    with pytest.raises(UserError, match=r"lm_head.weight in .* differs from model.embed_tokens.weight, wanted the same \(tie"):
        load_model(tmp_path / "m")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("damage, message", [
    (lambda f: edit_tensors(f / "model.safetensors", **{Q: None}), f"missing tensors {Q}$"),
    (lambda f: edit_tensors(f / "model.safetensors", extra=torch.ones(2)), "unexpected tensors extra$"),
    (lambda f: edit_tensors(f / "model.safetensors", **{Q: None, "z": torch.ones(2)}), f"missing tensors {Q}; unexpected tensors z"),
    (lambda f: edit_tensors(f / "model.safetensors", **{Q: torch.ones(80, 47)}), rf"{Q} in .* is \(80, 47\), config.json wants \(80, 48\)"),
    (lambda f: edit_tensors(f / "model.safetensors", **{Q: torch.ones(80, 48, dtype=torch.int8)}), f"{Q} in .* has type I8"),
    (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "missing tensors model.layers.2.* and 7 more"),
    (lambda f: edit_json(f / "config.json", vocab_size=68), r"embed_tokens.weight in .* is \(67, 48\), config.json wants \(68, 48\)"),
    (lambda f: os.truncate(f / "model.safetensors", 1000), "not a readable safetensors file"),
    (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin; save it as safetensors"),
    (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
])  # fmt: skip
def test_what_does_not_fit_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(folder)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "model-00002-of-00007.safetensors").unlink(), "model-00002-of-00007.safetensors, named by .* does not exist"),
    (lambda f: edit_tensors(f / "model-00001-of-00007.safetensors", **{"model.embed_tokens.weight": None}), "has no model.embed_tokens.weight"),
    (lambda f: edit_json(f / "model.safetensors.index.json", weight_map=3), "has no weight_map"),
    (lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"}), "does not exist"),
])  # fmt: skip
def test_a_broken_set_of_shards_is_named(folder, damage, message):
    save_model(load_model(folder), folder, max_shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) == 7
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="folder .*/nowhere does not exist"):
        load_model(tmp_path / "nowhere")


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write"):
            save_model(random_decoder(CONFIGS["qwen3"]), path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_a_round_trip_in_both_spellings_of_rope(name):
    hf = json.loads(json.dumps(model_config_to_hf(CONFIGS[name])))
    assert model_config_from_hf(hf) == CONFIGS[name]
    assert model_config_from_hf({k: v for k, v in hf.items() if k != "rope_parameters"}) == CONFIGS[name]
    assert model_config_from_hf({k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}) == CONFIGS[name]


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2', wanted one of llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "model_type is None"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is .*Qwen3ForSequenceClassification"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type llama3, linear, yarn or none"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type llama3, linear, yarn or none"),
    ({"rope_scaling": {"type": "linear"}}, "linear has no factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3 has no low_freq_factor, high_freq_factor"),
    ({"model_type": "llama", "architectures": None, "use_sliding_window": True}, "use_sliding_window is true, model_type llama has none"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ({"hidden_size": "wide"}, "hidden_size: Input should be a valid integer"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', wanted an object"),
])  # fmt: skip
def test_a_feature_that_the_decoder_lacks_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_config_from_hf({**model_config_to_hf(CONFIGS["qwen3"]), **changes})


# The fields that matter of published config.json files, as they were published.
PUBLISHED = {
    "Llama-3.2-1B": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256}""",
    "Qwen2.5-1.5B": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 131072,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen3-0.6B": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
}


@pytest.mark.parametrize("name, billions", [("Llama-3.2-1B", 1.2358), ("Qwen2.5-1.5B", 1.5437), ("Qwen3-0.6B", 0.5960)])
def test_published_configs_give_models_of_the_published_size(name, billions):
    config = model_config_from_hf(json.loads(PUBLISHED[name]))
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-4)
    assert model_config_from_hf(model_config_to_hf(config)) == config


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_and_we_read_each_others_folders(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    model = random_decoder(CONFIGS[name])
    save_model(model, tmp_path / "ours", max_shard_bytes=40_000, token_ids={"eos_token_id": 2})
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.eos_token_id == 2 and theirs.config.bos_token_id is None
    state = theirs.state_dict()
    parameters = dict(model.named_parameters())
    for hf_name, s in hf_tensors(model.config).items():
        assert torch.equal(state[hf_name], parameters[s.parameter][s.start : s.start + s.shape[0]]), hf_name
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    back = load_model(tmp_path / "theirs")
    assert_same(model, back)

    ids = torch.randint(67, (45,), generator=torch.Generator().manual_seed(1))
    truth = logits(load_model(tmp_path / "theirs", dtype=torch.float64), ids)
    reference = theirs(ids[None]).logits[0]
    allowed = 2 * float((reference.double() - truth).abs().max()) + 2 * torch.finfo(torch.float32).eps * float(truth.abs().max())
    assert float((logits(back, ids).double() - truth).abs().max()) <= allowed


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_of_a_sparse_config_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    given = dict(vocab_size=67, hidden_size=4096, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32)
    theirs = transformers.AutoConfig.for_model(family, **given)
    ours = model_config_from_hf({"model_type": family, **given})
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "initializer_range"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.width_per_head == getattr(theirs, "head_dim", 128)
