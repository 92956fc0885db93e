"""Linear layer for CPU tensors: csrc/cpu/linear.inl.  dx = dy weight,  dweight = dy^T x,  dbias = the sum of dy's rows."""

import torch
from torch import Tensor

from ._cpu import address, dense, dense_rows, native, run


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return run(LinearCpuFunction, x, weight, bias)


def located(x: Tensor) -> tuple[Tensor, int, int]:
    """x (T, N) or the copy of it that has to live as long as its address is used, that address, and the step from row to row."""
    x = dense_rows(x)
    return x, x.data_ptr(), x.stride(0)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x (T, K) weight (N, K)^T + bias (N,), in the memory of out (T, N) contiguous."""
    (T, K), N = x.shape, weight.shape[0]
    y = x.new_empty(T, N) if out is None else out
    (x, *x_rows), (weight, *weight_rows), bias = located(x), located(weight), None if bias is None else dense(bias)
    native().linear_fwd(*x_rows, *weight_rows, address(bias), y.data_ptr(), T, N, K, torch.get_num_threads())
    return y


def input_gradient(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dy (T, N) weight (N, K), in the memory of out (T, K) contiguous."""
    (T, N), K = dy.shape, weight.shape[1]
    dx = dy.new_empty(T, K) if out is None else out
    (dy, *dy_rows), (weight, *weight_rows) = located(dy), located(weight)
    native().linear_dx(*dy_rows, *weight_rows, dx.data_ptr(), T, N, K, torch.get_num_threads())
    return dx


def weight_gradient(dy: Tensor, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """dy (T, N)^T x (T, K), added to add_to (N, K) contiguous where there is one."""
    (T, N), K = dy.shape, x.shape[1]
    dw = dy.new_empty(N, K) if add_to is None else add_to
    (dy, *dy_rows), (x, *x_rows) = located(dy), located(x)
    native().linear_dw(*dy_rows, *x_rows, dw.data_ptr(), T, N, K, add_to is not None, torch.get_num_threads())
    return dw


class LinearCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = input_gradient(dy, weight) if ctx.needs_input_grad[0] else None
        dweight = weight_gradient(dy, x) if ctx.needs_input_grad[1] else None
        return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None
