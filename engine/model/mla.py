"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.1).

Keys and values of all heads come from one latent c (rank r) per token, plus one rotated key k^R that all heads share:

    [c_t; k^R_t] = W^KVa x_t,  c normed;   k_h = [W^UK_h c; rope(k^R)],  v_h = W^UV_h c;   q_h = [q^N_h; rope(q^R_h)] = W^Qb norm(W^Qa x)

Since q^N . W^UK c = (W^UK^T q^N) . c, the same attention is one of a single key head [c; rope(k^R)] of width r + R, whose values are c, and W^UV_h
is applied to the result: the *absorbed* form.  The cache holds that one head.  The *expanded* form multiplies out keys and values per head:
fewer operations per pair of tokens, but a cache of H times d.  Decoding is absorbed.  A packed forward is expanded, except where it promises the bits
of decoding: on a CPU in fp32.

DeepSeek lays the rotated pairs out as neighbours.  Even and odd ones are taken apart here, so that `rope` turns halves; queries and keys alike, which
leaves their products as they are.

T tokens, H heads, n = qk_nope_head_dim, R = qk_rope_head_dim, r = kv_lora_rank, v = v_head_dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from athanor.config import ModelConfig
from athanor.kernels import is_strict, rope
from athanor.model.layers import Linear, RMSNorm

LATENT_EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps is


@dataclass(frozen=True)
class Latent:
    """One layer's queries, keys and values before anyone decides on a form."""

    q_nope: Tensor  # (T, H, n)
    q_rope: Tensor  # (T, H, R), rotated
    latent: Tensor  # (T, r), normed
    k_rope: Tensor  # (T, R), rotated
    kv_b: Tensor  # (H, n + v, r): W^UK over W^UV
    scale: float

    @property
    def rank(self) -> int:
        return self.latent.shape[1]

    @property
    def absorbs(self) -> bool:
        """Whether a packed forward takes the form of decoding."""
        return self.latent.is_cpu and self.latent.dtype == torch.float32

    def queries(self) -> Tensor:
        """(T, H, r + R) for `keys`."""
        absorbed = torch.bmm(self.q_nope.transpose(0, 1), self.kv_b[:, : self.q_nope.shape[2]]).transpose(0, 1)
        return torch.cat((absorbed, self.q_rope), -1)

    def keys(self) -> Tensor:
        """(T, 1, r + R): what the cache holds.  The first r columns are the values too."""
        return torch.cat((self.latent, self.k_rope), -1)[:, None]

    def output(self, attended: Tensor) -> Tensor:
        """(T, H, v) from the weighted sums of the latents, (T, H, r) or wider."""
        return torch.bmm(attended[..., : self.rank].transpose(0, 1), self.kv_b[:, self.q_nope.shape[2] :].mT).transpose(0, 1)

    def expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head; values padded with zeros to the width of the keys, as flash attention wants them."""
        T, H, n = self.q_nope.shape
        k, v = F.linear(self.latent, self.kv_b.flatten(0, 1)).view(T, H, -1).split((n, self.kv_b.shape[1] - n), -1)
        k = torch.cat((k, self.k_rope[:, None].expand(-1, H, -1)), -1)
        return torch.cat((self.q_nope, self.q_rope), -1), k, F.pad(v, (0, k.shape[2] - v.shape[2]))


class LatentAttention(nn.Module):
    """The projections around it; q_a, where queries have a latent, and kv_a are one matrix."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        if config.v_head_dim > config.width_per_head:
            widths = f"v_head_dim is {config.v_head_dim}, queries are {config.width_per_head} wide"
            raise ValueError(f"LatentAttention: {widths}; wanted values no wider than queries")
        D, H = config.hidden_size, config.num_attention_heads
        self.index, self.num_heads, self.interleaved, self.scale = index, H, config.rope_interleave, softmax_scale(config)
        self.n, self.R, self.rank, self.v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, config.v_head_dim
        self.q_rank = config.q_lora_rank  # 0: q_b is all of the queries' projection
        self.qkv_a_proj = Linear(D, self.q_rank + self.rank + self.R, bias=False)
        if self.q_rank:
            self.q_a_norm = RMSNorm(self.q_rank, LATENT_EPS)
        self.q_b_proj = Linear(self.q_rank or D, H * config.width_per_head, bias=False)
        self.kv_a_norm = RMSNorm(self.rank, LATENT_EPS)
        self.kv_b_proj = Linear(self.rank, H * (self.n + self.v), bias=False)
        self.o_proj = Linear(H * self.v, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        """x (T, D), normed, to (T, D); `attend.latent(layer, Latent)` returns (T, H, v).

        Raises ValueError in strict mode on CUDA, where packed and cached latent attention do not have the same bits.
        """
        if is_strict() and x.is_cuda:
            raise ValueError("strict mode: latent attention on CUDA has no kernel whose packed and decode calls give equal bits")
        T, H = x.shape[0], self.num_heads
        q, latent, k_rope = self.qkv_a_proj(x).split((self.q_rank, self.rank, self.R), -1)
        q = self.q_b_proj(self.q_a_norm(q) if self.q_rank else x)
        q_nope, q_rope = q.view(T, H, self.n + self.R).split((self.n, self.R), -1)
        k_rope = k_rope[:, None]
        if self.interleaved:
            q_rope, k_rope = (torch.cat((a[..., ::2], a[..., 1::2]), -1) for a in (q_rope, k_rope))
        q_rope, k_rope = rope(q_rope, k_rope, cos, sin)
        kv_b = self.kv_b_proj.weight.view(H, self.n + self.v, self.rank)
        attended = attend.latent(self.index, Latent(q_nope, q_rope, self.kv_a_norm(latent), k_rope[:, 0], kv_b, self.scale))
        return self.o_proj(attended.reshape(T, H * self.v))


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature (arXiv 2309.00071, eq. 22):  0.1 weight ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(width of a query), times the square of YaRN's temperature where mscale_all_dim moves it here."""
    scale, yarn = config.width_per_head**-0.5, config.rope_scaling or {}
    weight = yarn.get("mscale_all_dim", 0)
    return scale * mscale(yarn["factor"], weight) ** 2 if weight and config.rope_type == "yarn" else scale


def yarn_frequencies(config: ModelConfig, inv_freq: Tensor) -> Tensor:
    """The frequencies (R/2,) that stay above beta_fast turns in the original context, are divided by `factor` below beta_slow, mixed between."""
    yarn, R = config.rope_scaling, config.rotary_width
    original = yarn["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(yarn.get("beta_fast") or 32), dimension(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    ramp = ((torch.arange(R // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    kept = 1 - ramp
    return inv_freq / yarn["factor"] * (1 - kept) + inv_freq * kept


def rotation_factor(config: ModelConfig) -> float:
    """What cosines and sines are multiplied by: YaRN's temperature, as far as `softmax_scale` does not have it."""
    if config.rope_type != "yarn":
        return 1.0
    yarn = config.rope_scaling
    if yarn.get("attention_factor") is not None:
        return float(yarn["attention_factor"])
    weight, all_dim = yarn.get("mscale"), yarn.get("mscale_all_dim")
    return mscale(yarn["factor"], weight) / mscale(yarn["factor"], all_dim) if weight and all_dim else mscale(yarn["factor"])
