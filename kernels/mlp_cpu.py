"""down(silu(gate x) * up x) of many CPU rows: the kernels of linear_cpu.py and swiglu_cpu.py on a block of rows at a time, which stays in the cache.

Layer by layer, a training step spends as much time on writing and reading what lies between the products as on a fifth of their arithmetic.  Here
only gate and up are kept for the backward; of silu(gate) * up and of both gradients there is never more than a block.

The bits are those of `linear`, `swiglu` and `linear`: rows are their own, and a block has whole runs of the sums over rows (csrc/cpu/linear.inl).
"""

import torch
from torch import Tensor

from ._cpu import dense, dense_rows, run
from .linear_cpu import input_gradient, product, weight_gradient
from .swiglu_cpu import swiglu_gradient_into, swiglu_into

BLOCK_ROWS = 512  # times the number of threads; a multiple of linear.inl's kDepth


def mlp_cpu(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """x (T, D), gate_up_weight (2F, D), down_weight (D, F), fp32; returns (T, D), differentiable."""
    return run(MlpCpuFunction, x, gate_up_weight, down_weight)


def blocks_of(T: int) -> list[slice]:
    rows = BLOCK_ROWS * torch.get_num_threads()
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


class MlpCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up_weight, down_weight):
        x, (T, D), F = dense_rows(x), x.shape, down_weight.shape[1]
        blocks, keep = blocks_of(T), any(ctx.needs_input_grad)
        largest = min(T, blocks[0].stop) if blocks else 0
        gate_up, between, y = x.new_empty(T if keep else largest, 2 * F), x.new_empty(largest, F), x.new_empty(T, D)
        for rows in blocks:
            n = rows.stop - rows.start
            here = product(x[rows], gate_up_weight, out=gate_up[rows] if keep else gate_up[:n])
            product(swiglu_into(here, between[:n]), down_weight, out=y[rows])
        ctx.save_for_backward(x, gate_up_weight, down_weight, gate_up)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate_up_weight, down_weight, gate_up = ctx.saved_tensors
        (T, D), F, dy = x.shape, down_weight.shape[1], dense(dy)
        wants_x, wants_gate_up, wants_down = ctx.needs_input_grad
        blocks = blocks_of(T)
        dx = x.new_empty(T, D) if wants_x else None
        d_gate_up = torch.zeros_like(gate_up_weight, memory_format=torch.contiguous_format) if wants_gate_up else None
        d_down = torch.zeros_like(down_weight, memory_format=torch.contiguous_format) if wants_down else None
        largest = min(T, blocks[0].stop) if blocks else 0
        between, d_between, d_here = x.new_empty(largest, F), x.new_empty(largest, F), x.new_empty(largest, 2 * F)
        for rows in blocks:
            n = rows.stop - rows.start
            d_h = input_gradient(dy[rows], down_weight, out=d_between[:n])
            d_g = swiglu_gradient_into(gate_up[rows], d_h, d_here[:n], between[:n])
            if wants_down:
                weight_gradient(dy[rows], between[:n], add_to=d_down)
            if wants_x:
                input_gradient(d_g, gate_up_weight, out=dx[rows])
            if wants_gate_up:
                weight_gradient(d_g, x[rows], add_to=d_gate_up)
        return dx, d_gate_up, d_down
