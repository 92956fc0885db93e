"""Which implementation serves a call: `backend=` argument, then `with use_backend(...)`, then env ATHANOR_BACKEND, then auto.

Every operation registers its backends in the order of preference (cuda, triton, cpu, reference), each with `why_not(call)`: None when it can
serve this call, else the reason as half a sentence.  Auto takes the first that can; a backend asked for by name that cannot serve raises.
Nothing falls back by catching an exception.  The Triton interpreter is only for a caller who names `triton`: auto never takes it on CPU.
"""

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the order in which auto asks

_context: ContextVar[str | None] = ContextVar("athanor_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Make `name` the backend of every kernel call inside the block; "auto" = choose per call, None = say nothing.

    Raises ValueError on an unknown name.
    """
    token = _context.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _context.reset(token)


def near_misses(name: str, known) -> str:
    """Half a sentence for an error message: what was probably meant, then everything there is."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def _known(name: str | None, where: str) -> str | None:
    if name is not None and name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; {near_misses(name, (*BACKENDS, 'auto'))}")
    return name


def requested_backend(backend: str | None, where: str) -> str | None:
    """The name that argument, context or environment ask for, the first of them that says anything; None = auto."""
    name = _known(backend, where) or _context.get() or _known(os.environ.get("ATHANOR_BACKEND") or None, "ATHANOR_BACKEND")
    return None if name == "auto" else name


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.  `run` takes the call's arguments by keyword; `why_not` takes them as one dict."""

    run: Callable
    why_not: Callable[[dict], str | None] = lambda call: None


class Op:
    """An operation and its backends.  `OPS[name]` finds it; bench and tests walk that table."""

    def __init__(self, name: str, backends: dict[str, Backend]):
        self.name = name
        self.backends = {key: backends[key] for key in BACKENDS if key in backends}
        assert set(backends) <= set(BACKENDS)

    def why_not(self, backend: str, **call) -> str | None:
        """Why this backend cannot serve this call; None if it can."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} backend (it has {', '.join(self.backends)})"
        return self.backends[backend].why_not(call)

    def resolve(self, call: dict, backend: str | None = None) -> tuple[str, Callable]:
        """Name and function of the backend that serves this call.  Raises ValueError when the one asked for cannot."""
        name = requested_backend(backend, self.name)
        if name is not None:
            reason = self.why_not(name, **call)
            if reason is not None:
                raise ValueError(f"{self.name}: backend {name!r} cannot serve this call: {reason}")
            return name, self.backends[name].run
        on_cpu = all(value.device.type == "cpu" for value in call.values() if isinstance(value, Tensor))
        reasons = []
        for name, candidate in self.backends.items():
            if on_cpu and name == "triton":
                continue
            reason = candidate.why_not(call)
            if reason is None:
                return name, candidate.run
            reasons.append(f"{name}: {reason}")
        raise ValueError(f"{self.name}: no backend can serve this call ({'; '.join(reasons)})")

    def __call__(self, backend: str | None, **call):
        return self.resolve(call, backend)[1](**call)


OPS: dict[str, Op] = {}


def register(name: str, **backends: Backend) -> Op:
    """Enter an operation into the table; one line at the end of each kernel file."""
    assert name not in OPS, f"{name} is registered twice"
    OPS[name] = Op(name, backends)
    return OPS[name]


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds; for the callers' arguments, not for our own bugs."""
    if not condition:
        raise ValueError(message)


def accumulation_dtype(dtype):
    """fp64 stays fp64, everything else is accumulated in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
