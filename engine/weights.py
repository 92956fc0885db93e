"""HuggingFace checkpoints in and out: config.json, model.safetensors or its shards, without a conversion step.

`Decoder` keeps q/k/v and gate/up as one matrix each; a HuggingFace tensor is a range of rows of ours, read and written in place, shard by shard.
The experts of a layer are one stack, of which each is a part.  Block-scaled FP8 weights (DeepSeek-V3, Qwen3-FP8: `weight_scale_inv`) are dequantised
when they are read, and saved as what they then are.
DeepSeek-V3's layer for multi-token prediction is read and written where the files have it.
Left out: pickled weights (pytorch_model.bin), other quantized checkpoints, RoPE types other than default, llama3, linear
and yarn.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from athanor import atomic
from athanor.errors import UserError
from athanor.hf_config import fp8_block, model_config_from_hf, model_config_to_hf
from athanor.hf_tensors import Source, hf_copies, hf_tensors, mtp_prefix
from athanor.model.transformer import Decoder
from athanor.sharding import WholeParameters

INDEX_FILE = "model.safetensors.index.json"
SCALE = "_scale_inv"  # behind the name of an FP8 weight


def weights_hash(model: Decoder) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters, in the type that the model computes in; of a split one every rank calls it."""
    digest = hashlib.sha256()
    parameters = WholeParameters(model)
    for name in sorted(parameters.names):
        parameter = parameters[name]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.cpu().contiguous().flatten().view(torch.uint8).numpy())
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
    hf_config = atomic.read_json(path / "config.json", "load_model")
    config, block = model_config_from_hf(hf_config), fp8_block(hf_config)
    files = _tensor_files(path)
    if not any(name.startswith(f"{mtp_prefix(config)}.") for name in files):  # a config.json may speak of a layer that was not saved
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    sources = hf_tensors(config)
    scales = {f"{name}{SCALE}" for name in sources} if block else set()
    missing = [name for name in sources if name not in files]
    # What is stored twice is compared, such as a tied head; rotary frequencies of old Llama files are computed.
    copies = hf_copies(config)
    extra = [name for name in files if name not in sources and name not in scales | copies.keys() and not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        parts = [f"{kind} {_listed(names)}" for kind, names in (("missing tensors", missing), ("unexpected tensors", extra)) if names]
        raise UserError(f"load_model: {path} does not fit its config.json: {'; '.join(parts)}")
    parameters = dict(model.named_parameters())
    for file in sorted(set(files.values())):
        with _open(path / file) as shard:
            for name, source in sources.items():
                if files[name] == file:
                    value = _checked(shard, name, source, path / file)
                    if value.dtype == torch.float8_e4m3fn:
                        value = _dequantized(value, block, name, path, files)
                    elif name + SCALE in files:
                        raise UserError(f"load_model: {name}{SCALE} in {path} is a scale, but {name} is no FP8")
                    with torch.no_grad():
                        source.of(parameters).copy_(value)
    for name in copies.keys() & set(files):
        with _open(path / files[name]) as shard:
            value = _checked(shard, name, sources[copies[name]], path / files[name])
        if not torch.equal(value.to(dtype), sources[copies[name]].of(parameters).cpu()):
            why = " (tie_word_embeddings is true)" if name == "lm_head.weight" else ""
            raise UserError(f"load_model: {name} in {path} differs from {copies[name]}, wanted the same{why}")
    return model


def save_model(model: Decoder, path: str | Path, *, token_ids: dict | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a HuggingFace folder that replaces `path` at once; files there that are not the model's are kept.

    token_ids: bos_token_id, eos_token_id and pad_token_id for config.json.  Tensors keep the model's dtype.
    Raises UserError when the folder cannot be written.
    """
    with atomic.replace_folder(path, carry=lambda name: not is_model_file(name)) as folder:
        write_model(model, folder, token_ids=token_ids, max_shard_bytes=max_shard_bytes)


def write_model(model: Decoder, folder: Path, *, token_ids: dict | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the safetensors into an existing folder, one shard in memory at a time.

    Where the model is split over ranks, its tensors are whole on the way, and the others call `hand_over` meanwhile.
    """
    parameters, sources = WholeParameters(model), _written(model)
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, source in sources.items():
        size = parameters.dtype_of(source.parameter).itemsize * torch.Size(source.shape).numel()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        # A copy each: safetensors refuses views that share their storage.
        tensors = {name: sources[name].of(parameters).to("cpu", copy=True).contiguous() for name in names}
        write_tensors(tensors, folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    dtype = parameters.dtype_of("embed.weight")
    config = {**model_config_to_hf(model.config), **(token_ids or {}), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def hand_over(model: Decoder) -> None:
    """This rank's part in another's `write_model`; nothing where the model is not split."""
    parameters = WholeParameters(model)
    for source in _written(model).values():
        source.of(parameters)


def _written(model: Decoder) -> dict[str, Source]:
    """What a folder has, in this order: a tied head once, and what DeepSeek's files have twice."""
    sources = hf_tensors(model.config)
    return sources | {name: sources[of] for name, of in hf_copies(model.config).items() if name != "lm_head.weight"}


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one safetensors file of contiguous CPU tensors; a failure to write is an OSError."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def is_model_file(name: str) -> bool:
    """Whether a folder entry belongs to the weights rather than to the tokenizer or the user."""
    return name in ("config.json", INDEX_FILE) or name.endswith(".safetensors")


def _checked(shard, name: str, source: Source, file: Path) -> Tensor:
    view = shard.get_slice(name)
    if tuple(view.get_shape()) != source.shape:
        raise UserError(f"load_model: {name} in {file} is {tuple(view.get_shape())}, config.json wants {source.shape}")
    if view.get_dtype() not in ("F64", "F32", "F16", "BF16", "F8_E4M3"):
        raise UserError(f"load_model: {name} in {file} has type {view.get_dtype()}, wanted F64, F32, F16, BF16 or, with scales, F8_E4M3")
    return shard.get_tensor(name)


def _dequantized(value: Tensor, block: tuple[int, int] | None, name: str, path: Path, files: dict[str, str]) -> Tensor:
    """The FP8 weight (N, K) in fp32: each block of it times its scale, which may lie in another file."""
    if block is None or value.ndim != 2 or name + SCALE not in files:
        raise UserError(f"load_model: {name} in {path} is FP8, which needs {name}{SCALE} and a quantization_config with weight_block_size")
    with _open(path / files[name + SCALE]) as shard:
        scale = shard.get_tensor(name + SCALE).float()
    blocks = tuple(-(-n // size) for n, size in zip(value.shape, block, strict=True))
    if tuple(scale.shape) != blocks:
        raise UserError(f"load_model: {name}{SCALE} in {path} is {tuple(scale.shape)}, {tuple(value.shape)} in blocks of {block} wants {blocks}")
    for axis in (0, 1):
        scale = scale.repeat_interleave(block[axis], axis)[tuple(slice(n) for n in value.shape)[: axis + 1]]
    return value.float() * scale


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
