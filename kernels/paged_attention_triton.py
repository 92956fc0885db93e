"""Paged decode attention in Triton; the equations, the layout of the caches and the traffic are in paged_attention.py.

Two launches.  `paged_attention_split_kernel`: one program per (chunk, row, key head).  Its tile of BM query rows holds the H / Hkv query heads of one
row or, in a chunk that lies wholly in a group's prefix, those of as many rows of the group as fit: then every ROWS-th row of the group has a program
that works and the others leave at once.  Shared or not, it is the same code in the same compiled kernel with the same tile, and a row of a product
does not depend on the other rows: that is why sharing changes no bit.  `paged_attention_merge_kernel` joins a row's chunks in ascending order, with a
running maximum.

attention_triton.py attends to packed sequences in the same bits.  It shares the tiles of the products, `step`, `joined` and `finished`, and like
here no compiler may contract a product and a sum into one rounding: which ones it would choose depends on the code around them.

A program whose chunk lies behind the row's end leaves at once, so the grid depends on the table's width and not on lengths that only the device
knows: nothing waits for the device and a captured graph stays valid.  The chunk is the slowest index of the grid: the full chunks start first, what
is left at the ends of the rows comes last.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import is_strict
from ._triton import AheadOfTime, entry_for, on_device_of
from .paged_attention import CHUNK

LN2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    BM: int  # query rows at least
    BN: int  # keys per step, a divisor of CHUNK
    num_warps: int
    num_stages: int


# Those of sm_90 are measured (LOG.md), the others are not.  64 query rows are the least that Hopper's wgmma takes: a group of 16 with 4 query heads
# per key head is one tile.  With one row most of the tile is filler.  attention_triton.py takes the same tiles for heads of at most 128 and keeps
# two sums of values: with 64 keys per step it spilled on sm_90 under triton 3.9.
TILES = {80: Tiles(32, 64, 4, 3), 90: Tiles(64, 32, 4, 5), 100: Tiles(64, 64, 8, 3)}
# Outside of strict mode decode need not have the bits of packed attention: its tiles then hold less filler.
TILES_DECODE = TILES | {90: Tiles(16, 64, 4, 4)}
TILES_WIDE = Tiles(64, 64, 8, 2)  # heads of more than 128
TILES_FP32 = Tiles(16, 16, 4, 2)  # exact fp32 products, no tensor cores
TILES_INTERPRETER = Tiles(16, 64, 4, 1)


def tiles_of(q: Tensor, repeat: int, table: dict[int, Tiles]) -> Tiles:
    if not q.is_cuda:
        tiles = TILES_INTERPRETER
    elif q.dtype == torch.float32:
        tiles = TILES_FP32
    elif q.shape[2] > 128:
        tiles = TILES_WIDE
    else:
        tiles = entry_for(table, q.device)
    return tiles._replace(BM=max(tiles.BM, triton.next_power_of_2(repeat)))


def paged_attention_triton(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float,
                           group_offsets: Tensor | None, prefix_lens: Tensor | None, limit: int,
                           window: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    R, H, d = q.shape
    Hkv, block_size = key_cache.shape[1:3]
    device, C = q.device, triton.cdiv(limit, CHUNK)
    q = q if q.stride(2) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    out, lse = torch.empty(R, H, d, dtype=q.dtype, device=device), torch.empty(R, H, dtype=torch.float32, device=device)
    if R == 0:
        return out, lse
    m, l = torch.empty(2, R, H, C, dtype=torch.float32, device=device)
    o = torch.empty(R, H, C, d, dtype=torch.float32, device=device)
    seq_lens, grouped = seq_lens.contiguous(), group_offsets is not None and prefix_lens.numel() > 0
    offsets, prefixes = (group_offsets.contiguous(), prefix_lens.contiguous()) if grouped else (seq_lens, seq_lens)
    tiles, BD = tiles_of(q, H // Hkv, TILES if is_strict() else TILES_DECODE), max(16, triton.next_power_of_2(d))
    with on_device_of(q):
        if C:
            paged_attention_split_kernel[(C * R * Hkv,)](
                q, key_cache, value_cache, block_table, seq_lens, offsets, prefixes, m, l, o, R, prefixes.numel(), C, limit, block_table.stride(0),
                q.stride(0), q.stride(1), *key_cache.stride()[:3], *value_cache.stride()[:3], scale * 1.4426950408889634,
                HKV=Hkv, REPEAT=H // Hkv, D=d, BLOCK=block_size, CHUNK=CHUNK, GROUPS=grouped, WINDOW=window or 0, BM=tiles.BM, BN=tiles.BN,
                BD=BD, num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False)  # fmt: skip
        paged_attention_merge_kernel[(R * H,)](m, l, o, seq_lens, out, lse, C, limit, H=H, D=d, CHUNK=CHUNK, WINDOW=window or 0, BD=BD,
                                               num_warps=1, enable_fp_fusion=False)  # fmt: skip
    return out, lse


SMALL = ["table_ptr", "lens_ptr", "offsets_ptr", "prefixes_ptr"]  # slices of a larger table: their alignment compiles nothing


# What changes from step to step is not specialised; strides of q and of the caches belong to the model, and knowing that they are multiples of 16
# makes the loads 16 bytes wide.
@triton.jit(do_not_specialize=["R", "P", "C", "limit", "table_stride"], do_not_specialize_on_alignment=SMALL)
def paged_attention_split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, offsets_ptr, prefixes_ptr, m_ptr, l_ptr, o_ptr, R, P, C, limit, table_stride,
    q_row_stride, q_head_stride, k_block_stride, k_head_stride, k_token_stride, v_block_stride, v_head_stride, v_token_stride, factor,
    HKV: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head, row, chunk = (pid % HKV).to(tl.int64), pid // HKV % R, pid // HKV // R
    begin = chunk * CHUNK
    rows = 1
    if GROUPS:
        first, end, prefix = group_of(offsets_ptr, prefixes_ptr, row, P)
        if begin + CHUNK <= prefix:
            ROWS: tl.constexpr = BM // REPEAT
            rows = tl.where((row - first) % ROWS == 0, tl.minimum(ROWS, end - row), 0)
    lanes = tl.arange(0, BM)
    place = lanes // REPEAT
    lens = tl.minimum(tl.load(lens_ptr + row + place, mask=place < rows, other=0), limit)
    longest = tl.max(lens, 0)
    if longest <= begin:
        return
    if WINDOW:
        # what no row of the tile sees is left out; whole steps of keys, so that a product has the same keys in it whatever the rows
        begin = tl.maximum(begin, tl.min(tl.where(lens > begin, tl.maximum(lens - WINDOW, 0), 2147483647), 0) // BN * BN)
        if begin >= chunk * CHUNK + CHUNK:
            return
    # the table of the first row that has this chunk: an empty row's table is not read
    table_ptr += (row + tl.min(tl.where(lens > begin, place, BM), 0)).to(tl.int64) * table_stride
    stop = tl.minimum(longest, chunk * CHUNK + CHUNK)
    dims = tl.arange(0, BD)
    query_row, query_head = (row + place).to(tl.int64), head * REPEAT + lanes % REPEAT
    q_at = query_row * q_row_stride + query_head * q_head_stride
    q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=(place < rows)[:, None] & (dims < D)[None, :], other=0.0)
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(begin, stop, BN):
        keys = start + tl.arange(0, BN)
        # slots behind the end are not read: they may hold NaN, and 0 x NaN is NaN
        inside = keys < stop
        if BLOCK % BN == 0:
            block = tl.load(table_ptr + start // BLOCK).to(tl.int64)
        else:
            block = tl.load(table_ptr + keys // BLOCK, mask=inside, other=0).to(tl.int64)
        k_at, v_at = block * k_block_stride + keys % BLOCK * k_token_stride, block * v_block_stride + keys % BLOCK * v_token_stride
        k = tl.load(k_ptr + k_at[:, None] + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0)
        v = tl.load(v_ptr + v_at[:, None] + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0)
        m, l, acc = step(q, k, v, m, l, acc, keys, lens, factor, WINDOW)
    at = (query_row * (HKV * REPEAT) + query_head) * C + chunk
    there = lens > chunk * CHUNK
    tl.store(m_ptr + at, m, mask=there)
    tl.store(l_ptr + at, l, mask=there)
    tl.store(o_ptr + (at * D)[:, None] + dims[None, :], acc, mask=there[:, None] & (dims < D)[None, :])


@triton.jit
def step(q, k, v, m, l, acc, keys, lens, factor, WINDOW: tl.constexpr):
    """Take some keys and values into the partial (m, l, acc) of a tile of query rows; row i sees the keys below lens[i], the last WINDOW of them
    unless WINDOW is 0."""
    s = tl.dot(q, k.T, input_precision="ieee") * factor
    s = tl.where(visible(keys[None, :], lens[:, None], WINDOW), s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # a query row without keys: -inf - -inf would be NaN
    p, alpha = tl.exp2(s - shift[:, None]), tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    return new, l, tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")


@triton.jit
def visible(keys, lens, WINDOW: tl.constexpr):
    """Which keys a row of that length sees."""
    if WINDOW:  # both bounds in one comparison: a negative distance is a large number without sign
        seen = (lens - 1 - keys).to(tl.uint32) < WINDOW
    else:
        seen = keys < lens
    return seen


@triton.jit
def joined(M, m):
    """Maximum of a row's chunks so far and of its next one, and the factors that make the sums of either relative to it: exactly 1 and 0 if the next
    chunk has no keys of the row."""
    new = tl.maximum(M, m)
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(M - shift), tl.exp2(m - shift)


@triton.jit
def finished(M, L):
    """What the sum of values is divided by, and the log-sum-exp to base 2."""
    total = tl.where(L == 0.0, 1.0, L)
    return total, M + tl.log2(total)


@triton.jit
def group_of(offsets_ptr, prefixes_ptr, row, P):
    """First row, end and prefix of the group that `row` is in; prefix 0 outside of all groups.  Of groups that begin at one row the last counts."""
    lanes = tl.arange(0, 64)
    begun = tl.zeros([64], tl.int32)
    for i in range(0, P + 1, 64):
        begun += (tl.load(offsets_ptr + i + lanes, mask=i + lanes <= P, other=2147483647) <= row).to(tl.int32)
    group = tl.sum(begun, 0) - 1
    inside = (group >= 0) & (group < P)
    first = tl.load(offsets_ptr + group, mask=inside, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=inside, other=0)
    return first, end, tl.load(prefixes_ptr + group, mask=inside, other=0)


@triton.jit(do_not_specialize=["C", "limit"], do_not_specialize_on_alignment=["lens_ptr"])
def paged_attention_merge_kernel(m_ptr, l_ptr, o_ptr, lens_ptr, out_ptr, lse_ptr, C, limit, H: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
                                 WINDOW: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lens_ptr + pid // H), limit)
    chunks, first = tl.cdiv(length, CHUNK), 0
    if WINDOW:  # chunks that the row sees nothing of may not have been written
        first = tl.maximum(length - WINDOW, 0) // CHUNK
    m_ptr += pid * C
    l_ptr += pid * C
    o_ptr += pid * C * D
    dims = tl.arange(0, BD)
    M, L, out = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([BD], tl.float32)
    # one chunk after the other, the loads of the next ones under way
    for c in tl.range(first, chunks, num_stages=4):
        M, old, new = joined(M, tl.load(m_ptr + c))
        L = L * old + tl.load(l_ptr + c) * new
        out = out * old + tl.load(o_ptr + c * D + dims, mask=dims < D, other=0.0) * new
    total, lse = finished(M, L)
    tl.store(out_ptr + pid * D + dims, (out / total).to(out_ptr.dtype.element_ty), mask=dims < D)
    tl.store(lse_ptr + pid, lse * LN2)


def ahead_of_time() -> list[AheadOfTime]:
    cases = []

    def add(dtype, D, repeat, block, tiles, capabilities, groups=True, matrix=True, window=0):
        pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}:16") | dict.fromkeys(("m_ptr", "l_ptr", "o_ptr"), "*fp32:16")
        strides = [f"{x}_{axis}_stride" for x in "kv" for axis in ("block", "head", "token")] + ["q_row_stride", "q_head_stride"]
        numbers = dict.fromkeys(("R", "P", "C", "limit", "table_stride"), "i32") | dict.fromkeys(strides, "i32:16")
        constants = dict(HKV=8, REPEAT=repeat, D=D, BLOCK=block, CHUNK=CHUNK, GROUPS=groups, WINDOW=window, BM=tiles.BM, BN=tiles.BN, BD=D)
        cases.append(AheadOfTime(f"paged_attention_split {dtype} {D} {repeat} {block} {window} {capabilities}", paged_attention_split_kernel,
                                 pointers | dict.fromkeys(SMALL, "*i32") | numbers | {"factor": "fp32"}, constants, tiles.num_warps, tiles.num_stages,
                                 registers=255, matrix=matrix, capabilities=capabilities, contract=False))  # fmt: skip

    for capability, tiles in TILES.items():  # blocks that hold a step's keys, and shorter ones
        add("bf16", 128, 4, 64, tiles, (capability,))
        add("bf16", 128, 7, 16, tiles, (capability,))
        add("fp16", 64, 8, 32, tiles, (capability,), groups=False)
    add("bf16", 128, 4, 64, TILES_DECODE[90], (90,), matrix=False)  # too low for wgmma
    add("bf16", 128, 7, 16, TILES_DECODE[90], (90,), matrix=False)
    add("bf16", 256, 2, 64, TILES_WIDE, tuple(TILES))
    add("bf16", 128, 4, 64, TILES[90], (90,), window=4096)
    add("fp32", 128, 4, 16, TILES_FP32, tuple(TILES), matrix=False)
    merge = dict.fromkeys(("m_ptr", "l_ptr", "o_ptr", "lse_ptr"), "*fp32:16")
    merge |= {"lens_ptr": "*i32", "out_ptr": "*bf16:16", "C": "i32", "limit": "i32"}
    constants = dict(H=32, D=128, CHUNK=CHUNK, WINDOW=0, BD=128)
    for window in (0, 4096):
        cases.append(AheadOfTime(f"paged_attention_merge {window}", paged_attention_merge_kernel, merge, constants | {"WINDOW": window}, num_warps=1,
                                 contract=False))  # fmt: skip
    return cases
