"""What a benchmark case declares: inputs, the operation, what a user would otherwise run, and the bytes and flops that it cannot avoid."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One operation at one size.  `run` and the rivals return the tensors to compare, gradients included, and are what is timed."""

    op: str  # name in athanor.kernels._dispatch.OPS
    sizes: dict[str, int]
    dtype: torch.dtype
    make: Callable[[torch.Generator], dict]  # inputs in fp64 or integers, on the current default device; random, never zeros
    run: Callable[..., tuple]  # (backend=..., **inputs) -> tensors
    eager: Callable[..., tuple]  # (**inputs) -> the same tensors from plain PyTorch: the rival, and in fp64 the oracle
    work: str  # the formula behind bytes and flops, for the reader
    bytes: float = 0  # that must be read and written at least
    flops: float = 0
    rivals: dict[str, Callable[..., tuple]] = field(default_factory=dict)  # further ones, by name; None in place of an output they do not give
    slack: float | tuple[float, ...] = 2  # ulp of the largest value that the gate allows beyond twice the eager error; of all outputs or of each
    gate: "Case | None" = None  # the same operation where an fp64 oracle is affordable, tile edges crossed; needed only if this size is too large
    compared: Callable[..., tuple] | None = None  # (outputs, **inputs) -> the tensors to compare, where two right answers may differ in the outputs
    floors: dict[str, Callable] = field(default_factory=dict)  # parts of the work, timed beside it and held against nothing
    fp32: tuple[str, ...] = ()  # inputs that are fp32 whatever the dtype, as log-probs and advantages are
    rows: tuple[str, ...] = ()  # inputs whose first axis is rows that do not influence each other: a sample of rows is checked at full size


_compiling = False


@contextmanager
def compiled() -> Iterator[None]:
    """Inside the block `differentiated` puts its function through torch.compile: forward and backward, but not the call of autograd around them."""
    global _compiling
    _compiling = True
    try:
        yield
    finally:
        _compiling = False


def differentiated(function: Callable, *leaves: torch.Tensor, upstream: torch.Tensor | tuple[torch.Tensor, ...] | None = None) -> tuple:
    """Outputs (None ones left out) and gradients of function(*leaves).

    upstream: the gradient of the first output, ones by default, or those of as many outputs as it has entries.
    """
    if _compiling:
        function = torch.compile(function, dynamic=False)  # found again by its code, so that only the first call compiles
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    outputs = [x for x in out if x is not None] if isinstance(out, tuple) else [out]
    upstream = upstream if isinstance(upstream, tuple) else (torch.ones_like(outputs[0]) if upstream is None else upstream,)
    grads = torch.autograd.grad(outputs[: len(upstream)], leaves, upstream)
    return (*(x.detach() for x in outputs), *grads)
