"""fp8_quantize_many in Triton: one program per tile of 128 x 128 of any of the matrices; what it does with a tile is fp8_quantize_triton.py's.

A program reads from one list which matrix its tile belongs to, and from that matrix's row of a table all the rest: two loads, one after the other.  A
binary search over the first tiles would take seven for 96 stacks.  What a launch knows of its arguments, that addresses and strides are multiples of
16, the compiler cannot know of numbers in a table: it is told so where it holds for all of them.  Else it moves numbers one by one, and spills
registers: right, and slow.

On an H200 (4.25 TB/s) 1e9 bf16 numbers move 4.0 GB, 0.94 ms.  Predicted from the kernel for one stack, which does the same with a tile (133 us where
83 would be the limit, 8 x 2048 x 7168): 1.2 to 1.3 ms, 35 to 38 ms for the 29e9 numbers of Qwen3-30B-A3B's experts, where 30 are the goal.  It has
never run on a GPU.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .fp8_quantize_many import TYPES, Copy
from .fp8_quantize_triton import TALL, emulates, quantize_tile

FIELDS = tl.constexpr(13)
ROUNDED = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fp8_quantize_many_triton(first: Tensor, weights: Sequence[Tensor], copies: Sequence[Copy], dtype: torch.dtype | None, power_of_two: bool) -> None:
    entries = tuple(entry_of(weight, copy) for weight, copy in zip(weights, copies, strict=True))
    table, matrix_of_tile, align = table_of(entries, first.device)
    if not len(matrix_of_tile):
        return
    with on_device_of(first):
        fp8_quantize_many_kernel[(len(matrix_of_tile),)](
            table, matrix_of_tile, ROUND=ROUNDED.get(dtype), POWER_OF_TWO=power_of_two, EMULATE=emulates(first), ALIGN=align, GROUP=TALL.group,
            **options_of(align, power_of_two, emulates(first)))  # fmt: skip
    written = [part for copy in copies for quantized in copy for part in quantized if not part.is_inference()]
    torch.autograd.graph.increment_version(written)  # PyTorch does not see what is written through the table


def options_of(align: int, power_of_two: bool, emulate: bool) -> dict:
    return {"num_warps": TALL.num_warps, "maxnreg": TALL.registers if align > 1 and power_of_two and not emulate else None}


def entry_of(weight: Tensor, copy: Copy) -> tuple[int, ...]:
    """A matrix's row of the table but for its first tile, and its number of tiles at the end."""
    batch, R, C = (1, *weight.shape)[-3:]
    stacked, (rows, columns) = weight.ndim == 3, copy
    return (weight.data_ptr(), rows.q.data_ptr(), rows.scales.data_ptr(), columns.q.data_ptr(), columns.scales.data_ptr(), R, C, weight.stride(-2),
            weight.stride(0) if stacked else 0, columns.q.stride(-1), columns.q.stride(0) if stacked else 0, TYPES.index(weight.dtype),
            batch * triton.cdiv(R, 128) * triton.cdiv(C, 128))  # fmt: skip


@lru_cache(maxsize=8)  # as many as models and parts of them that change by themselves; a moved tensor makes a new one
def table_of(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The table (n, FIELDS) int64, the matrix of each tile (tiles,) int32, and of what addresses and strides are multiples."""
    numbers = torch.tensor(entries, dtype=torch.int64)
    tiles = numbers[:, -1].clone()
    numbers[:, -1] = tiles.cumsum(0) - tiles
    # q, scales and x by 16 bytes; rows of x, of q (which are C apart) and of its columns by 16 numbers
    aligned = not (numbers[:, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]] % 16).any()
    matrix_of_tile = torch.repeat_interleave(torch.arange(len(entries), dtype=torch.int32), tiles)
    return numbers.to(device), matrix_of_tile.to(device), 16 if aligned else 1


@triton.jit
def quantize_from(
    x, TYPE: tl.constexpr, tile, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride,
    ROUND: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    x_ptr = tl.multiple_of(x.to(tl.pointer_type(TYPE)), ALIGN)
    quantize_tile(tile, x_ptr, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride, 0, 0, True,
                  True, True, POWER_OF_TWO, EMULATE, 128, GROUP, ROUND if TYPE == tl.float32 else None)  # fmt: skip


@triton.jit
def fp8_quantize_many_kernel(
    table_ptr, matrix_of_tile_ptr, ROUND: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr
):
    """table_ptr: (n, FIELDS), rows as `entry_of` makes them with the first tile at the end."""
    tile = tl.program_id(0)
    at = table_ptr + tl.load(matrix_of_tile_ptr + tile) * FIELDS
    x = tl.load(at)
    q_ptr = tl.multiple_of(tl.load(at + 1).to(tl.pointer_type(tl.uint8)), ALIGN)
    scales_ptr = tl.load(at + 2).to(tl.pointer_type(tl.float32))
    qt_ptr = tl.multiple_of(tl.load(at + 3).to(tl.pointer_type(tl.uint8)), 16)
    column_scales_ptr = tl.load(at + 4).to(tl.pointer_type(tl.float32))
    R, C = tl.load(at + 5).to(tl.int32), tl.multiple_of(tl.load(at + 6).to(tl.int32), ALIGN)
    x_stride, x_batch_stride = tl.multiple_of(tl.load(at + 7).to(tl.int32), ALIGN), tl.multiple_of(tl.load(at + 8), ALIGN)
    qt_stride, qt_batch_stride = tl.multiple_of(tl.load(at + 9).to(tl.int32), 16), tl.multiple_of(tl.load(at + 10), 16)
    kind, tile = tl.load(at + 11), tile - tl.load(at + 12).to(tl.int32)
    if kind == 0:
        quantize_from(x, tl.bfloat16, tile, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride,
                      ROUND, POWER_OF_TWO, EMULATE, ALIGN, GROUP)  # fmt: skip
    elif kind == 1:
        quantize_from(x, tl.float16, tile, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride,
                      ROUND, POWER_OF_TWO, EMULATE, ALIGN, GROUP)  # fmt: skip
    else:
        quantize_from(x, tl.float32, tile, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride,
                      ROUND, POWER_OF_TWO, EMULATE, ALIGN, GROUP)  # fmt: skip


def ahead_of_time() -> list[AheadOfTime]:
    signature, cases = {"table_ptr": "*i64:16", "matrix_of_tile_ptr": "*i32:16"}, []
    for rounded, power_of_two in ((tl.bfloat16, True), (None, False)):
        for emulate, capabilities in ((False, (90, 100)), (True, (80,))):
            constants = dict(ROUND=rounded, POWER_OF_TWO=power_of_two, EMULATE=emulate, ALIGN=16, GROUP=TALL.group)
            options = options_of(16, power_of_two, emulate)
            label = f"fp8_quantize_many {'2^n, of a bf16 model' if rounded else 'fp32'}{' emulated' * emulate}"
            cases.append(AheadOfTime(label, fp8_quantize_many_kernel, signature, constants, options["num_warps"], registers=168,
                                     capabilities=capabilities, maxnreg=options["maxnreg"], stack=24))  # fmt: skip
    return cases
