"""Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467, eq. 4):  y = x / sqrt(mean(x^2) + eps) * weight.

One rounding order, used by rollout and trainer: everything in fp32 (fp64 for fp64 input), one cast at the end.  Hugging Face's eager
modules cast before the multiplication by the weight instead; the two differ in bf16 only.
"""

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, register


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Divide each row by its root mean square and multiply by the weight.

    x: (..., D).  weight: (D,).  Returns the shape and dtype of x, differentiable in both.  Raises ValueError on a shape mismatch.
    """
    check(weight.ndim == 1 and x.ndim >= 1 and x.shape[-1] == weight.shape[0],
          f"rmsnorm: weight is {tuple(weight.shape)}, x is {tuple(x.shape)}; wanted weight (D,) and x (..., D)")  # fmt: skip
    return op(backend, x=x, weight=weight, eps=eps)


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return RMSNormFunction.apply(x, weight, eps)


class RMSNormFunction(torch.autograd.Function):
    """With n = x * rstd and g = dy * weight:  dx = rstd * (g - n * mean(g * n)),  dweight = sum over rows of dy * n."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(accumulation_dtype(x.dtype))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        wide, dy = x.to(rstd.dtype), dy.to(rstd.dtype)
        dx = dweight = None
        normed = wide * rstd
        if ctx.needs_input_grad[1]:
            dweight = (dy * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = dy * weight
            dot = (grad * normed).mean(-1, keepdim=True)
            dx = grad.sub_(normed.mul_(dot)).mul_(rstd).to(x.dtype)
        return dx, dweight, None


op = register("rmsnorm", reference=Backend(rmsnorm_reference))
