"""HuggingFace checkpoints in and out: config.json, model.safetensors or its shards, without a conversion step.

`Decoder` keeps q/k/v and gate/up as one matrix each; a HuggingFace tensor is a range of rows of ours, read and written in place, shard by shard.
Left out: pickled weights (pytorch_model.bin), quantized checkpoints, sliding windows, RoPE types other than default and llama3.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from athanor import atomic
from athanor.config import ModelConfig
from athanor.errors import UserError
from athanor.model.transformer import Decoder

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
INDEX_FILE = "model.safetensors.index.json"
# Fields that share their name and meaning with ModelConfig, and transformers' value where a config.json leaves one out (None = wanted).
_SHARED = dict(
    vocab_size=None, hidden_size=None, intermediate_size=None, num_hidden_layers=None, num_attention_heads=None,
    rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=False,
)  # fmt: skip
# What the decoder does not do, with the only value under which it need not.
_ONLY = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0, partial_rotary_factor=1.0, quantization_config=None)


@dataclass(frozen=True)
class Source:
    """Where one HuggingFace tensor lives in a Decoder: rows start .. start + shape[0] of `parameter`."""

    parameter: str
    start: int
    shape: tuple[int, ...]


def weights_hash(model: Decoder) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """Build the Decoder of a HuggingFace folder and fill it from its safetensors.

    Each tensor is read, cast and placed on its own, so the peak is the model plus one tensor.
    Raises UserError on a missing folder or file, an architecture or feature that is not supported, and missing, unexpected or misshapen tensors.
    """
    path = Path(path)
    atomic.recover(path)
    if not path.is_dir():
        raise UserError(f"load_model: folder {path} does not exist")
    config = model_config_from_hf(atomic.read_json(path / "config.json", "load_model"))
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    sources = hf_tensors(config)
    files = _tensor_files(path)
    missing = [name for name in sources if name not in files]
    # A tied head may be stored all the same, and is compared; rotary frequencies of old Llama files are computed.
    redundant = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = [name for name in files if name not in sources and name not in redundant and not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        parts = [f"{kind} {_listed(names)}" for kind, names in (("missing tensors", missing), ("unexpected tensors", extra)) if names]
        raise UserError(f"load_model: {path} does not fit its config.json: {'; '.join(parts)}")
    parameters = dict(model.named_parameters())
    for file in sorted(set(files.values())):
        with _open(path / file) as shard:
            for name, source in sources.items():
                if files[name] == file:
                    value = _checked(shard, name, source, path / file)
                    with torch.no_grad():
                        _rows(parameters, source).copy_(value)
    for name in redundant & set(files):
        with _open(path / files[name]) as shard:
            value = _checked(shard, name, sources["model.embed_tokens.weight"], path / files[name])
        if not torch.equal(value.to(dtype), model.embed.weight.cpu()):
            raise UserError(f"load_model: {path} says tie_word_embeddings, but its lm_head.weight differs from the embedding")
    return model


def save_model(model: Decoder, path: str | Path, *, token_ids: dict | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a HuggingFace folder that replaces `path` at once; files there that are not the model's are kept.

    token_ids: bos_token_id, eos_token_id and pad_token_id for config.json.  Tensors keep the model's dtype.
    Raises UserError when the folder cannot be written.
    """
    with atomic.replace_folder(path, carry=lambda name: not is_model_file(name)) as folder:
        write_model(model, folder, token_ids=token_ids, max_shard_bytes=max_shard_bytes)


def write_model(model: Decoder, folder: Path, *, token_ids: dict | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the safetensors into an existing folder, one shard in memory at a time."""
    parameters = dict(model.named_parameters())
    dtype = parameters["embed.weight"].dtype
    sources = hf_tensors(model.config)
    width = {name: parameters[source.parameter].element_size() for name, source in sources.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, source in sources.items():
        size = width[name] * torch.Size(source.shape).numel()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        # A copy each: safetensors refuses views that share their storage.
        tensors = {name: _rows(parameters, sources[name]).detach().to("cpu", copy=True).contiguous() for name in names}
        write_tensors(tensors, folder / file)
    if len(shards) > 1:
        total = sum(width[name] * torch.Size(source.shape).numel() for name, source in sources.items())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    config = {**model_config_to_hf(model.config), **(token_ids or {}), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one safetensors file of contiguous CPU tensors; a failure to write is an OSError."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def is_model_file(name: str) -> bool:
    """Whether a folder entry belongs to the weights rather than to the tokenizer or the user."""
    return name in ("config.json", INDEX_FILE) or name.endswith(".safetensors")


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
    for name, only in _ONLY.items():
        value = rope.get(name, config.get(name, only))
        if value is not None and value != only:
            raise UserError(f"config.json: {name} is {value!r}, the decoder supports {only!r} only")
    _refuse_sliding_window(config)
    fields = {name: config.get(name, default) for name, default in _SHARED.items()}
    for name, value in fields.items():
        if value is None:
            raise UserError(f"config.json: {name} is missing")
    H = fields["num_attention_heads"]
    # The defaults differ by family: an absent key means the class's value, an explicit null means "derive it".
    kv_heads = config.get("num_key_value_heads", None if family == "llama" else 32) or H
    head_dim = config.get("head_dim", 128 if family == "qwen3" else None) or 0
    if head_dim * H == fields["hidden_size"]:
        head_dim = 0
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "type", "partial_rotary_factor")}
    scaling.setdefault("rope_type", rope.get("type", "default"))
    if scaling["rope_type"] == "llama3":
        wanted = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
        if absent := [key for key in wanted if not isinstance(scaling.get(key), (int, float))]:
            raise UserError(f"config.json: rope_scaling of type llama3 has no {', '.join(absent)}")
    try:
        return ModelConfig(
            architecture=family,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_scaling=None if scaling["rope_type"] == "default" else scaling,
            max_position_embeddings=config.get("max_position_embeddings", 2048 if family == "llama" else 32768),
            **fields,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"config.json: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


def model_config_to_hf(config: ModelConfig) -> dict:
    """config.json for transformers 4 and 5 alike (both spellings of RoPE, all defaults written out)."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    if "rope_type" not in scaling:
        scaling = {"rope_type": scaling["type"], **{key: value for key, value in scaling.items() if key != "type"}}
    hf = {
        "architectures": [CLASSES[config.architecture]],
        "model_type": config.architecture,
        **{name: getattr(config, name) for name in _SHARED},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.width_per_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        "attention_dropout": 0.0,
        "use_cache": True,
        # Llama's class defaults are 1 and 2, which would be ordinary tokens here.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.architecture == "qwen2":
        return {**hf, "use_sliding_window": False}
    hf["attention_bias"] = False
    return {**hf, "mlp_bias": False} if config.architecture == "llama" else {**hf, "use_sliding_window": False}


def hf_tensors(config: ModelConfig) -> dict[str, Source]:
    """HuggingFace name -> place in the Decoder, in file order."""
    D, F, V, d = config.hidden_size, config.intermediate_size, config.vocab_size, config.width_per_head
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    tensors = {"model.embed_tokens.weight": Source("embed.weight", 0, (V, D))}
    for i in range(config.num_hidden_layers):
        hf, ours = f"model.layers.{i}", f"layers.{i}"
        tensors[f"{hf}.input_layernorm.weight"] = Source(f"{ours}.input_norm.weight", 0, (D,))
        start = 0
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{hf}.self_attn.{name}_proj.weight"] = Source(f"{ours}.qkv_proj.weight", start, (rows, D))
            if config.architecture == "qwen2":
                tensors[f"{hf}.self_attn.{name}_proj.bias"] = Source(f"{ours}.qkv_proj.bias", start, (rows,))
            start += rows
        if config.architecture == "qwen3":
            tensors[f"{hf}.self_attn.q_norm.weight"] = Source(f"{ours}.q_norm.weight", 0, (d,))
            tensors[f"{hf}.self_attn.k_norm.weight"] = Source(f"{ours}.k_norm.weight", 0, (d,))
        tensors[f"{hf}.self_attn.o_proj.weight"] = Source(f"{ours}.o_proj.weight", 0, (D, q))
        tensors[f"{hf}.post_attention_layernorm.weight"] = Source(f"{ours}.post_attention_norm.weight", 0, (D,))
        tensors[f"{hf}.mlp.gate_proj.weight"] = Source(f"{ours}.gate_up_proj.weight", 0, (F, D))
        tensors[f"{hf}.mlp.up_proj.weight"] = Source(f"{ours}.gate_up_proj.weight", F, (F, D))
        tensors[f"{hf}.mlp.down_proj.weight"] = Source(f"{ours}.down_proj.weight", 0, (D, F))
    tensors["model.norm.weight"] = Source("norm.weight", 0, (D,))
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = Source("lm_head.weight", 0, (V, D))
    return tensors


def _refuse_sliding_window(config: dict) -> None:
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise UserError(f"config.json: layer_types has {sorted(set(config['layer_types']))}, the decoder supports full_attention only")
    window, first = config.get("sliding_window", 4096), config.get("max_window_layers", 28)
    if config.get("use_sliding_window") and window is not None and first < config.get("num_hidden_layers", 0):
        raise UserError(f"config.json: use_sliding_window is true (window {window} from layer {first} on), the decoder supports full attention only")


def _rows(parameters: dict[str, Tensor], source: Source) -> Tensor:
    return parameters[source.parameter][source.start : source.start + source.shape[0]]


def _checked(shard, name: str, source: Source, file: Path) -> Tensor:
    view = shard.get_slice(name)
    if tuple(view.get_shape()) != source.shape:
        raise UserError(f"load_model: {name} in {file} is {tuple(view.get_shape())}, config.json wants {source.shape}")
    if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"load_model: {name} in {file} has type {view.get_dtype()}, wanted F64, F32, F16 or BF16")
    return shard.get_tensor(name)


def _tensor_files(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the single file."""
    if (path / INDEX_FILE).is_file():
        weight_map = atomic.read_json(path / INDEX_FILE, "load_model").get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"load_model: {path / INDEX_FILE} has no weight_map")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not (path / file).is_file():
                raise UserError(f"load_model: {path / file}, named by {INDEX_FILE}, does not exist")
            with _open(path / file) as shard:
                present = set(shard.keys())
            if absent := [name for name, where in weight_map.items() if where == file and name not in present]:
                raise UserError(f"load_model: {path / file} has no {_listed(absent)}, which {INDEX_FILE} places there")
        return weight_map
    file = path / "model.safetensors"
    if not file.is_file():
        pickled = " (there is a pytorch_model.bin; save it as safetensors first)" if list(path.glob("pytorch_model*.bin")) else ""
        raise UserError(f"load_model: {path} has neither model.safetensors nor {INDEX_FILE}{pickled}")
    with _open(file) as tensors:
        return dict.fromkeys(tensors.keys(), file.name)


def _open(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"load_model: {file} is not a readable safetensors file: {error}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
