"""Decode steps on a CPU: captured (`cpu_graph`), and of a small model by one thread for each share of the rows.

Threads that go through a step together wait for each other after each of its kernels, some ten times a layer.  Rows do not depend on one another, so
a thread may as well take its share of them from the embedding to the drawn token.  Each thread then reads all matrices, which pays as long as
they stay in a cache.
"""

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from athanor.cpu_graph import CpuGraph
from athanor.kernels._cpu import native_there, side_by_side
from athanor.model.transformer import ROW_STEP, Decoder

CAPTURED_BYTES = 1 << 27  # of captured steps, which keep every intermediate: what is larger has arithmetic enough to hide the calls
SHARED_BYTES = 1 << 24  # of a model that every thread reads


class Rows(Protocol):
    """What steps are taken of: `decode.DecodeRows`."""

    model: Decoder
    shared: object | None  # a prompt that rows read together
    seconds: dict[str, float]

    def forward(self, rows: slice, limit: int, width: int) -> Tensor: ...

    def append(self, hidden: Tensor, rows: slice, width: int, *, limit: int) -> None: ...


@dataclass
class Captured:
    """The step of some rows, in two parts whose times are kept apart."""

    rows: slice
    forward: CpuGraph
    hidden: Tensor
    append: CpuGraph

    @property
    def bytes(self) -> int:
        return self.forward.bytes + self.append.bytes

    @property
    def calls(self) -> list | None:
        """What a thread can make by itself, if that is all of it."""
        parts = [self.forward.native, self.append.native]
        return None if None in parts else parts


class CpuSteps:
    """The steps of `Rows`, by rows and whatever else a captured step depends on.  They keep it, not it them: they are to be freed at once."""

    def __init__(self, model: Decoder):
        self.steps: dict[tuple, Captured] = {}
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.splits = native_there() and size <= SHARED_BYTES
        self.together: set[tuple] = set()  # steps whose shares no thread can take by itself, or which there is no memory to capture

    @property
    def captured_bytes(self) -> int:
        return sum(step.bytes for step in self.steps.values())

    def run(self, owner: Rows, n: int, limit: int, width: int, key: tuple) -> None:
        """One step of rows 0..n-1 of the owner.  key: what it depends on besides these numbers."""
        threads, whole = torch.get_num_threads(), (n, limit, width, key)
        split = self.splits and width == 1 and owner.shared is None and whole not in self.together
        shares = shares_of(n, threads) if split else [slice(0, n)]
        split, captured = len(shares) > 1, []
        names = [(rows.start, rows.stop, limit, width, split, key) for rows in shares]
        for name, rows in zip(names, shares, strict=True):
            if name in self.steps:
                captured.append(self.steps[name])
                continue
            try:
                torch.set_num_threads(1 if split else threads)  # what a captured call is made with
                self.steps[name] = self._capture(owner, rows, limit, width)
            finally:
                torch.set_num_threads(threads)
        if captured and all(step.calls for step in captured):
            _took(owner, *side_by_side([step.calls for step in captured]))
        else:
            for step in captured:
                _replay(owner, step, limit, width)
        alone = [name for name in names if self.steps[name].calls]
        if split and len(alone) < len(names):  # from now on threads go through this step together
            self.together.add(whole)
            for name in set(names) - set(alone):
                del self.steps[name]

    def _capture(self, owner: Rows, rows: slice, limit: int, width: int) -> Captured:
        start, forward, append = perf_counter(), CpuGraph(), CpuGraph()
        hidden = forward.capture(partial(owner.forward, rows, limit, width))
        middle = perf_counter()
        append.capture(partial(owner.append, hidden, rows, width, limit=limit))
        _took(owner, middle - start, perf_counter() - middle)
        if self.captured_bytes + forward.bytes + append.bytes > CAPTURED_BYTES:
            forward.drop()
            append.drop()
        return Captured(rows, forward, hidden, append)


def _replay(owner: Rows, step: Captured, limit: int, width: int) -> None:
    """Part by part; one whose course depends on the data, in which ranks wait for each other, or for which there was no memory, as it is."""
    start = perf_counter()
    if step.forward.valid:
        step.forward.replay()
    else:
        step.hidden.copy_(owner.forward(step.rows, limit, width))  # where the captured rest reads it
    middle = perf_counter()
    if step.append.valid:
        step.append.replay()
    else:
        owner.append(step.hidden, step.rows, width, limit=limit)
    _took(owner, middle - start, perf_counter() - middle)


def _took(owner: Rows, forward_s: float, sample_s: float) -> None:
    owner.seconds["forward_s"] += forward_s
    owner.seconds["sample_s"] += sample_s


def shares_of(n: int, threads: int) -> list[slice]:
    """Rows 0..n-1 in as many parts as there are threads, or blocks of ROW_STEP rows."""
    blocks = n // ROW_STEP
    count = max(1, min(threads, blocks))
    bounds = [ROW_STEP * (blocks * i // count) for i in range(count)] + [n]
    return [slice(first, end) for first, end in zip(bounds[:-1], bounds[1:], strict=True)]
