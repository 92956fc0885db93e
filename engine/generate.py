"""Generation with explicit groups, continuous refill and log-probs that come from the trainer's own forward.

A request is a prompt with n samples: the prompt is prefilled once, its members decode in rows of their own.  Rows that finish make room for the
next request at once.  Every random number is a function of (sample seed, token index), so a sample does not depend on its neighbours.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from athanor.config import SamplingConfig
from athanor.kernels import sample
from athanor.kv_cache import DecodeAttention, KVCache, PrefillAttention
from athanor.model.transformer import ROW_STEP, Decoder, fill_rows, fill_tokens

# What makes the sampler's log-probs equal the training forward's bit for bit on a CPU (measured, and gated in every run): attention reads its keys
# in the steps of the training attention, and every matrix product has whole steps of rows (ROW_STEP).
SPAN_STEP = 16


@dataclass(frozen=True)
class Request:
    """One prompt and the seeds of its samples."""

    prompt_ids: np.ndarray  # (p,) int64
    seeds: np.ndarray  # (n,) int64, one sample each


@dataclass(frozen=True)
class Completion:
    """One sample of a request."""

    token_ids: np.ndarray  # (c,) int64, the end token included when the model wrote it
    logps: np.ndarray  # (c,) float32 under the distribution that was sampled from
    finish: str  # "stop" or "length"


class Generator:
    """Decode with `model` as it is now: weights are read, never copied, so an optimizer step needs no synchronisation."""

    def __init__(self, model: Decoder, eos_ids: set[int], *, max_rows: int = 512):
        if not eos_ids:
            raise ValueError("Generator: eos_ids is empty, wanted at least one token id that ends a sample")
        self.model, self.max_rows = model, max_rows
        self.device = model.embed.weight.device
        self.eos_ids = torch.tensor(sorted(eos_ids), device=self.device)

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], sampling: SamplingConfig, progress: Callable[[int, int], None] | None = None
    ) -> list[list[Completion]]:
        """Sample every request; the result has the requests' order and, within one, the seeds' order.

        `progress(done, total)` is called as samples finish.  Raises ValueError for an empty prompt, a group larger than max_rows, or a prompt
        that leaves no room below max_position_embeddings.
        """
        self._check(requests, sampling)
        if not requests:
            return []
        run = _Run(self, requests, sampling)
        while run.pending or run.active:
            run.admit()
            run.decode()
            if progress:
                progress(run.finished, run.total)
        return run.results

    def _check(self, requests: list[Request], sampling: SamplingConfig) -> None:
        limit = self.model.config.max_position_embeddings
        for i, request in enumerate(requests):
            if not len(request.prompt_ids):
                raise ValueError(f"generate: request {i} has an empty prompt, wanted at least one token")
            if len(request.seeds) > self.max_rows:
                raise ValueError(f"generate: request {i} has {len(request.seeds)} samples, more than max_rows = {self.max_rows}")
            if len(request.prompt_ids) + sampling.max_tokens > limit:
                raise ValueError(
                    f"generate: request {i} has {len(request.prompt_ids)} prompt tokens and max_tokens is {sampling.max_tokens}, "
                    f"more than max_position_embeddings = {limit}"
                )


class _Run:
    """State of one `generate` call: R rows of which the first `active` decode."""

    def __init__(self, generator: Generator, requests: list[Request], sampling: SamplingConfig):
        self.model, self.eos_ids, self.sampling = generator.model, generator.eos_ids, sampling
        self.pending = deque(i for i, request in enumerate(requests) if len(request.seeds))
        self.requests = requests
        self.results: list[list] = [[None] * len(request.seeds) for request in requests]
        self.total, self.finished, self.active = sum(len(r.seeds) for r in requests), 0, 0
        device = generator.device
        self.num_rows = min(generator.max_rows, self.total)
        R = -(-self.num_rows // ROW_STEP) * ROW_STEP
        longest = max(len(r.prompt_ids) for r in requests) + sampling.max_tokens
        self.cache = KVCache(self.model.config, R, -(-longest // SPAN_STEP) * SPAN_STEP, self.model.embed.weight.dtype, device)
        self.tokens = torch.zeros(R, sampling.max_tokens, dtype=torch.int64, device=device)
        self.logps = torch.zeros(R, sampling.max_tokens, dtype=torch.float32, device=device)
        # Per row: tokens written so far, prompt length, seed, request and member.
        self.rows = torch.zeros(R, 5, dtype=torch.int64, device=device)

    def admit(self) -> None:
        """Prefill waiting requests once enough rows are free to be worth a forward."""
        free = self.num_rows - self.active
        if not self.pending or (self.active and free < max(len(self.requests[self.pending[0]].seeds), self.num_rows // 4)):
            return
        taken = []
        while self.pending and len(self.requests[self.pending[0]].seeds) <= free:
            taken.append(self.pending.popleft())
            free -= len(self.requests[taken[-1]].seeds)
        prompts = [self.requests[i].prompt_ids for i in taken]
        lengths = np.array([len(p) for p in prompts])
        device = self.rows.device
        members, start = [], self.active
        for i, length in zip(taken, lengths, strict=True):
            seeds = self.requests[i].seeds
            rows = torch.arange(start, start + len(seeds), device=device)
            facts = np.stack([np.zeros(len(seeds)), np.full(len(seeds), length), seeds, np.full(len(seeds), i), np.arange(len(seeds))], 1)
            # Seeds use all 64 bits, which a float detour would round.
            facts = facts.astype(np.int64)
            facts[:, 2] = seeds
            self.rows[rows] = torch.from_numpy(facts).to(device)
            members.append(rows)
            start += len(seeds)
        cu_seqlens = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
        input_ids = torch.from_numpy(np.concatenate(prompts)).to(device)
        input_ids, positions, bounds = fill_tokens(input_ids, positions, cu_seqlens)
        hidden = self.model(input_ids, positions, PrefillAttention(self.cache, bounds, members))
        last = hidden[cu_seqlens[1:].long() - 1]
        counts = torch.tensor([len(rows) for rows in members], device=device)
        first, self.active = self.active, start
        self._append(last.repeat_interleave(counts, 0), first)

    def decode(self) -> None:
        """One forward over the active rows."""
        if not self.active:
            return
        # Rows beyond the active ones are finished or empty: computed for the row count's sake, never read.
        rows = self.rows[: -(-self.active // ROW_STEP) * ROW_STEP]
        n = len(rows)
        positions = (rows[:, 0] + rows[:, 1] - 1).clamp_min(0)
        span = min(-(-(int(positions.max()) + 1) // SPAN_STEP) * SPAN_STEP, self.cache.slots.numel())
        last = self.tokens[:n].gather(1, (rows[:, 0] - 1).clamp_min(0)[:, None])[:, 0]
        hidden = self.model(last, positions, DecodeAttention(self.cache, positions, span))
        self._append(hidden, 0)

    def _append(self, hidden: Tensor, first: int) -> None:
        """Draw a token for rows first..active from hidden (n, D), then retire the rows that ended."""
        n = self.active - first
        rows = self.rows[first : self.active]
        s = self.sampling
        logits = (fill_rows(hidden).float() @ self.model.lm_head_weight.float().T)[:n]
        drawn = sample(logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, seeds=rows[:, 2], positions=rows[:, 0])
        at = rows[:, 0:1]
        self.tokens[first : self.active].scatter_(1, at, drawn.tokens[:, None])
        self.logps[first : self.active].scatter_(1, at, drawn.logps[:, None])
        rows[:, 0] += 1
        ended = torch.isin(drawn.tokens, self.eos_ids) if len(self.eos_ids) > 1 else drawn.tokens == self.eos_ids
        done = torch.nonzero(ended | (rows[:, 0] >= s.max_tokens))[:, 0]
        if len(done):
            self._retire(done + first, ended[done])

    def _retire(self, done: Tensor, ended: Tensor) -> None:
        facts, tokens, logps = self.rows[done].cpu().numpy(), self.tokens[done].cpu().numpy(), self.logps[done].cpu().numpy()
        for j, (length, _, _, request, member) in enumerate(facts):
            finish = "stop" if bool(ended[j]) else "length"
            self.results[request][member] = Completion(tokens[j, :length].copy(), logps[j, :length].copy(), finish)
        self.finished += len(done)
        # Keep the active rows in front: rows from the tail fill the holes.
        keep = self.active - len(done)
        holes = done[done < keep]
        if len(holes):
            tail = torch.arange(keep, self.active, device=done.device)
            movers = tail[~torch.isin(tail, done)]
            span = int((self.rows[movers, 0] + self.rows[movers, 1]).max())
            self.cache.move_(movers, holes, span)
            self.tokens[holes], self.logps[holes], self.rows[holes] = self.tokens[movers], self.logps[movers], self.rows[movers]
        self.active = keep
