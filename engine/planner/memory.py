"""Bytes per rank: parameters under a layout, what autograd keeps for the backward, what the kernels allocate, blocks of the KV cache.

Parameters are those of the model itself on the meta device.  What a forward keeps is counted from the kernels: a tensor counts where some
backward saves it, and a view counts as the whole storage behind it.

T tokens, D hidden, H query heads, K key/value heads, d head width, F SwiGLU width, E experts, k of them per token, w their width.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd

import torch

from athanor.kernels.linear_logprob_cpu import KEPT_LOGITS, KEPT_SHARE, TILE_LOGITS, tiles_of
from athanor.kernels.mlp_cpu import blocks_of
from athanor.kv_cache import PagedKVCache
from athanor.model.layers import ROW_STEP
from athanor.model.transformer import Decoder
from athanor.model_config import ModelConfig

FP32 = 4
# Axis along which tensor parallelism splits a matrix, by the last part of its module's name: rows (0) of what widens, columns (1) of what narrows.
TENSOR_AXIS = {"embed": 0, "lm_head": 0, "qkv_proj": 0, "q_b_proj": 0, "kv_b_proj": 0, "gate_up_proj": 0, "o_proj": 1, "down_proj": 1}


@dataclass(frozen=True)
class Layout:
    """How ranks share the work.  world = replicate x shard x tensor, tensor innermost.

    Tensor parallel ranks have different experts, too.  Those of one of them are on `expert` ranks, the innermost of shard.  Context parallel ranks
    are neighbours among replicate x shard: they share tokens, not parameters.
    """

    shard: int = 1
    replicate: int = 1
    tensor: int = 1
    expert: int = 1
    activation_checkpointing: bool = False
    context: int = 1

    @property
    def expert_shard(self) -> int:
        """Ranks over which the parameters of one expert are sharded."""
        return self.shard // self.expert

    def is_built(self, config: ModelConfig) -> bool:
        """Whether the engine trains so: experts that travel are not sharded besides, and what FSDP cuts are whole experts."""
        experts = config.num_experts // (self.expert * self.tensor)
        return not experts or ((self.expert == 1 or self.expert_shard == 1) and experts >= self.expert_shard)


@dataclass(frozen=True)
class Weight:
    name: str
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def expert(self) -> bool:
        """A stack of experts (E, N, K)."""
        return len(self.shape) == 3

    @property
    def table(self) -> bool:
        return self.name.split(".")[0] in ("embed", "lm_head")

    @property
    def layer(self) -> int | None:
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    def split(self, layout: Layout) -> tuple[int, ...]:
        """Shape on one rank of the tensor and expert parallel groups, before FSDP."""
        if self.expert:
            return (self.shape[0] // (layout.expert * layout.tensor), *self.shape[1:])
        module = self.name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        axis = TENSOR_AXIS.get(module)
        if axis is None or axis >= len(self.shape):
            return self.shape
        return tuple(ceil(n / layout.tensor) if i == axis else n for i, n in enumerate(self.shape))

    def fsdp_axis(self, layout: Layout) -> int:
        """Axis that FSDP cuts: the first, but rows of the experts' matrices where a rank has fewer experts than there are shards."""
        few = self.expert and self.split(layout)[0] < layout.expert_shard and self.shape[1] % layout.expert_shard == 0
        return 1 if few else 0

    def local(self, layout: Layout, index: int = 0) -> int:
        """Numbers on the rank that is `index` in its FSDP group, cut as torch.chunk does: the first ranks have the most."""
        shape, axis = self.split(layout), self.fsdp_axis(layout)
        size = layout.expert_shard if self.expert else layout.shard
        step = ceil(shape[axis] / size)
        return max(0, min(step, shape[axis] - index % size * step)) * (torch.Size(shape).numel() // shape[axis])


def weights_of(config: ModelConfig) -> tuple[Weight, ...]:
    """Every parameter of the decoder, in its order."""
    return _weights_of(config.model_dump_json())


@lru_cache(maxsize=16)
def _weights_of(config: str) -> tuple[Weight, ...]:
    with torch.device("meta"):
        model = Decoder(ModelConfig.model_validate(json.loads(config)))
    return tuple(Weight(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())


def _kinds(config: ModelConfig) -> list[tuple[Weight, int]]:
    return _kinds_of(config.model_dump_json())


@lru_cache(maxsize=16)
def _kinds_of(config: str) -> list[tuple[Weight, int]]:
    """One weight of each kind and how many are alike: layers repeat, and a plan looks at thousands of layouts."""
    kinds: dict[tuple, list] = {}
    for weight in _weights_of(config):
        kinds.setdefault((weight.name.split(".", 2)[-1] if weight.layer is not None else weight.name, weight.shape), []).append(weight)
    return [(alike[0], len(alike)) for alike in kinds.values()]


def num_parameters(config: ModelConfig) -> int:
    return sum(weight.numel for weight in weights_of(config))


def num_active(config: ModelConfig) -> int:
    """Parameters that one token meets: of the routed experts, k of E."""
    experts = sum(weight.numel for weight in weights_of(config) if weight.expert)
    return num_parameters(config) - (experts - experts * config.num_experts_per_tok // config.num_experts if experts else 0)


def local_parameters(config: ModelConfig, layout: Layout, index: int = 0) -> int:
    """Parameters that a rank owns."""
    return sum(count * weight.local(layout, index) for weight, count in _kinds(config))


def unsharded_parameters(config: ModelConfig, layout: Layout) -> int:
    """Parameters on a rank where FSDP has gathered them all: what a sampler holds."""
    return sum(count * torch.Size(weight.split(layout)).numel() for weight, count in _kinds(config))


def moments(config: ModelConfig, layout: Layout, optimizer: str) -> int:
    """Numbers of optimizer state that a rank owns: two for each trained parameter, one for what Muon updates (`Optimizer`)."""
    muon = optimizer == "muon"
    per_weight = ((w, count * w.local(layout)) for w, count in _kinds(config) if w.trained)
    return sum(numbers * (1 if muon and len(w.shape) > 1 and not w.table else 2) for w, numbers in per_weight)


def gathered(config: ModelConfig, layout: Layout, compute_bytes: int, grad_bytes: int) -> float:
    """Bytes of unsharded parameters and gradients at once: tables and last norm, two layers (one ahead), one layer's gradient twice.

    A gradient is there as it was computed and as it is handed to the reduction.
    """
    first: dict[bool | None, int] = {None: None} | {config.is_sparse(i): i for i in range(config.num_hidden_layers)}
    unsharded = {layer: sum(torch.Size(w.split(layout)).numel() for w in weights_of(config) if w.layer == layer) for layer in first.values()}
    root, largest = unsharded.pop(None), max(unsharded.values())
    return root * (2 * compute_bytes) + largest * (3 * compute_bytes + grad_bytes)


@dataclass(frozen=True)
class Kept:
    """Bytes that one forward keeps for its backward."""

    layers: float  # by the layers, or their inputs where these are computed again
    top: float  # outside the layers: angles, ids, the stream before the last norm
    head: float  # normed rows, and the trained ones among them: gone when the backward of the layers begins
    working: float  # what the backward of one layer needs besides, its activations included where they are computed again


def activations(config: ModelConfig, tokens: int, layout: Layout, compute_bytes: int, *, sequence_parallel: bool = False, imbalance: float = 1.0,
                on_cpu: bool = False) -> Kept:  # fmt: skip
    """What a forward over `tokens` packed tokens (all of them trained), which context parallel ranks share, keeps on one rank."""
    D, t = config.hidden_size, layout.tensor
    split = t if sequence_parallel else 1
    tokens = ceil(tokens / layout.context)
    tokens = ceil(tokens / ROW_STEP) * ROW_STEP if on_cpu else tokens
    kinds = [config.is_sparse(i) for i in range(config.num_hidden_layers)]
    full = {kind: layer_bytes(config, kinds.index(kind), tokens, layout, compute_bytes, split, imbalance, on_cpu) for kind in set(kinds)}
    working = max(_backward_bytes(config, kinds.index(kind), tokens, layout, compute_bytes, imbalance, on_cpu) for kind in set(kinds))
    top = tokens * (config.rotary_width * compute_bytes + 4 * 8 + D * compute_bytes / split)  # cos and sin; ids, positions, rows and targets
    head = tokens * 2 * D * compute_bytes
    if layout.activation_checkpointing:
        return Kept(config.num_hidden_layers * tokens * 2 * D / split * compute_bytes, top, head, max(full.values()) + working)
    return Kept(sum(full[kind] for kind in kinds), top, head, working)


def layer_bytes(config: ModelConfig, index: int, T: int, layout: Layout, size: int, split: int, imbalance: float, on_cpu: bool) -> float:
    """What one layer keeps; split: ranks that share the residual stream."""
    D = config.hidden_size
    norms = 2 * (D / split + D) * size + 2 * FP32  # the stream before each norm, and what comes out of it
    return T * (norms + _attention_bytes(config, layout, size, on_cpu)) + _mlp_bytes(config, index, T, layout, size, imbalance, on_cpu)


def _attention_bytes(config: ModelConfig, layout: Layout, size: int, on_cpu: bool) -> float:
    """Per token, without the normed input: what the projections made, what is attended with, what comes out."""
    H, d = config.num_attention_heads / layout.tensor, config.width_per_head
    if not config.latent:
        K, statistics = config.num_key_value_heads / layout.tensor, (2 if on_cpu else 1) * H * FP32
        if layout.context == 1:
            return ((H + 2 * K) * d + (H + K) * d + H * d) * size + statistics
        projected = (H + 2 * K) * d if config.architecture.startswith("qwen3") else 0  # for the backward of the norms of heads
        return (projected + traded_width(config, layout) + H * d) * size + statistics
    extra = (layout.context * config.cache_width + H * config.v_head_dim) * size if layout.context > 1 else 0  # the latents of all, what came back
    return extra + _latent_bytes(config, H, d, size, on_cpu)


def traded_width(config: ModelConfig, layout: Layout) -> int:
    """Numbers per token that context parallel ranks trade around attention: queries, keys with values, results."""
    H, d = config.num_attention_heads // layout.tensor, config.width_per_head
    if config.latent:
        return H * d + layout.context * config.cache_width + H * config.v_head_dim
    K = config.num_key_value_heads // layout.tensor
    return (2 * H + 2 * K * layout.context // gcd(K, layout.context)) * d


def _latent_bytes(config: ModelConfig, H: float, d: int, size: int, on_cpu: bool) -> float:
    r, R, v, q_rank = config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim, config.q_lora_rank
    down = 2 * q_rank + 2 * r + R + (2 if q_rank else 1) * FP32 / size  # both latents, normed again, with the norms' statistics
    if on_cpu and size == FP32:  # absorbed: queries and results as wide as the latent
        return (down + H * d + 2 * H * (r + R) + (r + R) + H * v) * size + 2 * H * FP32  # of the queries' projection, the first part is read again
    return (down + 4 * H * d + H * v) * size + H * FP32  # values are padded to the width of keys


def _mlp_bytes(config: ModelConfig, index: int, T: int, layout: Layout, size: int, imbalance: float, on_cpu: bool) -> float:
    halves = 2 if _in_blocks(layout, size, on_cpu) else 3  # what comes out of SwiGLU is computed again, or kept
    if not config.is_sparse(index):
        return T * halves * config.intermediate_size / layout.tensor * size
    D, E, k, w = config.hidden_size, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    rows = _expert_rows(config, T, layout, imbalance, on_cpu)
    # scores and the router's own copy of its input in fp32; ids, places and weights of the k choices
    router = T * (2 * E * FP32 + (D * FP32 if config.latent and size != FP32 else 0) + k * (3 * 4 + 3 * 8))
    shared = T * halves * w * config.n_shared_experts / layout.tensor * size
    return router + rows * (2 * D + 3 * w) * size + shared


def _in_blocks(layout: Layout, size: int, on_cpu: bool) -> bool:
    """Whether dense SwiGLU layers run as `mlp_cpu`."""
    return on_cpu and size == FP32 and layout.tensor == 1


def _expert_rows(config: ModelConfig, T: int, layout: Layout, imbalance: float, on_cpu: bool) -> float:
    """Rows of experts on one rank: on average its share of its tokens' choices, since as many leave as come."""
    slots = T * config.num_experts_per_tok / layout.tensor
    return slots if on_cpu else slots * (imbalance if layout.expert * layout.tensor > 1 else 1)


def _backward_bytes(config: ModelConfig, index: int, T: int, layout: Layout, size: int, imbalance: float, on_cpu: bool) -> float:
    """Gradients that live at once in the backward of SwiGLU: of both halves before it, of the stream, of what came out less what was kept of that."""
    D = config.hidden_size
    if not config.is_sparse(index):
        rows, halves = (min(T, blocks_of(T)[0].stop), 4) if T and _in_blocks(layout, size, on_cpu) else (T, 2)
        return (rows * halves * config.intermediate_size / layout.tensor + T * 2 * D) * size
    return (_expert_rows(config, T, layout, imbalance, on_cpu) * 2 * config.moe_intermediate_size + T * 2 * D) * size


def linear_logprob_bytes(rows: int, vocab: int, hidden: int, size: int, *, on_cpu: bool) -> tuple[float, float]:
    """What linear_logprob allocates over `rows` trained tokens besides the gradient of the head: bytes held from its forward until the backward of
    the whole model is over, and bytes for the time of the call."""
    if on_cpu:
        tiles = [(t.stop - t.start) * vocab for t in tiles_of(rows, vocab)]
        room, kept = max(TILE_LOGITS, min(KEPT_LOGITS, rows * vocab // KEPT_SHARE)), 0
        for tile in tiles:
            if kept + tile > room:
                break
            kept += tile
        return (kept + rows * 5) * FP32, (max(tiles, default=0) + rows * hidden) * FP32
    from athanor.kernels.linear_logprob_triton import ROWS_BWD, SLICE_BWD, TILES

    chunk, width = min(rows, ROWS_BWD), min(vocab, SLICE_BWD)
    forward = 4 * ceil(vocab / TILES[90].SLICE) * rows * FP32
    backward = chunk * width * size + (rows + chunk) * hidden * FP32 + 2 * width * hidden * FP32
    return rows * 5 * FP32, max(forward, backward)


def kv_bytes_per_token(config: ModelConfig, compute_bytes: int, tensor: int, on_cpu: bool) -> float:
    """Of the cache on one rank: the heads are split as far as there are heads, a latent is on every rank."""
    dtype = torch.float32 if compute_bytes == FP32 else torch.bfloat16
    device = torch.device("cpu" if on_cpu else "cuda")
    return PagedKVCache.bytes_per_token(config, config.num_hidden_layers, dtype, device) / min(tensor, config.cache_heads)


def kv_blocks(prompt: float, longest: float, rows: int, group: int, block: int) -> int:
    """Blocks that `rows` samples of whole groups reserve: the prompt's once per group, the rest of each (as `Stream` asks for)."""
    shared, own = ceil(prompt / block), ceil((longest - 1) / block) - int(prompt) // block
    return ceil(rows / group) * shared + rows * own
