"""Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467, eq. 4):  y = x / sqrt(mean(x^2) + eps) * weight.

One rounding order, used by rollout and trainer: everything in fp32 (fp64 for fp64 input), one cast at the end.  Hugging Face's eager
modules cast before the multiplication by the weight instead; the two differ in bf16 only.

With a residual the norm is taken of s = x + residual *after* s is rounded to the dtype of x, so that whoever reads s sees the numbers that were
normed, and y is the one that rmsnorm(x + residual) gives.  Backward: the gradient of s joins in fp32, before the one cast.

A row whose sum of squares exceeds fp32 (|x| around 1e19) comes out as zeros, as in torch.nn.functional.rms_norm.
"""

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None,
            backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Divide each row by its root mean square and multiply by the weight; with a residual, add it first.

    x: (..., D).  weight: (D,).  residual: shape and dtype of x.  Returns y of the shape and dtype of x, or (y, s) with s = x + residual when a
    residual is given; differentiable in all.  Raises ValueError on a shape or dtype mismatch.

    Rows whose elements are neighbours in memory are read in place when all axes but one before the last form one stride (a head slice of a fused
    qkv matrix does); any other layout is copied first by the Triton and cpu backends.
    """
    check(weight.ndim == 1 and x.ndim >= 1 and x.shape[-1] == weight.shape[0],
          lambda: f"rmsnorm: weight is {tuple(weight.shape)}, x is {tuple(x.shape)}; wanted weight (D,) and x (..., D)")  # fmt: skip
    if residual is not None:
        check(residual.shape == x.shape and residual.dtype == x.dtype,
              lambda: f"rmsnorm: residual is {tuple(residual.shape)} {residual.dtype}; wanted that of x, {tuple(x.shape)} {x.dtype}")  # fmt: skip
    return op(backend, x=x, weight=weight, eps=eps, residual=residual)


def in_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x (..., D) as rows: x itself (or a contiguous copy where no two strides describe it), and (inner, outer_stride, inner_stride):
    row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride."""
    D = x.shape[-1]
    if x.is_contiguous():
        return x, 1, D, 0
    axes = []  # (size, stride) of the leading axes, neighbours that form one stride merged; an axis of size 1 has no stride
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        else:
            axes.append((size, stride))
    if (D > 1 and x.stride(-1) != 1) or len(axes) > 2:
        return x.contiguous(), 1, D, 0
    if len(axes) == 2:
        return x, axes[1][0], axes[0][1], axes[1][1]
    return x, 1, axes[0][1] if axes else D, 0


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return RMSNormFunction.apply(x, weight, eps, residual)


class RMSNormFunction(torch.autograd.Function):
    """With n = s * rstd and g = dy * weight:  dx = dresidual = rstd * (g - n * mean(g * n)) + ds,  dweight = sum over rows of dy * n."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        ctx.set_materialize_grads(False)
        s = x if residual is None else x + residual
        wide = s.to(accumulation_dtype(x.dtype))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(s, weight, rstd)
        y = (wide * rstd).mul_(weight).to(x.dtype)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight, rstd = ctx.saved_tensors
        if dy is None:
            return ds, None, None, ds
        wide, dy = s.to(rstd.dtype), dy.to(rstd.dtype)
        dx = dweight = None
        normed = wide * rstd
        if ctx.needs_input_grad[1]:
            dweight = (dy * normed).reshape(-1, s.shape[-1]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            grad = dy * weight
            dot = (grad * normed).mean(-1, keepdim=True)
            grad.sub_(normed.mul_(dot)).mul_(rstd)
            dx = (grad if ds is None else grad.add_(ds)).to(s.dtype)
        return dx, dweight, None, dx if ctx.needs_input_grad[3] else None


op = register("rmsnorm", triton=Backend(late("rmsnorm_triton.rmsnorm_triton"), why_not_triton),
              cpu=Backend(late("rmsnorm_cpu.rmsnorm_cpu"), why_not_cpu), reference=Backend(rmsnorm_reference))  # fmt: skip
