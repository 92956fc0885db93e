"""Grouped products in block-scaled FP8 for Hopper where experts have few tokens, as in decoding; the equations are those of fp8_grouped_gemm.py.

The design is that of fp8_grouped_gemm_hopper_triton.py with the operands changed over: outputs are the rows of the tensor core's product, of which it
takes 64 at a time, and tokens its columns, of which 8 would do.  A tile is 128 outputs x BT tokens of one expert, y transposed.  One warp fetches,
four multiply: a step of 128 fetches 16 KiB of the weight, for which memory needs 890 cycles, and takes the tensor core 64 (BT = 32) and the promotion
some 100, so one group is enough and the stages (STAGES x 16 KiB) are there to keep memory busy.

Bytes are the limit: Qwen3-30B-A3B's layer, 2,048 rows for 128 experts, reads 604 MB of weights: 142 us on an H200 (4.25 TB/s).  Predicted for its
three matrices 160 us (goal 160; two thirds of it, N = 1536 and K = 2048, in the tiles of 128 tokens: 118 us).  It has never run on a GPU.

The tensor core takes the same products in the same order, but whether it rounds them alike as rows and as columns is not known, and which kernel
serves depends on the number of rows: strict mode does not take this one.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._cuda import limits
from ._triton import AheadOfTime, on_device_of
from .grouped_gemm_triton import tile_map_of

BN, BK, STAGES = gl.constexpr(128), gl.constexpr(128), gl.constexpr(8)  # 8 x (16 + 8) KiB at most, and as much as a tile of y
OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
# BT by the most rows that experts have on average.  Twice that many: a second tile of an expert reads its weight again, from L2
COLUMNS = {8: 16, 16: 32, 32: 64}


def columns_of(rows: int, experts: int) -> int | None:
    """Tokens of a tile; None: there are too many for this kernel."""
    return next((columns for most, columns in COLUMNS.items() if rows <= most * experts), None)


def fp8_grouped_matmul_few(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, offsets: Tensor, y: Tensor, columns: int) -> None:
    """Into the rows of y (T, N) that belong to experts."""
    (T, K), (E, N, _) = x.shape, w.shape
    tile_map, slots = tile_map_of(offsets, T, E, columns)
    with on_device_of(x):
        fp8_grouped_gemm_few_kernel[(limits(x.device)[0],)](
            TensorDescriptor.from_tensor(x, [columns, 128], OPERAND), TensorDescriptor.from_tensor(w.flatten(0, 1), [128, 128], OPERAND), x_scales,
            w_scales, y, tile_map, slots, N, K, y.stride(0), x_scales.stride(1), *w_scales.stride(), BT=columns, num_warps=4)  # fmt: skip


@gluon.jit
def load_operands(x, w, x_smem, w_smem, ready, free, map_ptr, tiles, N, K, BT: gl.constexpr):
    tiles_n = gl.cdiv(N, BN)
    total = gl.load(map_ptr + 3 * tiles) * tiles_n
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        row0 = gl.load(map_ptr + tiles + tile // tiles_n)
        col0 = gl.load(map_ptr + tile // tiles_n) * N + tile % tiles_n * BN
        for k in range(0, K, BK):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES + 1) & 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (BN + BT) * BK)
            tma.async_copy_global_to_shared(w, [col0, k], bar, w_smem.index(stage))
            tma.async_copy_global_to_shared(x, [row0, k], bar, x_smem.index(stage))
            step += 1


@gluon.jit
def multiply(x_smem, w_smem, ready, free, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, y_stride, xs_column, ws_expert, ws_row, ws_column,
             BT: gl.constexpr):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 32])
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, 4], [0, 1])  # outputs are neighbours in y
    tiles_n = gl.cdiv(N, BN)
    total = gl.load(map_ptr + 3 * tiles) * tiles_n
    step = 0
    lanes = gl.arange(0, BT, gl.SliceLayout(0, SUMS))
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        expert = gl.load(map_ptr + tile // tiles_n)
        row0 = gl.load(map_ptr + tiles + tile // tiles_n)
        end = gl.load(map_ptr + 2 * tiles + tile // tiles_n)
        col0 = tile % tiles_n * BN
        inside = row0 + lanes < end
        xs_at = xs_ptr + row0
        ws_at = ws_ptr + expert.to(gl.int64) * ws_expert + col0 // 128 * ws_row
        acc = gl.zeros([BN, BT], gl.float32, SUMS)
        sums = gl.zeros([BN, BT], gl.float32, SUMS)
        token_scale, weight_scale = gl.load(xs_at + lanes, mask=inside, other=0.0), gl.load(ws_at)
        for k in range(0, K, BK):
            stage = step % STAGES
            scale = token_scale * weight_scale
            # those of the next step are on their way while this one multiplies; the last step fetches its own once more
            xs_at += gl.where(k + BK < K, xs_column, 0)
            ws_at += gl.where(k + BK < K, ws_column, 0)
            token_scale, weight_scale = gl.load(xs_at + lanes, mask=inside, other=0.0), gl.load(ws_at)
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            acc = warpgroup_mma(w_smem.index(stage), x_smem.index(stage).permute((1, 0)), acc, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            sums += acc * scale[None, :]
            step += 1
        rows = row0 + gl.arange(0, BT, gl.SliceLayout(0, STORE))
        cols = col0 + gl.arange(0, BN, gl.SliceLayout(1, STORE))
        at = y_ptr + rows.to(gl.int64)[None, :] * y_stride + cols[:, None]
        gl.store(at, gl.convert_layout(sums.to(y_ptr.dtype.element_ty), STORE), mask=(rows < end)[None, :] & (cols < N)[:, None])


@gluon.jit(do_not_specialize=["tiles", "xs_column", "ws_expert", "ws_row", "ws_column"], do_not_specialize_on_alignment=["map_ptr"])
def fp8_grouped_gemm_few_kernel(
    x, w, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, y_stride, xs_column, ws_expert, ws_row, ws_column, BT: gl.constexpr
):  # fmt: skip
    x_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BT, 128], x.layout)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    gl.warp_specialize([
        (multiply, (x_smem, w_smem, ready, free, xs_ptr, ws_ptr, y_ptr, map_ptr, tiles, N, K, y_stride, xs_column, ws_expert, ws_row, ws_column, BT)),
        (load_operands, (x, w, x_smem, w_smem, ready, free, map_ptr, tiles, N, K, BT)),
    ], [1], [40])  # fmt: skip


def ahead_of_time() -> list[AheadOfTime]:
    signature = {"w": f"tensordesc<fp8e4nv[128, 128],{OPERAND!r}>", "xs_ptr": "*fp32:16", "ws_ptr": "*fp32:16", "y_ptr": "*bf16:16",
                 "map_ptr": "*i32", "tiles": "i32", "N": "i32:16", "K": "i32:16", "y_stride": "i32:16", "xs_column": "i32", "ws_expert": "i32",
                 "ws_row": "i32", "ws_column": "i32"}  # fmt: skip
    # registers: 255 is what 256 threads may have, and what ptxas says whatever it needs
    return [AheadOfTime(f"fp8_grouped_gemm few {columns}", fp8_grouped_gemm_few_kernel,
                        signature | {"x": f"tensordesc<fp8e4nv[{columns}, 128],{OPERAND!r}>"}, {"BT": columns}, 4, 1, registers=255, matrix=True,
                        capabilities=(90,)) for columns in COLUMNS.values()]  # fmt: skip
