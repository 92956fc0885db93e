"""A pre-norm decoder (Llama 3, Mistral, Qwen2/2.5, Qwen3, Qwen3-MoE, DeepSeek-V3) whose one forward serves training, prefill, decode and scoring.

The forward knows nothing of batches: tokens are packed, and `attend(layer, q, k, v)` is where the callers differ - packed causal attention
in training (`PackedAttention`), a KV cache in generation (`kv_cache`), which rotates in the launch that writes the cache.  So there is no second
model to keep in step.

T tokens, D hidden, H query heads, K key/value heads, d head width, F SwiGLU width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from athanor.batch import SharedKeys
from athanor.config import ModelConfig
from athanor.kernels import LogProbs, attention, linear, linear_logprob, rope
from athanor.kernels.attention import longest_of
from athanor.kernels.rope_cpu import rotation_cpu
from athanor.model.layers import ROW_STEP, Embedding, Linear, RMSNorm, fill_rows, mlp, rows_of_their_own
from athanor.model.mla import Latent, LatentAttention, rotation_factor, yarn_frequencies
from athanor.model.moe import MixtureOfExperts, Routes

__all__ = ["ROW_STEP", "Attend", "Decoder", "DecoderLayer", "PackedAttention", "Rotation", "fill_rows", "fill_tokens", "rope_frequencies"]


def fill_tokens(input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, step: int = ROW_STEP) -> tuple[Tensor, Tensor, Tensor]:
    """A packed batch with a filler sequence behind it, where one is needed for whole row steps."""
    filled = fill_rows(input_ids, step=step)
    if len(filled) == len(input_ids):
        return input_ids, positions, cu_seqlens
    return filled, fill_rows(positions, step=step), torch.cat((cu_seqlens, cu_seqlens.new_full((1,), len(filled))))


@dataclass(frozen=True)
class Rotation:
    """Position embedding of the batch's tokens, with one layer's QK norm in front where the architecture has it."""

    cos: Tensor  # (T, d/2)
    sin: Tensor  # (T, d/2)
    norm: dict  # q_weight, k_weight and eps of `rope`, or nothing

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, self.cos, self.sin, **self.norm)


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, window: int | None = None) -> Tensor:
        """Take q (T, H, d), k and v (T, K, d) of one layer, not rotated yet; return the attention output (T, H, d).

        window: given where the layer has a sliding window, as in `attention`.
        """

    def latent(self, layer: int, x: Latent) -> Tensor:
        """The same of multi-head latent attention, rotated already; return (T, H, v)."""


class PackedAttention:
    """Causal attention within each packed sequence, or part of one behind keys that it shares."""

    def __init__(self, cu_seqlens: Tensor, shared: SharedKeys | None = None):
        self.cu_seqlens, self.shared = cu_seqlens, shared
        self.cu_seqlens_k = cu_seqlens if shared is None else shared.cu_seqlens
        self.max_seqlen = longest_of(self.cu_seqlens_k) if cu_seqlens.is_cuda else None  # once, and not in each layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, window: int | None = None) -> Tensor:
        return self.attention(*rotation(q, k), v, window=window)

    def latent(self, layer: int, x: Latent) -> Tensor:
        return packed_latent(x, self.attention)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
        if self.shared is not None:
            k, v = self.shared(k), self.shared(v)
        lengths = {"cu_seqlens_k": self.cu_seqlens_k, "max_seqlen": self.max_seqlen}
        return attention(q, k, v, self.cu_seqlens, scale=scale, window=window, **lengths)


def packed_latent(x: Latent, attend: Callable[..., Tensor]) -> Tensor:
    """Causal latent attention within each packed sequence: (T, H, v).  attend(q, k, v, scale=): the attention of rotated heads."""
    if x.absorbs:
        keys = x.keys()
        return x.output(attend(x.queries(), keys, keys, scale=x.scale))
    return attend(*x.expanded(), scale=x.scale)[..., : x.kv_b.shape[1] - x.q_nope.shape[2]]


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, q/k/v and gate/up fused into one matrix each (split again in HuggingFace files by `weights`)."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        D, d, F = config.hidden_size, config.width_per_head, config.intermediate_size
        qwen3 = config.architecture in ("qwen3", "qwen3_moe")
        self.index = index
        window = config.window_of(index)
        self.window = {} if window is None else {"window": window}
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
        self.input_norm = RMSNorm(D, config.rms_norm_eps)
        self.mla = LatentAttention(config, index) if config.latent else None
        if self.mla is None:
            self.qkv_proj = Linear(D, (self.num_heads + 2 * self.num_kv_heads) * d, bias=config.architecture == "qwen2")
            if qwen3:
                self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
            self.o_proj = Linear(self.num_heads * d, D, bias=False)
        self.post_attention_norm = RMSNorm(D, config.rms_norm_eps)
        self.moe = MixtureOfExperts(config) if config.is_sparse(index) else None
        if self.moe is None:
            self.gate_up_proj = Linear(D, 2 * F, bias=False)
            self.down_proj = Linear(F, D, bias=False)
        self.qk_norm = qwen3

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend, routes: Routes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take what the layer before added and the stream before that (None in the first layer); return the same of this layer.

        The sum of the two is left to the next norm, which reads and writes it anyway.
        """
        x, residual = (self.input_norm(x), x) if residual is None else self.input_norm(x, residual)
        x = self._attention(x, cos, sin, attend) if self.mla is None else self.mla(x, cos, sin, attend)
        x, residual = self.post_attention_norm(x, residual)
        return (mlp(x, self.gate_up_proj, self.down_proj) if self.moe is None else self.moe(x, routes)), residual

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        T, H, K, d = x.shape[0], self.num_heads, self.num_kv_heads, self.head_dim
        q, k, v = self.qkv_proj(x).view(T, H + 2 * K, d).split((H, K, K), dim=1)
        attended = attend(self.index, q, k, v, Rotation(cos, sin, self.norm_of_heads()), **self.window)
        return self.o_proj(attended.reshape(T, H * d))

    def norm_of_heads(self) -> dict:
        """What `Rotation` needs of the QK norm."""
        return {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight, "eps": self.q_norm.eps} if self.qk_norm else {}


class NextTokenLayer(nn.Module):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2, eqs. 21-23): a layer that sees one token further than its position.

    h'_t = layer(M [norm(Emb(token t+1)); norm(h_t)]),  from which the model's own head predicts token t+2.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.embed_norm, self.hidden_norm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.input_proj = Linear(2 * D, D, bias=False)
        self.layer = DecoderLayer(config, config.num_hidden_layers)
        self.norm = RMSNorm(D, eps)

    def forward(self, hidden: Tensor, following: Tensor, cos: Tensor, sin: Tensor, attend: Attend, routes: Routes | None = None) -> Tensor:
        """Normalised states (T, D) from those of the decoder (T, D) and the embeddings (T, D) of each position's next token."""
        x = self.input_proj(torch.cat((self.embed_norm(following), self.hidden_norm(hidden)), -1))
        return self.norm(*self.layer(x, None, cos, sin, attend, routes))[0]


class Decoder(nn.Module):
    """Embedding, layers and final norm; the head is applied to the hidden states that are wanted (`logprobs`, `logits`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.vocab_size:
            raise ValueError("Decoder: vocab_size is 0; take it from the tokenizer first (config.model_copy)")
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = NextTokenLayer(config) if config.num_nextn_predict_layers else None
        self.rotation_factor = rotation_factor(config)
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "Decoder":
        # A cast to bf16 must not round the frequencies (angles reach max_position_embeddings), and to_empty must not lose them.
        super()._apply(fn, recurse)
        self.inv_freq = rope_frequencies(self.config).to(self.inv_freq.device)
        return self

    @property
    def own_config(self) -> ModelConfig:
        """The shape of what this process has of the layers, by which keys and values are kept."""
        return self.config

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D): the embedding itself when tied."""
        return self.embed.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, routes: Routes | None = None) -> Tensor:
        """Return the normalised hidden states (T, D) of packed input_ids (T,) int64 at positions (T,) int64.

        routes: what the routers of sparse layers shall choose, and where they write down what they chose.
        """
        x, residual = self.embed(input_ids), None
        cos, sin = self._rotation(positions, x.dtype)
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, attend, routes)
        return self.norm(x) if residual is None else self.norm(x, residual)[0]

    def logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, support: tuple[Tensor, Tensor] | None = None, entropy: bool = True
    ) -> LogProbs:
        """`linear_logprob` of hidden states under the head; the entropy may be missing where it is not wanted."""
        return linear_logprob(hidden, self.lm_head_weight, targets, temperature=temperature, support=support)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) fp32 of hidden states (n, D), for sampling."""
        return linear(hidden, self.lm_head_weight, out_dtype=torch.float32)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if positions.is_cpu and dtype == torch.float32 and rows_of_their_own(self.inv_freq):
            return rotation_cpu(positions, self.inv_freq, self.rotation_factor)
        angles = positions.float()[:, None] * self.inv_freq[None]
        cos, sin = angles.cos(), angles.sin()
        if self.rotation_factor != 1:
            cos, sin = cos * self.rotation_factor, sin * self.rotation_factor
        return cos.to(dtype), sin.to(dtype)

    def look_ahead(self, hidden: Tensor, next_ids: Tensor, positions: Tensor, attend: Attend, routes: Routes | None = None) -> Tensor:
        """What the layer for multi-token prediction makes of the forward's hidden (T, D) and each position's next token (T,): (T, D), for the
        head."""
        return self.mtp(hidden, self.embed(next_ids), *self._rotation(positions, hidden.dtype), attend, routes)

    def train_mtp_(self, trained: bool) -> None:
        """Set whether the layer for multi-token prediction takes part in training."""
        for name, parameter in self.mtp.named_parameters():
            parameter.requires_grad_(trained and not name.endswith("router.bias"))

    @torch.no_grad()
    def initialize_(self, seed: int) -> "Decoder":
        """Fill all weights from `seed`: normal(0, initializer_range), residual writers divided by sqrt(2 x layers), norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            scale = std / math.sqrt(2 * len(self.layers)) if name.removesuffix(".weight").endswith(("o_proj", "down_proj")) else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return self


def rope_frequencies(config: ModelConfig) -> Tensor:
    """(d/2,) fp32 angular frequencies theta^(-2i/d), with Llama 3.1's, linear or YaRN's scaling when the config asks for it."""
    d = config.rotary_width
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    if config.rope_type == "default":
        return inv_freq
    if config.rope_type == "linear":
        return inv_freq / config.rope_scaling["factor"]
    if config.rope_type == "yarn":
        return yarn_frequencies(config, inv_freq)
    scaling = config.rope_scaling
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    # Long wavelengths are divided by `factor`, short ones kept, those between interpolated.  The order of operations is the one that the models
    # were trained with: an ulp of a frequency is a hundredth of a radian at position 100,000.
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)
