"""The bookkeeping of a decode step for CPU tensors: csrc/cpu/decode_rows.cpp; the rules are those of advance_rows.py."""

import torch
from torch import Tensor

from ._cpu import address, native


def advance_rows_cpu(tokens, logps, token_ring, logp_ring, status, lengths, max_lengths, generated, slots, last, eos, drawing, streaks) -> None:
    streak = (0, 0, 0, 0) if streaks is None else (x.data_ptr() for x in streaks)
    native().advance_rows(*(x.data_ptr() for x in (status, generated, slots, last, lengths, max_lengths, eos)), eos.shape[1], address(drawing),
                          *streak, *(x.data_ptr() for x in (tokens, logps, token_ring, logp_ring)), token_ring.stride(0), len(tokens))  # fmt: skip


def row_positions_cpu(status: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    positions, ends = (torch.empty_like(lengths, memory_format=torch.contiguous_format) for _ in range(2))
    status, lengths = status.contiguous(), lengths.contiguous()
    native().row_positions(*(x.data_ptr() for x in (status, lengths, positions, ends)), len(positions))
    return positions, ends


def take_rows_cpu(table: Tensor, indices: Tensor) -> Tensor:
    """(n, D) rows of table (V, D) fp32 at indices (n,) int64.  Raises IndexError where there is none."""
    table, indices = table.detach().contiguous(), indices.contiguous()
    out = table.new_empty(len(indices), table.shape[1])
    if not native().take_rows(table.data_ptr(), *table.shape, indices.data_ptr(), len(indices), out.data_ptr()):
        raise IndexError(f"take_rows_cpu: indices are {int(indices.min())} to {int(indices.max())}, wanted 0 to {len(table) - 1}")
    return out
