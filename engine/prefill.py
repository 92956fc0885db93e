"""Prompts into the KV cache, in pieces of bounded size.

A prompt that fits into a piece is run at once, packed with others.  What is longer goes on in the next piece, where its tokens attend to the keys and
values that are in the cache already; so do the tokens that a resumed sample brings behind its prompt.  Between two pieces other samples decode.
However it is cut, memory is that of a piece, and a token gets the same bits on a CPU in fp32 and in strict mode on CUDA: see `ContinuedAttention`.
"""

from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from athanor.kv_cache import ContinuedAttention, PagedKVCache, PrefillAttention, to_device
from athanor.model.moe import Routes
from athanor.model.transformer import ROW_STEP, Decoder


class Stretch(NamedTuple):
    """Tokens to run: those of a prompt, or those behind one."""

    tokens: np.ndarray  # (c,) int64
    start: int  # position of the first; what is before it is in the cache by then
    blocks: np.ndarray  # (columns,) int32: position p has slot p % block_size of blocks[p // block_size]


class Prefill:
    """What an admission has to run; `step` runs a piece of it."""

    def __init__(
        self, model: Decoder, cache: PagedKVCache, prompts: list[Stretch], copies: np.ndarray, resumed: list[Stretch], ends: list[tuple[int, int]],
        max_tokens: int, record_routes: bool = False, look_ahead: bool = False,
    ):  # fmt: skip
        """copies: as in `PagedKVCache.copy_`, made between the prompts and what continues them.  ends: where each sample's tokens end, (0, i) for
        prompt i and (1, i) for what is resumed.  max_tokens: of a step.  record_routes: keep which experts the tokens go to.  look_ahead: fill the
        cache of the layer for multi-token prediction too; at the end of a sequence, whose next token is not drawn yet, as if that were token 0.
        """
        self.model, self.cache, self.ends, self.max_tokens, self.look_ahead = model, cache, ends, max_tokens, look_ahead
        self._last: dict[tuple[int, int], Tensor] = {}  # end -> (D,), the hidden state there
        self._routes: dict[tuple[int, int], list[Tensor]] | None = {} if record_routes else None  # (kind, i) -> (c, L, k) int16, piece by piece
        self._left: deque[tuple[int, Callable[[], None]]] = deque()  # (tokens, what runs them)
        for kind, sequences in enumerate((prompts, resumed)):
            for piece in pieces([len(s.tokens) for s in sequences], max_tokens):
                self._left.append((sum(end - first for _, first, end in piece), partial(self._run, kind, sequences, piece)))
            if kind == 0:
                self._left.append((0, partial(cache.copy_, copies)))

    def step(self) -> int:
        """Run the next tokens, max_tokens at most, and return their number."""
        done = 0
        while self._left and done + self._left[0][0] <= self.max_tokens:
            num_tokens, run = self._left.popleft()
            run()
            done += num_tokens
        return done

    @property
    def finished(self) -> bool:
        return not self._left

    def states(self) -> Tensor:
        """(m, D), the hidden state at each of the `ends`, once all has been run."""
        return torch.stack([self._last[end] for end in self.ends])

    def routes(self) -> Tensor | None:
        """(m, L, k) int16, the experts at each of the `ends`, once all has been run; None where they are not recorded."""
        return None if self._routes is None else torch.stack([self._routes[end][-1][-1] for end in self.ends])

    def prompt_routes(self, i: int) -> Callable[[], np.ndarray]:
        """What fetches (p, L, k) int16, the experts of prompt i, from the device when it is first called."""
        parts = self._routes[0, i]
        return cache(lambda: torch.cat(parts).cpu().numpy())

    def _run(self, kind: int, sequences: list[Stretch], piece: list[tuple[int, int, int]]) -> None:
        device, size = self.cache.device, self.cache.block_size
        lengths = np.array([end - first for _, first, end in piece])
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        filler = -int(bounds[-1]) % ROW_STEP
        tokens = np.concatenate([sequences[i].tokens[first:end] for i, first, end in piece] + [np.zeros(filler, np.int64)])
        positions = np.concatenate([sequences[i].start + np.arange(first, end) for i, first, end in piece] + [np.full(filler, -1)])
        place = np.append(np.repeat(np.arange(len(piece)), lengths), np.full(filler, len(piece) - 1))
        tables = np.zeros((len(piece), max(len(sequences[i].blocks) for i, _, _ in piece)), np.int32)
        for table, (i, _, _) in zip(tables, piece, strict=True):
            table[: len(sequences[i].blocks)] = sequences[i].blocks
        if positions[bounds[:-1]].any():
            attend = ContinuedAttention(self.cache, self.model.own_config.num_attention_heads, tables, place, positions)
        else:
            cu_seqlens = np.append(bounds, [bounds[-1] + filler] if filler else []).astype(np.int32)
            blocks, slots = tables[place, positions // size][:, None], np.where(positions < 0, -1, positions % size).astype(np.int32)
            cu_seqlens, blocks, slots = (to_device(x, device) for x in (cu_seqlens, blocks, slots))
            attend = PrefillAttention(self.cache, cu_seqlens, max(int(lengths.max()), filler), blocks, slots)
        routes = None if self._routes is None else Routes(num_tokens=int(bounds[-1]))
        at = to_device(np.maximum(positions, 0), device)
        hidden = self.model(to_device(tokens, device), at, attend, routes)
        if self.look_ahead:
            following = [np.append(sequences[i].tokens, 0)[first + 1 : end + 1] for i, first, end in piece]
            self.model.look_ahead(hidden, to_device(np.concatenate([*following, np.zeros(filler, np.int64)]), device), at, attend)
        last = hidden[to_device(bounds[1:] - 1, device)]
        self._last |= {(kind, i): state for state, (i, _, end) in zip(last, piece, strict=True) if end == len(sequences[i].tokens)}
        if routes is not None:
            for chosen, (i, _, _) in zip(routes.by_token.split(lengths.tolist()), piece, strict=True):
                self._routes.setdefault((kind, i), []).append(chosen)


def pieces(lengths: list[int], most: int) -> list[list[tuple[int, int, int]]]:
    """Cut sequences of these lengths, laid end to end, into pieces of `most` tokens: lists of (sequence, first token, end)."""
    cut: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, length in enumerate(lengths):
        first = 0
        while first < length:
            if not room:
                cut.append([])
                room = most
            end = min(length, first + room)
            cut[-1].append((i, first, end))
            room, first = room - (end - first), end
    return cut
