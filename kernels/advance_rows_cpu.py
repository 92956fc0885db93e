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
