"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's rotate-half layout.

A head of size d is two halves (a, b), and position t turns each pair (a_i, b_i) by the angle of (cos_ti, sin_ti):
a' = a cos - b sin,  b' = b cos + a sin.  The gradient is the same rotation by the opposite angle.  Angles and products are fp32, one cast at the end.
"""

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, register


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    q: (T, H, d).  k: (T, Hkv, d).  cos, sin: (T, d/2) for the position of each token, no gradient.  Returns new (q, k), dtypes kept.
    Raises ValueError on a shape mismatch or an odd d.
    """
    T, _, d = q.shape
    check(k.ndim == 3 and k.shape[0] == T and k.shape[2] == d and d % 2 == 0,
          f"rope: q is {tuple(q.shape)}, k is {tuple(k.shape)}; wanted (T, H, d) and (T, Hkv, d) with even d")  # fmt: skip
    check(cos.shape == sin.shape == (T, d // 2),
          f"rope: cos is {tuple(cos.shape)}, sin is {tuple(sin.shape)}; wanted {(T, d // 2)} for q {tuple(q.shape)}")  # fmt: skip
    return op(backend, q=q, k=k, cos=cos, sin=sin)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
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


op = register("rope", reference=Backend(rope_reference))
