"""linear_logprob for CPU tensors: tiles of rows over the whole vocabulary, each a library product and then the row function of csrc/cpu/logprob.inl.

So a row has the bits that `sample` and `logprob` give it on the same logits, whatever the number of rows and the size of the vocabulary.  A product
has whole steps of ROW_STEP rows: BLAS rounds products of few rows differently.  The backward computes the logits again, but for the first tiles.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._cpu import address, dense, native, run
from .logprob_cpu import described

ROW_STEP = 16
TILE_LOGITS = 1 << 22  # of one tile: 16 MiB
LEAST_ROWS = 64  # of one tile, however large the vocabulary is: fewer would read the weights too often
KEPT_LOGITS = 1 << 24  # that the backward need not compute again: 64 MiB, and an eighth of all at most


def linear_logprob_cpu(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_argmax: bool,
                       support: tuple[Tensor, Tensor] | None = None) -> tuple:  # fmt: skip
    return run(LinearLogprobCpuFunction, hidden, weight, targets, temperature, return_argmax, *(support or (None, None)))


def tiles(T: int, V: int) -> Iterator[slice]:
    step = max(LEAST_ROWS, TILE_LOGITS // V // ROW_STEP * ROW_STEP)
    return (slice(row, min(row + step, T)) for row in range(0, T, step))


def logits_of(hidden: Tensor, weight: Tensor, rows: slice, buffer: Tensor) -> Tensor:
    """hidden[rows] weight^T into the front of `buffer`; the product has rows of zeros behind it."""
    tile = hidden[rows]
    n, missing = len(tile), -len(tile) % ROW_STEP
    if missing:
        tile = torch.cat((tile, tile.new_zeros(missing, tile.shape[1])))
    return torch.mm(tile, weight.T, out=buffer[: len(tile)])[:n]


def buffer_of(hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """Room for the logits of that many rows."""
    return hidden.new_empty(-(-(rows.stop - rows.start) // ROW_STEP) * ROW_STEP, weight.shape[0])


class LinearLogprobCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, return_argmax, thresholds, last_kept):
        T, V = hidden.shape[0], weight.shape[0]
        small = [x if x is None else dense(x) for x in (targets, thresholds, last_kept)]
        logps, entropy, largest, inverse_sum = hidden.new_empty(4, T)
        argmax = targets.new_empty(T) if return_argmax else None
        kept, room, spare = [], min(KEPT_LOGITS, T * V // 8) if any(ctx.needs_input_grad[:2]) else 0, None
        for rows in tiles(T, V):
            keep = (rows.stop - rows.start) * V <= room
            if spare is None or keep:
                buffer = buffer_of(hidden, weight, rows)
            logits = logits_of(hidden, weight, rows, buffer if keep or spare is None else spare)
            native().logprob_fwd(*parts(logits, rows, small, temperature), *(address(x if x is None else x[rows]) for x in
                                 (logps, entropy, largest, inverse_sum, argmax)), torch.get_num_threads())  # fmt: skip
            if keep:
                kept.append(logits)
                room -= logits.numel()
            elif spare is None:
                spare = buffer
        ctx.save_for_backward(hidden, weight, *small, largest, inverse_sum)
        ctx.temperature, ctx.kept = temperature, kept
        ctx.mark_non_differentiable(entropy, *([argmax] if return_argmax else []))
        return logps, entropy, argmax

    @staticmethod
    def backward(ctx, dlogps, _entropy, _argmax):
        hidden, weight, *small, largest, inverse_sum = ctx.saved_tensors
        dlogps = dense(dlogps)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        buffer = None
        for i, rows in enumerate(tiles(hidden.shape[0], weight.shape[0])):
            if buffer is None:
                buffer = buffer_of(hidden, weight, rows)
            logits = ctx.kept[i] if i < len(ctx.kept) else logits_of(hidden, weight, rows, buffer)
            out = buffer[: len(logits)]
            native().logprob_bwd(*parts(logits, rows, small, ctx.temperature), *(address(x[rows]) for x in (dlogps, largest, inverse_sum)),
                                 address(out), out.stride(0), torch.get_num_threads())  # fmt: skip
            if dhidden is not None:
                torch.mm(out, weight, out=dhidden[rows])
            if dweight is not None:
                dweight.addmm_(out.T, hidden[rows])
        return dhidden, dweight, *[None] * 5


def parts(logits: Tensor, rows: slice, small: list[Tensor | None], temperature: float) -> tuple:
    return described(logits, *(x if x is None else x[rows] for x in small[:1]), temperature,
                     *(x if x is None else x[rows] for x in small[1:]))  # fmt: skip
