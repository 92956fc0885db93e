"""A captured step on CPU tensors: the counterpart of a CUDA graph.

While it captures, a function runs as usual, and every PyTorch call and C++ kernel in it is written down with its arguments and results, which stay
where they are.  A replay makes the same calls into the same memory, without what it took to decide on them - checks, backends, modules, allocations -
which for small models costs more than the arithmetic.  As with CUDA graphs, inputs are what lies in the captured tensors at the time of the replay.
A function whose course depends on what its tensors hold, or that waits for other ranks, cannot be captured: `valid` is False then, and the caller
runs it as it is.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from athanor.kernels._cpu import no_calls, recording

DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
UNINITIALISED = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided}


class CpuGraph(TorchDispatchMode):
    """`result = graph.capture(function)` runs and captures; `graph.replay()` runs again, with new values in the tensors of `result`."""

    def __init__(self):
        super().__init__()
        self.valid, self.bytes = True, 0  # memory that the captured calls write to
        self._after_a_kernel = False
        self._calls: list[Callable] = []  # PyTorch's, and `Calls` of kernels that follow one another
        self._kept: list = []  # every result: its memory is used again

    def capture(self, function: Callable):
        with self, recording(self._native):
            result = function()
        if not self.valid:
            self.drop()
        return result

    def drop(self) -> None:
        """Give up what was captured."""
        self.valid, self.bytes = False, 0
        self._calls.clear()
        self._kept.clear()

    def replay(self) -> None:
        for call in self._calls:
            call()

    @property
    def native(self):
        """The `Calls` that are all there is to replay, or None."""
        return self._calls[0] if self.valid and len(self._calls) == 1 and self._after_a_kernel else None

    def _native(self, calls) -> None:
        if not self._after_a_kernel:
            self._calls.append(no_calls())
            self._after_a_kernel = True
        self._calls[-1].extend(calls)

    def _append(self, call: Callable) -> None:
        self._calls.append(call)
        self._after_a_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.valid:  # nothing of it will be replayed
            return result
        if func.namespace == "c10d":  # the host waits for other ranks in it
            self.valid = False
            return result
        self._kept.append(result)
        if _depends_on_data(func, args) or not isinstance(result, Tensor | tuple | list):  # what comes as a number decides on something
            self.valid = False
        elif func._schema.is_mutable:
            self._append(partial(func, *args, **kwargs))
        elif not _is_view(result, args):
            self.bytes += sum(x.nbytes for x in (result if isinstance(result, tuple | list) else (result,)))
            if func.overloadpacket not in UNINITIALISED:
                self._append(self._again(func, args, kwargs, result))
        return result

    def _again(self, func, args: tuple, kwargs: dict, result) -> Callable:
        """A call that computes the same into `result`."""
        into = _out_variant(func) if isinstance(result, Tensor) else None
        if into is not None:
            return partial(into, *args, **kwargs, out=result)
        results = result if isinstance(result, tuple | list) else (result,)

        def again() -> None:
            new = func(*args, **kwargs)
            for old, value in zip(results, new if isinstance(new, tuple | list) else (new,), strict=True):
                old.copy_(value)

        return again


def _depends_on_data(func, args: tuple) -> bool:
    """Whether shapes or course of the call depend on what its tensors hold.  Indices do not, masks do."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(DEPENDS_ON_DATA & set(func.tags))


def _is_view(result, args: tuple) -> bool:
    """Whether the result lies in memory of an argument: then there is nothing to compute again.  `reshape` or `to` may or may not copy."""
    first = result[0] if isinstance(result, tuple | list) else result
    return any(isinstance(a, Tensor) and a.untyped_storage()._cdata == first.untyped_storage()._cdata for a in args)


@cache
def _out_variant(func):
    """The overload that takes the same arguments and, as `out`, the tensor to write to."""

    def arguments(overload) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in overload._schema.arguments]

    wanted = [*arguments(func), ("out", "Tensor")]
    return next((o for o in (getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads()) if arguments(o) == wanted), None)
