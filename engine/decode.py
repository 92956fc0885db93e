"""The decode loop on the device: one step = forward, head, draw, bookkeeping, all on tensors that never move.

A row is one running sample.  Its last token, length, random counter, sampling parameters and block table live on the device; a window of steps runs
without the host, which then reads what was drawn (`Drawn`) and what became of the rows (`status`).  A row that has ended inside a window stands
still: it writes nothing and reads nothing.  The step is a captured graph, one per bucket of rows (and, on CUDA, of lengths).

Where few rows decode, a step may draw several tokens of each: `speculation` says how.

A window may be launched before the host has read the one before it (`Launched`).  What the host then has of a running row is behind what the device
has, and `load` leaves the row's own state (`DRAWN`) to the device.
"""

from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from athanor.config import SpeculationConfig
from athanor.cpu_steps import CpuSteps
from athanor.kernels import Sampled, advance_rows, is_strict, linear_sample, row_positions, sample
from athanor.kernels._dispatch import requested_backend
from athanor.kernels.advance_rows import ERROR, LENGTH, REPETITION, RUNNING, STOP, Streaks
from athanor.kernels.mla_decode import CHUNK as LATENT_CHUNK
from athanor.kernels.paged_attention import CHUNK
from athanor.kv_cache import DecodeAttention, DraftedAttention, PagedKVCache, SharedPrefix, to_device
from athanor.model.moe import Routes
from athanor.model.transformer import ROW_STEP, Decoder, fill_rows
from athanor.speculation import Draft, MtpDraft, NgramDraft, Runs

DRAWN = ("last", "generated", "lengths", "streak", "status")  # what a step changes
PARAMETERS = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class Drawn:
    """What a window drew, on the host; on a CPU without windows ahead these are views that the next window overwrites."""

    generated: np.ndarray  # (n,) int64 tokens of each row now: its last ones are the first entries of its columns
    status: np.ndarray  # (n,) int64
    streak: np.ndarray | None  # (n,) int64 tokens in a row above the repetition stop's probability
    forwards: np.ndarray | None  # (n,) int64 in which it decoded with drafts; None where there were none
    columns: dict[str, np.ndarray]  # (most, n) each: tokens int64, logps float32, and what else is recorded

    def of(self, rows: np.ndarray) -> "Drawn":
        """Of some of the rows."""
        columns = {name: values[:, rows] for name, values in self.columns.items()}
        streak, forwards = (None if x is None else x[rows] for x in (self.streak, self.forwards))
        return Drawn(self.generated[rows], self.status[rows], streak, forwards, columns)


@dataclass(frozen=True)
class Launched:
    """A window, or a first draw, whose results are on their way to the host."""

    rows: slice
    most: int  # tokens that a row may have gained
    tensors: dict[str, Tensor]  # on the host, filled once `copied` has happened
    copied: torch.cuda.Event | None  # None on a CPU
    seconds: dict[str, float]

    def read(self) -> Drawn:
        """Wait for the device and return what it drew."""
        if self.copied is not None:
            start = perf_counter()
            self.copied.synchronize()
            self.seconds["forward_s"] += perf_counter() - start
        arrays = {name: t.numpy() for name, t in self.tensors.items()}
        return Drawn(arrays.pop("generated"), arrays.pop("status"), arrays.pop("streak", None), arrays.pop("forwards", None), arrays)


class DecodeRows:
    """Device state of up to `capacity` rows and the step that advances them."""

    def __init__(
        self, model: Decoder, cache: PagedKVCache, num_rows: int, max_blocks: int, num_eos: int, records: tuple[str, ...], *, window: int,
        ahead: int, fused: bool, seconds: dict[str, float], speculation: SpeculationConfig, texts: tuple[int, int],
    ):  # fmt: skip
        """records: fields of `Sampled` that are kept for every token besides tokens and logps, and "routes", the experts of the token before.
        window: steps without the host.  ahead: windows that may be launched before one is read.  fused: draw with `linear_sample`, which takes no
        filters.  seconds: where times are added up.  texts: tokens of the longest sample with its prompt, and of the siblings that help to
        draft it.
        """
        self.model, self.cache, self.device, self.on_cpu = model, cache, cache.device, cache.device.type == "cpu"
        self.records, self.window, self.ahead, self.fused, self.seconds = records, window, ahead, fused, seconds
        self.capacity = -(-num_rows // ROW_STEP) * ROW_STEP  # products of few rows round differently on a CPU, see ROW_STEP
        self.speculation, self.width = speculation, 1 + speculation.tokens
        R, W = self.capacity, self.window * self.width
        self.num_drafted = min(speculation.max_rows if self.on_cpu else row_bucket(speculation.max_rows, False), R)

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.last, self.generated, self.seeds, self.status = zeros(R), zeros(R), zeros(R), zeros(R)
        self.lengths, self.max_lengths, self.table = zeros(R, dtype=torch.int32), zeros(R, dtype=torch.int32), zeros(R, max_blocks, dtype=torch.int32)
        self.eos = zeros(R, num_eos)
        self.streak, self.streak_limit, self.streak_logp = zeros(R), zeros(R), zeros(R, dtype=torch.float32)
        self.per_row = {name: zeros(R, dtype=dtype).fill_(NEUTRAL[name]) for name, dtype in PARAMETERS.items()}
        self.uniform: dict[str, float | int] = {}
        self.repeats = False
        dtypes = {"tokens": torch.int64, "last_kept": torch.int64}
        self.ring = {name: zeros(W, R, dtype=dtypes.get(name, torch.float32)) for name in ("tokens", "logps", *records) if name != "routes"}
        self.routes: Tensor | None = None  # (R, L, k) of each row's last forward: the experts of its last token
        if "routes" in records:
            config = model.config
            choices = sum(map(config.is_sparse, range(config.num_hidden_layers))), config.num_experts_per_tok
            self.routes, self.ring["routes"] = zeros(R, *choices, dtype=torch.int16), zeros(W, R, *choices, dtype=torch.int16)
            self.drafted_routes = zeros(self.num_drafted * self.width, *choices, dtype=torch.int16)
        self.slot = zeros(R)  # of the ring: each row's next
        self.ahead_of = torch.arange(self.width, device=self.device)  # tokens of one forward
        self.drafts, self.forwards = zeros(self.num_drafted, speculation.tokens), zeros(R)
        self.runs: dict[int, Runs] = {}  # by number of rows
        self.draft: Draft | None = None
        if speculation.tokens:
            ngram = speculation.draft == "ngram"
            self.draft = NgramDraft(self, speculation.tokens, self.num_drafted, *texts) if ngram else MtpDraft(model, cache, self, speculation.tokens)
        self.shared: SharedPrefix | None = None
        self.buffers = SharedPrefix(zeros(R), zeros(R), zeros(R + 1, dtype=torch.int32), zeros(R, dtype=torch.int32))
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.graph_pool = None
        self.cpu = CpuSteps(model) if self.on_cpu else None

    def holds(self, num_rows: int, max_blocks: int, num_eos: int, records: tuple[str, ...], texts: tuple[int, int]) -> bool:
        """Whether it is large enough for that."""
        if isinstance(self.draft, NgramDraft) and not self.draft.holds(*texts):
            return False
        return num_rows <= self.capacity and max_blocks <= self.table.shape[1] and num_eos <= self.eos.shape[1] and records == self.records

    def begin(self, uniform: dict[str, float | int], repeats: bool) -> None:
        """Start without rows.  uniform: sampling parameters that all rows will have in common.  repeats: some rows may stop by repetition."""
        if is_strict() and not self.on_cpu and "temperature" not in uniform:
            raise ValueError("generate: the requests have several temperatures, which strict mode cannot score on CUDA; wanted one per call")
        self.uniform, self.repeats, self.shared = uniform, repeats, None
        self.status.fill_(LENGTH)

    def load(self, state: dict[str, np.ndarray], source: np.ndarray | None = None) -> None:
        """Take all rows from the host: name -> (n, ...) of `last`, `lengths`, `table`, ...  Rows 0..n-1 decode, unless there is a `status` that says
        otherwise; the others stand still.

        source: (n,) where each row was so far, to keep what is drawn there and not read yet (`DRAWN`); -1, or None: the host has its last state.
        """
        n, kept = len(state["lengths"]), {}
        if source is not None:
            source = to_device(source, self.device)
            kept = {name: getattr(self, name)[source.clamp_min(0)] for name in DRAWN}
        self.status[:n] = RUNNING
        self.status[n:] = LENGTH
        for name, values in state.items():
            target = (self.per_row[name] if name in self.per_row else getattr(self, name))[:n]
            (target[:, : values.shape[1]] if values.ndim > 1 else target).copy_(to_device(values, self.device))
        for name, values in kept.items():
            target = getattr(self, name)[:n]
            target.copy_(torch.where(source < 0, target, values))

    def share(self, offsets: np.ndarray, order: np.ndarray, shared_blocks: np.ndarray) -> None:
        """Groups of rows with a common prompt, as the scheduler has them; dropped where no prompt fills a chunk of the attention."""
        self.shared, prefix_lens = None, shared_blocks * self.cache.block_size
        chunk = LATENT_CHUNK if self.model.config.latent and not self.on_cpu else CHUNK
        if not len(prefix_lens) or prefix_lens.max() < chunk:
            return
        R, n, P, b = self.capacity, len(order), len(prefix_lens), self.buffers
        whole = np.concatenate((order, np.arange(n, R)))
        b.order.copy_(to_device(whole.astype(np.int64), self.device))
        b.inverse.copy_(to_device(np.argsort(whole), self.device))
        b.group_offsets.copy_(to_device(np.concatenate((offsets, np.full(R - P, n))).astype(np.int32), self.device))
        b.prefix_lens.copy_(to_device(np.concatenate((prefix_lens, np.zeros(R - P))).astype(np.int32), self.device))
        self.shared = b

    def decode(self, n: int, longest: int) -> Launched:
        """Launch a window over rows 0..n-1, none of which is longer than `longest` before it."""
        start = perf_counter()
        self.slot.zero_()
        width = self.width if n <= self.speculation.max_rows else 1
        n_run = n if width > 1 and self.on_cpu else min(row_bucket(n, self.on_cpu), self.capacity)
        if width > 1:
            self.forwards.zero_()
            if n_run not in self.runs:  # made here, so that no captured step makes it again
                self.runs[n_run] = Runs.of(n_run, width, self.device)
        holds, most = self.table.shape[1] * self.cache.block_size, self.window * width
        if self.on_cpu:
            step = partial(self.cpu.run, self, n_run, holds, width, self._key(n_run, holds, width))
        else:
            step = self._graph(n_run, length_bucket(longest + most, holds), width).replay
        for _ in range(self.window):
            step()
        launched = self._launched(0, n, most, drafted=width > 1)
        if not self.on_cpu:  # a captured step does not tell its parts apart
            self.seconds["forward_s"] += perf_counter() - start
        return launched

    def draw(self, hidden: Tensor, rows: np.ndarray, routes: Tensor | None = None) -> Launched:
        """Draw the first token of `rows` (m,) from hidden (m, D), the last one of each prompt, whose experts were routes (m, L, k)."""
        if self.routes is not None:
            self.routes.index_copy_(0, to_device(rows, self.device), routes)
        first, end, drawing = int(rows.min()), int(rows.max()) + 1, None
        if not np.array_equal(rows, np.arange(first, end)):  # what lies between them stands still
            at = to_device(rows - first, self.device)
            drawing = at.new_zeros(end - first, dtype=torch.bool).index_fill_(0, at, True)
            hidden = hidden.new_zeros(end - first, hidden.shape[1]).index_copy_(0, at, hidden)
        self.slot.zero_()
        self.append(hidden, slice(first, end), drawing=drawing)
        return self._launched(first, end, 1)

    def forward(self, rows: slice, limit: int, width: int) -> Tensor:
        """States of the last tokens of rows, or of (width > 1) these and the drafts behind them, row by row.

        rows: all from the first on, but where no prompt is shared and nothing drafted.
        """
        if width > 1:
            return self._drafted_forward(rows.stop, limit, width)
        positions, seq_lens = row_positions(self.status[rows], self.lengths[rows])
        attend = DecodeAttention(self.cache, self.table[rows], positions, limit, self.shared and self.shared.first(rows.stop), seq_lens)
        routes = None if self.routes is None else Routes()
        hidden = self.model(self.last[rows], positions, attend, routes)  # whatever a row without a position becomes, nobody reads it
        if routes is not None:
            self.routes[rows].copy_(routes.by_token)
        return hidden

    def _drafted_forward(self, n: int, limit: int, width: int) -> Tensor:
        self.drafts[:n].copy_(self.draft.propose(n, limit))
        runs = self.runs[n]
        lengths, most, status = (x.index_select(0, runs.of_row) for x in (self.lengths, self.max_lengths, self.status))
        positions = lengths - 1 + runs.ahead
        positions = torch.where((status == RUNNING) & (positions + 1 < most), positions, -1)  # the last token that a sample may have is never fed
        tokens = torch.cat((self.last[:n, None], self.drafts[:n].clamp_min(0)), 1).flatten()
        tokens = fill_rows(tokens) if self.on_cpu else tokens
        routes = None if self.routes is None else Routes()
        prefixes = (self.lengths[:n] - 1).clamp_min(0) // CHUNK * CHUNK
        attend = DraftedAttention(self.cache, self.table.index_select(0, runs.of_row), positions, limit, runs.offsets, prefixes)
        hidden = self.model(tokens, positions.clamp_min(0), attend, routes)
        if routes is not None:
            self.drafted_routes[: n * width].copy_(routes.by_token[: n * width])
        return hidden

    def _step(self, n: int, limit: int, width: int = 1) -> None:
        self.append(self.forward(slice(0, n), limit, width), slice(0, n), width, limit=limit)

    def _key(self, n: int, limit: int, width: int) -> tuple:
        """What a captured step depends on besides the tensors that it reads."""
        chosen = requested_backend(None, "decode"), is_strict(), torch.get_num_threads() if self.on_cpu else 0
        return n, limit, width, chosen, self.shared is not None, self.repeats, tuple(sorted(self.uniform.items()))

    def _draw(self, hidden: Tensor, rows: slice, width: int) -> Sampled:
        """`width` tokens for each of m rows from hidden (at least m width, D)."""

        def each(x: Tensor) -> Tensor:
            return x[rows] if width == 1 else x[rows].repeat_interleave(width)

        count = (rows.stop - rows.start) * width
        positions = self.generated[rows] if width == 1 else (self.generated[rows, None] + self.ahead_of).flatten()
        keys = {"seeds": each(self.seeds), "positions": positions}
        parameters = {name: self.uniform[name] if name in self.uniform else each(values) for name, values in self.per_row.items()}
        strict = is_strict() and not self.on_cpu
        if self.fused:
            drawn = linear_sample(hidden[:count], self.model.lm_head_weight, temperature=parameters["temperature"], **keys)
        else:
            filled = fill_rows(hidden) if self.on_cpu else hidden
            drawn = sample(self.model.logits(filled)[:count], **parameters, **keys)
        if strict and parameters["temperature"] != 0:
            # The trainer's kernel scores the token: its sums run in another order than the sampler's.
            support = drawn.support if "thresholds" in self.ring else None
            scored = self.model.logprobs(hidden[:count], drawn.tokens, temperature=parameters["temperature"], support=support)
            drawn = drawn._replace(logps=scored.logps)
        return drawn

    def append(self, hidden: Tensor, rows: slice, width: int = 1, *, drawing: Tensor | None = None, limit: int | None = None) -> None:
        """Draw for m rows, or for those of them that are `drawing` (m,), from hidden (at least m width, D), and account for what counts: the first
        token, and with drafts (width > 1) each further one as long as the draft before it is what was drawn there and ends nothing."""
        m, drawn = rows.stop - rows.start, self._draw(hidden, rows, width)
        slots = (self.slot[rows, None] + self.ahead_of[:width]).T if width > 1 or len(self.ring) > 2 else None
        for name, ring in self.ring.items():
            if width == 1 and name in ("tokens", "logps"):
                continue  # `advance_rows` writes these
            values = (self.routes[rows] if width == 1 else self.drafted_routes[: m * width]) if name == "routes" else getattr(drawn, name)
            values = values.view(m, width, *values.shape[1:]).transpose(0, 1)
            ring[:, rows].scatter_(0, slots.view(width, m, *[1] * (values.ndim - 2)).expand_as(values), values)
        if width > 1:
            return self._append_drafted(hidden, drawn, rows, width, limit)
        if self.draft is not None:
            live = self.status[rows] == RUNNING
            self.draft.follow(rows, hidden, drawn.tokens[:, None], (live if drawing is None else live & drawing).long(), limit)
        streaks = Streaks(self.streak[rows], self.streak_limit[rows], self.streak_logp[rows], drawn.full_logps) if self.repeats else None
        state = {"status": self.status, "lengths": self.lengths, "max_lengths": self.max_lengths, "generated": self.generated, "slots": self.slot}
        state = {name: x[rows] for name, x in (state | {"last": self.last, "eos": self.eos}).items()}
        advance_rows(drawn.tokens, drawn.logps, self.ring["tokens"][:, rows], self.ring["logps"][:, rows], drawing=drawing, streaks=streaks, **state)

    def _append_drafted(self, hidden: Tensor, drawn: Sampled, rows: slice, width: int, limit: int) -> None:
        m, status, lengths = rows.stop - rows.start, self.status[rows], self.lengths[rows]
        live = status == RUNNING
        tokens, logps = drawn.tokens.view(m, width), drawn.logps.view(m, width)
        became = torch.where(lengths[:, None] + (self.ahead_of[:width] + 1) >= self.max_lengths[rows, None], LENGTH, RUNNING)
        if self.repeats:
            streaks = self._streaks(drawn.full_logps.view(m, width), rows)
            most = self.streak_limit[rows, None]
            became = torch.where((streaks >= most) & (most > 0), REPETITION, became)
        became = torch.where((tokens[..., None] == self.eos[rows, None]).any(2), STOP, became)
        became = torch.where(logps.isnan(), ERROR, became)
        goes_on = (became[:, :-1] == RUNNING) & (self.drafts[rows] == tokens[:, :-1])
        last = goes_on.long().cumprod(1).sum(1, keepdim=True)
        gained = (last[:, 0] + 1) * live
        self.forwards[rows].add_(live)

        def at_the_end(x: Tensor) -> Tensor:  # what its last token that counts gave each row
            return x.gather(1, last)[:, 0]

        self.draft.follow(rows, hidden, tokens, gained, limit)
        for count in (self.slot[rows], self.generated[rows], lengths):
            count += gained
        self.last[rows].copy_(torch.where(live, at_the_end(tokens), self.last[rows]))
        if self.repeats:
            self.streak[rows].copy_(torch.where(live, at_the_end(streaks), self.streak[rows]))
        status.copy_(torch.where(live, at_the_end(became), status))

    def _streaks(self, full_logps: Tensor, rows: slice) -> Tensor:
        """(m, width) tokens in a row above the repetition stop's probability, up to and including each."""
        above, place = full_logps > self.streak_logp[rows, None], self.ahead_of[: full_logps.shape[1]]
        broken = torch.where(above, -1, place).cummax(1).values  # where it was last not
        return torch.where(broken < 0, self.streak[rows, None] + place + 1, place - broken)

    def _launched(self, first: int, end: int, most: int, drafted: bool = False) -> Launched:
        """Send what was drawn for rows first..end to the host, before the next window overwrites it."""
        tensors = {name: ring[:most, first:end] for name, ring in self.ring.items()}
        tensors |= {"status": self.status[first:end], "generated": self.generated[first:end]}
        if self.repeats:
            tensors["streak"] = self.streak[first:end]
        if drafted:
            tensors["forwards"] = self.forwards[first:end]
        copied = None
        if not self.on_cpu:
            # Pinned memory comes from PyTorch's cache, which gives it out again only after the copies: as many buffers as there are windows ahead.
            tensors = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for name, t in tensors.items()}
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        elif self.ahead:
            tensors = {name: t.clone() for name, t in tensors.items()}
        return Launched(slice(first, end), most, tensors, copied, self.seconds)

    def _graph(self, n: int, limit: int, width: int) -> torch.cuda.CUDAGraph:
        key = self._key(n, limit, width)
        if key not in self.graphs:
            # A first run compiles kernels and fills allocators; with no row running it changes nothing but the ring.
            status = self.status.clone()
            self.status.fill_(LENGTH)
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._step(n, limit, width)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_pool):
                self._step(n, limit, width)
            self.graph_pool = self.graph_pool or graph.pool()
            self.graphs[key] = graph
            self.status.copy_(status)
            self.slot.zero_()
        return self.graphs[key]


def row_bucket(n: int, on_cpu: bool) -> int:
    """Rows that a step computes for n that decode: whole row steps on a CPU; 1, 2, 4, 8, then multiples of 16, then of 64 on CUDA."""
    if on_cpu:
        return -(-n // ROW_STEP) * ROW_STEP
    if n <= 8:
        return 1 << (n - 1).bit_length()
    step = 16 if n <= 128 else 64
    return -(-n // step) * step


def length_bucket(longest: int, capacity: int) -> int:
    """Tokens that the attention of a captured step is launched for: a power of two of chunks, so that a growing sample meets few graphs."""
    return min(CHUNK << max(0, (-(-longest // CHUNK) - 1).bit_length()), capacity)
