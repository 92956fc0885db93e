"""What the C++ kernels for CPU tensors (csrc/cpu, module `_native`) share.

They compute in fp32, sixteen numbers at a time on every machine, in an order that the source fixes: a row's bits depend on that row alone, neither on
its neighbours nor on the number of threads.  They run on the threads that PyTorch has (`torch.set_num_threads`).
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def native_there() -> bool:
    return importlib.util.find_spec("athanor.kernels._native") is not None


@lru_cache(maxsize=1)
def _module():
    from . import _native

    return _native


class _Recorded:
    """The compiled module, giving `record` every call once more, as `Calls` to be made again."""

    def __init__(self, record: Callable):
        self._record = record

    def __getattr__(self, name: str):
        function, later = getattr(_module(), name), getattr(_module().later, name, None)
        if later is None:  # a type
            return function

        def call(*arguments):
            result = function(*arguments)
            self._record(later(*arguments))
            return result

        return call


_recorded: _Recorded | None = None


@contextmanager
def recording(record: Callable) -> Iterator[None]:
    """Give `record` the `Calls` of every call of a kernel inside the block.  They have addresses: whoever makes them again keeps the tensors."""
    global _recorded
    _recorded = _Recorded(record)
    try:
        yield
    finally:
        _recorded = None


def no_calls():
    """Calls of kernels, none so far.  `extend(calls)` adds some, and calling it makes all of them in their order, without the interpreter's lock."""
    return _module().Calls()


def side_by_side(shares: list[list]) -> list[float]:
    """Make the `Calls` of every share in their order, each share on a thread of PyTorch's team; return the most seconds that each of a share took."""
    return _module().side_by_side(shares)


def native():
    """The compiled module."""
    return _recorded or _module()


def why_not_cpu(call: dict) -> str | None:
    """The reasons that hold for every C++ kernel here."""
    for name, value in call.items():
        if isinstance(value, Tensor):
            if not value.is_cpu:
                return f"{name} is on {value.device.type}"
            if value.dtype != torch.float32 and value.is_floating_point():
                return f"{name} is {value.dtype}; the C++ kernels compute in fp32"
    if not native_there():
        return "the C++ kernels are not built (pip install builds them with g++)"
    return None


class _Unrecorded:
    """Stands in for autograd's context where nothing is differentiated: calls without gradients are small ones, and autograd's own cost shows."""

    needs_input_grad = ()

    def __getattr__(self, name: str):
        return lambda *ignored: None


def run(function: type[torch.autograd.Function], *inputs):
    """function.apply(*inputs), or its forward alone where gradients are off."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_Unrecorded(), *inputs)


def address(x: Tensor | None) -> int:
    """Where the numbers of x start; 0 = there is no such tensor."""
    return 0 if x is None else x.data_ptr()


def dense(x: Tensor) -> Tensor:
    """x itself or a contiguous copy."""
    return x if x.is_contiguous() else x.contiguous()


def dense_rows(x: Tensor) -> Tensor:
    """x (T, N) itself where the numbers of a row are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
