"""Grouped products for CPU tensors: those of csrc/cpu/linear.inl, expert by expert, whose offsets are read where they lie."""

import torch
from torch import Tensor

from ._cpu import dense, native, run
from .linear_cpu import located


def grouped_gemm_cpu(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return run(GroupedGemmCpuFunction, x, w, offsets)


def grouped_wgrad_cpu(dy: Tensor, x: Tensor, offsets: Tensor, experts: int) -> Tensor:
    dw = x.new_empty(experts, dy.shape[1], x.shape[1])
    (dy, *dy_rows), (x, *x_rows) = located(dy), located(x)
    native().grouped_dw(*dy_rows, *x_rows, dw.data_ptr(), *described(offsets, experts, len(x)), *dw.shape[1:], torch.get_num_threads())
    return dw


def described(offsets: Tensor, E: int, T: int) -> tuple:
    """How the C++ side is told of the groups."""
    return offsets.data_ptr(), offsets.dtype == torch.int64, len(offsets) == E + 1, E, T


class GroupedGemmCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets):
        w = dense(w)
        ctx.save_for_backward(x, w, offsets)
        (x, *x_rows), (E, N, K) = located(x), w.shape
        y = x.new_empty(len(x), N)
        native().grouped_fwd(*x_rows, w.data_ptr(), y.data_ptr(), *described(offsets, E, len(x)), N, K, torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, offsets = ctx.saved_tensors
        E, N, K = w.shape
        dx = None
        if ctx.needs_input_grad[0]:
            dx, (dy, *dy_rows) = x.new_empty(x.shape), located(dy)
            native().grouped_dx(*dy_rows, w.data_ptr(), dx.data_ptr(), *described(offsets, E, len(x)), N, K, torch.get_num_threads())
        return dx, grouped_wgrad_cpu(dy, x, offsets, E) if ctx.needs_input_grad[1] else None, None
