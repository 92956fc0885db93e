"""Root-mean-square norm for CPU tensors: csrc/cpu/rmsnorm.inl, with the residual addition in front; the equations are those of rmsnorm.py.

dweight is added in runs of rows that their number alone fixes, then run after run: its bits do not depend on the number of threads.
"""

import torch
from torch import Tensor

from ._cpu import address, dense, native, run
from .rmsnorm import in_rows

NO_ROWS = (0, 1, 0, 0)


def rmsnorm_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return run(RMSNormCpuFunction, x, weight, eps, residual)


def located(x: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """x (..., D) or the copy of it that has to live as long as its address is used, and its rows as the C++ side takes them."""
    if x is None:
        return None, NO_ROWS
    x, *strides = in_rows(x)
    return x, (x.data_ptr(), *strides)


class RMSNormCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        ctx.set_materialize_grads(False)
        weight, y, rstd = dense(weight), x.new_empty(x.shape), x.new_empty(x.shape[:-1])
        s = x if residual is None else torch.empty_like(y)
        (x, x_rows), (residual, residual_rows) = located(x), located(residual)
        native().rmsnorm_fwd(x_rows, residual_rows, weight.data_ptr(), s.data_ptr(), y.data_ptr(), rstd.data_ptr(), rstd.numel(), x.shape[-1], eps,
                             torch.get_num_threads())  # fmt: skip
        ctx.save_for_backward(s, weight, rstd)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight, rstd = ctx.saved_tensors
        if dy is None:
            return ds, None, None, ds
        dx = s.new_empty(s.shape)
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        (s, s_rows), (dy, dy_rows), (ds, ds_rows) = located(s), located(dy), located(ds)
        native().rmsnorm_bwd(s_rows, dy_rows, ds_rows, weight.data_ptr(), rstd.data_ptr(), dx.data_ptr(), address(dweight), rstd.numel(), s.shape[-1],
                             torch.get_num_threads())  # fmt: skip
        return dx, dweight, None, dx if ctx.needs_input_grad[3] else None
