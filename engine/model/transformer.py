"""A dense pre-norm decoder (Llama 3, Qwen2/2.5, Qwen3) whose one forward serves training, prefill, decode and scoring.

The forward knows nothing of batches: tokens are packed, and `attend(layer, q, k, v)` is where the callers differ - packed causal attention
in training (`PackedAttention`), a KV cache in generation (`kv_cache`), which rotates in the launch that writes the cache.  So there is no second
model to keep in step.

T tokens, D hidden, H query heads, K key/value heads, d head width, F SwiGLU width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from athanor.config import ModelConfig
from athanor.kernels import attention, linear, rmsnorm, rope, swiglu
from athanor.kernels.attention import longest_of

# Products of few rows, or of an odd number of rows per CPU thread, take other paths in BLAS and round differently (seen with 5-27 rows on AMD and
# 1-7 on Intel).  Rollout and trainer therefore run the model on multiples of this many rows, the last ones filler that nobody reads.
ROW_STEP = 16


def fill_rows(x: Tensor, value: float = 0) -> Tensor:
    """x (n, ...) with rows of `value` behind it, up to the next multiple of ROW_STEP and at least ROW_STEP."""
    missing = -x.shape[0] % ROW_STEP if x.shape[0] else ROW_STEP
    return torch.cat((x, x.new_full((missing, *x.shape[1:]), value))) if missing else x


def fill_tokens(input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A packed batch with a filler sequence behind it, where one is needed for whole row steps."""
    filled = fill_rows(input_ids)
    if len(filled) == len(input_ids):
        return input_ids, positions, cu_seqlens
    return filled, fill_rows(positions), torch.cat((cu_seqlens, cu_seqlens.new_full((1,), len(filled))))


@dataclass(frozen=True)
class Rotation:
    """Position embedding of the batch's tokens, with one layer's QK norm in front where the architecture has it."""

    cos: Tensor  # (T, d/2)
    sin: Tensor  # (T, d/2)
    norm: dict  # q_weight, k_weight and eps of `rope`, or nothing

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, self.cos, self.sin, **self.norm)


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """Take q (T, H, d), k and v (T, K, d) of one layer, not rotated yet; return the attention output (T, H, d)."""


class PackedAttention:
    """Causal attention within each packed sequence."""

    def __init__(self, cu_seqlens: Tensor):
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = longest_of(cu_seqlens) if cu_seqlens.is_cuda else None  # once, and not in each layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        return attention(*rotation(q, k), v, self.cu_seqlens, max_seqlen=self.max_seqlen)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The normed x; with a residual (the normed x + residual, x + residual), in one kernel."""
        return rmsnorm(x, self.weight, eps=self.eps, residual=residual)


class Linear(nn.Linear):
    """nn.Linear by way of the kernel, which has a row-independent version for strict mode."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, q/k/v and gate/up fused into one matrix each (split again in HuggingFace files by `weights`)."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        D, d, F = config.hidden_size, config.width_per_head, config.intermediate_size
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
        self.input_norm = RMSNorm(D, config.rms_norm_eps)
        self.qkv_proj = Linear(D, (self.num_heads + 2 * self.num_kv_heads) * d, bias=config.architecture == "qwen2")
        if config.architecture == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.o_proj = Linear(self.num_heads * d, D, bias=False)
        self.post_attention_norm = RMSNorm(D, config.rms_norm_eps)
        self.gate_up_proj = Linear(D, 2 * F, bias=False)
        self.down_proj = Linear(F, D, bias=False)
        self.qk_norm = config.architecture == "qwen3"

    def forward(self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Take what the layer before added and the stream before that (None in the first layer); return the same of this layer.

        The sum of the two is left to the next norm, which reads and writes it anyway.
        """
        T, H, K, d = x.shape[0], self.num_heads, self.num_kv_heads, self.head_dim
        x, residual = (self.input_norm(x), x) if residual is None else self.input_norm(x, residual)
        q, k, v = self.qkv_proj(x).view(T, H + 2 * K, d).split((H, K, K), dim=1)
        norm = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight, "eps": self.q_norm.eps} if self.qk_norm else {}
        attended = attend(self.index, q, k, v, Rotation(cos, sin, norm))
        x, residual = self.post_attention_norm(self.o_proj(attended.reshape(T, H * d)), residual)
        return self.down_proj(swiglu(self.gate_up_proj(x))), residual


class Decoder(nn.Module):
    """Embedding, layers and final norm; `lm_head_weight` is applied by the caller (`linear_logprob`, the sampler)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.vocab_size:
            raise ValueError("Decoder: vocab_size is 0; take it from the tokenizer first (config.model_copy)")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "Decoder":
        # A cast to bf16 must not round the frequencies (angles reach max_position_embeddings), and to_empty must not lose them.
        super()._apply(fn, recurse)
        self.inv_freq = rope_frequencies(self.config).to(self.inv_freq.device)
        return self

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D): the embedding itself when tied."""
        return self.embed.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the normalised hidden states (T, D) of packed input_ids (T,) int64 at positions (T,) int64."""
        x = self.embed(input_ids)
        angles = positions.float()[:, None] * self.inv_freq[None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, attend)
        return self.norm(x) if residual is None else self.norm(x, residual)[0]

    @torch.no_grad()
    def initialize_(self, seed: int) -> "Decoder":
        """Fill all weights from `seed`: normal(0, initializer_range), residual writers divided by sqrt(2 x layers), norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            scale = std / math.sqrt(2 * len(self.layers)) if name.endswith(("o_proj.weight", "down_proj.weight")) else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return self


def rope_frequencies(config: ModelConfig) -> Tensor:
    """(d/2,) fp32 angular frequencies theta^(-2i/d), with Llama 3.1's wavelength scaling when the config asks for it."""
    d = config.width_per_head
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    scaling = config.rope_scaling
    if not scaling or scaling.get("rope_type", scaling.get("type")) == "default":
        return inv_freq
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    # Long wavelengths are divided by `factor`, short ones kept, those between interpolated.  The order of operations is the one that the models
    # were trained with: an ulp of a frequency is a hundredth of a radian at position 100,000.
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)
