"""The FP8 weight gradient for Hopper, in Gluon; the equation is that of fp8_grouped_gemm.py, the design that of fp8_grouped_gemm_hopper_triton.py.

Here both operands have a scale per row of the product: promotion multiplies each element by two.  The tile is 128 x 128 of one expert's dW, 64 x 128
per group of four warps, so that registers remain for a scale per column; these come through shared memory with the operands.  An expert without
tokens has no steps, and its dW is 0.

Predicted for an H200, measured only with waits of the host (1.34 ms): T = 32768, E = 8, N = 2048, K = 7168 is 962 GFLOP: 1.0 ms at 950 TFLOP/s.  A
step fetches 32.5 KiB per 512 cycles of the tensor cores, 64 bytes a cycle: so L2 is near its limit too.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._cuda import limits
from ._triton import AheadOfTime, on_device_of
from .fp8_grouped_gemm_hopper_triton import OPERAND

TILE, STAGES = gl.constexpr(128), gl.constexpr(6)  # 6 x 32.5 KiB, and 2 x 16 KiB through which the results go
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def fp8_grouped_wgrad_hopper(dy, dy_scales, x, x_scales, offsets, experts, out_dtype) -> Tensor:
    (T, N), K = dy.shape, x.shape[1]
    dw = torch.empty(experts, N, K, dtype=out_dtype, device=x.device)
    if not T or not dw.numel():
        return dw.zero_()
    tiles = experts * triton.cdiv(N, 128) * triton.cdiv(K, 128)
    programs = min(tiles, limits(x.device)[0])
    with on_device_of(x):
        fp8_grouped_wgrad_hopper_kernel[(programs,)](
            TensorDescriptor.from_tensor(dy.T, [64, 128], OPERAND), TensorDescriptor.from_tensor(x.T, [128, 128], OPERAND),
            TensorDescriptor.from_tensor(x_scales, [1, 128], SCALES), dy_scales, dw, offsets, experts, T, N, K, dy_scales.stride(0),
            LEADING=len(offsets) - experts, num_warps=4)  # fmt: skip
    return dw


@gluon.jit
def steps_of(offsets_ptr, expert, T, LEADING: gl.constexpr):
    """First and last + 1 scale block of an expert."""
    start = gl.load(offsets_ptr + expert + LEADING - 1, mask=expert + LEADING > 0, other=0)
    end = gl.load(offsets_ptr + expert + LEADING)
    return (gl.minimum(start, T) // 128).to(gl.int32), ((gl.minimum(end, T) + 127) // 128).to(gl.int32)


@gluon.jit
def load_operands(dy, x, xs, a_smem, b_smem, s_smem, ready, free, offsets_ptr, E, T, N, K, LEADING: gl.constexpr):
    tiles_n, tiles_k = gl.cdiv(N, TILE), gl.cdiv(K, TILE)
    step = 0
    for tile in range(gl.program_id(0), E * tiles_n * tiles_k, gl.num_programs(0)):
        row0, col0 = tile // tiles_k % tiles_n * TILE, tile % tiles_k * TILE
        first, last = steps_of(offsets_ptr, tile // (tiles_n * tiles_k), T, LEADING)
        for block in range(first, last):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES + 1) & 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, 2 * TILE * TILE + 4 * TILE)
            tma.async_copy_global_to_shared(dy, [row0, block * TILE], bar, a_smem.index(2 * stage))
            tma.async_copy_global_to_shared(dy, [row0 + 64, block * TILE], bar, a_smem.index(2 * stage + 1))
            tma.async_copy_global_to_shared(x, [col0, block * TILE], bar, b_smem.index(stage))
            tma.async_copy_global_to_shared(xs, [block, col0], bar, s_smem.index(stage))
            step += 1


@gluon.jit
def multiply(a_smem, b_smem, s_smem, ready, free, dys_ptr, dw_ptr, offsets_ptr, E, T, N, K, dys_stride, LEADING: gl.constexpr, GROUP: gl.constexpr):
    """A group of four warps: rows 64 GROUP to 64 GROUP + 63 of each tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tiles_n, tiles_k = gl.cdiv(N, TILE), gl.cdiv(K, TILE)
    lanes = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    step = 0
    for tile in range(gl.program_id(0), E * tiles_n * tiles_k, gl.num_programs(0)):
        expert = tile // (tiles_n * tiles_k)
        row0, col0 = tile // tiles_k % tiles_n * TILE + 64 * GROUP, tile % tiles_k * TILE
        first, last = steps_of(offsets_ptr, expert, T, LEADING)
        inside = row0 + lanes < N
        scales_at = dys_ptr + first.to(gl.int64) * dys_stride + row0
        acc = gl.zeros([64, 128], gl.float32, SUMS)
        sums = gl.zeros([64, 128], gl.float32, SUMS)
        row_scale = gl.load(scales_at + lanes, mask=inside & (first < last), other=0.0)
        for block in range(first, last):
            stage = step % STAGES
            scale = row_scale
            # of the next step, on its way while this one multiplies; the last step fetches its own once more
            scales_at += gl.where(block + 1 < last, dys_stride, 0)
            row_scale = gl.load(scales_at + lanes, mask=inside, other=0.0)
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            acc = warpgroup_mma(a_smem.index(2 * stage + GROUP), b_smem.index(stage).permute((1, 0)), acc, use_acc=False, is_async=True)
            column_scale = s_smem.index(stage).load(SUMS)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            sums += (acc * column_scale) * scale[:, None]
            step += 1
        rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, STORE))
        cols = col0 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
        at = dw_ptr + (expert.to(gl.int64) * N + rows)[:, None] * K + cols[None, :]
        gl.store(at, gl.convert_layout(sums.to(dw_ptr.dtype.element_ty), STORE), mask=(rows < N)[:, None] & (cols < K)[None, :])


@gluon.jit(do_not_specialize=["E", "T"], do_not_specialize_on_alignment=["offsets_ptr"])
def fp8_grouped_wgrad_hopper_kernel(dy, x, xs, dys_ptr, dw_ptr, offsets_ptr, E, T, N, K, dys_stride, LEADING: gl.constexpr):
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], dy.layout)
    b_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], x.layout)
    s_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], xs.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize([
        (multiply, (a_smem, b_smem, s_smem, ready, free, dys_ptr, dw_ptr, offsets_ptr, E, T, N, K, dys_stride, LEADING, 0)),
        (multiply, (a_smem, b_smem, s_smem, ready, free, dys_ptr, dw_ptr, offsets_ptr, E, T, N, K, dys_stride, LEADING, 1)),
        (load_operands, (dy, x, xs, a_smem, b_smem, s_smem, ready, free, offsets_ptr, E, T, N, K, LEADING)),
    ], [4, 1], [224, 40])  # fmt: skip


def ahead_of_time() -> list[AheadOfTime]:
    kinds = {"dy": f"tensordesc<fp8e4nv[64, 128],{OPERAND!r}>", "x": f"tensordesc<fp8e4nv[128, 128],{OPERAND!r}>",
             "xs": f"tensordesc<fp32[1, 128],{SCALES!r}>"}  # fmt: skip
    signature = kinds | {"dys_ptr": "*fp32:16", "dw_ptr": "*bf16:16", "offsets_ptr": "*i32", "E": "i32", "T": "i32", "N": "i32:16", "K": "i32:16",
                         "dys_stride": "i32:16"}  # fmt: skip
    return [AheadOfTime("fp8_grouped_wgrad hopper", fp8_grouped_wgrad_hopper_kernel, signature, dict(LEADING=1), 4, 1, registers=255, matrix=True,
                        capabilities=(90,))]  # fmt: skip
