"""Permutation of tokens to experts in Triton; the rules are those of moe_permute.py.

The counting sort: `moe_histogram_kernel` counts the experts in each block of BLOCK choices, `moe_scan_kernel` adds up those of the
blocks before, expert by expert, `moe_offsets_kernel` pads and adds the totals, and `moe_place_kernel` gives each choice the offset of its expert,
what the blocks before have and its rank in its own block.  Integers alone, without atomics, and the order of the choices is kept.

`moe_gather_kernel` copies or scales rows (permute, and the gradient of unpermute), `moe_combine_kernel` sums a token's rows (unpermute, and the
gradient of permute), `moe_dot_kernel` gives the gradient of the weights.

Traffic: rows are read once per choice and written once: 2 T k D b bytes for permute, T (k + 1) D b for unpermute.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .moe_permute import num_rows
from .swiglu_triton import neighbours, tile, tile_of

BLOCK, EXPERTS, WARPS = 128, 64, 4  # choices and experts per tile
# Blocks and experts per tile of the scan over blocks.  One program walks all blocks of its experts, so few experts each: 128 blocks of 64 took 23 us
# for T = 16384, k = 8, E = 128 on an H200, nearly half of moe_places.  This entry has not been measured.
SCAN_BLOCKS, SCAN_EXPERTS = 128, 8
PLACE_WARPS = 8  # every choice of a block is compared with every other
DOT_ROWS, DOT_COLUMNS = 8, 256


def moe_places_triton(ids: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    (T, k), E, device = ids.shape, num_experts, ids.device
    slots, blocks, columns = T * k, triton.cdiv(T * k, BLOCK), triton.cdiv(num_experts, EXPERTS)
    ids = ids.contiguous()
    source = torch.full((num_rows(slots, E, align),), -1, dtype=torch.int32, device=device)
    inverse, offsets = torch.empty(T, k, dtype=torch.int32, device=device), torch.empty(E + 1, dtype=torch.int32, device=device)
    before, totals = torch.empty(blocks, E, dtype=torch.int32, device=device), torch.empty(E, dtype=torch.int32, device=device)
    with on_device_of(ids):
        if slots:
            moe_histogram_kernel[(blocks * columns,)](ids, before, slots, E, BLOCK=BLOCK, EXPERTS=EXPERTS, num_warps=WARPS)
        moe_scan_kernel[(triton.cdiv(E, SCAN_EXPERTS),)](before, totals, blocks, E, BLOCKS=SCAN_BLOCKS, EXPERTS=SCAN_EXPERTS, num_warps=WARPS)
        moe_offsets_kernel[(1,)](totals, offsets, E, align, BE=triton.next_power_of_2(E), num_warps=WARPS)
        if slots:
            moe_place_kernel[(blocks,)](ids, before, offsets, source, inverse, slots, E, BLOCK=BLOCK, num_warps=PLACE_WARPS)
    return offsets, source, inverse


def moe_permute_triton(x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    return MoePermuteFunction.apply(x, source, inverse)


def moe_unpermute_triton(y: Tensor, weights: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    return MoeUnpermuteFunction.apply(y, weights.contiguous(), source, inverse)


def gathered(x: Tensor, source: Tensor, k: int, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(P, D): row source[p] // k of x, times weights[source[p]]; zeros for -1."""
    x, stride = neighbours(x)
    P, D = source.shape[0], x.shape[1]
    y = torch.empty(P, D, dtype=dtype, device=x.device)
    if y.numel():
        ROWS, COLUMNS = tile_of(D)
        with on_device_of(x):
            moe_gather_kernel[(triton.cdiv(P, ROWS) * triton.cdiv(D, COLUMNS),)](x, source, source if weights is None else weights, y, P, D, k,
                                                                                stride, SCALED=weights is not None, ROWS=ROWS, COLUMNS=COLUMNS,
                                                                                num_warps=WARPS)  # fmt: skip
    return y


def combined(y: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """(T, D): the sum of the k rows of each token, times its weights."""
    y, stride = neighbours(y)
    (T, k), D = inverse.shape, y.shape[1]
    out = torch.empty(T, D, dtype=y.dtype, device=y.device)
    if out.numel():
        ROWS, COLUMNS = tile_of(D)
        with on_device_of(y):
            moe_combine_kernel[(triton.cdiv(T, ROWS) * triton.cdiv(D, COLUMNS),)](y, inverse, inverse if weights is None else weights, out, T, D,
                                                                                 stride, K=k, WEIGHTED=weights is not None, ROWS=ROWS,
                                                                                 COLUMNS=COLUMNS, num_warps=WARPS)  # fmt: skip
    return out


class MoePermuteFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, inverse):
        ctx.save_for_backward(inverse)
        return gathered(x, source, inverse.shape[1], None, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return combined(dy, ctx.saved_tensors[0], None), None, None


class MoeUnpermuteFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, source, inverse):
        ctx.save_for_backward(y, weights, source, inverse)
        return combined(y, inverse, weights)

    @staticmethod
    def backward(ctx, dout):
        y, weights, source, inverse = ctx.saved_tensors
        dy = gathered(dout, source, inverse.shape[1], weights, y.dtype) if ctx.needs_input_grad[0] else None
        dweights = moe_dots_triton(y, dout, inverse, weights.dtype) if ctx.needs_input_grad[1] else None
        return dy, dweights, None, None


def moe_dots_triton(y: Tensor, dout: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, k): row inverse[t, j] of y times row t of dout; 0 for -1."""
    (y, y_stride), (dout, dout_stride) = neighbours(y), neighbours(dout)
    out = torch.empty(inverse.shape, dtype=dtype, device=y.device)
    if out.numel():
        with on_device_of(y):
            moe_dot_kernel[(triton.cdiv(out.numel(), DOT_ROWS),)](y, dout, inverse, out, out.numel(), y.shape[1], inverse.shape[1], y_stride,
                                                                  dout_stride, ROWS=DOT_ROWS, COLUMNS=DOT_COLUMNS, num_warps=WARPS)  # fmt: skip
    return out


SMALL = ["ids_ptr", "before_ptr", "offsets_ptr", "source_ptr", "inverse_ptr", "weights_ptr", "totals_ptr"]


# The number of choices changes from step to step and is not specialised.
@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["ids_ptr", "before_ptr"])
def moe_histogram_kernel(ids_ptr, before_ptr, slots, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    columns = tl.cdiv(E, EXPERTS)
    block, first = tl.program_id(0) // columns, tl.program_id(0) % columns * EXPERTS
    at = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < slots, other=-1)
    experts = first + tl.arange(0, EXPERTS)
    counts = tl.sum(tl.where(ids[:, None] == experts[None, :], 1, 0), 0)
    tl.store(before_ptr + block.to(tl.int64) * E + experts, counts, mask=experts < E)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["before_ptr", "totals_ptr"])
def moe_scan_kernel(before_ptr, totals_ptr, blocks, E, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """In place: the sum over the blocks before, for each expert; and the sum over all."""
    experts = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    running = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, blocks, BLOCKS):
        rows = first + tl.arange(0, BLOCKS)[:, None]
        mask = (rows < blocks) & (experts < E)[None, :]
        at = before_ptr + rows.to(tl.int64) * E + experts[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, running[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        running += tl.sum(counts, 0)
    tl.store(totals_ptr + experts, running, mask=experts < E)


@triton.jit(do_not_specialize_on_alignment=["totals_ptr", "offsets_ptr"])
def moe_offsets_kernel(totals_ptr, offsets_ptr, E, align, BE: tl.constexpr):
    experts = tl.arange(0, BE)
    padded = tl.cdiv(tl.load(totals_ptr + experts, mask=experts < E, other=0), align) * align
    tl.store(offsets_ptr + 1 + experts, tl.cumsum(padded, 0), mask=experts < E)
    tl.store(offsets_ptr, 0)


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=SMALL)
def moe_place_kernel(ids_ptr, before_ptr, offsets_ptr, source_ptr, inverse_ptr, slots, E, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    at = block * BLOCK + lanes
    ids = tl.load(ids_ptr + at, mask=at < slots, other=-1)
    others = tl.load(ids_ptr + at[None, :], mask=at[None, :] < slots, other=-1)
    rank = tl.sum(tl.where((others == ids[:, None]) & (lanes[None, :] < lanes[:, None]), 1, 0), 1)
    goes = (at < slots) & (ids >= 0) & (ids < E)
    place = tl.load(offsets_ptr + ids, mask=goes, other=0) + tl.load(before_ptr + block.to(tl.int64) * E + ids, mask=goes, other=0) + rank
    tl.store(source_ptr + place, at, mask=goes)
    tl.store(inverse_ptr + at, tl.where(goes, place, -1), mask=at < slots)


@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["source_ptr", "weights_ptr"])
def moe_gather_kernel(x_ptr, source_ptr, weights_ptr, y_ptr, P, D, k, stride, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns, mask = tile(P, D, ROWS, COLUMNS)
    slot = tl.load(source_ptr + rows, mask=rows < P, other=-1)
    x = tl.load(x_ptr + (slot // k).to(tl.int64) * stride + columns, mask=mask & (slot >= 0), other=0.0)
    if SCALED:
        x = x.to(tl.float32) * tl.load(weights_ptr + slot, mask=slot >= 0, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * D + columns, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["inverse_ptr", "weights_ptr"])
def moe_combine_kernel(y_ptr, inverse_ptr, weights_ptr, out_ptr, T, D, stride, K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
                       COLUMNS: tl.constexpr):  # fmt: skip
    rows, columns, mask = tile(T, D, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.static_range(K):
        place = tl.load(inverse_ptr + rows * K + j, mask=rows < T, other=-1)
        y = tl.load(y_ptr + place.to(tl.int64) * stride + columns, mask=mask & (place >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + rows * K + j, mask=rows < T, other=0.0).to(tl.float32)
        total += y
    tl.store(out_ptr + rows * D + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["inverse_ptr", "dweights_ptr"])
def moe_dot_kernel(y_ptr, dout_ptr, inverse_ptr, dweights_ptr, slots, D, k, y_stride, dout_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.load(inverse_ptr + slot, mask=slot < slots, other=-1).to(tl.int64)
    there = (place >= 0)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, D, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        mask = there & (columns < D)
        y = tl.load(y_ptr + place[:, None] * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        total += y * tl.load(dout_ptr + (slot // k)[:, None] * dout_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(dweights_ptr + slot, tl.sum(total, 1).to(dweights_ptr.dtype.element_ty), mask=slot < slots)


def ahead_of_time() -> list[AheadOfTime]:
    ints = {"ids_ptr": "*i32", "before_ptr": "*i32", "slots": "i32", "E": "i32:16"}
    ROWS, COLUMNS = tile_of(2048)
    rows, wide = {"ROWS": ROWS, "COLUMNS": COLUMNS}, {"D": "i32:16", "stride": "i32:16"}
    gather = {"x_ptr": "*bf16:16", "source_ptr": "*i32", "weights_ptr": "*fp32", "y_ptr": "*bf16:16", "P": "i32", "k": "i32", **wide}
    combine = {"y_ptr": "*bf16:16", "inverse_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": "*bf16:16", "T": "i32", **wide}
    dot = {"y_ptr": "*bf16:16", "dout_ptr": "*bf16:16", "inverse_ptr": "*i32", "dweights_ptr": "*fp32", "slots": "i32", "D": "i32:16", "k": "i32",
           "y_stride": "i32:16", "dout_stride": "i32:16"}  # fmt: skip
    return [
        AheadOfTime("moe_histogram", moe_histogram_kernel, ints, {"BLOCK": BLOCK, "EXPERTS": EXPERTS}, WARPS),
        AheadOfTime("moe_scan", moe_scan_kernel, {"before_ptr": "*i32", "totals_ptr": "*i32", "blocks": "i32", "E": "i32:16"},
                    {"BLOCKS": SCAN_BLOCKS, "EXPERTS": SCAN_EXPERTS}, WARPS),
        AheadOfTime("moe_offsets", moe_offsets_kernel, {"totals_ptr": "*i32", "offsets_ptr": "*i32", "E": "i32:16", "align": "i32"}, {"BE": 256},
                    WARPS),
        AheadOfTime("moe_place", moe_place_kernel, {**ints, "offsets_ptr": "*i32", "source_ptr": "*i32", "inverse_ptr": "*i32"}, {"BLOCK": BLOCK},
                    PLACE_WARPS, registers=128),
        *(AheadOfTime(f"moe_gather {s}", moe_gather_kernel, gather, {"SCALED": s, **rows}, WARPS) for s in (False, True)),
        *(AheadOfTime(f"moe_combine {w}", moe_combine_kernel, combine, {"K": 8, "WEIGHTED": w, **rows}, WARPS) for w in (False, True)),
        AheadOfTime("moe_dot", moe_dot_kernel, dot, {"ROWS": DOT_ROWS, "COLUMNS": DOT_COLUMNS}, WARPS),
    ]  # fmt: skip
