"""Self-speculative decoding: several tokens of a sample per forward, and none of them another than without.

A draw is a function of its logits and of (seed, index of the token), so that nothing is rejected at random as in Leviathan et al. (arXiv 2211.17192):
one forward over a row's last token and k drafts gives logits at k + 1 places, each place draws its own token as it always would, and a draw counts
as long as all drafts before it are the tokens that were drawn there.  What was drawn behind the first draft that is another token is dropped: it
came from a text that does not exist.

Where many rows decode, they fill the machine by themselves; the drafts are for the last ones, the stragglers.  Everything here lies on the device and
has a fixed size, so that it is part of the captured step.  Two ways to draft:

- `NgramDraft`: what followed the last tokens when they stood in the row's own text, or in that of a sibling, before.
- `MtpDraft`: the model's layer for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2), applied to its own output for k > 1.

R rows, n of them decoding, W = k + 1 tokens of a row in one forward, C columns of a text, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from athanor.kv_cache import DecodeAttention, PagedKVCache, to_device
from athanor.model.transformer import Decoder, fill_rows

NGRAM = 4  # tokens that are looked up: as many as an int32 has bytes
SIBLING_TOKENS = 8192  # of siblings that a row looks through besides its own text
NEVER = 1 << 30  # tokens ahead of a row's end: beyond every limit


class Runs(NamedTuple):
    """Where the tokens of a forward with W of them per row belong: row by row, on a CPU with fillers up to whole row steps."""

    of_row: Tensor  # (V,) int64
    ahead: Tensor  # (V,) int32 tokens ahead of the row's last one
    offsets: Tensor  # (n+1,) int32, each row's tokens

    @classmethod
    def of(cls, n: int, width: int, device: torch.device) -> "Runs":
        at = torch.arange(n * width, device=device)
        of_row, ahead = at // width, (at % width).to(torch.int32)
        if device.type == "cpu":
            of_row, ahead = fill_rows(of_row), fill_rows(ahead, NEVER)
        return cls(of_row, ahead, torch.arange(0, (n + 1) * width, width, dtype=torch.int32, device=device))


class Rows(Protocol):
    """What a draft reads of the rows: tensors that never move."""

    lengths: Tensor  # (R,) int32
    max_lengths: Tensor  # (R,) int32
    generated: Tensor  # (R,) int64
    table: Tensor  # (R, blocks) int32


class Draft(Protocol):
    def load(self, n: int, moved: np.ndarray, texts: Callable[[], np.ndarray]) -> None:
        """The rows are others now.  moved: (n,) where each row was, -1 = nowhere.  texts: makes what `lay_out` returns."""

    def propose(self, n: int, limit: int) -> Tensor:
        """(n, k) integers, the tokens that may follow; -1 = none.  limit: no row is longer."""

    def follow(self, rows: slice, hidden: Tensor, tokens: Tensor, gained: Tensor, limit: int | None) -> None:
        """Of tokens (m, W) int64 that were drawn from hidden (at least m W, D), each row's first `gained` (m,) count; called before the rows grow."""


class NgramDraft:
    """Prompt lookup: the longest of the last NGRAM tokens that stood somewhere before, the latest place first, and the k tokens behind it.

    A text is a row of C tokens, -1 where there is none: siblings in front, the sample itself from column `first` on.  Behind its end it repeats.
    """

    def __init__(self, rows: Rows, k: int, num_rows: int, longest: int, num_siblings: int):
        """num_rows: for which texts are kept.  longest: sample, prompt included.  num_siblings: tokens of theirs."""
        device = rows.lengths.device
        self.rows, self.first = rows, num_siblings + NGRAM
        self.origin = torch.tensor([self.first], device=device)
        self.texts = torch.full((num_rows, self.first + longest + 1), -1, dtype=torch.int32, device=device)  # the last column is for nobody
        self.starts = torch.arange(self.texts.shape[1] - NGRAM, device=device)
        self.same = torch.empty(num_rows, len(self.starts), NGRAM, dtype=torch.bool, device=device)
        self.back = torch.arange(NGRAM, 0, -1, device=device)
        self.ahead = torch.arange(k + 1, device=device)
        self.followed = False

    def holds(self, longest: int, num_siblings: int) -> bool:
        return num_siblings + NGRAM <= self.first and longest + self.first < self.texts.shape[1]

    def load(self, n: int, moved: np.ndarray, texts: Callable[[], np.ndarray]) -> None:
        before, self.followed = self.followed, n <= len(self.texts)
        if not self.followed:
            return
        new = to_device(texts(), self.texts.device)
        if before:  # what the host has not read yet
            moved = to_device(moved, new.device)[:, None]
            own, kept = new[:, self.first :], self.texts[moved[:, 0].clamp_min(0), self.first :]
            own.copy_(torch.where((moved >= 0) & (own < 0), kept, own))
        self.texts[:n] = new

    def propose(self, n: int, limit: int) -> Tensor:
        texts, C = self.texts[:n], self.texts.shape[1]
        end = self.origin + self.rows.lengths[:n, None]
        same = torch.eq(texts[:, :-1].unfold(1, NGRAM, 1), texts.gather(1, end - self.back)[:, None], out=self.same[:n])
        # Four bytes, 0 or 1, the last token's the highest: as a (little-endian) number they put the matches in order.
        score = torch.add(self.starts, same.view(torch.int32)[..., 0], alpha=C)
        best = score.scatter_(1, end - NGRAM, 0).amax(1, keepdim=True)  # the suffix itself is not meant
        at = best % C + NGRAM
        drafts = texts.gather(1, at + self.ahead[:-1] % (end - at))
        return torch.where(best >= C << 8 * (NGRAM - 1), drafts, -1)

    def follow(self, rows: slice, hidden: Tensor, tokens: Tensor, gained: Tensor, limit: int | None) -> None:
        if not self.followed:
            return
        ahead = self.ahead[: tokens.shape[1]]
        end = self.origin + self.rows.lengths[rows, None]
        at = torch.where(ahead < gained[:, None], end + ahead, self.texts.shape[1] - 1)
        self.texts[rows].scatter_(1, at, tokens.to(torch.int32))


def lay_out(draft: NgramDraft, own: Sequence[Sequence[np.ndarray]], siblings: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """(n, C) int32: own[i], the parts of row i's text, behind what fits of siblings[i], their texts, the most useful one last."""
    texts = np.full((len(own), draft.texts.shape[1]), -1, np.int32)
    for row, parts, others in zip(texts, own, siblings, strict=True):
        text = np.concatenate(parts)
        row[draft.first : draft.first + len(text)] = text
        end = draft.first - NGRAM
        for other in reversed(others):
            other = other[max(0, len(other) - end) :]
            row[end - len(other) : end] = other
            end -= len(other) + 1
            if end <= 0:
                break
    return texts


class MtpDraft:
    """The layer for multi-token prediction, with keys and values of its own behind those of the layers: it follows every step.

    From the state at position t and token t + 1 it predicts token t + 2.  In place of the state of a token that is a draft it takes its own output.
    """

    def __init__(self, model: Decoder, cache: PagedKVCache, rows: Rows, k: int):
        self.model, self.cache, self.rows, self.k = model, cache, rows, k
        self.states = model.embed.weight.new_zeros(len(rows.lengths), model.config.hidden_size)  # that predict the token behind the row's last

    def load(self, n: int, moved: np.ndarray, texts: Callable[[], np.ndarray]) -> None:
        moved = to_device(moved, self.states.device)
        self.states[:n] = torch.where((moved >= 0)[:, None], self.states[moved.clamp_min(0)], 0)

    def propose(self, n: int, limit: int) -> Tensor:
        state, drafts = self.states[:n], []
        lengths, most = self.rows.lengths[:n], self.rows.max_lengths[:n]
        for i in range(self.k):
            if i:
                positions = lengths + (i - 2)
                state = self._look_ahead(state, drafts[-1], torch.where(positions + 1 < most, positions, -1), self.rows.table[:n], limit)[:n]
            head = self.model.logits(fill_rows(state) if state.is_cpu else state)
            drafts.append(head[:n].argmax(1))
        return torch.stack(drafts, 1)

    def follow(self, rows: slice, hidden: Tensor, tokens: Tensor, gained: Tensor, limit: int | None) -> None:
        (m, width), lengths = tokens.shape, self.rows.lengths[rows]
        ahead = torch.arange(width, dtype=torch.int32, device=tokens.device)
        positions = torch.where(ahead < gained[:, None], lengths[:, None] - 1 + ahead, -1)
        # The slot of the prompt's last token may be its siblings' too, whose first tokens are others; it keeps what the prompt's own run wrote.
        shared = (self.rows.generated[rows] == 0) & (lengths % self.cache.block_size == 0)
        positions = positions.masked_fill(shared[:, None], -1)
        table = self.rows.table[rows].repeat_interleave(width, 0)
        out = self._look_ahead(hidden[: m * width], tokens.flatten(), positions.flatten(), table, limit)[: m * width].view(m, width, -1)
        last = out.gather(1, (gained - 1).clamp_min(0)[:, None, None].expand(-1, 1, out.shape[2]))[:, 0]
        self.states[rows] = torch.where((gained > 0)[:, None], last, self.states[rows])

    def _look_ahead(self, hidden: Tensor, following: Tensor, positions: Tensor, table: Tensor, limit: int | None) -> Tensor:
        """States (at least m, D) from those of m tokens, each in a slot of its own."""
        if hidden.is_cpu:
            hidden, following, positions, table = fill_rows(hidden), fill_rows(following), fill_rows(positions, -1), fill_rows(table)
        return self.model.look_ahead(hidden, following, positions.clamp_min(0), DecodeAttention(self.cache, table, positions, limit, None))
