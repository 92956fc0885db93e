"""Packed batches: sequences laid end to end, no padding.

T packed tokens, S sequences, N tokens with a loss.  A sequence is prompt + completion; the loss is on the completion, so row t of the hidden
states predicts token t + 1 for the rows listed in `loss_rows`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from athanor._host import best_fit_pack


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on the device."""

    input_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (S+1,) int32
    loss_rows: Tensor  # (N,) int64, rows whose next token is trained
    targets: Tensor  # (N,) int64, those next tokens
    loss_cu_seqlens: Tensor  # (S+1,) int32 over the N rows
    sequences: np.ndarray  # (S,) which of the caller's sequences these are

    @property
    def num_targets(self) -> int:
        return len(self.targets)


def work_of(length: int, hidden_size: int) -> float:
    """What a sequence of `length` tokens costs a dense decoder, in tokens of a short one: attention adds length / 12 hidden_size to each.

    Per token and layer the matrices cost about 24 D^2 operations, attention 4 D for each of the length / 2 tokens before it, on the mean.
    """
    return length * (1 + length / (12 * hidden_size))


def pack(prompts: list[np.ndarray], completions: list[np.ndarray], micro_batch_tokens: int, device: torch.device | str = "cpu") -> list[PackedBatch]:
    """Best-fit pack S sequences (prompt (p,) int64, completion (c,) int64) into as few micro-batches as fit; a longer sequence gets its own.

    The last token of a sequence is never an input (nothing follows it), and an empty prompt has no loss on its first token.
    """
    if not prompts:
        return []
    lengths = np.array([len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)], np.int64)
    if (lengths < 1).any():
        raise ValueError(f"pack: sequence {int(np.argmin(lengths))} has {int(lengths.min()) + 1} tokens, wanted at least 2")
    bins, num_bins = best_fit_pack(lengths, max(micro_batch_tokens, int(lengths.max())))
    return [_concatenate(np.flatnonzero(bins == b), prompts, completions, device) for b in range(num_bins)]


def empty_batch(device: torch.device | str = "cpu") -> PackedBatch:
    """A micro-batch without sequences: a forward and a backward that change nothing."""
    ids, offsets = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    return PackedBatch(ids, ids, offsets, ids, ids, offsets, np.zeros(0, np.int64))


def _concatenate(members: np.ndarray, prompts: list[np.ndarray], completions: list[np.ndarray], device: torch.device | str) -> PackedBatch:
    inputs, rows, targets, positions, ends, loss_ends, start = [], [], [], [], [0], [0], 0
    for s in members:
        tokens = np.concatenate((prompts[s], completions[s]))
        n, first = len(tokens) - 1, max(len(prompts[s]) - 1, 0)
        inputs.append(tokens[:-1])
        positions.append(np.arange(n))
        rows.append(np.arange(start + first, start + n))
        targets.append(tokens[first + 1 :])
        start += n
        ends.append(start)
        loss_ends.append(loss_ends[-1] + n - first)

    def tensor(parts, dtype=np.int64):
        return torch.from_numpy(np.ascontiguousarray(parts, dtype)).to(device)

    return PackedBatch(
        tensor(np.concatenate(inputs)), tensor(np.concatenate(positions)), tensor(ends, np.int32),
        tensor(np.concatenate(rows)), tensor(np.concatenate(targets)), tensor(loss_ends, np.int32), members,
    )
