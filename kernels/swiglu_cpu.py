"""SwiGLU for CPU tensors: csrc/cpu/swiglu.inl, one pass forward and one backward."""

import torch
from torch import Tensor

from ._cpu import dense, dense_rows, native, run


def swiglu_cpu(gate_up: Tensor) -> Tensor:
    return run(SwigluCpuFunction, gate_up)


class SwigluCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = dense_rows(gate_up)
        ctx.save_for_backward(gate_up)
        T, F = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(T, F)
        native().swiglu_fwd(gate_up.data_ptr(), y.data_ptr(), T, F, gate_up.stride(0), torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx, dy):
        return swiglu_gradient_cpu(*ctx.saved_tensors, dy)


def swiglu_gradient_cpu(gate_up: Tensor, dy: Tensor) -> Tensor:
    gate_up, dy = dense_rows(gate_up), dense(dy)
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    T, F = dy.shape
    native().swiglu_bwd(gate_up.data_ptr(), dy.data_ptr(), out.data_ptr(), T, F, gate_up.stride(0), torch.get_num_threads())
    return out
