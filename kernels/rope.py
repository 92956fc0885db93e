"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's rotate-half layout, with Qwen3's QK norm in front where asked for.

A head of size d is two halves (a, b), and position t turns each pair (a_i, b_i) by the angle of (cos_ti, sin_ti):
a' = a cos - b sin,  b' = b cos + a sin.  The gradient is the same rotation by the opposite angle.  Angles and products are fp32, one cast at the end.

QK norm (Qwen3, arXiv 2505.09388, section 2): each head is normed over d (`rmsnorm`, one weight for all query heads, one for all key heads) before
it is turned.  The rounding order is that of rope(rmsnorm(q), rmsnorm(k)): the normed head is rounded to its dtype, then turned in fp32 and rounded
again.  The reference is that composition, to the bit.
"""

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton
from .rmsnorm import rmsnorm_reference


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
         backend: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate queries and keys by their positions, normed by the weights first when these are given.

    q: (T, H, d).  k: (T, Hkv, d), both may be slices of a fused qkv.  cos, sin: (T, d/2) for the position of each token, no gradient.
    q_weight, k_weight: (d,), both or neither.  Returns new contiguous (q, k), dtypes kept, differentiable in q, k and the weights.
    Raises ValueError on a shape mismatch, an odd d, or one weight without the other.
    """
    T, _, d = q.shape
    check(k.ndim == 3 and k.shape[0] == T and k.shape[2] == d and d % 2 == 0,
          lambda: f"rope: q is {tuple(q.shape)}, k is {tuple(k.shape)}; wanted (T, H, d) and (T, Hkv, d) with even d")  # fmt: skip
    check(cos.shape == sin.shape == (T, d // 2),
          lambda: f"rope: cos is {tuple(cos.shape)}, sin is {tuple(sin.shape)}; wanted {(T, d // 2)} for q {tuple(q.shape)}")  # fmt: skip
    check((q_weight is None) == (k_weight is None), "rope: one of q_weight and k_weight is missing; wanted both or neither")
    if q_weight is not None:
        check(q_weight.shape == k_weight.shape == (d,),
              lambda: f"rope: q_weight is {tuple(q_weight.shape)}, k_weight is {tuple(k_weight.shape)}; wanted {(d,)} for q "
                      f"{tuple(q.shape)}")  # fmt: skip
    return op(backend, q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight, eps=eps)


def angles(x: Tensor) -> tuple[Tensor, int]:
    """cos or sin (T, d/2), copied only where the numbers of a row are not neighbours, with the stride of tokens."""
    x = x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else x.shape[1]


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
                   eps: float = 1e-6) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q_weight is not None:
        q, k = rmsnorm_reference(q, q_weight, eps), rmsnorm_reference(k, k_weight, eps)
    return RopeFunction.apply(q, cos, sin), RopeFunction.apply(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    a, b = x.to(wide).chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=wide, device=x.device)
    first, second = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out.to(x.dtype)


class RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


op = register("rope", triton=Backend(late("rope_triton.rope_triton"), why_not_triton),
              cpu=Backend(late("rope_cpu.rope_cpu"), why_not_cpu), reference=Backend(rope_reference))  # fmt: skip
