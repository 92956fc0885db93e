"""Block-scaled FP8 in Triton: one kernel for every layout; the equations are those of fp8_quantize.py, and so are the bits.

A program owns a tile of 128 x 128 (or, for rows alone, ROWS x 128), keeps it in registers, and writes each layout that is asked for: so two layouts
cost one read.  Magnitudes are compared as integers, in whose order NaN is the largest.

The cast to e4m3 is cvt.rn.satfinite from sm_89 on.  Where there is none (sm_80, and the interpreter, whose cast truncates) integer arithmetic gives
the same bits.

On an H200 (4.25 TB/s), 32768 x 7168 bf16: rows alone move 712 MB, 168 us, and take 169.  Both layouts move 954 MB, 224 us, and take 453 (688 when
columns went through shared memory byte by byte): 1,080 instructions per thread and tile are 265 us of issue slots; a tile's place in the order and
prefetching do not matter.  From bf16 fp8_quantize_dual_hopper_triton.py makes both layouts, with half the instructions.
Blocks of 128 x 128 with their transpose, 8 x 2048 x 7168: 83 us at least, 133.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cuda import limits
from ._triton import AheadOfTime, interpreting, on_device_of
from .fp8_quantize import LEAST_AMAX, Quantized, empty_layout
from .fp8_quantize_dual_hopper_triton import fp8_quantize_dual_words, why_not_words

ROWS, WARPS = 32, 4  # rows of a program that scales rows alone: 32 numbers per thread
AMAX_FLOOR = tl.constexpr(LEAST_AMAX)


class Tall(NamedTuple):
    """How tiles of 128 x 128 are done."""

    num_warps: int  # 16: 32 numbers per thread; tile_rows is made for it
    programs: int  # per processor, if they take tile after tile
    group: int  # tiles above each other before the next ones to the right: DRAM pages are longer than a tile's side
    stages: int  # tiles on their way to a program; 0: each program does one tile
    registers: int | None  # per thread, where both layouts are written and scales are powers of two: dividing takes more, and would spill


TALL = Tall(16, 2, 8, 0, 64)


def fp8_quantize_triton(x: Tensor, layouts: tuple, power_of_two: bool) -> tuple[Quantized, ...]:
    x = x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
    if layouts == ((1, 128), (128, 1)) and x.is_cuda and x.numel() and why_not_words(x) is None:
        return fp8_quantize_dual_words(x, power_of_two)
    results = [empty_layout(x.shape, layout, x.device) for layout in layouts]
    if not x.numel():
        return tuple(results)
    batch, R, C = (1, *x.shape)[-3:]
    square, by_row = layouts[0] == (128, 128), layouts[0] == (1, 128)
    rows = results[0] if square or by_row else None
    columns = results[-1] if len(results) == 2 or not (square or by_row) else None
    some, q_stride = (rows or columns), lambda result, axis: result.q.stride(axis) if result else 0
    tall = square or columns is not None
    tiles = batch * triton.cdiv(R, 128 if tall else ROWS) * triton.cdiv(C, 128)
    limited = rows is not None and columns is not None and power_of_two and not emulates(x)
    launch = launch_of(tiles, tall, limited, x.device)
    with on_device_of(x):
        fp8_quantize_kernel[(launch["programs"],)](
            x, (rows or some).q.view(torch.uint8), (rows or some).scales, (columns or some).q.view(torch.uint8), (columns or some).scales, R, C,
            x.stride(-2), x.stride(0) if x.ndim == 3 else 0, q_stride(columns, -1), q_stride(columns, 0) if x.ndim == 3 else 0,
            (rows or some).scales.stride(-1), (columns or some).scales.stride(-2), tiles,
            SQUARE=square, BY_ROW=rows is not None, BY_COLUMN=columns is not None, POWER_OF_TWO=power_of_two, EMULATE=emulates(x),
            **launch)  # fmt: skip
    return tuple(results)


def launch_of(tiles: int, tall: bool, limited: bool, device: torch.device) -> dict:
    """Grid, compile-time values and options that the shape of the tiles decides."""
    if not tall:
        return {"programs": tiles, "HEIGHT": ROWS, "GROUP": 1, "STAGES": 0, "num_warps": WARPS}
    processors = limits(device)[0] if device.type == "cuda" else 2
    programs = min(tiles, TALL.programs * processors) if TALL.stages else tiles
    return {"programs": programs, "HEIGHT": 128, "GROUP": TALL.group, "STAGES": TALL.stages,
            "num_warps": TALL.num_warps, "maxnreg": TALL.registers if limited else None}  # fmt: skip


def emulates(x: Tensor) -> bool:
    """Is there no instruction for the cast?"""
    return interpreting() or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9)


@triton.jit
def scales_of(amax_bits, POWER_OF_TWO: tl.constexpr):
    """Scale and factor from the bits of the largest magnitude."""
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), AMAX_FLOOR)
    if POWER_OF_TWO:
        # of the power of two at or above amax / 448 = amax / (1.75 x 2^8): a division by a number would be a call of 20 instructions
        exponent = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
        scale, factor = (exponent << 23).to(tl.float32, bitcast=True), (254 - exponent << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.div_rn(amax, 448.0)
        factor = tl.div_rn(448.0, amax)
    finite = amax_bits < 0x7F800000
    return tl.where(finite, scale, float("nan")), tl.where(finite, factor, float("nan"))


@triton.jit
def e4m3_bits(y, EMULATE: tl.constexpr):
    """Bits of y in e4m3: nearest, ties to even, saturated at 448, NaN stays NaN."""
    if EMULATE:
        bits = y.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 the grid is 2^-9: adding 2^23 rounds to it
        small = (size.to(tl.float32, bitcast=True) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
        code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
        code = tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
        return code.to(tl.uint8)
    else:
        # Not y.to(tl.float8e4nv): where a thread stores the halves of its words and also takes them apart, ptxas 12.8 reads the latter from
        # registers that nothing wrote (LOG.md).  Here halves exist inside the block alone.
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,r,r,r,r", [y.to(tl.int32, bitcast=True)], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def as_if_in(x, TYPE: tl.constexpr):
    """fp32 rounded to bf16 or fp16, to the nearest, ties to even; TYPE None: as it is.  The interpreter's cast to bf16 truncates."""
    if TYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        # NaN stays: adding to it could carry into the sign
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF, bits)
        return bits.to(tl.float32, bitcast=True)
    elif TYPE == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def store_transposed(code, qt_at, qt_stride, R, C):
    """Store a tile of codes (128, 128), its rows in the order of tile_rows, by columns, as words of four rows.

    Through shared memory, where the layouts are exchanged, go 4,096 words instead of 16,384 bytes.  R, C: what is left of x.  The padding of a
    column's storage, up to a multiple of 16 bytes, is written too, with 0.
    """
    two = tl.arange(0, 2)
    words = tl.sum(tl.reshape(code, [2, 32, 2, 128]).to(tl.int32) << (8 * two)[:, None, None, None], 0)
    words = tl.sum(words << (16 * two)[None, :, None], 1)
    word, column = tl.arange(0, 32), tl.arange(0, 128)
    mask = (column < C)[:, None] & (word < tl.cdiv(R, 16) * 4)[None, :]
    at = qt_at.to(tl.pointer_type(tl.int32)) + (column[:, None] * (qt_stride // 4) + word[None, :])
    tl.store(at, tl.trans(words), mask=mask)


@triton.jit
def tile_place(tile, R, C, HEIGHT: tl.constexpr, GROUP: tl.constexpr):
    """Which batch, row and column of tiles a program has: GROUP above each other before the next ones to the right."""
    tiles_c, tiles_r = tl.cdiv(C, 128), tl.cdiv(R, HEIGHT)
    batch, within = (tile // (tiles_c * tiles_r)).to(tl.int64), tile % (tiles_c * tiles_r)
    first = within // (GROUP * tiles_c) * GROUP
    high = tl.minimum(GROUP, tiles_r - first)
    within = within % (GROUP * tiles_c)
    return batch, (first + within % high).to(tl.int64), within // high


@triton.jit
def tile_rows(HEIGHT: tl.constexpr):
    """The rows of a tile in the order in which its programs hold them.

    With 16 warps a thread holds rows i and i + 64 of the tile, and its neighbour in a column i + 1: in this order they are four rows that follow
    each other in x, which store_transposed makes a word of.
    """
    row = tl.arange(0, HEIGHT)
    if HEIGHT == 128:
        row = row % 64 // 2 * 4 + row % 2 * 2 + row // 64
    return row


@triton.jit
def store_rows(x, size, q_at, mask, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr):
    """Quantise a tile of x (rows, 128) by 1 x 128 and return the scales.  size: the bits of its magnitudes."""
    scale, factor = scales_of(tl.max(size, 1), POWER_OF_TWO)
    tl.store(q_at, e4m3_bits(x * factor[:, None], EMULATE), mask=mask)
    return scale


@triton.jit
def store_columns(x, size, qt_at, qt_stride, R, C, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr):
    """Quantise a tile of x (128, 128), its rows in the order of tile_rows, by 128 x 1 and return the scales.  R, C: what is left of x."""
    scale, factor = scales_of(tl.max(size, 0), POWER_OF_TWO)
    store_transposed(e4m3_bits(x * factor[None, :], EMULATE), qt_at, qt_stride, R, C)
    return scale


@triton.jit
def quantize_tile(
    tile, x_ptr, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride, scales_stride,
    column_scales_stride,
    SQUARE: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr, HEIGHT: tl.constexpr,
    GROUP: tl.constexpr, ROUND: tl.constexpr = None,
):  # fmt: skip
    batch, tile_r, tile_c = tile_place(tile, R, C, HEIGHT, GROUP)
    row0, column0 = tile_r * HEIGHT, tile_c * 128
    row, column = tile_rows(HEIGHT), tl.arange(0, 128)
    rows, columns = (row0 + row).to(tl.int32), column0 + column
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    # 64 bits for where the tile begins, 32 within it: in 64 each of a thread's addresses would take two registers more
    x_at = x_ptr + (batch * x_batch_stride + row0 * x_stride + column0)
    x = as_if_in(tl.load(x_at + (row[:, None] * x_stride + column[None, :]), mask=mask, other=0.0).to(tl.float32), ROUND)
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    q_at = q_ptr + ((batch * R + row0) * C + column0) + (row[:, None] * C + column[None, :])
    qt_at = qt_ptr + (batch * qt_batch_stride + column0.to(tl.int64) * qt_stride + row0)
    if SQUARE:
        scale, factor = scales_of(tl.max(tl.max(size, 1), 0), POWER_OF_TWO)
        code = e4m3_bits(x * factor, EMULATE)
        tl.store(q_at, code, mask=mask)
        at = (batch * tl.cdiv(R, HEIGHT) + tile_r) * tl.cdiv(C, 128) + tile_c
        tl.store(scales_ptr + at, scale)
        if BY_COLUMN:
            store_transposed(code, qt_at, qt_stride, R - row0, C - column0)
            tl.store(column_scales_ptr + at, scale)
    else:
        if BY_ROW:
            scale = store_rows(x, size, q_at, mask, POWER_OF_TWO, EMULATE)
            tl.store(scales_ptr + tile_c.to(tl.int64) * scales_stride + rows, scale, mask=rows < R)
        if BY_COLUMN:
            scale = store_columns(x, size, qt_at, qt_stride, R - row0, C - column0, POWER_OF_TWO, EMULATE)
            tl.store(column_scales_ptr + tile_r * column_scales_stride + columns, scale, mask=columns < C)


# The number of rows changes from step to step and is not specialised, nor is the stride that follows from it.
@triton.jit(do_not_specialize=["R", "scales_stride", "tiles", "programs"])
def fp8_quantize_kernel(
    x_ptr, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride, scales_stride,
    column_scales_stride, tiles, programs,
    SQUARE: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr, HEIGHT: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q_ptr: (.., R, C) contiguous; scales_ptr: 1 x 128 by column block with stride scales_stride, 128 x 128 contiguous.  qt_ptr: (.., C, R).

    STAGES 0: a program per tile; else programs take tile after tile and load the next ones meanwhile.
    """
    if STAGES:
        for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
            quantize_tile(tile, x_ptr, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride, qt_batch_stride,
                          scales_stride, column_scales_stride, SQUARE, BY_ROW, BY_COLUMN, POWER_OF_TWO, EMULATE, HEIGHT, GROUP)  # fmt: skip
    else:
        quantize_tile(tl.program_id(0), x_ptr, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, x_stride, x_batch_stride, qt_stride,
                      qt_batch_stride, scales_stride, column_scales_stride, SQUARE, BY_ROW, BY_COLUMN, POWER_OF_TWO, EMULATE, HEIGHT,
                      GROUP)  # fmt: skip


def ahead_of_time() -> list[AheadOfTime]:
    pointers = {"x_ptr": "*bf16:16", "q_ptr": "*u8:16", "scales_ptr": "*fp32:16", "qt_ptr": "*u8:16", "column_scales_ptr": "*fp32:16"}
    integers = ["C", "x_stride", "x_batch_stride", "qt_stride", "qt_batch_stride", "column_scales_stride"]
    signature = pointers | dict.fromkeys(integers, "i32:16") | dict.fromkeys(("R", "scales_stride", "tiles", "programs"), "i32")
    cases = []
    for name, square, by_row, by_column in [("rows", False, True, False), ("dual", False, True, True), ("columns", False, False, True),
                                            ("square dual", True, True, True)]:  # fmt: skip
        for emulate, capabilities in ((False, (90, 100)), (True, (80,))):
            for power_of_two in (True, False):
                launch = launch_of(1, by_column, by_row and by_column and power_of_two and not emulate, torch.device("cpu"))
                constants = dict(SQUARE=square, BY_ROW=by_row, BY_COLUMN=by_column, POWER_OF_TWO=power_of_two, EMULATE=emulate)
                constants |= {key: launch[key] for key in ("HEIGHT", "GROUP", "STAGES")}
                for x, kind in (("*bf16:16", ""), ("*fp32:16", " of fp32"))[: 2 if by_column and power_of_two else 1]:
                    label = f"fp8_quantize {name}{kind} {'2^n' if power_of_two else 'fp32'}{' emulated' * emulate}"
                    cases.append(AheadOfTime(label, fp8_quantize_kernel, signature | {"x_ptr": x}, constants, launch["num_warps"], registers=168,
                                             capabilities=capabilities, maxnreg=launch.get("maxnreg"), stack=24))  # fmt: skip
    return cases
