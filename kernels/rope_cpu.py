"""Rotary position embedding for CPU tensors: csrc/cpu/rope.inl, with the QK norm in front where weights are given.  The equations are in rope.py.

One pass turns all heads of a token, queries and keys, read where they lie.  The backward through the norm computes rstd again, with the bits that it
had, and adds dweight in the order of rmsnorm_cpu.py.
"""

import torch
from torch import Tensor

from ._cpu import address, dense, native, run
from .rmsnorm_cpu import located
from .rope import angles


def rope_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
             eps: float = 1e-6) -> tuple[Tensor, Tensor]:  # fmt: skip
    return run(RopeCpuFunction, q, k, cos, sin, q_weight, k_weight, eps)


class RopeCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps):
        weights = (dense(q_weight), dense(k_weight)) if q_weight is not None else ()
        ctx.save_for_backward(cos, sin, *((q, k, *weights) if weights else ()))
        ctx.eps = eps
        return rotated(q, k, cos, sin, weights, eps, inverse=False)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin, *normed = ctx.saved_tensors
        if not normed:
            return *rotated(dq, dk, cos, sin, (), ctx.eps, inverse=True), *[None] * 5
        q, k, *weights = normed
        (cos, cos_stride), (sin, sin_stride) = angles(cos), angles(sin)
        gradients, dweights = [], []
        for x, dy, weight, with_dweight in zip((q, k), (dq, dk), weights, ctx.needs_input_grad[4:6], strict=True):
            T, H, d = x.shape
            dx, dweight = x.new_empty(x.shape), torch.empty_like(weight) if with_dweight else None
            (x, x_rows), (dy, dy_rows) = located(x), located(dy)
            native().rope_norm_bwd(x_rows, dy_rows, H, weight.data_ptr(), dx.data_ptr(), address(dweight), cos.data_ptr(),
                                   sin.data_ptr(), cos_stride, sin_stride, T, d, ctx.eps, torch.get_num_threads())  # fmt: skip
            gradients.append(dx)
            dweights.append(dweight)
        return *gradients, None, None, *dweights, None


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: tuple, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k turned by the angles, or by their opposites; normed first where there are weights."""
    T, H, d = q.shape
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    (q, q_rows), (k, k_rows), (cos, cos_stride), (sin, sin_stride) = located(q), located(k), angles(cos), angles(sin)
    addresses = [w.data_ptr() for w in weights] or [0, 0]
    native().rope(q_rows, k_rows, H, k.shape[1], *addresses, *(x.data_ptr() for x in out), cos.data_ptr(), sin.data_ptr(), cos_stride, sin_stride,
                  T, d, eps, inverse, torch.get_num_threads())  # fmt: skip
    return out


def rotation_cpu(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """factor cos(p f) and factor sin(p f), (T, d/2) fp32 each, of positions (T,) int32 or int64 and frequencies (d/2,) fp32."""
    positions, frequencies = positions.contiguous(), frequencies.contiguous()
    T, half, wide = len(positions), len(frequencies), positions.dtype == torch.int64
    cos, sin = frequencies.new_empty(T, half), frequencies.new_empty(T, half)
    native().rotation(positions.data_ptr(), wide, frequencies.data_ptr(), factor, cos.data_ptr(), sin.data_ptr(), T, half, torch.get_num_threads())
    return cos, sin
