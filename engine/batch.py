"""Packed batches: sequences laid end to end, no padding.

T packed tokens, S sequences, N tokens with a loss.  A sequence is prompt + completion; the loss is on the completion, so row t of the hidden
states predicts token t + 1 for the rows listed in `loss_rows`.

Sequences with the same prompt can share it: its rows are computed once, as a part of their own, and only keys and values are copied to each
completion, which is a part whose queries are its last keys.  The last token of the prompt belongs to the completions, so every row of theirs, and
no other, has a loss.  A row's values are those of the unshared batch; gradients are, too, summed in another order.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from athanor._host import best_fit_pack


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on the device."""

    input_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (parts+1,) int32; parts are the S sequences, and shared prompts before theirs
    loss_rows: Tensor  # (N,) int64, rows whose next token is trained
    targets: Tensor  # (N,) int64, those next tokens
    loss_cu_seqlens: Tensor  # (S+1,) int32 over the N rows
    sequences: np.ndarray  # (S,) which of the caller's sequences these are
    shared: "SharedKeys | None" = None  # None: each part has the keys of its own rows

    @property
    def num_targets(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class SharedKeys:
    """U keys of the parts of a batch of T rows, some of which appear in several parts; R rows do."""

    rows: Tensor  # (U,) int64, the row that each key is of
    cu_seqlens: Tensor  # (parts+1,) int32
    own: Tensor  # (T,) int64, each row's key in its own part
    repeated: Tensor  # (R,) int64, rows with keys in other parts
    copies: Tensor  # (R, most copies) int64, those keys; -1 where there are fewer

    def filled(self, num_rows: int) -> "SharedKeys":
        """With one more part, of the rows behind the batch's up to `num_rows`."""
        more = torch.arange(num_rows - len(self.own), device=self.own.device)
        if not len(more):
            return self
        ends = self.cu_seqlens.new_full((1,), len(self.rows) + len(more))
        return replace(self, rows=torch.cat((self.rows, len(self.own) + more)), own=torch.cat((self.own, len(self.rows) + more)),
                       cu_seqlens=torch.cat((self.cu_seqlens, ends)))  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """(U, ...) keys or values of the rows x (T, ...)."""
        return _Repeat.apply(x, self)


class _Repeat(torch.autograd.Function):
    """x[rows]; the gradient adds a row's copies in their order, whatever else runs."""

    @staticmethod
    def forward(ctx, x: Tensor, shared: SharedKeys) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        shared = ctx.shared
        dx = grad.index_select(0, shared.own)
        missing = (shared.copies < 0).view(*shared.copies.shape, *[1] * (grad.dim() - 1))
        copies = grad.index_select(0, shared.copies.clamp_min(0).flatten()).view(*shared.copies.shape, *grad.shape[1:]).masked_fill_(missing, 0)
        return dx.index_copy_(0, shared.repeated, dx.index_select(0, shared.repeated) + copies.sum(1)), None


def work_of(length: int, hidden_size: int, before: int = 0) -> float:
    """What a sequence of `length` tokens costs a dense decoder, in tokens of a short one: attention adds length / 12 hidden_size to each.

    Per token and layer the matrices cost about 24 D^2 operations, attention 4 D for each of the length / 2 tokens before it, on the mean.
    before: tokens that it sees and does not compute.
    """
    return length * (1 + (2 * before + length) / (12 * hidden_size))


def pack(
    prompts: list[np.ndarray], completions: list[np.ndarray], micro_batch_tokens: int, device: torch.device | str = "cpu", *,
    share_prompts: bool = False,
) -> list[PackedBatch]:
    """Best-fit pack S sequences (prompt (p,) int64, completion (c,) int64) into as few micro-batches as fit; a longer sequence gets its own.

    The last token of a sequence is never an input (nothing follows it), and an empty prompt has no loss on its first token.  share_prompts: compute
    a prompt that several sequences of a micro-batch have once; those with the same prompt come together as far as they fit.
    """
    if not prompts:
        return []
    lengths = np.array([len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)], np.int64)
    if (lengths < 1).any():
        raise ValueError(f"pack: sequence {int(np.argmin(lengths))} has {int(lengths.min()) + 1} tokens, wanted at least 2")
    capacity = max(micro_batch_tokens, int(lengths.max()))
    units = _families(prompts, lengths, capacity) if share_prompts else [[i] for i in range(len(lengths))]
    # A shared prompt counts once; all but its last token, which is each completion's.
    sizes = np.array([lengths[unit].sum() - (len(unit) - 1) * (len(prompts[unit[0]]) - 1) for unit in units], np.int64)
    bins, num_bins = best_fit_pack(sizes, capacity)
    return [_concatenate([units[u] for u in np.flatnonzero(bins == b)], prompts, completions, device) for b in range(num_bins)]


def _families(prompts: list[np.ndarray], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Sequences that share a prompt, in as few families as fit into `capacity` tokens each; prompts of one token have nothing to share."""
    same: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        same.setdefault(prompt.tobytes() if len(prompt) > 1 else f"alone {i}".encode(), []).append(i)
    families = []
    for members in same.values():
        if len(members) == 1:
            families.append(members)
            continue
        before = len(prompts[members[0]]) - 1
        bins, num_bins = best_fit_pack(lengths[members] - before, capacity - before)
        families += [[members[j] for j in np.flatnonzero(bins == b)] for b in range(num_bins)]
    return families


def empty_batch(device: torch.device | str = "cpu") -> PackedBatch:
    """A micro-batch without sequences: a forward and a backward that change nothing."""
    ids, offsets = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    return PackedBatch(ids, ids, offsets, ids, ids, offsets, np.zeros(0, np.int64))


def _concatenate(units: list[list[int]], prompts: list[np.ndarray], completions: list[np.ndarray], device: torch.device | str) -> PackedBatch:
    inputs, positions, rows, targets, ends, loss_ends, members = [], [], [], [], [0], [0], []
    keys, key_ends, copies = [], [0], {}  # copies: keys in other parts, by row

    def part(tokens: np.ndarray, first: int, before: np.ndarray) -> None:
        """Add rows for `tokens`, the first of which has position `first`; they see the rows `before`, too."""
        inputs.append(tokens)
        positions.append(np.arange(first, first + len(tokens)))
        for key, row in enumerate(before.tolist(), key_ends[-1]):
            copies.setdefault(row, []).append(key)
        keys.append(np.concatenate((before, np.arange(ends[-1], ends[-1] + len(tokens)))))
        ends.append(ends[-1] + len(tokens))
        key_ends.append(key_ends[-1] + len(keys[-1]))

    for unit in units:
        prompt, before = prompts[unit[0]], np.zeros(0, np.int64)
        if len(unit) > 1:
            part(prompt[:-1], 0, before)
            prompt, before = prompt[-1:], np.arange(*ends[-2:])
        for s in unit:
            tokens, first = np.concatenate((prompt, completions[s])), max(len(prompt) - 1, 0)
            part(tokens[:-1], len(before), before)
            rows.append(np.arange(ends[-2] + first, ends[-1]))
            targets.append(tokens[first + 1 :])
            loss_ends.append(loss_ends[-1] + len(rows[-1]))
            members.append(s)

    def tensor(parts, dtype=np.int64):
        return torch.from_numpy(np.ascontiguousarray(parts, dtype)).to(device)

    shared = None
    if copies:
        key_rows, most = np.concatenate(keys), max(map(len, copies.values()))
        own = np.concatenate([np.arange(end - len(tokens), end) for tokens, end in zip(inputs, key_ends[1:], strict=True)])
        table = np.array([row + [-1] * (most - len(row)) for row in copies.values()])
        shared = SharedKeys(tensor(key_rows), tensor(key_ends, np.int32), tensor(own), tensor(list(copies)), tensor(table))
    return PackedBatch(
        tensor(np.concatenate(inputs)), tensor(np.concatenate(positions)), tensor(ends, np.int32), tensor(np.concatenate(rows)),
        tensor(np.concatenate(targets)), tensor(loss_ends, np.int32), np.array(members), shared,
    )  # fmt: skip
