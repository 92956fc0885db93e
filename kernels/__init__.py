"""GPU kernels for reinforcement learning on language models, each with a PyTorch reference that is its specification and CPU path.

Importing this needs torch and nothing else: Triton, CuPy and flash-attn are imported by the first call that runs on them.
The public functions bear the names of their files, so `from athanor.kernels.rmsnorm import ...` reaches the file's other contents.
"""

from ._dispatch import is_strict, strict_mode, use_backend
from ._philox import philox_uniform
from .advance_rows import advance_rows, row_positions
from .attention import attention
from .fp8_grouped_gemm import fp8_grouped_gemm, fp8_grouped_matmul, fp8_grouped_wgrad
from .fp8_mixture import fp8_mixture
from .fp8_producers import Produced, fp8_permute, fp8_rmsnorm, fp8_swiglu, fp8_swiglu_backward
from .fp8_quantize import Quantized, fp8_quantize, fp8_quantize_dual
from .fp8_quantize_many import fp8_quantize_many
from .group_advantage import group_advantage
from .grouped_gemm import grouped_gemm, grouped_wgrad
from .grpo_loss import grpo_loss
from .kv_append import kv_append, qkv_append
from .linear import linear
from .linear_grpo import linear_grpo
from .linear_logprob import linear_logprob
from .linear_logprob_parallel import linear_logprob_parallel
from .linear_sample import linear_sample
from .logits_grpo import logits_grpo
from .logprob import LogProbs, Support, logprob
from .mla_decode import mla_decode
from .moe_permute import Places, moe_dots, moe_permute, moe_places, moe_unpermute
from .moe_route import Routing, moe_route
from .paged_attention import empty_kv_cache, paged_attention
from .policy_loss import LossVariant, policy_loss
from .rmsnorm import rmsnorm
from .rope import rope
from .sample import Sampled, sample
from .swiglu import swiglu

__all__ = [
    "LogProbs", "LossVariant", "Places", "Produced", "Quantized", "Routing", "Sampled", "Support", "advance_rows", "attention", "empty_kv_cache",
    "fp8_grouped_gemm", "fp8_grouped_matmul", "fp8_grouped_wgrad", "fp8_mixture", "fp8_permute", "fp8_quantize", "fp8_quantize_dual",
    "fp8_quantize_many", "fp8_rmsnorm", "fp8_swiglu", "fp8_swiglu_backward", "group_advantage", "grouped_gemm", "grouped_wgrad", "grpo_loss",
    "is_strict", "kv_append", "linear", "linear_grpo", "linear_logprob", "linear_logprob_parallel", "linear_sample", "logits_grpo", "logprob",
    "mla_decode", "moe_dots", "moe_permute", "moe_places", "moe_route", "moe_unpermute", "paged_attention", "philox_uniform", "policy_loss",
    "qkv_append", "rmsnorm", "rope", "row_positions", "sample", "strict_mode", "swiglu", "use_backend",
]  # fmt: skip
