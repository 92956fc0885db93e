"""Run a Gluon kernel as Python on CPU tensors: values in numpy, a thread per warp partition, barriers that really wait, PTX blocks read line by line.

Triton's interpreter knows nothing of Gluon.  Layouts mean nothing here and products are fp32, so what this shows is the arithmetic of addresses,
masks, scales and phases; registers, swizzles and the tensor core's bits it does not.
"""

import re
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

DEADLOCK_S = 10


class Value(np.ndarray):
    """Also what would be a scalar stays an array, which `to` needs."""

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return array.view(Value)

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


def value(x, dtype=None) -> Value:
    return np.asarray(x, dtype).view(Value)


class Pointer:
    def __init__(self, tensor: torch.Tensor, offset=0):
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.memory, self.offset = storage.numpy(), np.asarray(offset) + tensor.storage_offset()
        self.dtype = SimpleNamespace(element_ty=self.memory.dtype.type)

    def __add__(self, offset):
        moved = Pointer.__new__(Pointer)
        moved.memory, moved.dtype, moved.offset = self.memory, self.dtype, self.offset + np.asarray(offset, np.int64)
        return moved

    def __sub__(self, offset):
        return self + -np.asarray(offset, np.int64)


def load(pointer, mask=True, other=0):
    at, mask = np.broadcast_arrays(pointer.offset, mask)
    found = np.full(at.shape, other, pointer.memory.dtype)
    found[mask] = pointer.memory[at[mask]]
    return value(found)


def store(pointer, x, mask=True):
    at, x, mask = np.broadcast_arrays(pointer.offset, x, mask)
    pointer.memory[at[mask]] = x[mask].astype(pointer.memory.dtype)


def reduce(x, axis, combine):
    parts = [value(part) for part in np.moveaxis(np.asarray(x), axis, 0)]
    total = parts[0]
    for part in parts[1:]:
        total = combine(total, part)
    return total


def floats(bits):
    return bits.view(np.float32)


def e4m3(bits):
    """cvt.rn.satfinite.e4m3x2.f32 of one number."""
    wide = torch.from_numpy(floats(bits).copy())
    return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint32)


def ptx(text: str, registers: dict) -> None:
    """The instructions that the kernels' blocks have, on arrays of 32 bits."""

    def get(name):
        return np.uint32(int(name, 0)) if name[0].isdigit() else registers[name]

    text = re.sub(r"\.reg[^;]*;", "", text.strip().removeprefix("{").removesuffix("}"))
    for line in filter(None, (part.strip() for part in text.split(";"))):
        op, rest = line.split(None, 1)
        names = [name.strip(" {}") for name in rest.split(",")]
        target, inputs = names[0], [get(name) for name in names[1:]]
        if op == "shl.b32":
            result = inputs[0] << inputs[1]
        elif op == "and.b32":
            result = inputs[0] & inputs[1]
        elif op == "mul.f32":
            result = (floats(inputs[0]) * floats(inputs[1])).view(np.uint32)
        elif op == "cvt.rn.satfinite.e4m3x2.f32":
            result = e4m3(inputs[1]) | e4m3(inputs[0]) << 8
        elif op == "mov.b32":
            result = inputs[0] | inputs[1] << 16
        elif op == "max.u16x2":
            result = np.maximum(inputs[0] & 0xFFFF, inputs[1] & 0xFFFF) | np.maximum(inputs[0] >> 16, inputs[1] >> 16) << 16
        else:
            raise NotImplementedError(op)
        registers[target] = result


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    shape, registers = np.broadcast_shapes(*(a.shape for a in args)), {}
    outputs = sum(part.startswith("=") for part in constraints.split(","))
    number = outputs
    for a in args:  # 32 bits each
        groups = np.broadcast_to(np.asarray(a), shape).reshape(-1, pack).view(np.uint32) if pack > 1 else np.asarray(a).reshape(-1, 1).view(np.uint32)
        for i in range(pack):
            registers[f"${number}"] = np.ascontiguousarray(groups[:, i])
            number += 1
    assert number == len(constraints.split(","))
    ptx(asm, registers)
    results = []
    for i, kind in enumerate(dtypes):  # one register of 32 bits holds the group
        assert np.dtype(kind).itemsize * pack == 4
        results.append(value(registers[f"${i}"].reshape(-1, 1).view(kind).reshape(shape)))
    return results[0] if len(results) == 1 else results


class Barrier:
    """mbarrier: a phase ends when `count` have arrived and every announced byte is there."""

    def __init__(self):
        self.changed = threading.Condition()

    def init(self, count):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def _update(self, arrivals=0, announced=0):
        with self.changed:
            self.pending, self.bytes = self.pending - arrivals, self.bytes + announced
            assert self.pending >= 0, "one arrival too many"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
            self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase & 1 != int(parity), DEADLOCK_S), "a partition waits for ever"


class Shared:
    def __init__(self, data):
        self.data = data

    def index(self, i):
        return self.data[int(i)] if isinstance(self.data, list) else Shared(self.data[int(i)])

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return value(self.data.numpy().copy())


def copy_to_shared(descriptor, at, barrier, target):
    """A box of a matrix; what lies outside is 0."""
    base, (rows, columns), (row, column) = descriptor.base, descriptor.block_shape, (int(x) for x in at)
    part = base[row : row + rows, column : column + columns]
    box = torch.zeros(rows, columns, dtype=torch.float32)
    box[: part.shape[0], : part.shape[1]] = part.float()
    target.data.copy_(box.to(target.data.dtype))
    barrier._update(announced=-rows * columns * target.data.element_size())


def multiplied(a, b, acc, use_acc=True, is_async=False):
    product = (a.data.float() @ b.data.float()).numpy()
    return value(product + np.asarray(acc) if use_acc else product)


def warp_specialize(partitions, warps, registers):
    failures = []

    def run(function, args):
        try:
            function(*args)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLOCK_S)
    if failures:
        raise failures[0]


def language(place: SimpleNamespace) -> SimpleNamespace:
    def allocate(dtype, shape, layout):
        if dtype is np.int64:  # barriers
            return Shared([Barrier() for _ in range(shape[0])])
        return Shared(torch.full(shape, torch.nan).to(dtype) if dtype is torch.float8_e4m3fn else torch.full(shape, torch.nan))

    anything = lambda *args, **options: None  # noqa: E731
    return SimpleNamespace(
        int16=np.int16, int32=np.int32, int64=np.int64, uint8=np.uint8, float32=np.float32, float8e4nv=torch.float8_e4m3fn, constexpr=int,
        BlockedLayout=anything, SliceLayout=anything, NVMMADistributedLayout=anything, load=load, store=store, reduce=reduce,
        program_id=lambda axis: value(place.program, np.int32), num_programs=lambda axis: place.programs,
        arange=lambda first, end, layout: value(np.arange(first, end, dtype=np.int32)), cdiv=lambda a, b: -(-a // b),
        minimum=lambda a, b: value(np.minimum(a, b)), maximum=lambda a, b: value(np.maximum(a, np.asarray(b, getattr(a, "dtype", None)))),
        where=lambda c, a, b: value(np.where(c, a, b)), broadcast=lambda a, b: [value(x.copy()) for x in np.broadcast_arrays(a, b)],
        full_like=lambda a, x: value(np.full_like(a, x)), div_rn=lambda a, b: a / b, convert_layout=lambda x, layout: x,
        zeros=lambda shape, dtype, layout: value(np.zeros(shape, dtype)), static_range=range, allocate_shared_memory=allocate,
        warp_specialize=warp_specialize, inline_asm_elementwise=inline_asm_elementwise)  # fmt: skip


@contextmanager
def emulated(*modules, programs: int = 2):
    """Inside the block a kernel of these modules runs at once where it is launched; yields nothing.  programs: of a persistent grid."""
    place, before = SimpleNamespace(program=0, programs=programs), []

    class Launch:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            def launch(*args, num_warps=None, **constants):
                place.programs = int(grid[0])
                args = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
                for program in range(place.programs):
                    place.program = program
                    with np.errstate(all="ignore"):
                        self.function(*args, **constants)

            return launch

    gl = language(place)
    barriers = SimpleNamespace(MBarrierLayout=lambda: None, init=lambda bar, count: bar.init(count), wait=lambda bar, parity: bar.wait(parity),
                               arrive=lambda bar, count: bar._update(arrivals=count), expect=lambda bar, size: bar._update(1, int(size)))  # fmt: skip
    replaced = {"gl": gl, "mbarrier": barriers, "tma": SimpleNamespace(async_copy_global_to_shared=copy_to_shared), "warpgroup_mma": multiplied,
                "warpgroup_mma_wait": lambda n, deps: deps[0], "limits": lambda device: (programs, 0)}  # fmt: skip
    try:
        for module in modules:
            module.range = lambda *bounds: (value(i, np.int32) for i in range(*map(int, bounds)))  # a counter has `to`, too
            for name, item in list(vars(module).items()):
                new = replaced.get(name, item)
                if hasattr(item, "is_gluon") and item.is_gluon():
                    new = Launch(item.fn) if name.endswith("_kernel") else item.fn
                elif type(item).__name__ == "constexpr":
                    new = type("Constant", (type(item.value),), {"value": item.value})(item.value)
                if new is not item:
                    before.append((module, name, item))
                    setattr(module, name, new)
        yield
    finally:
        for module, name, item in before:
            setattr(module, name, item)
        for module in modules:
            del module.range
