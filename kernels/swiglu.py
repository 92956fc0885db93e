"""SwiGLU (Shazeer, arXiv 2002.05202):  y = silu(gate) * up,  silu(g) = g * sigmoid(g), gate and up side by side in one tensor.

The gradient recomputes silu from the input instead of storing it:  dup = dy silu(g),  dgate = dy up sigmoid(g) (1 + g (1 - sigmoid(g))).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import Backend, accumulation_dtype, check, register


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply silu of the first half of each row by the second half.

    gate_up: (T, 2F), gate first.  Returns (T, F) of the same dtype; computed in fp32.  Raises ValueError when the last axis is odd.
    """
    check(gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, f"swiglu: gate_up is {tuple(gate_up.shape)}; wanted (T, 2F)")
    return op(backend, gate_up=gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    return SwigluFunction.apply(gate_up)


class SwigluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
        return F.silu(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        wide = gate_up.to(accumulation_dtype(gate_up.dtype))
        dy = dy.to(wide.dtype)
        gate, up = wide.chunk(2, dim=-1)
        out = torch.empty_like(wide, memory_format=torch.contiguous_format)
        dgate, dup = out.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=dup)
        dup.mul_(dy)
        torch.mul(dy, up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return out.to(gate_up.dtype)


op = register("swiglu", reference=Backend(swiglu_reference))
