"""Causal attention over packed sequences in Triton, in the very bits of the paged decode kernel; the equation is that of attention.py.

Forward, one launch.  A program owns a tile of BM query rows: the H / Hkv query heads of one key head at each of ROWS positions of a sequence, the
heads filled up to a power of two.  It walks the keys in the chunks of paged_attention.py, counted from the sequence's first token, and does with
each what the two decode kernels do with it: the same tile of the same products, the same partial (m, l, o) by the same `step`, joined to the chunks
before it by the same `joined`.  A row of a product does not depend on the other rows.  What the tile has beyond decode are keys behind a row's own
end, which later rows see: their weight is exactly 0, and a factor of exactly 1 keeps what was there.  So a token of a packed sequence gets the bits
that a decode step gets for it, but for the sign of a zero, and where values are infinite or NaN, because 0 x NaN is NaN.

Backward, two launches, from the saved lse:  p = exp(s - lse),  delta = sum_d dout out,  ds = p (dout v^T - delta),
    dq = scale sum_j ds k_j     (a program per tile of queries, which also writes delta),
    dk = scale sum_i ds q_i,  dv = sum_i p dout_i     (a program per tile of keys; i runs over positions and over the query heads of the key head).
All sums are in fp32 and in fixed order, without atomics.

A grid of T // ROWS + S tiles holds those of every sequence whatever the lengths, so no call waits for the device: sequence s begins at tile
cu_seqlens[s] // ROWS + s, and a tile behind its end leaves at once.  The last tiles, which see the most keys of their sequence, start first.

Where a sequence has more keys than queries (cu_seqlens_k), query i is that of its key `num_keys - length + i`.

Memory: lse and delta, 8 H bytes per token.  On an H200, at 8 x 1024 tokens, 32 / 8 heads of 128: 0.295 ms forward
(233 TFLOP/s), 0.94 ms with the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, entry_for, on_device_of
from .paged_attention import CHUNK
from .paged_attention_triton import LN2, TILES, TILES_FP32, Tiles, finished, joined, step, tiles_of, visible

# Tiles of the backward: BM query rows x BN keys.  Those of sm_90 are the fastest of ten on an H200: dk and dv spill some registers and are faster
# all the same.  The others are not measured; nothing spills in them.
TILES_DQ = {80: Tiles(64, 64, 8, 2), 90: Tiles(128, 64, 8, 3), 100: Tiles(64, 64, 8, 2)}
TILES_DKV = {80: Tiles(64, 64, 8, 2), 90: Tiles(32, 64, 4, 3), 100: Tiles(64, 64, 8, 2)}


def backward_tiles(q: Tensor, repeat: int, table: dict[int, Tiles]) -> Tiles:
    if not q.is_cuda or q.dtype == torch.float32:
        return tiles_of(q, repeat, TILES)
    tiles = entry_for(table, q.device)
    return tiles._replace(BM=max(tiles.BM, triton.next_power_of_2(repeat)))


def attention_triton(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float,
                     max_seqlen: int | None = None, window: int | None = None) -> Tensor:  # fmt: skip
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    return AttentionFunction.apply(q, k, v, *(cu.to(torch.int32).contiguous() for cu in (cu_seqlens, cu_seqlens_k)), scale, window or 0)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, cu_seqlens_k, scale, window):
        T, H, _ = q.shape
        out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(T, H, dtype=torch.float32, device=q.device)
        if T:
            call, tiles = shared_arguments(q, k, v, cu_seqlens, cu_seqlens_k, scale, window, tiles_of(q, H // k.shape[1], TILES))
            with on_device_of(q):
                attention_fwd_kernel[(tiles * k.shape[1],)](out_ptr=out, lse_ptr=lse, tiles=tiles, CHUNK=CHUNK, enable_fp_fusion=False, **call)
        ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, cu_seqlens, cu_seqlens_k, out, lse = ctx.saved_tensors
        H, Hkv = q.shape[1], k.shape[1]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if k.shape[0]:
            dout, delta = dout.contiguous(), torch.empty_like(lse)
            call, tiles = shared_arguments(q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.window, backward_tiles(q, H // Hkv, TILES_DQ))
            with on_device_of(q):
                attention_dq_kernel[(tiles * Hkv,)](out_ptr=out, dout_ptr=dout, lse_ptr=lse, delta_ptr=delta, dq_ptr=dq, tiles=tiles, **call)
                call, _ = shared_arguments(q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.window, backward_tiles(q, H // Hkv, TILES_DKV))
                key_tiles = k.shape[0] // call["BN"] + len(cu_seqlens) - 1
                attention_dkv_kernel[(key_tiles * Hkv,)](dout_ptr=dout, lse_ptr=lse, delta_ptr=delta, dk_ptr=dk, dv_ptr=dv, **call)
        return dq, dk, dv, None, None, None, None


def shared_arguments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, window: int,
                     tiles: Tiles) -> tuple[dict, int]:  # fmt: skip
    """What all three kernels take, and the number of query tiles."""
    (T, H, d), Hkv, S = q.shape, k.shape[1], len(cu_seqlens) - 1
    places = triton.next_power_of_2(H // Hkv)
    call = dict(q_ptr=q, k_ptr=k, v_ptr=v, cu_ptr=cu_seqlens, cu_k_ptr=cu_seqlens_k, S=S)
    call |= dict(factor=scale * 1.4426950408889634, HKV=Hkv, REPEAT=H // Hkv, PLACES=places, D=d, WINDOW=window,
                BM=tiles.BM, BN=tiles.BN, BD=max(16, triton.next_power_of_2(d)), num_warps=tiles.num_warps, num_stages=tiles.num_stages)  # fmt: skip
    call |= {f"{name}_{axis}_stride": x.stride(i) for name, x in (("q", q), ("k", k), ("v", v)) for i, axis in enumerate(("row", "head"))}
    return call, T // (tiles.BM // places) + S


@triton.jit
def tile_of(cu_ptr, index, S, ROWS: tl.constexpr):
    """The sequence that tile `index` is in, its first row in 64 bits and length, and where in it the tile begins: beyond its end in a surplus tile"""
    lanes = tl.arange(0, 64)
    begun = tl.zeros([64], tl.int32)
    for i in range(0, S, 64):
        s = i + lanes
        begun += ((s < S) & (tl.load(cu_ptr + s, mask=s < S, other=0) // ROWS + s <= index)).to(tl.int32)
    s = tl.sum(begun, 0) - 1
    base, length = span_of(cu_ptr, s)
    return s, base.to(tl.int64), length, (index - base // ROWS - s) * ROWS


@triton.jit
def span_of(cu_ptr, s):
    base = tl.load(cu_ptr + s)
    return base, tl.load(cu_ptr + s + 1) - base


@triton.jit
def query_rows(first, length, BM: tl.constexpr, PLACES: tl.constexpr, REPEAT: tl.constexpr):
    """Place among the sequence's queries, which query head of the key head, and whether there is one, for each row of a tile of queries."""
    lanes = tl.arange(0, BM)
    position, query_head = first + lanes // PLACES, lanes % PLACES
    return position, query_head, (query_head < REPEAT) & (position < length)


@triton.jit
def first_step(first, WINDOW: tl.constexpr, BN: tl.constexpr):
    """Where a tile of queries from position `first` on begins to see keys, in whole steps."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(first + 1 - WINDOW, 0) // BN * BN
    return begin


@triton.jit
def rows_of(x_ptr, at, there, D: tl.constexpr, BD: tl.constexpr):
    """(rows, BD) from the addresses `at`; 0 where there is nothing."""
    dims = tl.arange(0, BD)
    return tl.load(x_ptr + at[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def put_rows(x_ptr, at, there, x, D: tl.constexpr, BD: tl.constexpr):
    dims = tl.arange(0, BD)
    tl.store(x_ptr + at[:, None] + dims[None, :], x.to(x_ptr.dtype.element_ty), mask=there[:, None] & (dims < D)[None, :])


@triton.jit
def with_chunk(M, L, out, m, l, acc):
    """What paged_attention_merge_kernel does with one chunk."""
    M, old, new = joined(M, m)
    return M, L * old + l * new, out * old[:, None] + acc * new[:, None]


# The numbers of sequences and tiles change from step to step and are not specialised; the strides belong to the model.
@triton.jit(do_not_specialize=["S", "tiles"], do_not_specialize_on_alignment=["cu_ptr", "cu_k_ptr"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_k_ptr, out_ptr, lse_ptr, S, tiles, q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride,
    v_head_stride, factor, HKV: tl.constexpr, REPEAT: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HKV).to(tl.int64)
    s, base, length, first = tile_of(cu_ptr, tiles - 1 - tl.program_id(0) // HKV, S, BM // PLACES)
    if first >= length:
        return
    key_base, num_keys = span_of(cu_k_ptr, s)
    position, query_head, there = query_rows(first, length, BM, PLACES, REPEAT)
    lens = tl.where(there, num_keys - length + position + 1, 0)
    longest = tl.max(lens, 0)
    q = rows_of(q_ptr, (base + position) * q_row_stride + (head * REPEAT + query_head) * q_head_stride, there, D, BD)
    k_ptr += key_base.to(tl.int64) * k_row_stride + head * k_head_stride
    v_ptr += key_base.to(tl.int64) * v_row_stride + head * v_head_stride
    M = tl.full([BM], float("-inf"), tl.float32)
    L = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    m, l, acc = M, L, out
    for start in range(first_step(num_keys - length + first, WINDOW, BN), longest, BN):
        if start % CHUNK == 0:  # within the one loop, so that the next step's loads do not wait for a chunk to end
            M, L, out = with_chunk(M, L, out, m, l, acc)
            m, l, acc = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, BD], tl.float32)
        keys = start + tl.arange(0, BN)
        k = rows_of(k_ptr, keys.to(tl.int64) * k_row_stride, keys < longest, D, BD)
        v = rows_of(v_ptr, keys.to(tl.int64) * v_row_stride, keys < longest, D, BD)
        m, l, acc = step(q, k, v, m, l, acc, keys, lens, factor, WINDOW)
    M, L, out = with_chunk(M, L, out, m, l, acc)
    total, lse = finished(M, L)
    at = (base + position) * (HKV * REPEAT) + head * REPEAT + query_head
    put_rows(out_ptr, at * D, there, out / total[:, None], D, BD)
    tl.store(lse_ptr + at, lse, mask=there)


@triton.jit(do_not_specialize=["S", "tiles"], do_not_specialize_on_alignment=["cu_ptr", "cu_k_ptr"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_k_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, S, tiles, q_row_stride, q_head_stride, k_row_stride,
    k_head_stride, v_row_stride, v_head_stride, factor, HKV: tl.constexpr, REPEAT: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HKV).to(tl.int64)
    s, base, length, first = tile_of(cu_ptr, tiles - 1 - tl.program_id(0) // HKV, S, BM // PLACES)
    if first >= length:
        return
    key_base, num_keys = span_of(cu_k_ptr, s)
    position, query_head, there = query_rows(first, length, BM, PLACES, REPEAT)
    lens = tl.where(there, num_keys - length + position + 1, 0)
    longest = tl.max(lens, 0)
    at = (base + position) * (HKV * REPEAT) + head * REPEAT + query_head
    q = rows_of(q_ptr, (base + position) * q_row_stride + (head * REPEAT + query_head) * q_head_stride, there, D, BD)
    dout = rows_of(dout_ptr, at * D, there, D, BD)
    delta = tl.sum(dout.to(tl.float32) * rows_of(out_ptr, at * D, there, D, BD).to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=there)
    lse = tl.load(lse_ptr + at, mask=there, other=0.0)
    k_ptr += key_base.to(tl.int64) * k_row_stride + head * k_head_stride
    v_ptr += key_base.to(tl.int64) * v_row_stride + head * v_head_stride
    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(first_step(num_keys - length + first, WINDOW, BN), longest, BN):
        keys = start + tl.arange(0, BN)
        k = rows_of(k_ptr, keys.to(tl.int64) * k_row_stride, keys < longest, D, BD)
        v = rows_of(v_ptr, keys.to(tl.int64) * v_row_stride, keys < longest, D, BD)
        scores = tl.dot(q, k.T, input_precision="ieee") * factor
        p = tl.where(visible(keys[None, :], lens[:, None], WINDOW), tl.exp2(scores - lse[:, None]), 0.0)
        ds = p * (tl.dot(dout, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    put_rows(dq_ptr, at * D, there, dq * (factor * LN2), D, BD)


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["cu_ptr", "cu_k_ptr"])
def attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_k_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, S, q_row_stride, q_head_stride, k_row_stride,
    k_head_stride, v_row_stride, v_head_stride, factor, HKV: tl.constexpr, REPEAT: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HKV).to(tl.int64)
    s, key_base, num_keys, first = tile_of(cu_k_ptr, tl.program_id(0) // HKV, S, BN)
    if first >= num_keys:
        return
    base, length = span_of(cu_ptr, s)
    base = base.to(tl.int64)
    keys = first + tl.arange(0, BN)
    k = rows_of(k_ptr, (key_base + keys) * k_row_stride + head * k_head_stride, keys < num_keys, D, BD)
    v = rows_of(v_ptr, (key_base + keys) * v_row_stride + head * v_head_stride, keys < num_keys, D, BD)
    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    # queries before the tile's first key see none of its keys, nor do those a window behind its last
    before, end = num_keys - length, length
    if WINDOW:
        end = tl.minimum(length, first + BN - 1 + WINDOW - before)
    for start in range(tl.maximum(first - before, 0), end, BM // PLACES):
        position, query_head, there = query_rows(start, length, BM, PLACES, REPEAT)
        at = (base + position) * (HKV * REPEAT) + head * REPEAT + query_head
        q = rows_of(q_ptr, (base + position) * q_row_stride + (head * REPEAT + query_head) * q_head_stride, there, D, BD)
        dout = rows_of(dout_ptr, at * D, there, D, BD)
        lse, delta = tl.load(lse_ptr + at, mask=there, other=0.0), tl.load(delta_ptr + at, mask=there, other=0.0)
        seen = there[None, :] & visible(keys[:, None], before + position[None, :] + 1, WINDOW)
        scores = tl.dot(k, q.T, input_precision="ieee") * factor
        p = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, dout.T, input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    at = ((key_base + keys) * HKV + head) * D
    put_rows(dk_ptr, at, keys < num_keys, dk * (factor * LN2), D, BD)
    put_rows(dv_ptr, at, keys < num_keys, dv, D, BD)


def ahead_of_time() -> list[AheadOfTime]:
    cases = []
    strides = {f"{name}_{axis}_stride": "i32:16" for name in "qkv" for axis in ("row", "head")}
    names = {attention_fwd_kernel: ("out",), attention_dq_kernel: ("out", "dout", "dq"), attention_dkv_kernel: ("dout", "dk", "dv")}

    def add(kernel, dtype, D, repeat, tiles, capabilities, window=0):
        tensors = dict.fromkeys((f"{name}_ptr" for name in ("q", "k", "v", *names[kernel])), f"*{dtype}:16")
        rows = dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32:16") | dict.fromkeys(("cu_ptr", "cu_k_ptr"), "*i32")
        rows |= {"S": "i32", "tiles": "i32", "factor": "fp32"}
        signature = {name: kind for name, kind in (tensors | rows | strides).items() if name in kernel.arg_names}
        forward = kernel is attention_fwd_kernel
        constants = dict(HKV=8, REPEAT=repeat, PLACES=triton.next_power_of_2(repeat), D=D, WINDOW=window, BM=tiles.BM, BN=tiles.BN, BD=D)
        constants |= {"CHUNK": CHUNK} if forward else {}
        # a window's second bound spills in the forward's tiles of sm_90; what that costs is not measured
        stack = 192 if window else 128 if kernel is attention_dkv_kernel else 16
        cases.append(AheadOfTime(f"{kernel.__name__} {dtype} {D} {repeat} {window} {capabilities}", kernel, signature, constants, tiles.num_warps,
                                 tiles.num_stages, registers=255, stack=stack, matrix=dtype != "fp32", capabilities=capabilities,
                                 contract=not forward))  # fmt: skip

    tables = {attention_fwd_kernel: TILES, attention_dq_kernel: TILES_DQ, attention_dkv_kernel: TILES_DKV}
    for kernel in names:
        for capability, tiles in tables[kernel].items():
            add(kernel, "bf16", 128, 4, tiles, (capability,))
            add(kernel, "bf16", 128, 7, tiles, (capability,))
            add(kernel, "fp16", 64, 8, tiles, (capability,))
        add(kernel, "bf16", 128, 4, tables[kernel][90], (90,), window=4096)
        add(kernel, "fp32", 128, 4, TILES_FP32, tuple(TILES))
    return cases
