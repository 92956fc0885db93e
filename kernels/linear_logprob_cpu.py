"""Log-probability and entropy straight from hidden states and the lm_head, for CPU tensors in fp32; the equations are those of logprob.py.

A tile of rows with the whole vocabulary at a time: its logits are a BLAS product into a buffer that is used again, then the C++ row function of
logprob_cpu.py.  So a row has the bits that `logprob` and `sample` have on the same logits.  BLAS rounds a row in one way in products of 16 rows or
more, in another where there are only one or two: tiles are whole multiples of 16 rows, the last one filled up with zeros.  With few columns (V up to
100, no multiple of 16) BLAS also rounds by the number of threads: such rows have the sampler's bits under the same number only.

Backward: each tile's logits again, or those of the first tiles, which are kept; dlogits in their place; then two products.
"""

import torch
from torch import Tensor

from ._cpu import address, dense, dense_rows, native, run
from .logprob_cpu import described

TILE_LOGITS, LEAST_ROWS = 1 << 22, 64  # 16 MiB, unless the vocabulary is so large that 64 rows have more
KEPT_LOGITS, KEPT_SHARE = 1 << 24, 8  # so many (64 MiB), and at most an eighth, are kept for the backward; one tile in any case


def linear_logprob_cpu(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_argmax: bool,
                       support: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = max(TILE_LOGITS, min(KEPT_LOGITS, hidden.shape[0] * weight.shape[0] // KEPT_SHARE)) if backward else 0
    return run(LinearLogprobCpuFunction, hidden, weight, targets, temperature, return_argmax, *(support or (None, None)), keep)


def filled_up(rows: int) -> int:
    return -(-rows // 16) * 16


def tiles_of(T: int, V: int) -> list[slice]:
    rows = max(LEAST_ROWS, TILE_LOGITS // max(V, 1) // 16 * 16)
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


def buffer_for(hidden: Tensor, tiles: list[slice], V: int) -> Tensor:
    return hidden.new_empty(max((filled_up(rows.stop - rows.start) for rows in tiles), default=0) * V)


def product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden @ weight.T of one tile, in the memory of out."""
    (n, D), V = hidden.shape, weight.shape[0]
    rows = filled_up(n)
    if rows > n:
        hidden = torch.cat((hidden, hidden.new_zeros(rows - n, D)))
    return torch.mm(hidden, weight.T, out=out[: rows * V].view(rows, V))[:n]


class LinearLogprobCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, return_argmax, thresholds, last_kept, keep):
        hidden, (T, V) = dense_rows(hidden), (hidden.shape[0], weight.shape[0])
        small = [x if x is None else dense(x) for x in (targets, thresholds, last_kept)]
        logps, entropy, largest, inverse_sum = (hidden.new_empty(T) for _ in range(4))
        argmax = targets.new_empty(T) if return_argmax else None
        tiles, ctx.kept = tiles_of(T, V), []
        buffer = buffer_for(hidden, tiles, V)
        for rows in tiles:
            size = filled_up(rows.stop - rows.start) * V
            kept, keep = size <= keep, keep - size  # once a tile is not kept, none after it is: the first ones are
            logits = product(hidden[rows], weight, hidden.new_empty(size) if kept else buffer)
            if kept:
                ctx.kept.append(logits)
            targets_here, *support = (x if x is None else x[rows] for x in small)
            out = (x if x is None else x[rows] for x in (logps, entropy, largest, inverse_sum, argmax))
            native().logprob_fwd(*described(logits, targets_here, temperature, *support), *map(address, out), torch.get_num_threads())
        ctx.save_for_backward(hidden, weight, *small, largest, inverse_sum)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy, *([argmax] if return_argmax else []))
        return logps, entropy, argmax

    @staticmethod
    def backward(ctx, dlogps, _entropy, _argmax):
        hidden, weight, *small, largest, inverse_sum = ctx.saved_tensors
        T, V = hidden.shape[0], weight.shape[0]
        dlogps, tiles = dense(dlogps), tiles_of(T, V)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        buffer = buffer_for(hidden, tiles, V)
        for i, rows in enumerate(tiles):
            logits = ctx.kept[i] if i < len(ctx.kept) else product(hidden[rows], weight, buffer)
            dlogits = buffer[: logits.numel()].view(logits.shape)  # kept logits stay: there may be a second backward
            targets, *support = (x if x is None else x[rows] for x in small)
            native().logprob_bwd(*described(logits, targets, ctx.temperature, *support),
                                 *map(address, (dlogps[rows], largest[rows], inverse_sum[rows], dlogits)), V, torch.get_num_threads())  # fmt: skip
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[rows])
            if dweight is not None:
                dweight.addmm_(dlogits.T, hidden[rows])
        return dhidden, dweight, *[None] * 6
