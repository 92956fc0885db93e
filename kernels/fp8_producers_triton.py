"""The producers of FP8 operands in Triton; what they compute is in fp8_producers.py.

`fp8_produce_kernel` has the tiles of fp8_quantize_triton.py, and stores them in the same way; where that one loads a tile, this one gathers it, or
computes it by the formulas of swiglu_triton.py, element by element and in their order of operations, so the bits are those of the two kernels after
each other.  A tile of swiglu's gradient lies in dgate or in dup (or, where F is no multiple of 128, in both): each reads gate and dy, which the other
one reads too, from L2.

`fp8_rmsnorm_kernel` takes rmsnorm_triton.py's tiles, hence its order of summation.  Rows too long for one pass are walked twice, as there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .fp8_producers import Produced
from .fp8_quantize import empty_layout
from .fp8_quantize_triton import ROWS, TALL, WARPS, e4m3_bits, emulates, scales_of, store_columns, store_rows, tile_place, tile_rows
from .rmsnorm import in_rows
from .rmsnorm_triton import row_starts, rstd_of, summed, tile_of
from .swiglu_triton import neighbours

# Registers per thread of the tiles of 128 x 128, by what they come from.  512 threads: 64 let two programs run on a processor, 128 one.
REGISTERS = {"rows": 64, "weighted": 64, "swiglu": 128, "dswiglu": 128}


def fp8_permute_triton(x: Tensor, source: Tensor, weights: Tensor | None, k: int, columns: bool, wide: bool, power_of_two: bool) -> Produced:
    weights = source if weights is None else weights.contiguous()
    kind = "rows" if weights is source else "weighted"
    return produce(kind, x, x, source.contiguous(), weights, (source.shape[0], x.shape[1]), k, columns, wide, power_of_two)


def fp8_swiglu_triton(gate_up: Tensor, columns: bool, wide: bool, power_of_two: bool) -> Produced:
    T, twice = gate_up.shape
    return produce("swiglu", gate_up, gate_up, gate_up, gate_up, (T, twice // 2), 1, columns, wide, power_of_two)


def fp8_swiglu_backward_triton(gate_up: Tensor, dy: Tensor, columns: bool, wide: bool, power_of_two: bool) -> Produced:
    return produce("dswiglu", gate_up, dy, gate_up, gate_up, tuple(gate_up.shape), 1, columns, wide, power_of_two)


def produce(kind: str, a: Tensor, b: Tensor, source: Tensor, weights: Tensor, shape: tuple[int, int], k: int, columns: bool, wide: bool,
            power_of_two: bool) -> Produced:  # fmt: skip
    (R, C), (a, a_stride), (b, b_stride) = shape, neighbours(a), neighbours(b)
    y = torch.empty(R, C, dtype=a.dtype, device=a.device) if wide else None
    rows, turned = empty_layout(shape, (1, 128), a.device), empty_layout(shape, (128, 1), a.device) if columns else None
    if R * C:
        tiles, some = tiles_of(columns), turned or rows
        with on_device_of(a):
            fp8_produce_kernel[(triton.cdiv(R, tiles["HEIGHT"]) * triton.cdiv(C, 128),)](
                a, b, source, weights, a if y is None else y, rows.q.view(torch.uint8), rows.scales, some.q.view(torch.uint8), some.scales, R, C, k,
                a_stride, b_stride, some.q.stride(-1), rows.scales.stride(-1), some.scales.stride(-2), FROM=kind, WIDE=wide, BY_COLUMN=columns,
                POWER_OF_TWO=power_of_two, EMULATE=emulates(a), maxnreg=limit_of(kind, columns, power_of_two, emulates(a)), **tiles)  # fmt: skip
    return Produced(rows, turned, y)


def tiles_of(columns: bool) -> dict[str, int]:
    if columns:
        return {"HEIGHT": 128, "GROUP": TALL.group, "num_warps": TALL.num_warps}
    return {"HEIGHT": ROWS, "GROUP": 1, "num_warps": WARPS}


def limit_of(kind: str, columns: bool, power_of_two: bool, emulate: bool) -> int | None:
    """Registers per thread that the compiler may take.  Dividing by scales, and the cast in integers, take more, and would spill."""
    return REGISTERS[kind] if columns and power_of_two and not emulate else None


def fp8_rmsnorm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, wide: bool, power_of_two: bool) -> tuple[Produced, Tensor]:
    (T, D), weight = x.shape, weight.contiguous()
    y = torch.empty(T, D, dtype=x.dtype, device=x.device) if wide else None
    s = x if residual is None else torch.empty(T, D, dtype=x.dtype, device=x.device)
    rows = empty_layout((T, D), (1, 128), x.device)
    if x.numel():
        a, *a_rows = in_rows(x)
        r, *r_rows = (a, *a_rows) if residual is None else in_rows(residual)
        HEIGHT, BLOCK, warps = tile_of(D)
        with on_device_of(x):
            fp8_rmsnorm_kernel[(triton.cdiv(T, HEIGHT),)](
                a, r, weight, s, x if y is None else y, rows.q.view(torch.uint8), rows.scales, T, D, *a_rows, *r_rows, rows.scales.stride(-1), eps,
                HAS_RESIDUAL=residual is not None, WIDE=wide, POWER_OF_TWO=power_of_two, EMULATE=emulates(x), LONG=BLOCK < D, ROWS=HEIGHT,
                BLOCK=BLOCK, num_warps=warps)  # fmt: skip
    return Produced(rows, None, y), s


# The number of rows changes from step to step and is not specialised, nor is the stride that follows from it.
@triton.jit(do_not_specialize=["R", "scales_stride"], do_not_specialize_on_alignment=["source_ptr", "weights_ptr"])
def fp8_produce_kernel(
    a_ptr, b_ptr, source_ptr, weights_ptr, y_ptr, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, C, k, a_stride, b_stride, qt_stride,
    scales_stride, column_scales_stride, FROM: tl.constexpr, WIDE: tl.constexpr, BY_COLUMN: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    EMULATE: tl.constexpr, HEIGHT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """R, C: of the result.  a_ptr: x, or gate and up; b_ptr: dy of swiglu; source_ptr, weights_ptr: as in moe_gather_kernel."""
    _, tile_r, tile_c = tile_place(tl.program_id(0), R, C, HEIGHT, GROUP)
    row0, column0 = tile_r * HEIGHT, tile_c * 128
    row, column = tile_rows(HEIGHT), tl.arange(0, 128)
    rows, columns = (row0 + row).to(tl.int32), column0 + column
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    if FROM == "swiglu":
        at = a_ptr + (row0 * a_stride + column0) + (row[:, None] * a_stride + column[None, :])
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + C, mask=mask, other=0.0).to(tl.float32)
        x = gate / (1 + tl.exp(-gate)) * up
    elif FROM == "dswiglu":
        F = C // 2
        of_gate = (columns < F)[None, :]
        within = tl.where(columns < F, columns, columns - F)[None, :]
        at = a_ptr + row0 * a_stride + (row[:, None] * a_stride + within)
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=mask & of_gate, other=0.0).to(tl.float32)
        dy = tl.load(b_ptr + row0 * b_stride + (row[:, None] * b_stride + within), mask=mask, other=0.0).to(tl.float32)
        s = 1 / (1 + tl.exp(-gate))
        x = tl.where(of_gate, dy * up, dy) * tl.where(of_gate, s * (1 + gate * (1 - s)), gate * s)
    else:
        slot = tl.load(source_ptr + rows, mask=rows < R, other=-1)
        x_at = a_ptr + ((slot // k).to(tl.int64) * a_stride)[:, None] + columns[None, :]
        x = tl.load(x_at, mask=mask & (slot >= 0)[:, None], other=0.0)
        if FROM == "weighted":
            x = x.to(tl.float32) * tl.load(weights_ptr + slot, mask=slot >= 0, other=0.0).to(tl.float32)[:, None]
    x = x.to(a_ptr.dtype.element_ty)
    at = (row0 * C + column0) + (row[:, None] * C + column[None, :])
    if WIDE:
        tl.store(y_ptr + at, x, mask=mask)
    x = x.to(tl.float32)
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = store_rows(x, size, q_ptr + at, mask, POWER_OF_TWO, EMULATE)
    tl.store(scales_ptr + tile_c.to(tl.int64) * scales_stride + rows, scale, mask=rows < R)
    if BY_COLUMN:
        qt_at = qt_ptr + (column0.to(tl.int64) * qt_stride + row0)
        scale = store_columns(x, size, qt_at, qt_stride, R - row0, C - column0, POWER_OF_TWO, EMULATE)
        tl.store(column_scales_ptr + tile_r * column_scales_stride + columns, scale, mask=columns < C)


@triton.jit(do_not_specialize=["T", "scales_stride"])
def fp8_rmsnorm_kernel(
    x_ptr, r_ptr, w_ptr, s_ptr, y_ptr, q_ptr, scales_ptr, T, D, x_inner, x_outer_stride, x_inner_stride, r_inner, r_outer_stride, r_inner_stride,
    scales_stride, eps, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LONG: ROWS is 1, and the row is walked in steps of BLOCK."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x_at = x_ptr + row_starts(rows, x_inner, x_outer_stride, x_inner_stride)[:, None]
    r_at = r_ptr + row_starts(rows, r_inner, r_outer_stride, r_inner_stride)[:, None]
    if LONG:
        row_x = x_ptr + row_starts(tl.program_id(0).to(tl.int64), x_inner, x_outer_stride, x_inner_stride)
        row_r = r_ptr + row_starts(tl.program_id(0).to(tl.int64), r_inner, r_outer_stride, r_inner_stride)
        squares = tl.zeros([BLOCK], tl.float32)
        for i in range(0, D, BLOCK):
            x = summed(row_x, row_r, i + columns, i + columns < D, HAS_RESIDUAL).to(tl.float32)
            squares += x * x
        rstd = rstd_of(tl.sum(squares, 0), D, eps)
        for i in range(0, D, BLOCK):
            mask = (rows < T)[:, None] & (i + columns < D)[None, :]
            x = summed(x_at, r_at, (i + columns)[None, :], mask, HAS_RESIDUAL)
            store_normed(x, rstd, i, rows, mask, w_ptr, s_ptr, y_ptr, q_ptr, scales_ptr, T, D, scales_stride, HAS_RESIDUAL, WIDE, POWER_OF_TWO,
                         EMULATE, ROWS, BLOCK)  # fmt: skip
    else:
        mask = (rows < T)[:, None] & (columns < D)[None, :]
        x = summed(x_at, r_at, columns[None, :], mask, HAS_RESIDUAL)
        wide = x.to(tl.float32)
        rstd = rstd_of(tl.sum(wide * wide, 1), D, eps)[:, None]
        store_normed(x, rstd, 0, rows, mask, w_ptr, s_ptr, y_ptr, q_ptr, scales_ptr, T, D, scales_stride, HAS_RESIDUAL, WIDE, POWER_OF_TWO, EMULATE,
                     ROWS, BLOCK)  # fmt: skip


@triton.jit
def store_normed(x, rstd, first, rows, mask, w_ptr, s_ptr, y_ptr, q_ptr, scales_ptr, T, D, scales_stride, HAS_RESIDUAL: tl.constexpr,
                 WIDE: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Columns first up to first + BLOCK of some rows."""
    WIDTH: tl.constexpr = BLOCK if BLOCK < 128 else 128
    BLOCKS: tl.constexpr = BLOCK // WIDTH
    columns = first + tl.arange(0, BLOCK)
    at = (rows * D)[:, None] + columns[None, :]
    if HAS_RESIDUAL:
        tl.store(s_ptr + at, x, mask=mask)
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    y = (x.to(tl.float32) * rstd * w[None, :]).to(y_ptr.dtype.element_ty)
    if WIDE:
        tl.store(y_ptr + at, y, mask=mask)
    y = tl.reshape(y.to(tl.float32), [ROWS, BLOCKS, WIDTH])
    scale, factor = scales_of(tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), POWER_OF_TWO)
    block = first // 128 + tl.arange(0, BLOCKS)
    within = block[None, :, None] * 128 + tl.arange(0, WIDTH)[None, None, :]
    # In three axes: a store of bytes in the two of x would have each thread hold 16 neighbours of x instead of 8, and the sum of squares would run
    # in another order than rmsnorm's.
    tl.store(q_ptr + (rows * D)[:, None, None] + within, e4m3_bits(y * factor[:, :, None], EMULATE), mask=(rows < T)[:, None, None] & (within < D))
    scales_at = scales_ptr + rows[:, None] + (block.to(tl.int64) * scales_stride)[None, :]
    tl.store(scales_at, scale, mask=(rows < T)[:, None] & (block * 128 < D)[None, :])


def ahead_of_time() -> list[AheadOfTime]:
    pointers = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16", "source_ptr": "*i32", "weights_ptr": "*fp32", "y_ptr": "*bf16:16", "q_ptr": "*u8:16",
                "scales_ptr": "*fp32:16", "qt_ptr": "*u8:16", "column_scales_ptr": "*fp32:16"}  # fmt: skip
    integers = dict.fromkeys(("C", "a_stride", "b_stride", "qt_stride", "column_scales_stride"), "i32:16")
    signature = pointers | integers | dict.fromkeys(("R", "k", "scales_stride"), "i32")
    cases = []
    exact, emulated = (True, False, False, False), [(True, False, True, True), (False, True, True, True)]  # scales that are divided by; no cast
    for kind in REGISTERS:
        for columns, wide, power_of_two, emulate in [(False, True, True, False), (True, False, True, False),
                                                     *((exact, *emulated) if kind == "dswiglu" else ())]:  # fmt: skip
            tiles = tiles_of(columns)
            constants = dict(FROM=kind, WIDE=wide, BY_COLUMN=columns, POWER_OF_TWO=power_of_two, EMULATE=emulate, HEIGHT=tiles["HEIGHT"],
                             GROUP=tiles["GROUP"])  # fmt: skip
            label = f"{'dual' if columns else 'rows'}{' + bf16' * wide} {'2^n' if power_of_two else 'fp32'}{' emulated' * emulate}"
            cases.append(AheadOfTime(f"fp8_produce {kind} {label}", fp8_produce_kernel, signature, constants, tiles["num_warps"], registers=128,
                                     capabilities=(80,) if emulate else (90, 100), maxnreg=limit_of(kind, columns, power_of_two, emulate),
                                     stack=24))  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "r_ptr", "w_ptr", "s_ptr", "y_ptr"), "*bf16:16") | {"q_ptr": "*u8:16", "scales_ptr": "*fp32:16"}
    strides = {f"{name}_{key}_stride": "i32:16" for name in "xr" for key in ("outer", "inner")}
    signature = pointers | strides | {"T": "i32", "D": "i32:16", "scales_stride": "i32", "eps": "fp32"}
    for D, wide, emulate in [(7168, True, False), (16384, True, False), (4096, True, True)]:
        HEIGHT, BLOCK, warps = tile_of(D)
        constants = dict(x_inner=1, r_inner=1, HAS_RESIDUAL=True, WIDE=wide, POWER_OF_TWO=True, EMULATE=emulate, LONG=BLOCK < D, ROWS=HEIGHT,
                         BLOCK=BLOCK)  # fmt: skip
        cases.append(AheadOfTime(f"fp8_rmsnorm {D}{' + bf16' * wide}{' emulated' * emulate}", fp8_rmsnorm_kernel, signature, constants, warps,
                                 capabilities=(80,) if emulate else (90, 100)))  # fmt: skip
    return cases
