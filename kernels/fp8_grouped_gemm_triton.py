"""Grouped products in block-scaled FP8 in Triton, on any card with FP8 tensor cores; the equations are those of fp8_grouped_gemm.py.

Tiles of tokens and their experts as in grouped_gemm_triton.py.  One step of the sum is a scale block of 128: its product starts from 0 in the tensor
core, is multiplied by the scales in fp32 and added.  Scales of rows that the tile does not store are read as 0.  A tile is no wider than a scale
block of the weights, so that one number scales all of it.  On Hopper every step waits for its product: fp8_grouped_gemm_hopper_triton.py does not.

On an H200 630-650 TFLOP/s, half of what the tensor cores have.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._triton import AheadOfTime, entry_for, on_device_of
from .grouped_gemm_triton import Tiles, bounds_of, descriptors_allowed, fill_outside, tile_map_of

# 4 x (128 + 128) x 128 bytes = 128 KiB
TILES = {80: Tiles(128, 128, 128, 8, 3), 90: Tiles(128, 128, 128, 8, 4), 100: Tiles(128, 128, 128, 8, 4)}
TILES_INTERPRETER = Tiles(16, 16, 128, 4, 1)


def tiles_of(x: Tensor) -> Tiles:
    if not x.is_cuda:
        return TILES_INTERPRETER
    return entry_for(TILES, x.device)


def fp8_grouped_matmul_triton(x, x_scales, w, w_scales, offsets, out, out_dtype) -> Tensor:
    x = x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
    (T, K), (E, N, _) = x.shape, w.shape
    y = torch.empty(T, N, dtype=out_dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    tiles = tiles_of(x)
    tile_map, slots = tile_map_of(offsets, T, E, tiles.BM)
    descriptors = descriptors_allowed(x, w)
    with on_device_of(x):
        fp8_grouped_gemm_kernel[(slots * triton.cdiv(N, tiles.BN),)](
            TensorDescriptor.from_tensor(x, [tiles.BM, tiles.BK]) if descriptors else x,
            TensorDescriptor.from_tensor(w, [1, tiles.BN, tiles.BK]) if descriptors else w,
            x_scales, w_scales, y, tile_map, slots, N, K, x.stride(0), w.stride(0), w.stride(1), y.stride(0), *x_scales.stride(),
            *w_scales.stride(), BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, DESCRIPTORS=descriptors, num_warps=tiles.num_warps,
            num_stages=tiles.num_stages)  # fmt: skip
        if out is None:
            fill_outside(y, offsets, E)
    return y


def fp8_grouped_wgrad_triton(dy, dy_scales, x, x_scales, offsets, experts, out_dtype) -> Tensor:
    (T, N), K = dy.shape, x.shape[1]
    dw = torch.empty(experts, N, K, dtype=out_dtype, device=x.device)
    if not T or not dw.numel():
        return dw.zero_()
    tiles = tiles_of(x)
    a, b = dy.T, x.T  # rows contiguous: the sum runs along them
    with on_device_of(x):
        fp8_grouped_wgrad_kernel[(experts * triton.cdiv(N, tiles.BM) * triton.cdiv(K, tiles.BN),)](
            TensorDescriptor.from_tensor(a, [tiles.BM, tiles.BK]), TensorDescriptor.from_tensor(b, [tiles.BN, tiles.BK]), dy_scales, x_scales, dw,
            offsets, T, N, K, dy_scales.stride(0), x_scales.stride(0), LEADING=len(offsets) - experts, BM=tiles.BM, BN=tiles.BN, BK=tiles.BK,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages)  # fmt: skip
    return dw


@triton.jit(do_not_specialize=["tiles", "xs_column"], do_not_specialize_on_alignment=["map_ptr"])
def fp8_grouped_gemm_kernel(
    x, w, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, x_stride, w_expert, w_stride, y_stride, xs_row, xs_column, ws_expert, ws_row, ws_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BK == 128 and 128 % BN == 0)
    tile = tl.program_id(0) // tl.cdiv(N, BN)
    expert = tl.load(map_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    row0, end = tl.load(map_ptr + tiles + tile), tl.load(map_ptr + 2 * tiles + tile)
    col0 = tl.program_id(0) % tl.cdiv(N, BN) * BN
    rows, cols, lanes = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN), tl.arange(0, BK)
    xs_ptr += rows.to(tl.int64) * xs_row
    ws_ptr += expert * ws_expert + col0 // 128 * ws_row
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        if DESCRIPTORS:
            a, b = x.load([row0, k]), w.load([expert.to(tl.int32), col0, k]).reshape(BN, BK).T
        else:
            inside = k + lanes < K
            a = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + (k + lanes)[None, :], mask=(rows < end)[:, None] & inside[None, :], other=0.0)
            b = tl.load(w + expert * w_expert + cols.to(tl.int64)[None, :] * w_stride + (k + lanes)[:, None],
                        mask=(cols < N)[None, :] & inside[:, None], other=0.0)  # fmt: skip
        scale = tl.load(xs_ptr, mask=rows < end, other=0.0) * tl.load(ws_ptr)
        acc += tl.dot(a, b) * scale[:, None]
        xs_ptr += xs_column
        ws_ptr += ws_column
    at = y_ptr + rows.to(tl.int64)[:, None] * y_stride + cols[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["offsets_ptr"])
def fp8_grouped_wgrad_kernel(
    dy, x, dys_ptr, xs_ptr, dw_ptr, offsets_ptr, T, N, K, dys_stride, xs_stride,
    LEADING: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dy: descriptor of (N, T), x: of (K, T); what lies beyond T reads as 0."""
    tl.static_assert(BK == 128)
    tiles_n, tiles_k = tl.cdiv(N, BM), tl.cdiv(K, BN)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    row0, col0 = tl.program_id(0) // tiles_k % tiles_n * BM, tl.program_id(0) % tiles_k * BN
    start, end = bounds_of(offsets_ptr, expert, expert + 1, T, LEADING)
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    dys_ptr += (start // BK).to(tl.int64) * dys_stride + rows
    xs_ptr += (start // BK).to(tl.int64) * xs_stride + cols
    acc = tl.zeros([BM, BN], tl.float32)
    for t in range(start, end, BK):
        row_scale, column_scale = tl.load(dys_ptr, mask=rows < N, other=0.0), tl.load(xs_ptr, mask=cols < K, other=0.0)
        acc += tl.dot(dy.load([row0, t]), x.load([col0, t]).T) * row_scale[:, None] * column_scale[None, :]
        dys_ptr += dys_stride
        xs_ptr += xs_stride
    at = dw_ptr + (expert.to(tl.int64) * N + rows)[:, None] * K + cols[None, :]
    tl.store(at, acc.to(dw_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < K)[None, :])


def ahead_of_time() -> list[AheadOfTime]:
    cases = []
    integers = lambda *names: dict.fromkeys(names, "i32:16")  # noqa: E731
    for capability in (90, 100):
        tiles = TILES[capability]
        blocks = dict(BM=tiles.BM, BN=tiles.BN, BK=tiles.BK)
        more = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages, registers=255, matrix=True, capabilities=(capability,))
        for descriptors in (False, True):
            kinds = [f"tensordesc<fp8e4nv{block}>" if descriptors else "*fp8e4nv:16" for block in ([tiles.BM, tiles.BK], [1, tiles.BN, tiles.BK])]
            signature = {"x": kinds[0], "w": kinds[1], "xs_ptr": "*fp32:16", "ws_ptr": "*fp32:16", "y_ptr": "*bf16:16", "map_ptr": "*i32",
                         "tiles": "i32", "xs_column": "i32", "ws_row": "i32", "ws_column": "i32"}  # fmt: skip
            signature |= integers("N", "K", "x_stride", "w_expert", "w_stride", "y_stride", "ws_expert")
            cases.append(AheadOfTime(f"fp8_grouped_gemm sm_{capability} {'descriptors' if descriptors else 'pointers'}", fp8_grouped_gemm_kernel,
                                     signature, blocks | dict(xs_row=1, DESCRIPTORS=descriptors), **more))  # fmt: skip
        signature = {"dy": f"tensordesc<fp8e4nv{[tiles.BM, tiles.BK]}>", "x": f"tensordesc<fp8e4nv{[tiles.BN, tiles.BK]}>", "dys_ptr": "*fp32:16",
                     "xs_ptr": "*fp32:16", "dw_ptr": "*bf16:16", "offsets_ptr": "*i32", "T": "i32"}  # fmt: skip
        signature |= integers("N", "K", "dys_stride", "xs_stride")
        cases.append(AheadOfTime(f"fp8_grouped_wgrad sm_{capability}", fp8_grouped_wgrad_kernel, signature, blocks | dict(LEADING=1), **more))
    return cases
