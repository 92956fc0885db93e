"""Log-probability and entropy straight from hidden states and the lm_head, for CPU tensors in fp32; the equations are those of logprob.py.

A tile of rows with the whole vocabulary at a time: its logits are the product of linear_cpu.py, into a buffer that is used again, then the C++ row
function of logprob_cpu.py.  So a row has the bits that `linear` with `logprob` or `sample` gives it.

Backward: each tile's logits again, or those of the first tiles, which are kept; dlogits in their place; then two products.
"""

import torch
from torch import Tensor

from ._cpu import address, dense, dense_rows, native, run
from .linear_cpu import input_gradient, product, weight_gradient
from .logprob_cpu import described

TILE_LOGITS, LEAST_ROWS = 1 << 22, 64  # 16 MiB, unless the vocabulary is so large that 64 rows have more
MOST_ROWS = 1024  # of a small vocabulary: its tiles stay in the cache
KEPT_LOGITS, KEPT_SHARE = 1 << 24, 8  # so many (64 MiB), and at most an eighth, are kept for the backward; TILE_LOGITS in any case


def linear_logprob_cpu(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_argmax: bool,
                       support: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = max(TILE_LOGITS, min(KEPT_LOGITS, hidden.shape[0] * weight.shape[0] // KEPT_SHARE)) if backward else 0
    return run(LinearLogprobCpuFunction, hidden, weight, targets, temperature, return_argmax, *(support or (None, None)), keep)


def tiles_of(T: int, V: int) -> list[slice]:
    rows = min(MOST_ROWS, max(LEAST_ROWS, TILE_LOGITS // max(V, 1) // 16 * 16))
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


def buffer_for(hidden: Tensor, tiles: list[slice], V: int) -> Tensor:
    return hidden.new_empty(max((rows.stop - rows.start for rows in tiles), default=0), V)


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
            n = rows.stop - rows.start
            kept, keep = n * V <= keep, keep - n * V  # once a tile is not kept, none after it is: the first ones are
            logits = product(hidden[rows], weight, out=hidden.new_empty(n, V) if kept else buffer[:n])
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
            dlogits = buffer[: rows.stop - rows.start]  # kept logits stay: there may be a second backward
            logits = ctx.kept[i] if i < len(ctx.kept) else product(hidden[rows], weight, out=dlogits)
            targets, *support = (x if x is None else x[rows] for x in small)
            native().logprob_bwd(*described(logits, targets, ctx.temperature, *support),
                                 *map(address, (dlogps[rows], largest[rows], inverse_sum[rows], dlogits)), V, torch.get_num_threads())  # fmt: skip
            if dhidden is not None:
                input_gradient(dlogits, weight, out=dhidden[rows])
            if dweight is not None:
                weight_gradient(dlogits, hidden[rows], add_to=dweight)
        return dhidden, dweight, *[None] * 6
