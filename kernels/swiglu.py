"""SwiGLU (Shazeer, arXiv 2002.05202):  y = silu(gate) * up,  silu(g) = g * sigmoid(g), gate and up side by side in one tensor.

The gradient recomputes silu from the input instead of storing it:  dup = dy silu(g),  dgate = dy up sigmoid(g) (1 + g (1 - sigmoid(g))).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._cpu import why_not_cpu
from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton

PARALLEL_GRAIN = 32768  # elements below which PyTorch's elementwise CPU loops stay on one thread (at::internal::GRAIN_SIZE)


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply silu of the first half of each row by the second half.

    gate_up: (T, 2F), gate first, rows of any stride.  Returns (T, F) of the same dtype, differentiable; computed in fp32, rounded once.
    Raises ValueError when the last axis is odd.
    """
    check(gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, lambda: f"swiglu: gate_up is {tuple(gate_up.shape)}; wanted (T, 2F)")
    return op(backend, gate_up=gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    return SwigluFunction.apply(gate_up)


def whole_row_shares(x: Tensor) -> list[int]:
    """Numbers of rows of x (T, F) to compute in one call each, so that no CPU thread starts in the middle of a row.

    PyTorch shares elements among its threads wherever the count falls, and the exp of a share's last few elements is the scalar one, an ulp off the
    vectorised one: then the bits of a row depend on how many other rows there are.
    """
    T, width = x.shape
    if x.device.type != "cpu" or T == 0:
        return [T]
    shares = []
    while T:
        rows = T
        while rows % min(torch.get_num_threads(), -(-rows * width // PARALLEL_GRAIN)):
            rows -= 1
        shares.append(rows)
        T -= rows
    return shares


class SwigluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
        return torch.cat([F.silu(part) for part in gate.split(whole_row_shares(gate))]).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx, dy):
        return swiglu_gradient(*ctx.saved_tensors, dy)


def swiglu_gradient(gate_up: Tensor, dy: Tensor) -> Tensor:
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


op = register("swiglu", triton=Backend(late("swiglu_triton.swiglu_triton"), why_not_triton),
              cpu=Backend(late("swiglu_cpu.swiglu_cpu"), why_not_cpu), reference=Backend(swiglu_reference))  # fmt: skip
