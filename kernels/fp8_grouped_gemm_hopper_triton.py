"""Grouped products in block-scaled FP8 for Hopper, in Gluon (Triton's lower level); the equations are those of fp8_grouped_gemm.py.

A program per processor walks over the tiles of 128 tokens x 256 outputs.  Its warps have parts of their own: one warp fetches operands through tensor
descriptors (TMA) into STAGES buffers, two groups of four warps each multiply 64 tokens.  What Hopper's tensor cores sum of FP8 operands has some 14
bits, so each scale block of 128 is multiplied from 0, scaled in fp32 and added to a second accumulator ("promotion").  That occupies a group for some
200 cycles per 256 of its tensor-core time; the groups share no barrier but those of the buffers, so that one promotes while the other multiplies.
The 256 outputs are two halves one after the other, in one accumulator: 64 registers, beside 128 of sums; a half has one weight scale.

Why 256 wide: a step of 128 fetches 48 KiB per 1024 cycles of the tensor cores.  A tile of 128 x 128 would fetch 64 bytes a cycle and processor, twice
what L2 gives.

Where experts have few tokens, fp8_grouped_gemm_few_hopper_triton.py takes over.

On an H200, T = 32768, E = 8, N = 2048, K = 7168 (962 GFLOP): 807 us, 1,192 TFLOP/s; dx, whose sum is 2048 long, 841 us (5 % for what is not hidden of
the stores had been predicted).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._cuda import limits
from ._dispatch import is_strict
from ._triton import AheadOfTime, on_device_of
from .fp8_grouped_gemm_few_hopper_triton import OPERAND, columns_of, fp8_grouped_matmul_few
from .grouped_gemm_triton import fill_outside, tile_map_of

BM, BN, BK, STAGES = gl.constexpr(128), gl.constexpr(256), gl.constexpr(128), gl.constexpr(4)  # 4 x 48 KiB; the results go through 2 x 16 KiB


def fp8_grouped_matmul_hopper(x, x_scales, w, w_scales, offsets, out, out_dtype) -> Tensor:
    T, (E, N, _) = x.shape[0], w.shape
    y = torch.empty(T, N, dtype=out_dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    columns = None if is_strict() else columns_of(T, E)
    if columns is not None:
        fp8_grouped_matmul_few(x, x_scales, w, w_scales, offsets, y, columns)
    else:
        fp8_grouped_matmul_many(x, x_scales, w, w_scales, offsets, y)
    if out is None:
        fill_outside(y, offsets, E)
    return y


def fp8_grouped_matmul_many(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, offsets: Tensor, y: Tensor) -> None:
    """Into the rows of y (T, N) that belong to experts."""
    (T, K), (E, N, _) = x.shape, w.shape
    tile_map, slots = tile_map_of(offsets, T, E, BM.value)
    programs = limits(x.device)[0]
    with on_device_of(x):
        fp8_grouped_gemm_hopper_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [64, 128], OPERAND), TensorDescriptor.from_tensor(w.flatten(0, 1), [128, 128], OPERAND), x_scales,
            w_scales, y, tile_map, slots, N, K, y.stride(0), x_scales.stride(1), *w_scales.stride(), num_warps=4)  # fmt: skip


@gluon.jit
def load_operands(x, w, a_smem, b_smem, ready, free, map_ptr, tiles, N, K):
    """The warp that fetches: x in two halves of 64 rows, w in two of 128, per step."""
    tiles_n = gl.cdiv(N, BN)
    total = gl.load(map_ptr + 3 * tiles) * tiles_n
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        row0 = gl.load(map_ptr + tiles + tile // tiles_n)
        col0 = gl.load(map_ptr + tile // tiles_n) * N + tile % tiles_n * BN
        for k in range(0, K, BK):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES + 1) & 1)
            left, right = ready.index(2 * stage), ready.index(2 * stage + 1)
            mbarrier.expect(left, (BM + BN // 2) * BK)
            tma.async_copy_global_to_shared(x, [row0, k], left, a_smem.index(2 * stage))
            tma.async_copy_global_to_shared(x, [row0 + 64, k], left, a_smem.index(2 * stage + 1))
            tma.async_copy_global_to_shared(w, [col0, k], left, b_smem.index(2 * stage))
            mbarrier.expect(right, BN // 2 * BK)
            tma.async_copy_global_to_shared(w, [col0 + 128, k], right, b_smem.index(2 * stage + 1))
            step += 1


@gluon.jit
def multiply(a_smem, b_smem, ready, free, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, y_stride, xs_column, ws_expert, ws_row, ws_column,
             GROUP: gl.constexpr):  # fmt: skip
    """A group of four warps: rows 64 GROUP to 64 GROUP + 63 of each tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tiles_n = gl.cdiv(N, BN)
    total = gl.load(map_ptr + 3 * tiles) * tiles_n
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        expert = gl.load(map_ptr + tile // tiles_n)
        row0 = gl.load(map_ptr + tiles + tile // tiles_n) + 64 * GROUP
        end = gl.load(map_ptr + 2 * tiles + tile // tiles_n)
        col0 = tile % tiles_n * BN
        lanes = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        inside = row0 + lanes < end
        xs_at = xs_ptr + row0
        ws_at = ws_ptr + expert.to(gl.int64) * ws_expert + col0 // 128 * ws_row
        to_right = gl.where(col0 + 128 < N, ws_row, 0)  # a right half behind the last output is multiplied by any scale, and not stored
        acc = gl.zeros([64, 128], gl.float32, SUMS)
        left = gl.zeros([64, 128], gl.float32, SUMS)
        right = gl.zeros([64, 128], gl.float32, SUMS)
        row_scale, left_scale, right_scale = gl.load(xs_at + lanes, mask=inside, other=0.0), gl.load(ws_at), gl.load(ws_at + to_right)
        for k in range(0, K, BK):
            stage = step % STAGES
            scale, left_now, right_now = row_scale, left_scale, right_scale
            # the scales of the next step are on their way while this one multiplies; the last step fetches its own once more
            xs_at += gl.where(k + BK < K, xs_column, 0)
            ws_at += gl.where(k + BK < K, ws_column, 0)
            row_scale, left_scale, right_scale = gl.load(xs_at + lanes, mask=inside, other=0.0), gl.load(ws_at), gl.load(ws_at + to_right)
            mbarrier.wait(ready.index(2 * stage), (step // STAGES) & 1)
            a = a_smem.index(2 * stage + GROUP)
            acc = warpgroup_mma(a, b_smem.index(2 * stage).permute((1, 0)), acc, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            left += acc * (scale * left_now)[:, None]
            mbarrier.wait(ready.index(2 * stage + 1), (step // STAGES) & 1)
            acc = warpgroup_mma(a, b_smem.index(2 * stage + 1).permute((1, 0)), acc, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            right += acc * (scale * right_now)[:, None]
            step += 1
        rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, STORE))
        cols = col0 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
        at = y_ptr + rows.to(gl.int64)[:, None] * y_stride + cols[None, :]
        gl.store(at, gl.convert_layout(left.to(y_ptr.dtype.element_ty), STORE), mask=(rows < end)[:, None] & (cols < N)[None, :])
        gl.store(at + 128, gl.convert_layout(right.to(y_ptr.dtype.element_ty), STORE), mask=(rows < end)[:, None] & (cols + 128 < N)[None, :])


@gluon.jit(do_not_specialize=["tiles", "xs_column", "ws_expert", "ws_row", "ws_column"], do_not_specialize_on_alignment=["map_ptr"])
def fp8_grouped_gemm_hopper_kernel(
    x, w, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, y_stride, xs_column, ws_expert, ws_row, ws_column
):  # fmt: skip
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], x.layout)
    b_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 128, 128], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(2 * i), count=1)
        mbarrier.init(ready.index(2 * i + 1), count=1)
        mbarrier.init(free.index(i), count=2)
    # 224 and not the 232 that there are: with more, ptxas overlaps so much that it spills in the loop
    gl.warp_specialize([
        (multiply, (a_smem, b_smem, ready, free, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, y_stride, xs_column, ws_expert, ws_row, ws_column, 0)),
        (multiply, (a_smem, b_smem, ready, free, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, y_stride, xs_column, ws_expert, ws_row, ws_column, 1)),
        (load_operands, (x, w, a_smem, b_smem, ready, free, map_ptr, tiles, N, K)),
    ], [4, 1], [224, 40])  # fmt: skip


def ahead_of_time() -> list[AheadOfTime]:
    signature = {"x": f"tensordesc<fp8e4nv[64, 128],{OPERAND!r}>", "w": f"tensordesc<fp8e4nv[128, 128],{OPERAND!r}>", "xs_ptr": "*fp32:16",
                 "ws_ptr": "*fp32:16", "y_ptr": "*bf16:16", "map_ptr": "*i32", "tiles": "i32", "N": "i32:16", "K": "i32:16", "y_stride": "i32:16",
                 "xs_column": "i32", "ws_expert": "i32", "ws_row": "i32", "ws_column": "i32"}  # fmt: skip
    # Some versions of ptxas let the second product begin before the first is added, as far as registers reach, and a little further: 48 bytes.
    return [AheadOfTime("fp8_grouped_gemm hopper", fp8_grouped_gemm_hopper_kernel, signature, {}, 4, 1, registers=255, matrix=True,
                        capabilities=(90,), stack=64)]  # fmt: skip
