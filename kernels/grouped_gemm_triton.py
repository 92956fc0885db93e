"""Grouped product in Triton; the equations are those of grouped_gemm.py.

`tile_map_kernel` writes, on the device, which expert and which rows each tile of BM tokens has: an expert's last tile may be smaller, and tiles never
cross experts.  There are at most T / BM + E tiles; what is left of them returns at once.  `grouped_gemm_kernel` computes one tile of BM tokens x BN
outputs, forward (the sum runs along the rows of a weight) or dx (along its columns).  Rows of the next expert that a tile reads are not stored, and
rows of a product do not meet.  `grouped_wgrad_kernel` sums over the tokens of an expert, whole steps of BK through tensor descriptors (TMA), the
last, partial one through masked pointers, in which both operands are 0: 0 x NaN would be NaN.  No atomics; every sum ascends.

On an H200 in bf16, T = 32768, E = 8, N = 2048, K = 7168 (962 GFLOP each way): 1.23 ms forward, 1.30 ms dx, 1.38 ms dW.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._triton import AheadOfTime, entry_for, on_device_of


class Tiles(NamedTuple):
    BM: int  # tokens; in wgrad the outputs N
    BN: int  # outputs; in wgrad the inputs K
    BK: int  # along the sum
    num_warps: int
    num_stages: int


# 3 x (128 + 256) x 64 x 2 bytes = 144 KiB on sm_90
TILES = {80: Tiles(128, 128, 32, 8, 4), 90: Tiles(128, 256, 64, 8, 3), 100: Tiles(128, 128, 64, 8, 4)}
TILES_FP32 = Tiles(64, 64, 16, 8, 3)  # exact fp32 products, no tensor cores
TILES_INTERPRETER = Tiles(16, 16, 16, 4, 1)
MAP_TILES = 32  # per program
FILL_ROWS, FILL_COLUMNS = 16, 256


def grouped_gemm_triton(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return GroupedGemmFunction.apply(x, w, offsets)


class GroupedGemmFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets):
        ctx.save_for_backward(x, w, offsets)
        return grouped_product(x, w, offsets)

    @staticmethod
    def backward(ctx, dy):
        x, w, offsets = ctx.saved_tensors
        dx = grouped_product(dy, w, offsets, transposed=True) if ctx.needs_input_grad[0] else None
        dw = grouped_wgrad_triton(dy, x, offsets, w.shape[0]) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def tiles_of(x: Tensor) -> Tiles:
    if not x.is_cuda:
        return TILES_INTERPRETER
    if x.dtype == torch.float32:
        return TILES_FP32
    return entry_for(TILES, x.device)


def rows_adjacent(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def descriptors_allowed(*operands: Tensor) -> bool:
    """Has the hardware descriptors, and do addresses and strides fit them?"""
    x = operands[0]
    capable = not x.is_cuda or (x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (9, 0))
    return capable and all(
        t.numel() > 0 and t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 and s >= t.shape[-1] for s in t.stride()[:-1])
        for t in operands
    )


def grouped_product(x: Tensor, w: Tensor, offsets: Tensor, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """x w_e^T, or x w_e if transposed, for the rows of each expert.  Into `out`, whose other rows stay as they are, or into new memory with zeros."""
    x = rows_adjacent(x)
    T, E = x.shape[0], w.shape[0]
    N, K = (w.shape[2], w.shape[1]) if transposed else w.shape[1:]
    y = torch.empty(T, N, dtype=x.dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    tiles = tiles_of(x)
    tile_map, slots = tile_map_of(offsets, T, E, tiles.BM)
    descriptors = descriptors_allowed(x, w)
    w_block = [1, tiles.BK, tiles.BN] if transposed else [1, tiles.BN, tiles.BK]
    with on_device_of(x):
        grouped_gemm_kernel[(slots * triton.cdiv(N, tiles.BN),)](
            TensorDescriptor.from_tensor(x, [tiles.BM, tiles.BK]) if descriptors else x,
            TensorDescriptor.from_tensor(w, w_block) if descriptors else w,
            y, tile_map, slots, N, K, x.stride(0), y.stride(0), TRANSPOSED=transposed, BM=tiles.BM, BN=tiles.BN, BK=tiles.BK,
            DESCRIPTORS=descriptors, num_warps=tiles.num_warps, num_stages=tiles.num_stages)  # fmt: skip
        if out is None:
            fill_outside(y, offsets, E)
    return y


def grouped_wgrad_triton(dy: Tensor, x: Tensor, offsets: Tensor, experts: int) -> Tensor:
    """Sum of dy_t x_t^T over the tokens of each expert: (E, N, K)."""
    dy, x = rows_adjacent(dy), rows_adjacent(x)
    (T, N), K = dy.shape, x.shape[1]
    dw = torch.empty(experts, N, K, dtype=x.dtype, device=x.device)
    if not T or not dw.numel():
        return dw.zero_()
    tiles = tiles_of(x)
    descriptors = descriptors_allowed(dy, x)
    with on_device_of(x):
        grouped_wgrad_kernel[(experts * triton.cdiv(N, tiles.BM) * triton.cdiv(K, tiles.BN),)](
            TensorDescriptor.from_tensor(dy, [tiles.BK, tiles.BM]) if descriptors else dy,
            TensorDescriptor.from_tensor(x, [tiles.BK, tiles.BN]) if descriptors else x,
            dy, x, dw, offsets, T, N, K, dy.stride(0), x.stride(0), LEADING=len(offsets) - experts, BM=tiles.BM, BN=tiles.BN,
            BK=tiles.BK, DESCRIPTORS=descriptors, num_warps=tiles.num_warps, num_stages=tiles.num_stages)  # fmt: skip
    return dw


def tile_map_of(offsets: Tensor, T: int, E: int, BM: int) -> tuple[Tensor, int]:
    """int32: expert of each tile, -1 = no tile; its first row; the row behind the last of its expert; and, the last number, how many tiles there are.

    The first three have room for as many tiles as there can be.  Returns them in a row, and that number.
    """
    tiles = triton.cdiv(T, BM) + E
    tile_map = torch.empty(3 * tiles + 1, dtype=torch.int32, device=offsets.device)
    with on_device_of(offsets):
        tile_map_kernel[(triton.cdiv(tiles, MAP_TILES),)](offsets, tile_map, tiles, T, E, BM=BM, LEADING=len(offsets) - E,
                                                         EXPERTS=triton.next_power_of_2(E), TILES=MAP_TILES)  # fmt: skip
    return tile_map, tiles


def fill_outside(y: Tensor, offsets: Tensor, E: int) -> None:
    """Zeros for the rows of no expert."""
    if y.numel():
        fill_outside_kernel[(triton.cdiv(y.shape[0], FILL_ROWS),)](y, offsets, *y.shape, y.stride(0), E, LEADING=len(offsets) - E,
                                                                  ROWS=FILL_ROWS, COLUMNS=FILL_COLUMNS)  # fmt: skip


@triton.jit
def bounds_of(offsets_ptr, e, E, T, LEADING: tl.constexpr):
    """First row and row behind the last of expert e; 0, 0 for e >= E."""
    if LEADING:
        start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    else:
        start = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    end = tl.load(offsets_ptr + e + LEADING, mask=e < E, other=0)
    return tl.minimum(start, T).to(tl.int32), tl.minimum(end, T).to(tl.int32)


# How many tokens there are changes from step to step and is not specialised; where offsets and the map lie compiles nothing.
@triton.jit(do_not_specialize=["tiles", "T"], do_not_specialize_on_alignment=["offsets_ptr", "map_ptr"])
def tile_map_kernel(offsets_ptr, map_ptr, tiles, T, E, BM: tl.constexpr, LEADING: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr):
    e, t = tl.arange(0, EXPERTS), tl.program_id(0) * TILES + tl.arange(0, TILES)
    start, end = bounds_of(offsets_ptr, e, E, T, LEADING)
    count = tl.maximum(end - start + BM - 1, 0) // BM
    last = tl.cumsum(count, 0)  # behind the last tile
    expert = tl.sum((last[None, :] <= t[:, None]).to(tl.int32), 1)
    mine = e[None, :] == expert[:, None]
    row = tl.sum(tl.where(mine, (start - (last - count) * BM)[None, :], 0), 1) + t * BM
    mask = t < tiles
    tl.store(map_ptr + t, tl.where(expert < E, expert, -1), mask=mask)
    tl.store(map_ptr + tiles + t, row, mask=mask)
    tl.store(map_ptr + 3 * tiles + tl.zeros_like(t), tl.max(last, 0), mask=t == 0)
    tl.store(map_ptr + 2 * tiles + t, tl.sum(tl.where(mine, end[None, :], 0), 1), mask=mask)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["offsets_ptr"])
def fill_outside_kernel(y_ptr, offsets_ptr, T, N, y_stride, E, LEADING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.load(offsets_ptr) if LEADING else 0
    outside = (rows < T) & ((rows < first) | (rows >= tl.load(offsets_ptr + E - 1 + LEADING)))
    at = y_ptr + rows.to(tl.int64)[:, None] * y_stride
    for column in range(0, tl.where(tl.max(outside.to(tl.int32), 0) > 0, N, 0), COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        zeros = tl.zeros([ROWS, COLUMNS], y_ptr.dtype.element_ty)
        tl.store(at + columns[None, :], zeros, mask=outside[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["map_ptr"])
def grouped_gemm_kernel(
    x, w, y_ptr, map_ptr, tiles, N, K, x_stride, y_stride,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // tl.cdiv(N, BN)
    expert = tl.load(map_ptr + tile)
    if expert < 0:
        return
    row0, end = tl.load(map_ptr + tiles + tile), tl.load(map_ptr + 2 * tiles + tile)
    col0 = tl.program_id(0) % tl.cdiv(N, BN) * BN
    rows, cols, lanes = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    if DESCRIPTORS:
        for k in range(0, K, BK):
            if TRANSPOSED:
                b = w.load([expert, k, col0]).reshape(BK, BN)
            else:
                b = w.load([expert, col0, k]).reshape(BN, BK).T
            acc = tl.dot(x.load([row0, k]), b, acc, input_precision="ieee")
    else:
        x_ptr = x + rows.to(tl.int64)[:, None] * x_stride + lanes[None, :]
        w_ptr = w + expert.to(tl.int64) * N * K
        for k in range(0, K, BK):
            inside = k + lanes < K
            a = tl.load(x_ptr + k, mask=(rows < end)[:, None] & inside[None, :], other=0.0)
            at = (k + lanes).to(tl.int64)[:, None] * N + cols[None, :] if TRANSPOSED else cols.to(tl.int64)[None, :] * K + (k + lanes)[:, None]
            b = tl.load(w_ptr + at, mask=inside[:, None] & (cols < N)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    at = y_ptr + rows.to(tl.int64)[:, None] * y_stride + cols[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["offsets_ptr"])
def grouped_wgrad_kernel(
    dy, x, dy_ptr, x_ptr, dw_ptr, offsets_ptr, T, N, K, dy_stride, x_stride,
    LEADING: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_k = tl.cdiv(N, BM), tl.cdiv(K, BN)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    row0, col0 = tl.program_id(0) // tiles_k % tiles_n * BM, tl.program_id(0) % tiles_k * BN
    start, end = bounds_of(offsets_ptr, expert, expert + 1, T, LEADING)
    rows, cols, lanes = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    whole = start + tl.maximum(end - start, 0) // BK * BK if DESCRIPTORS else start
    if DESCRIPTORS:
        for t in range(start, whole, BK):
            acc = tl.dot(dy.load([t, row0]).T, x.load([t, col0]), acc, input_precision="ieee")
    for t in range(whole, end, BK):  # with descriptors one step at most
        token = (t + lanes).to(tl.int64)
        a = tl.load(dy_ptr + token[None, :] * dy_stride + rows[:, None], mask=(token < end)[None, :] & (rows < N)[:, None], other=0.0)
        b = tl.load(x_ptr + token[:, None] * x_stride + cols[None, :], mask=(token < end)[:, None] & (cols < K)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    at = dw_ptr + (expert.to(tl.int64) * N + rows)[:, None] * K + cols[None, :]
    tl.store(at, acc.to(dw_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < K)[None, :])


def ahead_of_time() -> list[AheadOfTime]:
    small = {"offsets_ptr": "*i32", "map_ptr": "*i32", "T": "i32", "E": "i32:16", "tiles": "i32", "N": "i32:16", "y_stride": "i32:16"}
    of = lambda kernel: {name: kind for name, kind in small.items() if name in kernel.arg_names}  # noqa: E731
    cases = [AheadOfTime(f"tile_map E {E}", tile_map_kernel, of(tile_map_kernel), dict(BM=128, LEADING=1, EXPERTS=E, TILES=MAP_TILES), registers=255)
             for E in (8, 256)]  # fmt: skip
    cases.append(AheadOfTime("fill_outside", fill_outside_kernel, of(fill_outside_kernel) | {"y_ptr": "*bf16:16"},
                             dict(LEADING=1, ROWS=FILL_ROWS, COLUMNS=FILL_COLUMNS)))  # fmt: skip

    def add(name, tiles, capabilities, dtype, descriptors):
        kind = lambda *block: f"tensordesc<{dtype}{list(block)}>" if descriptors else f"*{dtype}:16"  # noqa: E731
        blocks, more = dict(BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, DESCRIPTORS=descriptors), dict(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, registers=255, matrix=dtype != "fp32", capabilities=capabilities)  # fmt: skip
        sizes = {"N": "i32:16", "K": "i32:16", "x_stride": "i32:16"}
        for transposed in (False, True):
            w = kind(1, tiles.BK, tiles.BN) if transposed else kind(1, tiles.BN, tiles.BK)
            signature = of(grouped_gemm_kernel) | sizes | {"x": kind(tiles.BM, tiles.BK), "w": w, "y_ptr": f"*{dtype}:16"}
            cases.append(AheadOfTime(f"grouped_gemm {name} {'dx' if transposed else 'fwd'}", grouped_gemm_kernel, signature,
                                     blocks | dict(TRANSPOSED=transposed), **more))  # fmt: skip
        signature = of(grouped_wgrad_kernel) | sizes | {"dy": kind(tiles.BK, tiles.BM), "x": kind(tiles.BK, tiles.BN), "dy_stride": "i32:16"}
        signature |= dict.fromkeys(("dy_ptr", "x_ptr", "dw_ptr"), f"*{dtype}:16")
        cases.append(AheadOfTime(f"grouped_wgrad {name}", grouped_wgrad_kernel, signature, blocks | dict(LEADING=1), **more))

    for capability, tiles in TILES.items():
        for descriptors in (False, True) if capability >= 90 else (False,):
            for dtype in ("bf16", "fp16") if descriptors else ("bf16",):
                add(f"sm_{capability} {dtype} {'descriptors' if descriptors else 'pointers'}", tiles, (capability,), dtype, descriptors)
    add("fp32", TILES_FP32, (80, 90, 100), "fp32", False)
    return cases
