"""Which implementation serves a call: `backend=` argument, then `with use_backend(...)`, then env ATHANOR_BACKEND, then auto.

Every operation registers its backends in the order of preference (cuda, triton, cpu, reference), each with `why_not(call)`: None when it can
serve this call, else the reason as half a sentence.  Auto takes the first that can; a backend asked for by name that cannot serve raises.
Nothing falls back by catching an exception.  The Triton interpreter is only for a caller who names `triton`: auto never takes it on CPU.

Strict mode.  An operation whose usual backends on CUDA choose the order of a sum by the shape of the call has, besides, one that does not, registered
with strict=True.  Inside `with strict_mode()` auto takes that one and none of the others; outside it leaves out what is registered with usual=False.
"""

import difflib
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the order in which auto asks

_context: ContextVar[str | None] = ContextVar("athanor_backend", default=None)
_strict: ContextVar[bool] = ContextVar("athanor_strict", default=False)


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


@contextmanager
def strict_mode(on: bool = True) -> Iterator[None]:
    """Inside the block a token's numbers do not depend, bit for bit, on the other tokens of a call, in packed and in decode calls: log-probs of
    rollout and training are equal.

    `linear` and `attention` take their row-independent kernels on CUDA, and raise ValueError where these cannot serve or another backend is asked for
    by name.  On CPU it changes nothing.  Each thread starts outside of it, as with every ContextVar: what autograd's thread computes again, as
    activation checkpointing does, must enter it itself (torch.utils.checkpoint: context_fn).
    """
    token = _strict.set(on)
    try:
        yield
    finally:
        _strict.reset(token)


def is_strict() -> bool:
    return _strict.get()


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
    name = _known(backend, where) or _context.get() or os.environ.get("ATHANOR_BACKEND")
    if not name or name == "auto":
        return None
    return _known(name, "ATHANOR_BACKEND")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.  `run` takes the call's arguments by keyword; `why_not` takes them as one dict."""

    run: Callable
    why_not: Callable[[dict], str | None] = lambda call: None
    strict: bool = False  # a row's bits depend on that row alone, so it serves strict mode on CUDA
    usual: bool = True  # taken by auto outside of strict mode, too


def late(where: str) -> Callable:
    """The function `file.name` of this package, imported at its first call: Triton and the compiled modules cost time."""
    file, name = where.split(".")
    found = None

    def run(**call):
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f".{file}", __package__), name)
        return found(**call)

    run.file = file
    return run


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
        on_cpu = all([value.is_cpu for value in call.values() if isinstance(value, Tensor)])
        strict = is_strict() and not on_cpu and any(candidate.strict for candidate in self.backends.values())
        if name is not None:
            reason = self.why_not(name, **call)
            if reason is None and strict and not self.backends[name].strict:
                reason = "strict mode is on, and its results for a row depend on the other rows"
            if reason is not None:
                raise ValueError(f"{self.name}: backend {name!r} cannot serve this call: {reason}")
            return name, self.backends[name].run
        reasons = []
        for name, candidate in self.backends.items():
            if (on_cpu and name == "triton") or not (candidate.strict if strict else candidate.usual):
                continue
            reason = candidate.why_not(call)
            if reason is None:
                return name, candidate.run
            reasons.append(f"{name}: {reason}")
        mode = " in strict mode" if strict else ""
        raise ValueError(f"{self.name}: no backend can serve this call{mode} ({'; '.join(reasons)})")

    def __call__(self, backend: str | None, **call):
        cpu = self.backends.get("cpu")
        # What auto comes to for CPU tensors, without asking the others: small calls are made by the thousand.
        if cpu is not None and requested_backend(backend, self.name) is None and cpu.why_not(call) is None:
            return cpu.run(**call)
        return self.resolve(call, backend)[1](**call)


OPS: dict[str, Op] = {}


def register(name: str, **backends: Backend) -> Op:
    """Enter an operation into the table; one line at the end of each kernel file."""
    assert name not in OPS, f"{name} is registered twice"
    OPS[name] = Op(name, backends)
    return OPS[name]


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless the condition holds; for the callers' arguments, not for our own bugs.

    A message with figures in it is a function, called when it is needed: writing shapes and dtypes out costs as much as a small kernel.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def accumulation_dtype(dtype):
    """fp64 stays fp64, everything else is accumulated in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
