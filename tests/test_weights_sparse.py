"""HuggingFace folders of mixtures of experts: per-expert tensors, transformers both ways, block-scaled FP8, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from athanor.errors import UserError
from athanor.hf_config import model_config_from_hf, model_config_to_hf
from athanor.hf_tensors import hf_tensors
from athanor.kernels import fp8_quantize
from athanor.model.transformer import Decoder
from athanor.weights import load_model, save_model

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, in_stack, our_logits, random_decoder, sequences, their_logits  # noqa: E402


def assert_same(a: Decoder, b: Decoder) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.config == b.config and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000])
def test_a_saved_model_loads_unchanged(name, max_shard_bytes, tmp_path):
    model = random_decoder(FAMILIES[name])
    save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    assert_same(model, load_model(tmp_path / "m"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_covered_exactly_once(name):
    model = Decoder(FAMILIES[name])
    covered = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    for source in hf_tensors(model.config).values():
        source.of(covered).add_(1)
    assert all(bool((p == 1).all()) for p in covered.values())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_transformers_and_we_read_each_others_folders(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    model = random_decoder(FAMILIES[name])
    save_model(model, tmp_path / "ours", max_shard_bytes=40_000, token_ids={"eos_token_id": 2})
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, parameters = theirs.state_dict(), dict(model.named_parameters())
    for hf_name, source in hf_tensors(model.config).items():
        assert torch.equal(in_stack(state, hf_name), source.of(parameters)), hf_name
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert_same(model, load_model(tmp_path / "theirs"))
    torch.testing.assert_close(our_logits(model, sequences()), their_logits(theirs, sequences()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_types_are_cast_on_load_but_selection_biases_stay_fp32(name, tmp_path):
    model = random_decoder(FAMILIES[name])
    save_model(model, tmp_path / "m")
    cast = load_model(tmp_path / "m", dtype=torch.bfloat16)
    for (n, p), q in zip(cast.named_parameters(), model.parameters(), strict=True):
        wanted = torch.float32 if n.endswith("router.bias") else torch.bfloat16
        assert p.dtype == wanted and torch.equal(p, q.to(wanted)), n
    save_model(cast, tmp_path / "cast")
    assert_same(cast, load_model(tmp_path / "cast", dtype=torch.bfloat16))
    assert model.config.latent == any(t.dtype == torch.float32 for t in safetensors.torch.load_file(tmp_path / "cast" / "model.safetensors").values())


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def in_fp8(folder: Path, block=(128, 128)) -> dict[str, torch.Tensor]:
    """Rewrite a folder as DeepSeek-V3 publishes it; returns the weights that it then means.  Embedding, head, norms and gates stay as they are."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    means = {}
    for name, x in list(tensors.items()):
        if not name.endswith("_proj.weight") and not name.endswith("_with_mqa.weight"):
            continue
        q, scales = fp8_quantize(x, block=(128, 128), power_of_two=False)
        tensors[name], tensors[f"{name}_scale_inv"] = q, scales
        rows = [torch.arange(n) // 128 for n in x.shape]
        means[name] = q.float() * scales[rows[0]][:, rows[1]]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                                          "weight_block_size": list(block)})  # fmt: skip
    return means


@pytest.fixture(scope="module")
def wide():
    """Matrices of more than one block of 128, some of them cut."""
    return random_decoder(FAMILIES["deepseek_v3"].model_copy(update={"hidden_size": 200, "moe_intermediate_size": 150, "num_hidden_layers": 2}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_weights_are_read_with_their_scales(dtype, wide, tmp_path):
    save_model(wide, tmp_path / "m")
    means = in_fp8(tmp_path / "m")
    assert len(means) > 20
    loaded = load_model(tmp_path / "m", dtype=dtype)
    ours, before = dict(loaded.named_parameters()), dict(wide.named_parameters())
    for name, source in hf_tensors(wide.config).items():
        got = source.of(ours)
        assert torch.equal(got, means.get(name, source.of(before)).to(got.dtype)), name
        if name in means:
            plain = source.of(before).detach()
            assert 0 < float((got.detach().float() - plain).norm() / plain.norm()) < 0.04
    save_model(loaded, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same(loaded, load_model(tmp_path / "plain", dtype=dtype))


GATE = "model.layers.0.mlp.gate_proj.weight"


def edit_tensors(path, **changes):
    tensors = {**safetensors.torch.load_file(path), **changes}
    safetensors.torch.save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize("damage, message", [
    (lambda f: edit_tensors(f / "model.safetensors", **{f"{GATE}_scale_inv": None}), f"{GATE} in .* is FP8, which needs {GATE}_scale_inv"),
    (lambda f: edit_tensors(f / "model.safetensors", **{f"{GATE}_scale_inv": torch.ones(2, 2)}), r"\(2, 2\), \(80, 200\) in blocks .* \(1, 2\)"),
    (lambda f: edit_tensors(f / "model.safetensors", **{GATE: torch.ones(80, 200)}), "is a scale, but .* is no FP8"),
    (lambda f: edit_json(f / "config.json", quantization_config=None), "unexpected tensors .*_scale_inv"),
    (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "fp8"}), "quantization_config is"),
    (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "awq", "weight_block_size": [1, 1]}), "quantization_config is"),
])  # fmt: skip
def test_fp8_that_does_not_fit_is_named(damage, message, wide, tmp_path):
    save_model(wide, tmp_path / "m")
    in_fp8(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_yarn"])  # the second is tied
def test_the_layer_for_multi_token_prediction_is_saved_and_loaded_as_deepseeks_files_have_it(name, tmp_path):
    model = random_decoder(FAMILIES[name].model_copy(update={"num_nextn_predict_layers": 1}))
    save_model(model, tmp_path / "m")
    assert_same(model, load_model(tmp_path / "m"))
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    parts = {n.removeprefix("model.layers.3.").split(".")[0] for n in tensors if n.startswith("model.layers.3.")}
    assert parts == {"embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], model.embed.weight)
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], model.lm_head_weight)
    edit_tensors(tmp_path / "m" / "model.safetensors", **{"model.layers.3.shared_head.head.weight": torch.ones(67, 48)})
    with pytest.raises(UserError, match="model.layers.3.shared_head.head.weight in .* differs from (lm_head|model.embed_tokens).weight"):
        load_model(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", num_nextn_predict_layers=2)
    with pytest.raises(UserError, match="num_nextn_predict_layers: .* less than or equal to 1"):
        load_model(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="unexpected tensors model.layers.3"):
        load_model(tmp_path / "m")


def test_a_config_may_name_a_layer_for_multi_token_prediction_that_the_files_lack(tmp_path):
    model = random_decoder(FAMILIES["deepseek_v3"])
    save_model(model, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", num_nextn_predict_layers=1)
    assert_same(model, load_model(tmp_path / "m"))


@pytest.mark.parametrize("name", FAMILIES)
def test_config_survives_a_round_trip_in_both_spellings_of_rope(name):
    hf = json.loads(json.dumps(model_config_to_hf(FAMILIES[name])))
    assert model_config_from_hf(hf) == FAMILIES[name]
    assert model_config_from_hf({k: v for k, v in hf.items() if k != "rope_parameters"}) == FAMILIES[name]
    assert model_config_from_hf({k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}) == FAMILIES[name]


@pytest.mark.parametrize("changes, message", [
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2, wanted as many as query heads"),
    ({"rope_scaling": {"type": "yarn"}}, "yarn has no factor"),
    ({"rope_scaling": {"type": "linear", "factor": 40}}, "wanted rope_type yarn or none"),
    ({"n_routed_experts": None}, "num_experts is 0"),
])  # fmt: skip
def test_a_feature_that_the_decoder_lacks_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_config_from_hf({**model_config_to_hf(FAMILIES["deepseek_v3"]), **changes})


@pytest.mark.parametrize("name", ("deepseek_v3", "qwen3_moe"))
@pytest.mark.parametrize("longest", (None, 8192))
def test_yarn_counts_from_the_longest_position_where_the_original_one_is_absent(name, longest):
    """As transformers fills it in, with the family's default where that is absent, too."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    changes = {"rope_scaling": {"rope_type": "yarn", "factor": 40.0}} | ({} if longest is None else {"max_position_embeddings": longest})
    hf = {k: v for k, v in model_config_to_hf(FAMILIES[name]).items() if k not in ("max_position_embeddings", "rope_parameters")} | changes
    ours, theirs = model_config_from_hf(hf), transformers.AutoConfig.for_model(name, **json.loads(json.dumps(changes)))
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rope_scaling["original_max_position_embeddings"] == theirs.rope_parameters["original_max_position_embeddings"]


# The fields that matter of published config.json files, as they were published.
PUBLISHED = {
    "DeepSeek-V3": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic",
        "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32,
        "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 4,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}""",
    "Qwen3-30B-A3B": """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
}


@pytest.mark.parametrize("name, billions", [("DeepSeek-V3", 671.026), ("Qwen3-30B-A3B", 30.532)])
def test_published_configs_give_models_of_the_published_size(name, billions):
    config = model_config_from_hf(json.loads(PUBLISHED[name]))
    with torch.device("meta"):
        model = Decoder(config)
    mtp = 0 if model.mtp is None else sum(p.numel() for p in model.mtp.parameters()) / 1e9
    assert sum(p.numel() for p in model.parameters()) / 1e9 - mtp == pytest.approx(billions, abs=1e-3)
    # 257 experts of 44.04M, attention 187.1M, input projection 102.8M, router 1.8M
    assert mtp == pytest.approx(11.610 if name == "DeepSeek-V3" else 0, abs=1e-3)
    assert model_config_from_hf(model_config_to_hf(config)) == config


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_defaults_of_a_sparse_config_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    given = dict(vocab_size=67, hidden_size=4096, intermediate_size=64, num_hidden_layers=2, num_attention_heads=128)
    theirs = transformers.AutoConfig.for_model(family, **given)
    assert model_config_from_hf({"model_type": family, **given}) == model_config_from_hf(theirs.to_dict())
