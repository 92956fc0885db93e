"""HuggingFace's config.json as a ModelConfig and back, refusing what the decoder does not have."""

from pydantic import ValidationError

from athanor.config import ModelConfig
from athanor.errors import UserError
from athanor.model_config import WINDOWED

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
           "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}  # fmt: skip
# Fields that share their name and meaning with ModelConfig, and transformers' value where a config.json leaves one out (None = wanted).
_SHARED = dict(
    vocab_size=None, hidden_size=None, intermediate_size=None, num_hidden_layers=None, num_attention_heads=None,
    rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=False,
)  # fmt: skip
# The same for the fields of one family.  An explicit null is 0, () or 1 by the type.
_SPARSE = {
    "qwen3_moe": dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False, decoder_sparse_step=1,
                      mlp_only_layers=()),
    "deepseek_v3": dict(num_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, norm_topk_prob=True, n_shared_experts=1, n_group=8,
                        topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                        qk_rope_head_dim=64, v_head_dim=128, rope_interleave=True, num_nextn_predict_layers=1),
}  # fmt: skip
# HuggingFace's name where it is another, the one that is written first; transformers 5 writes the second for Qwen3-MoE.
_NAMES = {
    "deepseek_v3": {"num_experts": ("n_routed_experts", "num_local_experts"),
                    "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers")},
    "qwen3_moe": {"num_experts": ("num_experts", "num_local_experts")},
}
# What the decoder does not do, with the only value under which it need not.
_ONLY = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0, partial_rotary_factor=1.0)
_ONLY_OF = {"deepseek_v3": dict(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)}


def model_config_from_hf(config: dict) -> ModelConfig:
    """Read config.json.  RoPE may be in transformers 4's fields (rope_theta, rope_scaling) or transformers 5's (rope_parameters).

    Raises UserError on a family or a feature that the decoder does not have, rather than dropping it.
    """
    family = config.get("model_type")
    if family not in CLASSES:
        raise UserError(f"config.json: model_type is {family!r}, wanted one of {', '.join(CLASSES)}")
    architectures = config.get("architectures") or [CLASSES[family]]
    if architectures != [CLASSES[family]]:
        raise UserError(f"config.json: architectures is {architectures}, wanted ['{CLASSES[family]}']")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_scaling is {rope!r}, wanted an object")
    for name, only in {**_ONLY, **_ONLY_OF.get(family, {})}.items():
        value = rope.get(name, config.get(name, only))
        if value is not None and value != only:
            raise UserError(f"config.json: {name} is {value!r}, the decoder supports {only!r} only")
    fp8_block(config)
    fields = {name: config.get(name, default) for name, default in _SHARED.items()}
    for name, value in fields.items():
        if value is None:
            raise UserError(f"config.json: {name} is missing")
    for name, default in _SPARSE.get(family, {}).items():
        value = next((config[alias] for alias in _NAMES[family].get(name, (name,)) if alias in config), default)
        fields[name] = (1 if name in ("n_group", "topk_group") else type(default)()) if value is None else value
    fields |= _sliding_window(config, family, fields["num_hidden_layers"])
    if family != "deepseek_v3":
        fields |= _heads(config, family, fields)
    elif config.get("num_key_value_heads") not in (None, fields["num_attention_heads"]):
        heads = config["num_key_value_heads"]
        raise UserError(f"config.json: num_key_value_heads is {heads}, wanted as many as query heads, {fields['num_attention_heads']}")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "type", "partial_rotary_factor")}
    scaling.setdefault("rope_type", rope.get("type", "default"))
    longest = config.get("max_position_embeddings", {"llama": 2048, "mistral": 131072, "deepseek_v3": 4096}.get(family, 32768))
    if scaling["rope_type"] in ("llama3", "yarn"):
        scaling.setdefault("original_max_position_embeddings", longest)
    try:
        return ModelConfig(
            architecture=family,
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_scaling=None if scaling["rope_type"] == "default" else scaling,
            max_position_embeddings=longest,
            **fields,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"config.json: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


def _heads(config: dict, family: str, fields: dict) -> dict:
    H = fields["num_attention_heads"]
    # The defaults differ by family: an absent key means the class's value, an explicit null means "derive it".
    kv_heads = config.get("num_key_value_heads", {"llama": None, "mistral": 8, "qwen3_moe": 4}.get(family, 32)) or H
    head_dim = config.get("head_dim", 128 if family == "qwen3" else None) or 0
    return {"num_key_value_heads": kv_heads, "head_dim": 0 if head_dim * H == fields["hidden_size"] else head_dim}


def fp8_block(config: dict) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale in a block-scaled FP8 checkpoint (DeepSeek-V3's format); None where weights are plain.

    Raises UserError on any other quantization.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if not block or quantization.get("quant_method") != "fp8" or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise UserError(f"config.json: quantization_config is {quantization!r}, the decoder reads quant_method fp8 with a weight_block_size only")
    return block[0], block[1]


def model_config_to_hf(config: ModelConfig) -> dict:
    """config.json for transformers 4 and 5 alike (both spellings of RoPE, all defaults written out)."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    if "rope_type" not in scaling:
        scaling = {"rope_type": scaling["type"], **{key: value for key, value in scaling.items() if key != "type"}}
    family = config.architecture
    hf = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        **{name: getattr(config, name) for name in _SHARED},
        "num_key_value_heads": config.num_attention_heads if config.latent else config.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else dict(scaling),  # a copy: transformers adds to it
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        "attention_dropout": 0.0,
        "use_cache": True,
        # Llama's class defaults are 1 and 2, which would be ordinary tokens here.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    for name in _SPARSE.get(family, {}):
        value = getattr(config, name)
        hf[_NAMES[family].get(name, (name,))[0]] = list(value) if isinstance(value, tuple) else value
    if config.latent:
        # 0 would be a matrix of no rows to transformers
        return {**hf, "q_lora_rank": config.q_lora_rank or None, "attention_bias": False, **_ONLY_OF[family]}
    hf["head_dim"] = config.width_per_head
    if family == "mistral":
        return {**hf, "sliding_window": config.sliding_window or None}
    if family != "qwen2":
        hf["attention_bias"] = False
    return {**hf, "mlp_bias": False} if family == "llama" else {**hf, **_windows_to_hf(config)}


def _windows_to_hf(config: ModelConfig) -> dict:
    if not config.sliding_window:
        return {"use_sliding_window": False}
    windows = {"use_sliding_window": True, "sliding_window": config.sliding_window}
    if config.architecture == "qwen3_moe":  # all layers alike
        return windows
    slides = [config.window_of(layer) is not None for layer in range(config.num_hidden_layers)]
    first = slides.index(True)
    windows["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return windows | ({"max_window_layers": first} if all(slides[first:]) else {})  # for readers that do not know layer_types


def _sliding_window(config: dict, family: str, num_layers: int) -> dict:
    """ModelConfig's sliding_window and layer_types, if a layer has a window.

    qwen2 and qwen3: the layers from max_window_layers on, or those that layer_types says.  qwen3_moe and mistral: all.
    """
    types = config.get("layer_types") or []
    if not isinstance(types, list) or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(f"config.json: layer_types is {types}, the decoder supports full_attention and sliding_attention")
    used = family == "mistral" or bool(config.get("use_sliding_window"))
    window, slides = config.get("sliding_window", 4096) if used else None, "sliding_attention" in types
    if (slides or used) and family not in WINDOWED:
        asked = "layer_types has sliding_attention" if slides else "use_sliding_window is true"
        raise UserError(f"config.json: {asked}, model_type {family} has none")
    if types and (slides or window is not None) and family not in ("qwen2", "qwen3"):
        raise UserError(f"config.json: layer_types is {types}, in model_type {family} all layers have the sliding window or none")
    if slides and window is None:
        why = "sliding_window is null" if used else "use_sliding_window is false"
        raise UserError(f"config.json: layer_types has sliding_attention, but {why}")
    if window is None or not isinstance(num_layers, int):  # which ModelConfig refuses
        return {}
    if not types and family in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise UserError(f"config.json: max_window_layers is {first!r}, wanted the number of layers without sliding window")
        types = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    if types and "sliding_attention" not in types:
        return {}
    if not isinstance(window, int) or window < 1:
        raise UserError(f"config.json: sliding_window is {window!r}, wanted a positive number of tokens")
    return {"sliding_window": window} | ({"layer_types": tuple(types)} if "full_attention" in types else {})
