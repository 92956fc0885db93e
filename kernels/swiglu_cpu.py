"""SwiGLU for CPU tensors: csrc/cpu/swiglu.inl, one pass forward and one backward."""

import torch
from torch import Tensor

from ._cpu import address, dense, dense_rows, native, run


def swiglu_cpu(gate_up: Tensor) -> Tensor:
    return run(SwigluCpuFunction, gate_up)


class SwigluCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = dense_rows(gate_up)
        ctx.save_for_backward(gate_up)
        return swiglu_into(gate_up, gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2))

    @staticmethod
    def backward(ctx, dy):
        return swiglu_gradient_cpu(*ctx.saved_tensors, dy)


def swiglu_gradient_cpu(gate_up: Tensor, dy: Tensor) -> Tensor:
    gate_up = dense_rows(gate_up)
    return swiglu_gradient_into(gate_up, dense(dy), torch.empty_like(gate_up, memory_format=torch.contiguous_format))


def swiglu_into(gate_up: Tensor, y: Tensor) -> Tensor:
    """Write silu(gate) * up of gate_up (T, 2F), rows of neighbours, to y (T, F) contiguous; return y."""
    native().swiglu_fwd(gate_up.data_ptr(), y.data_ptr(), *y.shape, gate_up.stride(0), torch.get_num_threads())
    return y


def swiglu_gradient_into(gate_up: Tensor, dy: Tensor, out: Tensor, y: Tensor | None = None) -> Tensor:
    """Write the gradient of gate_up (T, 2F) to out (T, 2F), and silu(gate) * up once more to y (T, F) if there is one; return out.

    gate_up: rows of neighbours; dy (T, F), out and y contiguous.
    """
    native().swiglu_bwd(gate_up.data_ptr(), dy.data_ptr(), out.data_ptr(), address(y), *dy.shape, gate_up.stride(0), torch.get_num_threads())
    return out
