"""One run of a generator over its requests: the scheduler's decisions go to the device, and what the device draws becomes completions.

Samples are numbered through: sample b_i + m is member m of request i.  A sample in flight has a slot, where its columns (tokens, log-probs, ...)
collect on the host; its row, where it decodes, changes as others finish.

Up to `ahead` windows are launched before one is read, so that the device has work while the host decides.  A decision then finds the device ahead of
it and takes effect behind the windows that are under way: rows that go on keep what they draw there, and what these windows drew for a row that the
host has ended, paused or loaded anew in between is dropped.  A paused row draws it again, the same.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter

import numpy as np
import torch

from athanor._host import Events, Scheduler
from athanor.config import SamplingConfig
from athanor.decode import NEUTRAL, PARAMETERS, Launched
from athanor.kernels.advance_rows import ERROR, HELD, LENGTH, REPETITION, RUNNING, STOP
from athanor.model.moe import refresh_fp8_
from athanor.prefill import Prefill, Stretch
from athanor.samples import Completion, Finished, Request
from athanor.speculation import SIBLING_TOKENS, MtpDraft, NgramDraft, lay_out
from athanor.stops import StopStrings

FINISH = {STOP: "stop", REPETITION: "repetition", LENGTH: "length", ERROR: "error", RUNNING: "abort", HELD: "abort"}
INTEGERS = {"tokens": np.int64, "last_kept": np.int64, "versions": np.int32, "routes": np.int16}  # columns; the others are float32
WAITING, FINISHED = -1, -2  # in place of a slot
NOWHERE = -1  # in place of a row


class Stream(Iterator[Finished]):
    """What Generator.stream returns: iterate over samples in the order in which they finish; `abort` some, `close` all.  A context manager."""

    def __init__(
        self, generator, requests: list[Request], sampling: SamplingConfig, full_logps: bool, on_demand: bool = False, max_rows: int | None = None
    ):
        self.generator, self.requests, self.on_demand = generator, requests, on_demand
        self.max_rows = min(generator.max_rows, max_rows or generator.max_rows)
        self.sampling = [request.sampling or sampling for request in requests]
        for i, (request, own) in enumerate(zip(requests, self.sampling, strict=True)):
            generator.check(i, request, own)
        self._ready: deque[Finished] = deque()
        self._unread: deque[tuple[Launched, int, np.ndarray]] = deque()  # (it, loads of the rows before it, slots of its rows)
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
        num_rows = min(self.max_rows, len(self._request_of))
        num_blocks = g.pool_blocks(self._blocks_wanted(active, num_rows))
        lookahead = g.window * (1 + g.ahead) * (1 + g.speculation.tokens)
        self.scheduler = Scheduler(
            num_rows, longest, num_blocks, g.block_size, policy=g.policy, lookahead=lookahead, refill_rows=max(1, num_rows // 4)
        )
        records = (("full_logps",) if full_logps else ()) + (("thresholds", "last_kept") if any(s.truncated for s in all_sampling) else ())
        records += ("routes",) if g.record_routes else ()
        eos = [sorted(request.eos_ids or g.eos_ids) for request in requests]
        siblings = max((len(requests[i].seeds) - 1) * (all_sampling[i].max_tokens + 1) for i in active)
        texts = longest, min(siblings, SIBLING_TOKENS)
        self.rows = g.reserve(num_blocks, num_rows, self.scheduler.max_blocks, max(map(len, eos)), records, texts)
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
        shapes = {"routes": self.rows.routes.shape[1:]} if g.record_routes else {}
        names = ("tokens", "logps", "versions", *records)
        self._columns = {name: np.empty((slots, width, *shapes.get(name, ())), INTEGERS.get(name, np.float32)) for name in names}
        self._free_slots = list(range(slots))[::-1]
        self._slot_of = np.full(len(self._request_of), WAITING)
        self._status = np.full(slots, RUNNING)
        self._streak = np.zeros(len(self._request_of), np.int64)  # of each sample, kept while it waits
        self._cut: dict[int, int] = {}  # slot -> tokens up to and including a stop string
        self._active = self._slots = self._requests = np.zeros(0, np.int64)  # sample, slot and request of each active row, as the device has them
        self._row_of = np.full(slots, NOWHERE)  # row in which a slot decodes
        self._loaded, self._num_loads = np.zeros(slots, np.int64), 0  # the load that gave a slot's row the host's state, while something was unread
        # Of the one request whose prompt, longer than a piece, is on its way into the cache.
        self._prefill: Prefill | None = None
        self._prefilled: list[tuple[int, int]] = []  # (sample, which of the prompts) of it
        self._held: list[int] = []  # slots of its samples, by row
        self._prompt_routes: dict[int, Callable[[], np.ndarray] | np.ndarray] = {}  # of samples whose prompt was run; as of the last time
        self._carried: dict[int, dict[str, np.ndarray]] = {}  # columns of waiting samples that were under way before
        self._told: dict[int, list[np.ndarray]] = {}  # request -> tokens of its samples that have finished, for drafts
        # The scheduler's (request, member) is sample _flat[_offset[request] + member]; _place has it by sample, as of the last time.
        self._flat, self._offset, self._place = np.zeros(0, np.int64), np.zeros(0, np.int64), np.full((len(self._request_of), 2), -1)
        self._version = g.version
        for i in [] if self.on_demand else active:
            self.submit(i, range(len(requests[i].seeds)), {m: c for m, c in enumerate(requests[i].partial or ()) if c is not None})

    def submit(self, request: int, members: Sequence[int], partial: Mapping[int, Completion] = {}) -> None:
        """Queue samples of a request; on demand, each is submitted once, or again after an `abort`.  partial: what some have so far, by member."""
        base = self._base[request]
        for member, so_far in partial.items():
            self._carried[base + member], self._streak[base + member] = _columns_of(so_far, tuple(self._columns)), so_far.streak
            if self.generator.record_routes:
                self._prompt_routes[base + member] = so_far.routes[0]
        samples = base + np.array(members, np.int64)
        self._slot_of[samples] = WAITING
        self._submit(request, samples)

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
        self._place[samples] = np.stack((np.full(len(samples), len(self._offset)), np.arange(len(samples))), 1)
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
        self._unread.clear()
        if self.generator.running() is self:
            self.generator.running = lambda: None

    @property
    def num_decoding(self) -> int:
        """Samples that decode now."""
        return self.scheduler.num_active - len(self._held) if self._open else 0

    @torch.inference_mode()
    def abort(self, request: int | None = None, member: int | Sequence[int] | None = None) -> None:
        """End a request, some of its samples, or everything; what they have is yielded with finish "abort".  What has finished stays as it is.

        Such completions go into `Request.partial` to go on later, here or elsewhere.  A prompt that has run in part is dropped with its request; for
        one of its samples it runs to the end first.
        """
        if not self._open:
            return
        self._notice_new_weights()
        samples = np.arange(len(self._request_of))
        if request is not None:
            samples = samples[self._base[request] : self._base[request + 1]]
        if member is not None:
            samples = samples[np.isin(samples - self._base[self._request_of[samples]], member)]
        for sample in samples.tolist():
            while member is not None and self._slot_of[sample] in self._held:
                self._admit()
            id, at = self._place[sample].tolist()
            if self._slot_of[sample] != FINISHED and id in self.scheduler:
                self._finish(self.scheduler.abort(id) if member is None else self.scheduler.abort(id, at))
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
        """Launch one window and return what has finished in what the host has read by then, often nothing.  At its end the stream closes itself, but
        not on demand."""
        if not self._ready and not self.finished:
            self._advance()
        done = list(self._ready)
        self._ready.clear()
        if self.finished and not self.on_demand:
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
        self._notice_new_weights()
        self._admit()
        n = self.scheduler.num_active
        if n > len(self._held):
            under_way = sum(launched.most for launched, _, _ in self._unread)
            self._launch(self.rows.decode(n, int(self.scheduler.lengths[:n].max()) + under_way))

    def _samples(self, requests: np.ndarray, members: np.ndarray) -> np.ndarray:
        return self._flat[self._offset[requests] + members]

    def _admit(self) -> None:
        """Prefill the requests that are next, or one more piece of a long one, and draw the first token of their samples."""
        start, under_way = perf_counter(), self._prefill is not None
        if not under_way and not self._start_prefill():
            return
        prefill, held, samples = self._prefill, self._held, self._prefilled
        self.generator.num_prefill_tokens += prefill.step()
        if prefill.finished:
            self._prefill, self._held = None, []
        if prefill.finished or not under_way:
            self._load_rows()
        self.generator.timings["prefill_s"] += perf_counter() - start
        if prefill.finished:
            if self.generator.record_routes:
                of_prompt = [prefill.prompt_routes(j) for j in range(samples[-1][1] + 1)]
                self._prompt_routes |= {sample: of_prompt[j] for sample, j in samples}
            self._launch(self.rows.draw(prefill.states(), self._row_of[held], prefill.routes()))

    def _start_prefill(self) -> bool:
        """Give rows to the requests that are next, if they fit."""
        g, s, admission = self.generator, self.scheduler, self.scheduler.admit(self.generator.max_prefill_tokens)
        if not len(admission):
            return False
        samples = self._samples(np.repeat(admission.requests, np.diff(admission.row_offsets)), admission.members).tolist()
        prompts, resumed, ends = [], [], []
        self._prefilled = []
        for j, (first, end) in enumerate(zip(admission.row_offsets.tolist(), admission.row_offsets[1:].tolist(), strict=False)):
            prompt = np.asarray(self.requests[self._request_of[samples[first]]].prompt_ids, np.int64)
            prompts.append(Stretch(prompt, 0, admission.prompt_blocks[slice(*admission.block_offsets[j : j + 2])]))
            for row, sample, generated in zip(admission.rows[first:end], samples[first:end], admission.generated[first:end].tolist(), strict=True):
                slot = self._slot_of[sample] = self._free_slots.pop()
                self._held.append(slot)
                self._prefilled.append((sample, j))
                self._status[slot] = RUNNING
                for name, values in self._carried.pop(sample, {}).items():
                    self._columns[name][slot, : len(values)] = values
                ends.append((1, len(resumed)) if generated else (0, j))
                if generated:
                    resumed.append(Stretch(self._columns["tokens"][slot, :generated], len(prompt), s.block_table[row].copy()))
        options = {"record_routes": g.record_routes, "look_ahead": isinstance(self.rows.draft, MtpDraft)}
        self._prefill = Prefill(g.model, g.cache, prompts, admission.copies, resumed, ends, g.max_prefill_tokens, **options)
        return True

    def _launch(self, launched: Launched) -> None:
        """The device has been given work; read what it was given before, but for as many launches as may be unread."""
        self._unread.append((launched, self._num_loads, self._slots[launched.rows]))
        while len(self._unread) > self.generator.ahead:
            self._account()

    def _account(self) -> None:
        """Store what the oldest launch drew, look for stop strings, tell the scheduler, and take its decisions to the device."""
        launched, load, slots = self._unread.popleft()
        drawn, s = launched.read(), self.scheduler
        start = perf_counter()
        rows = launched.rows
        in_place = load == self._num_loads and rows.stop == s.num_active
        if not in_place:  # look up where the rows are now, and leave out those that the host has ended, paused or loaded anew since the launch
            rows = self._row_of[slots]
            known = (rows >= 0) & (self._loaded[slots] <= load)
            slots, rows, drawn = slots[known], rows[known], drawn.of(known)
            if not len(rows):
                return
        before = s.lengths[rows] - s.prompt_lengths[rows]
        gained = drawn.generated - before
        row = np.repeat(np.arange(len(slots)), gained)
        step = np.arange(len(row)) - np.repeat(np.cumsum(gained) - gained, gained)
        to = slots[row], before[row] + step
        for name, values in drawn.columns.items():
            self._columns[name][to] = values[step, row]
        self._columns["versions"][to] = self._version
        self._status[slots] = drawn.status
        if drawn.forwards is not None:
            self.generator.drafting["forwards"] += int(drawn.forwards.sum())
            self.generator.drafting["tokens"] += int(gained.sum())
        if drawn.streak is not None:
            self._streak[self._active[rows]] = drawn.streak
        ended = drawn.status >= STOP
        if self._stops:
            self._stop(self._requests[rows], slots, before, gained, ended)
        if in_place:
            events = s.advance(ended, rows.start, gained)
        else:
            done, appended = np.zeros(s.num_active, bool), np.zeros(s.num_active, np.int64)
            done[rows], appended[rows] = ended, gained
            events = s.advance(done, 0, appended)
        if events:
            self._finish(events)
            self._load_rows()
        self.generator.timings["host_s"] += perf_counter() - start

    def _stop(self, requests: np.ndarray, slots: np.ndarray, before: np.ndarray, gained: np.ndarray, ended: np.ndarray) -> None:
        for j, (request, slot) in enumerate(zip(requests.tolist(), slots.tolist(), strict=True)):
            rule = self._stops.get(request)
            if rule is None or self._status[slot] == ERROR:
                continue
            cut = rule.find(self._columns["tokens"][slot, : before[j] + gained[j]], int(before[j]))
            if cut is not None:
                self._cut[slot], self._status[slot], ended[j] = cut, STOP, True

    def _finish(self, events: Events) -> None:
        """Turn finished samples into completions."""
        samples = self._samples(events.finished_requests, events.finished_members)
        for sample, generated in zip(samples.tolist(), events.finished_generated.tolist(), strict=True):
            slot, status = int(self._slot_of[sample]), RUNNING
            if slot == WAITING:
                values = self._carried.pop(sample, None) or {name: column[0, :0] for name, column in self._columns.items()}
            else:
                status = int(self._status[slot])
                length = self._cut.pop(slot, generated - (status == ERROR))  # an error's token means nothing
                values = {name: column[slot, :length].copy() for name, column in self._columns.items()}
                self._free(slot)
            self._slot_of[sample] = FINISHED
            i = int(self._request_of[sample])
            support = (values["thresholds"], values["last_kept"]) if self.sampling[i].truncated else None
            routes, streak = None, int(self._streak[sample])
            if (prompt := self._prompt_routes.pop(sample, None)) is not None:
                routes = prompt() if callable(prompt) else prompt, values["routes"]
            columns = values["tokens"], values["logps"], FINISH[status], values["versions"], values.get("full_logps")
            done = Completion(*columns, support, routes, streak)
            self._ready.append(Finished(i, sample - int(self._base[i]), done))
            if isinstance(self.rows.draft, NgramDraft):
                self._told.setdefault(i, []).append(done.token_ids)

    def _free(self, slot: int) -> None:
        self._free_slots.append(slot)
        self._row_of[slot] = NOWHERE
        if slot in self._held:  # and with it all samples of the one request whose prompt is under way
            self._prefill, self._held = None, []

    def _load_rows(self) -> None:
        """Give the device the rows as the scheduler has them now."""
        s, n = self.scheduler, self.scheduler.num_active
        self._active = self._samples(s.requests[:n], s.members[:n])
        self._slots, self._requests = self._slot_of[self._active], self._request_of[self._active]
        self._num_loads += 1
        moved, source = self._row_of[self._slots], None
        if self._unread:
            source = moved
            self._loaded[self._slots[source < 0]] = self._num_loads
        self._row_of.fill(NOWHERE)
        self._row_of[self._slots] = np.arange(n)
        self._row_of[self._held] = NOWHERE
        generated = s.lengths[:n] - s.prompt_lengths[:n]
        last = np.where(generated > 0, self._columns["tokens"][self._slots, np.maximum(generated - 1, 0)], 0)
        state = {"last": last, "generated": generated, "seeds": s.seeds[:n], "lengths": s.lengths[:n], "max_lengths": s.max_lengths[:n]}
        state |= {"table": s.block_table[:n], "streak": self._streak[self._active]}
        state |= {name: values[self._requests] for name, values in self._of_request.items()}
        if self._held:
            state["status"] = np.where(self._row_of[self._slots] < 0, HELD, RUNNING)
        self.rows.load(state, source)
        self.rows.share(*s.groups())
        if self.rows.draft is not None:
            self.rows.draft.load(n, moved, lambda: self._texts(generated))

    def _texts(self, generated: np.ndarray) -> np.ndarray:
        """What n-gram drafts are looked up in: each row's own text and those of its siblings, the finished ones last."""
        own = [self._columns["tokens"][slot, :length] for slot, length in zip(self._slots, generated, strict=True)]
        others = [[own[k] for k in np.flatnonzero(self._requests == i) if k != row] + self._told.get(i, []) for row, i in enumerate(self._requests)]
        prompts = [np.asarray(self.requests[i].prompt_ids) for i in self._requests]
        return lay_out(self.rows.draft, list(zip(prompts, own, strict=True)), others)

    def _notice_new_weights(self) -> None:
        """Where the weights have changed, drop the keys and values of the old ones and let every sample go on from its tokens."""
        if self.generator.version == self._version:
            return
        while self._unread:
            self._account()
        self._version = self.generator.version
        refresh_fp8_(self.generator.model)
        events = self.scheduler.abort_all()
        samples = self._samples(events.finished_requests, events.finished_members)
        for sample, generated in zip(samples.tolist(), events.finished_generated.tolist(), strict=True):
            slot = int(self._slot_of[sample])
            if slot != WAITING:
                if generated:
                    self._carried[sample] = {name: column[slot, :generated].copy() for name, column in self._columns.items()}
                self._free(slot)
                self._slot_of[sample] = WAITING
        for i in np.unique(self._request_of[samples]).tolist():
            self._submit(i, np.sort(samples[self._request_of[samples] == i]))


def _columns_of(partial: Completion, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    thresholds, last_kept = partial.support or (None, None)
    columns = {"tokens": partial.token_ids, "logps": partial.logps, "versions": partial.versions, "full_logps": partial.full_logps}
    columns |= {"thresholds": thresholds, "last_kept": last_kept, "routes": partial.routes and partial.routes[1]}
    missing = [name for name in names if columns[name] is None]
    if missing:
        raise ValueError(f"generate: a partial sample has no {', '.join(missing)}, which this call records; wanted one drawn with the same settings")
    return {name: columns[name] for name in names}
