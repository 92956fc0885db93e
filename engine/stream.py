"""One run of a generator over its requests: the scheduler's decisions go to the device, and what the device draws becomes completions.

Samples are numbered through: sample b_i + m is member m of request i.  A sample in flight has a slot, where its columns (tokens, log-probs, ...)
collect on the host; its row, where it decodes, changes as others finish.
"""

from collections import deque
from collections.abc import Iterator
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from athanor._host import Admission, Events, Scheduler
from athanor.config import SamplingConfig
from athanor.decode import ERROR, LENGTH, NEUTRAL, PARAMETERS, REPETITION, RUNNING, STOP, Drawn
from athanor.kv_cache import PrefillAttention
from athanor.model.transformer import fill_tokens
from athanor.samples import Completion, Finished, Request
from athanor.stops import StopStrings

FINISH = {STOP: "stop", REPETITION: "repetition", LENGTH: "length", ERROR: "error", RUNNING: "abort"}
INTEGERS = {"tokens": np.int64, "last_kept": np.int64, "versions": np.int32}  # columns; the others are float32
WAITING, FINISHED = -1, -2  # in place of a slot


class Stream(Iterator[Finished]):
    """What Generator.stream returns: iterate over samples in the order in which they finish; `abort` some, `close` all.  A context manager."""

    def __init__(self, generator, requests: list[Request], sampling: SamplingConfig, full_logps: bool):
        self.generator, self.requests = generator, requests
        self.sampling = [request.sampling or sampling for request in requests]
        for i, (request, own) in enumerate(zip(requests, self.sampling, strict=True)):
            generator.check(i, request, own)
        self._ready: deque[Finished] = deque()
        counts = [len(request.seeds) for request in requests]
        self._base = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self._request_of = np.repeat(np.arange(len(requests)), counts)
        self._open = len(self._request_of) > 0
        if self._open:
            self._prepare(full_logps)

    def _prepare(self, full_logps: bool) -> None:
        g, requests, all_sampling = self.generator, self.requests, self.sampling
        active = [i for i, request in enumerate(requests) if len(request.seeds)]
        longest = max(len(requests[i].prompt_ids) + all_sampling[i].max_tokens for i in active)
        num_rows = min(g.max_rows, len(self._request_of))
        num_blocks = g.pool_blocks(self._blocks_wanted(active, num_rows))
        self.scheduler = Scheduler(
            num_rows, longest, num_blocks, g.block_size, policy=g.policy, lookahead=g.window, refill_rows=max(1, num_rows // 4)
        )
        records = (("full_logps",) if full_logps else ()) + (("thresholds", "last_kept") if any(s.truncated for s in all_sampling) else ())
        eos = [sorted(request.eos_ids or g.eos_ids) for request in requests]
        self.rows = g.reserve(num_blocks, num_rows, self.scheduler.max_blocks, max(map(len, eos)), records)
        # A filter that is on is always given per row: a number and a tensor of it could round differently.
        common = {name: values.pop() for name in PARAMETERS if len(values := {getattr(s, name) for s in all_sampling}) == 1}
        uniform = {name: value for name, value in common.items() if name == "temperature" or value == NEUTRAL[name]}
        self.rows.begin(uniform, repeats=any(s.repetition_tokens for s in all_sampling))
        # What a row needs of its request, to be gathered by request.
        self._of_request = {name: np.array([getattr(s, name) for s in all_sampling]) for name in PARAMETERS if name not in uniform}
        self._of_request |= {
            "eos": np.array([ids + [-1] * (self.rows.eos.shape[1] - len(ids)) for ids in eos]),
            "streak_limit": np.array([s.repetition_tokens for s in all_sampling]),
            "streak_logp": np.log([s.repetition_probability for s in all_sampling]).astype(np.float32),
        }
        self._stops = {i: StopStrings(s.stop, g.tokenizer) for i, s in enumerate(all_sampling) if s.stop}
        slots, width = self.scheduler.num_table_rows, max(s.max_tokens for s in all_sampling)
        self._columns = {name: np.empty((slots, width), INTEGERS.get(name, np.float32)) for name in ("tokens", "logps", "versions", *records)}
        self._free_slots = list(range(slots))[::-1]
        self._slot_of = np.full(len(self._request_of), WAITING)
        self._status, self._streak = np.full(slots, RUNNING), np.zeros(slots, np.int64)
        self._cut: dict[int, int] = {}  # slot -> tokens up to and including a stop string
        self._hidden: dict[int, Tensor] = {}  # last hidden state of prompts that members still wait for, by the scheduler's request
        self._carried: dict[int, dict[str, np.ndarray]] = {}  # columns of waiting samples that were under way before
        # The scheduler's (request, member) is sample _flat[_offset[request] + member].
        self._flat, self._offset = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._version = g.version
        for i in active:
            for sample, partial in zip(range(self._base[i], self._base[i + 1]), requests[i].partial or (), strict=False):
                if partial is not None:
                    self._carried[sample] = _columns_of(partial, tuple(self._columns))
            self._submit(i, np.arange(self._base[i], self._base[i + 1]))

    def _blocks_wanted(self, active: list[int], num_rows: int) -> int:
        """Blocks that suffice for the num_rows largest samples at once."""
        size, shared, own = self.generator.block_size, [], []
        for i in active:
            prompt, longest = len(self.requests[i].prompt_ids), len(self.requests[i].prompt_ids) + self.sampling[i].max_tokens
            shared.append(-(-prompt // size))
            own += [-(-(longest - 1) // size) - prompt // size] * len(self.requests[i].seeds)
        return sum(sorted(shared)[-num_rows:]) + sum(sorted(own)[-num_rows:])

    def _submit(self, i: int, samples: np.ndarray) -> None:
        request, own = self.requests[i], self.sampling[i]
        generated = [len(self._carried[s]["tokens"]) if s in self._carried else 0 for s in samples.tolist()]
        try:
            self.scheduler.submit(
                len(request.prompt_ids), len(samples), own.max_tokens, seeds=np.asarray(request.seeds, np.int64)[samples - self._base[i]],
                expected_new_tokens=min(request.expected_tokens or own.max_tokens, own.max_tokens), priority=request.priority, generated=generated,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"generate: request {i}: {error}") from None
        self._offset = np.append(self._offset, len(self._flat))
        self._flat = np.concatenate((self._flat, samples))

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Drop what has not been read."""
        self._open = False
        self._ready.clear()
        if self.generator.running() is self:
            self.generator.running = lambda: None

    @property
    def num_decoding(self) -> int:
        """Samples that decode now."""
        return self.scheduler.num_active if self._open else 0

    def abort(self, request: int | None = None, member: int | None = None) -> None:
        """End a request, one of its samples, or everything; what they have is yielded with finish "abort".  What has finished stays as it is.

        Such completions go into `Request.partial` to go on later, here or elsewhere.
        """
        if not self._open:
            return
        for id, start in enumerate(self._offset.tolist()):
            i = int(self._request_of[self._flat[start]])
            if request not in (None, i) or id not in self.scheduler:
                continue
            if member is None:
                self._finish(self.scheduler.abort(id))
                continue
            at = np.flatnonzero(self._flat[start:] == self._base[i] + member)
            if len(at) and self._slot_of[self._base[i] + member] != FINISHED:
                self._finish(self.scheduler.abort(id, int(at[0])))
        self._load_rows()

    @property
    def finished(self) -> bool:
        """Whether everything has been read."""
        return not self._ready and not (self._open and self.scheduler.num_requests)

    def __next__(self) -> Finished:
        while not self._ready:
            if self.finished:
                self.close()
                raise StopIteration
            self._advance()
        return self._ready.popleft()

    def step(self) -> list[Finished]:
        """Decode one window and return what has finished by then, often nothing."""
        if not self._ready and not self.finished:
            self._advance()
        done = list(self._ready)
        self._ready.clear()
        if self.finished:
            self.close()
        return done

    def tokens_of(self, request: int, member: int) -> np.ndarray:
        """(c,) int64, what a sample that decodes has so far; empty where it waits or has finished."""
        rows = np.flatnonzero(self._slots == self._slot_of[self._base[request] + member]) if self.num_decoding else ()
        if not len(rows):
            return np.zeros(0, np.int64)
        length = int(self.scheduler.lengths[rows[0]] - self.scheduler.prompt_lengths[rows[0]])
        return self._columns["tokens"][self._slots[rows[0]], :length].copy()

    @torch.inference_mode()
    def _advance(self) -> None:
        if self.generator.version != self._version:
            self._start_over()
        self._admit()
        n = self.scheduler.num_active
        if n:
            self._account(self.rows.decode(n, int(self.scheduler.lengths[:n].max())), 0)

    def _samples(self, requests: np.ndarray, members: np.ndarray) -> np.ndarray:
        return self._flat[self._offset[requests] + members]

    def _admit(self) -> None:
        """Prefill the requests that are next, and draw the first token of their samples."""
        admission = self.scheduler.admit(self.generator.max_prefill_tokens)
        if not len(admission):
            return
        start = perf_counter()
        samples = self._samples(np.repeat(admission.requests, np.diff(admission.row_offsets)), admission.members)
        for sample in samples.tolist():
            slot = self._slot_of[sample] = self._free_slots.pop()
            self._status[slot], self._streak[slot] = RUNNING, 0
            for name, values in self._carried.pop(sample, {}).items():
                self._columns[name][slot, : len(values)] = values
        self._load_rows()
        hidden = self._prefill(admission)
        self.generator.timings["prefill_s"] += perf_counter() - start
        self._account(self.rows.draw(hidden, admission.first_row), admission.first_row)

    def _prefill(self, admission: Admission) -> Tensor:
        """Run the prompts that are not in the pool yet and the resumed samples behind theirs; return (m, D), the last hidden state of each row."""
        g, size = self.generator, self.generator.block_size
        sequences, blocks, slots = [], [], []
        end_of: dict[tuple[str, int], int] = {}  # ("prompt", request) or ("row", row) -> its sequence

        def add(key: tuple[str, int], tokens: np.ndarray, table: np.ndarray, first: int) -> None:
            """Run these tokens; keys and values from token `first` on go to the slots of `table`."""
            at = np.arange(len(tokens))
            end_of[key] = len(sequences)
            sequences.append(tokens)
            blocks.append(np.where(at < first, 0, table[at // size]))
            slots.append(np.where(at < first, -1, at % size))

        rows_of = list(zip(admission.requests.tolist(), admission.row_offsets.tolist(), admission.row_offsets[1:].tolist(), strict=False))
        for j, (request, first, end) in enumerate(rows_of):
            prompt = np.asarray(self.requests[self._request_of[self._flat[self._offset[request]]]].prompt_ids, np.int64)
            if admission.needs_prefill[j]:
                add(("prompt", request), prompt, admission.prompt_blocks[slice(*admission.block_offsets[j : j + 2])], 0)
            for row, generated in zip(admission.rows[first:end].tolist(), admission.generated[first:end].tolist(), strict=True):
                if generated:
                    tokens = np.concatenate((prompt, self._columns["tokens"][self._slots[row], :generated]))
                    add(("row", row), tokens, self.scheduler.block_table[row], len(prompt))
        last = self._run_packed(sequences, blocks, slots) if sequences else None
        g.cache.copy_(admission.copies)
        states = []
        for j, (request, first, end) in enumerate(rows_of):
            if admission.needs_prefill[j]:
                self._hidden[request] = last[end_of["prompt", request]]
            states += [last[end_of["row", row]] if ("row", row) in end_of else self._hidden[request] for row in admission.rows[first:end].tolist()]
            if not self.scheduler.waiting_members(request):
                del self._hidden[request]
        return torch.stack(states)

    def _run_packed(self, sequences: list[np.ndarray], blocks: list[np.ndarray], slots: list[np.ndarray]) -> Tensor:
        """Last hidden state of each sequence; keys and values go to their slots."""
        g, lengths = self.generator, np.array([len(s) for s in sequences])
        g.num_prefill_tokens += int(lengths.sum())

        def tensor(parts: list[np.ndarray], dtype: type) -> Tensor:
            return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(g.device)

        cu_seqlens = tensor([np.zeros(1), np.cumsum(lengths)], np.int32)
        input_ids, positions, bounds = fill_tokens(tensor(sequences, np.int64), tensor([np.arange(n) for n in lengths], np.int64), cu_seqlens)
        filler = len(input_ids) - int(lengths.sum())
        blocks_of, slots_of = (torch.nn.functional.pad(tensor(x, np.int32), (0, filler), value=-1) for x in (blocks, slots))
        hidden = g.model(input_ids, positions, PrefillAttention(g.cache, bounds, blocks_of[:, None], slots_of))
        return hidden[cu_seqlens[1:].long() - 1]

    def _account(self, drawn: Drawn, first: int) -> None:
        """Store what was drawn for rows first.., look for stop strings, tell the scheduler, and take its decisions to the device."""
        start = perf_counter()
        n = self.scheduler.num_active
        slots = self._slots[first:n]
        before = self.scheduler.lengths[first:n] - self.scheduler.prompt_lengths[first:n]
        appended = drawn.generated - before
        for step in range(int(appended.max(initial=0))):
            counted = np.flatnonzero(appended > step)
            to = slots[counted], before[counted] + step
            for name, values in drawn.columns.items():
                self._columns[name][to] = values[step, counted]
            self._columns["versions"][to] = self._version
        self._status[slots] = drawn.status
        if drawn.streak is not None:
            self._streak[slots] = drawn.streak
        done = (drawn.status != RUNNING) & (drawn.status != LENGTH)
        if self._stops:
            self._stop(slots, before, appended, done, first)
        events = self.scheduler.advance(done, first, appended)
        if events:
            self._finish(events)
            self._load_rows()
        self.generator.timings["host_s"] += perf_counter() - start

    def _stop(self, slots: np.ndarray, before: np.ndarray, appended: np.ndarray, done: np.ndarray, first: int) -> None:
        for j, slot in enumerate(slots.tolist()):
            rule = self._stops.get(int(self._requests[first + j]))
            if rule is None or self._status[slot] == ERROR:
                continue
            cut = rule.find(self._columns["tokens"][slot, : before[j] + appended[j]], int(before[j]))
            if cut is not None:
                self._cut[slot], self._status[slot], done[j] = cut, STOP, True

    def _finish(self, events: Events) -> None:
        """Turn finished samples into completions."""
        samples = self._samples(events.finished_requests, events.finished_members)
        for id, sample, generated in zip(events.finished_requests.tolist(), samples.tolist(), events.finished_generated.tolist(), strict=True):
            slot, status = int(self._slot_of[sample]), RUNNING
            if slot == WAITING:
                values = self._carried.pop(sample, None) or {name: column[0, :0] for name, column in self._columns.items()}
            else:
                status = int(self._status[slot])
                length = self._cut.pop(slot, generated - (status == ERROR))  # an error's token means nothing
                values = {name: column[slot, :length].copy() for name, column in self._columns.items()}
                self._free_slots.append(slot)
            self._slot_of[sample] = FINISHED
            i = int(self._request_of[sample])
            support = (values["thresholds"], values["last_kept"]) if self.sampling[i].truncated else None
            done = Completion(values["tokens"], values["logps"], FINISH[status], values["versions"], values.get("full_logps"), support)
            self._ready.append(Finished(i, sample - int(self._base[i]), done))
            if status in (STOP, LENGTH) and id in self.scheduler and self.scheduler.waiting_members(id):
                self.scheduler.set_expected(id, generated)  # siblings tend to be as long as the first of them
        for id in events.completed_requests.tolist():
            self._hidden.pop(id, None)

    def _load_rows(self) -> None:
        """Give the device the rows as the scheduler has them now."""
        s, n = self.scheduler, self.scheduler.num_active
        samples = self._samples(s.requests[:n], s.members[:n])
        self._slots, self._requests = self._slot_of[samples], self._request_of[samples]
        generated = s.lengths[:n] - s.prompt_lengths[:n]
        last = np.where(generated > 0, self._columns["tokens"][self._slots, np.maximum(generated - 1, 0)], 0)
        state = {"last": last, "generated": generated, "seeds": s.seeds[:n], "lengths": s.lengths[:n], "max_lengths": s.max_lengths[:n]}
        state |= {"table": s.block_table[:n], "streak": self._streak[self._slots]}
        state |= {name: values[self._requests] for name, values in self._of_request.items()}
        self.rows.load(state)
        self.rows.share(*s.groups())

    def _start_over(self) -> None:
        """The weights have changed: keys and values of the old ones are dropped, and every sample goes on from its tokens."""
        self._version = self.generator.version
        self._hidden.clear()
        events = self.scheduler.abort_all()
        samples = self._samples(events.finished_requests, events.finished_members)
        for sample, generated in zip(samples.tolist(), events.finished_generated.tolist(), strict=True):
            slot = int(self._slot_of[sample])
            if slot != WAITING:
                if generated:
                    self._carried[sample] = {name: column[slot, :generated].copy() for name, column in self._columns.items()}
                self._free_slots.append(slot)
                self._slot_of[sample] = WAITING
        for i in np.unique(self._request_of[samples]).tolist():
            self._submit(i, np.sort(samples[self._request_of[samples] == i]))


def _columns_of(partial: Completion, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    thresholds, last_kept = partial.support or (None, None)
    columns = {"tokens": partial.token_ids, "logps": partial.logps, "versions": partial.versions, "full_logps": partial.full_logps}
    columns |= {"thresholds": thresholds, "last_kept": last_kept}
    missing = [name for name in names if columns[name] is None]
    if missing:
        raise ValueError(f"generate: a partial sample has no {', '.join(missing)}, which this call records; wanted one drawn with the same settings")
    return {name: columns[name] for name in names}
