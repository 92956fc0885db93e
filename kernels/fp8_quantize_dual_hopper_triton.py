"""fp8_quantize of bf16 along rows and along columns in one read, in Gluon; the equations are those of fp8_quantize.py.

fp8_quantize_triton.py is held up by instructions: 1,080 per thread and tile.  Here two neighbours of a row stay one word, as they lie in memory:
maxima compare both halves at once (max.u16x2, from sm_90 on; as integers without sign, in whose order NaN is the largest), and a cast takes two or
four words apart where it needs the numbers.  A thread has a tile twice.  For rows it holds 16 neighbours of two rows, as they are loaded and stored;
for columns, through shared memory in whole words, 16 neighbours of two columns, which again are what it stores.  So no byte is moved by itself, and
the two columns are the halves of a word.

544 instructions per thread and tile (135 us of issue slots for 32768 x 7168 on an H200), 40 registers: three programs per processor.  Predicted: the
224 us that bytes need, and a tenth (goal 238; 453 with the other kernel).  It has never run on a GPU.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._triton import AheadOfTime, on_device_of
from .fp8_quantize import LEAST_AMAX, Quantized, empty_layout

WARPS = 16
GROUP = gl.constexpr(8)  # tiles above each other before the next ones to the right
AMAX_FLOOR = gl.constexpr(LEAST_AMAX)


def why_not_words(x: Tensor) -> str | None:
    """Why x cannot be read in words of two; None if it can."""
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        return f"x is {tuple(x.shape)} {x.dtype}; wanted (R, C) bf16"
    if x.shape[1] % 2 or x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
        return f"the rows of x are no words of four bytes (shape {tuple(x.shape)}, strides {x.stride()})"
    return None if torch.cuda.get_device_capability(x.device) >= (9, 0) else "the card has no maxima of pairs (they begin with 9.0)"


def fp8_quantize_dual_words(x: Tensor, power_of_two: bool) -> tuple[Quantized, Quantized]:
    R, C = x.shape
    rows, columns = (empty_layout(x.shape, layout, x.device) for layout in ((1, 128), (128, 1)))
    with on_device_of(x):
        fp8_quantize_dual_kernel[(triton.cdiv(R, 128) * triton.cdiv(C, 128),)](
            x.view(torch.int32), rows.q.view(torch.int16), rows.scales, columns.q.view(torch.uint8), columns.scales, R, C // 2, x.stride(0) // 2,
            columns.q.stride(1), rows.scales.stride(1), columns.scales.stride(0), POWER_OF_TWO=power_of_two, num_warps=WARPS)  # fmt: skip
    return rows, columns


@gluon.jit
def larger(a, b):
    """Of both halves of a word."""
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def scales_of(amax_bits, POWER_OF_TWO: gl.constexpr):
    """As in fp8_quantize_triton.py."""
    amax = gl.maximum(amax_bits.to(gl.float32, bitcast=True), AMAX_FLOOR)
    if POWER_OF_TWO:
        exponent = ((amax.to(gl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
        scale, factor = (exponent << 23).to(gl.float32, bitcast=True), (254 - exponent << 23).to(gl.float32, bitcast=True)
    else:
        scale = gl.div_rn(amax, gl.full_like(amax, 448.0))
        factor = gl.div_rn(gl.full_like(amax, 448.0), amax)
    finite = amax_bits < 0x7F800000
    return gl.where(finite, scale, float("nan")), gl.where(finite, factor, float("nan"))


@gluon.jit(do_not_specialize=["R", "scales_stride"])
def fp8_quantize_dual_kernel(x_ptr, q_ptr, scales_ptr, qt_ptr, column_scales_ptr, R, W, x_stride, qt_stride, scales_stride, column_scales_stride,
                             POWER_OF_TWO: gl.constexpr):  # fmt: skip
    """x_ptr: words, W in a row, x_stride apart.  q_ptr: pairs of codes, contiguous.  qt_ptr: (2 W, R) codes, rows qt_stride apart."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [16, 1], [1, 0])
    COLUMNS: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, 16], [0, 1])
    tiles_c, tiles_r, tile = gl.cdiv(W, 64), gl.cdiv(R, 128), gl.program_id(0)
    first = tile // (GROUP * tiles_c) * GROUP
    high = gl.minimum(GROUP, tiles_r - first)
    tile_r, tile_c = (first + tile % (GROUP * tiles_c) % high).to(gl.int64), tile % (GROUP * tiles_c) // high
    row0, word0 = tile_r * 128, tile_c * 64

    row, word = gl.arange(0, 128, gl.SliceLayout(1, ROWS)), gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    left = (R - row0).to(gl.int32)  # rows from here on
    mask = (row < left)[:, None] & (word0 + word < W)[None, :]
    # 64 bits for where the tile begins, 32 within it
    w = gl.load(x_ptr + (row0 * x_stride + word0) + (row[:, None] * x_stride + word[None, :]), mask=mask, other=0)
    pair = gl.reduce(w & 0x7FFF7FFF, 1, larger)
    scale, factor = scales_of(gl.maximum(pair << 16, pair & 0x7FFF0000), POWER_OF_TWO)
    code = gl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d; .reg .f32 e, f, g, h; .reg .b16 low, high;
        shl.b32 a, $1, 16; and.b32 b, $1, 0xFFFF0000; shl.b32 c, $2, 16; and.b32 d, $2, 0xFFFF0000;
        mul.f32 e, a, $3; mul.f32 f, b, $3; mul.f32 g, c, $4; mul.f32 h, d, $4;
        cvt.rn.satfinite.e4m3x2.f32 low, f, e; cvt.rn.satfinite.e4m3x2.f32 high, h, g; mov.b32 $0, {low, high}; }""",
        "=r,r,r,r,r", [w, gl.broadcast(factor.to(gl.int32, bitcast=True)[:, None], w)[0]], dtype=gl.int16, is_pure=True, pack=2)
    gl.store(q_ptr + (row0 * W + word0) + (row[:, None] * W + word[None, :]), code, mask=mask)
    gl.store(scales_ptr + tile_c.to(gl.int64) * scales_stride + row0 + row, scale, mask=row < left)

    w = gl.convert_layout(w, COLUMNS)
    row, word = gl.arange(0, 128, gl.SliceLayout(1, COLUMNS)), gl.arange(0, 64, gl.SliceLayout(0, COLUMNS))
    pair = gl.reduce(w & 0x7FFF7FFF, 0, larger)
    even_scale, even = scales_of(pair << 16, POWER_OF_TWO)
    odd_scale, odd = scales_of(pair & 0x7FFF0000, POWER_OF_TWO)
    even_code, odd_code = gl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d; .reg .f32 e, f, g, h; .reg .b16 low, high;
        shl.b32 a, $2, 16; shl.b32 b, $3, 16; shl.b32 c, $4, 16; shl.b32 d, $5, 16;
        mul.f32 e, a, $6; mul.f32 f, b, $7; mul.f32 g, c, $8; mul.f32 h, d, $9;
        cvt.rn.satfinite.e4m3x2.f32 low, f, e; cvt.rn.satfinite.e4m3x2.f32 high, h, g; mov.b32 $0, {low, high};
        and.b32 a, $2, 0xFFFF0000; and.b32 b, $3, 0xFFFF0000; and.b32 c, $4, 0xFFFF0000; and.b32 d, $5, 0xFFFF0000;
        mul.f32 e, a, $10; mul.f32 f, b, $11; mul.f32 g, c, $12; mul.f32 h, d, $13;
        cvt.rn.satfinite.e4m3x2.f32 low, f, e; cvt.rn.satfinite.e4m3x2.f32 high, h, g; mov.b32 $1, {low, high}; }""",
        "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w, gl.broadcast(even.to(gl.int32, bitcast=True)[None, :], w)[0], gl.broadcast(odd.to(gl.int32, bitcast=True)[None, :], w)[0]],
        dtype=(gl.uint8, gl.uint8), is_pure=True, pack=4)
    # the padding of a column's storage, up to a multiple of 16 bytes, is written too
    there = (row < gl.cdiv(left, 16) * 16)[:, None] & (word0 + word < W)[None, :]
    at = qt_ptr + (word0.to(gl.int64) * 2 * qt_stride + row0) + (2 * word[None, :] * qt_stride + row[:, None])
    gl.store(at, even_code, mask=there)
    gl.store(at + qt_stride, odd_code, mask=there)
    at = column_scales_ptr + tile_r * column_scales_stride + 2 * (word0 + word)
    gl.store(at, even_scale, mask=word0 + word < W)
    gl.store(at + 1, odd_scale, mask=word0 + word < W)


def ahead_of_time() -> list[AheadOfTime]:
    signature = {"x_ptr": "*i32:16", "q_ptr": "*i16:16", "scales_ptr": "*fp32:16", "qt_ptr": "*u8:16", "column_scales_ptr": "*fp32:16", "R": "i32",
                 "W": "i32:16", "x_stride": "i32:16", "qt_stride": "i32:16", "scales_stride": "i32", "column_scales_stride": "i32:16"}  # fmt: skip
    return [AheadOfTime(f"fp8_quantize_dual words {'2^n' if power_of_two else 'fp32'}", fp8_quantize_dual_kernel, signature,
                        {"POWER_OF_TWO": power_of_two}, WARPS, registers=128, capabilities=(90, 100)) for power_of_two in (True, False)]  # fmt: skip
