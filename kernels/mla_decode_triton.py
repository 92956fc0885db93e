"""Absorbed decode of multi-head latent attention in Triton; the equation and the layout of the cache are in mla_decode.py.

Two launches, as in paged_attention_triton.py, whose second one, `paged_attention_merge_kernel`, serves here too. `mla_decode_split_kernel` runs a
program per chunk, row and tile of BM queries.  A tile of the latent is read once and is both operands: keys for the scores, together with the rotated
part, and values for the sum.

The products are turned: scores are (keys, queries) and sums (rank, queries), so what fills the 64 rows of a Hopper product is the cache, and queries
are its columns: 16 of them, a row's heads, cost a quarter of 64.  Columns do not meet, in a product or in a maximum or a sum over keys: a query has
the same bits in a tile of 16 and in one of 64, alone or beside the queries of other rows.  In a chunk that lies wholly in a group's prefix the tile
holds the heads of BM / H rows of the group; every so many rows of the group one has a program that works, and the others leave at once.

Before the products were turned, on an H200: 128 rows of 8,192 tokens 1.37 ms with 128 heads (products: 0.37) and 0.40 with 16 (bytes: 0.29).  This
form has never run on a GPU.  What shared memory has to give per 64 keys: 3,300 cycles at 64 queries, 2,240 at 16, of which bandwidth hides 3,970.  So
predicted: 16 heads 0.31 ms; 128 rows in groups of 16 that share 8,192 tokens and have 1,024 of their own 0.10 ms (bytes 0.065, goal 0.09), for which
unshared rows take 0.35.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, entry_for, on_device_of
from .mla_decode import CHUNK
from .paged_attention_triton import Tiles, group_of, paged_attention_merge_kernel

# BM queries.  The sum of values is rank x BM in fp32: 512 x 64 are 128 registers of each of 256 threads.  Of one card all tiles have the same keys
# per step, and their warps lie along the keys: on both rests the order of sums.
TILES = {80: Tiles(32, 32, 8, 2), 90: Tiles(64, 64, 8, 2), 100: Tiles(64, 32, 8, 2)}
FEW = {80: 16, 90: 16, 100: 64}  # queries of a tile where a row has no more heads, and shares nothing; sm_100 would arrange the warps of 16 otherwise
TILES_FP32 = Tiles(16, 16, 4, 1)  # exact fp32 products, no tensor cores
TILES_INTERPRETER = Tiles(16, 64, 4, 1)


def tiles_of(q: Tensor, grouped: bool) -> Tiles:
    if not q.is_cuda:
        return TILES_INTERPRETER
    if q.dtype == torch.float32:
        return TILES_FP32
    tiles, few = entry_for(TILES, q.device), entry_for(FEW, q.device)
    return tiles if grouped or q.shape[1] > few else tiles._replace(BM=few)


def mla_decode_triton(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, rank: int, scale: float,
                      group_offsets: Tensor | None, prefix_lens: Tensor | None, limit: int) -> Tensor:  # fmt: skip
    (R, H, d), device, C = q.shape, q.device, triton.cdiv(limit, CHUNK)
    q = q if q.stride(2) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    out, lse = torch.empty(R, H, rank, dtype=q.dtype, device=device), torch.empty(R, H, dtype=torch.float32, device=device)
    if R == 0:
        return out
    m, l = torch.empty(2, R, H, C, dtype=torch.float32, device=device)
    o = torch.empty(R, H, C, rank, dtype=torch.float32, device=device)
    seq_lens, grouped = seq_lens.contiguous(), group_offsets is not None and prefix_lens.numel() > 0
    offsets, prefixes = (group_offsets.contiguous(), prefix_lens.contiguous()) if grouped else (seq_lens, seq_lens)
    tiles = tiles_of(q, grouped)
    with on_device_of(q):
        if C:
            mla_decode_split_kernel[(C * R * triton.cdiv(H, tiles.BM),)](
                q, key_cache, block_table, seq_lens, offsets, prefixes, m, l, o, R, prefixes.numel(), C, limit, block_table.stride(0), q.stride(0),
                q.stride(1), key_cache.stride(0), key_cache.stride(2), scale * 1.4426950408889634, H=H, RANK=rank, ROTATED=d - rank,
                BLOCK=key_cache.shape[2], CHUNK=CHUNK, GROUPS=grouped, BM=tiles.BM, BN=tiles.BN, BRANK=max(16, triton.next_power_of_2(rank)),
                BROT=max(16, triton.next_power_of_2(max(1, d - rank))), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
                enable_fp_fusion=False)  # fmt: skip
        paged_attention_merge_kernel[(R * H,)](m, l, o, seq_lens, out, lse, C, limit, H=H, D=rank, CHUNK=CHUNK, WINDOW=0,
                                               BD=max(16, triton.next_power_of_2(rank)), num_warps=1, enable_fp_fusion=False)  # fmt: skip
    return out


SMALL = ["table_ptr", "lens_ptr", "offsets_ptr", "prefixes_ptr"]


@triton.jit(do_not_specialize=["R", "P", "C", "limit", "table_stride"], do_not_specialize_on_alignment=SMALL)
def mla_decode_split_kernel(q_ptr, cache_ptr, table_ptr, lens_ptr, offsets_ptr, prefixes_ptr, m_ptr, l_ptr, o_ptr, R, P, C, limit, table_stride,
                            q_row_stride, q_head_stride, block_stride, token_stride, factor, H: tl.constexpr, RANK: tl.constexpr,
                            ROTATED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr,
                            BN: tl.constexpr, BRANK: tl.constexpr, BROT: tl.constexpr):  # fmt: skip
    TILES: tl.constexpr = (H + BM - 1) // BM
    ROWS: tl.constexpr = BM // H if H <= BM else 1
    pid = tl.program_id(0)
    row, chunk = pid // TILES % R, pid // TILES // R
    begin = chunk * CHUNK
    rows = 1
    if GROUPS:
        first, end, prefix = group_of(offsets_ptr, prefixes_ptr, row, P)
        if begin + CHUNK <= prefix:
            rows = tl.where((row - first) % ROWS == 0, tl.minimum(ROWS, end - row), 0)
    lanes = tl.arange(0, BM)
    if TILES == 1:
        place, heads = lanes // H, lanes % H
    else:
        place, heads = lanes * 0, pid % TILES * BM + lanes
    lens = tl.minimum(tl.load(lens_ptr + row + place, mask=(place < rows) & (heads < H), other=0), limit)
    stop = tl.minimum(tl.max(lens, 0), begin + CHUNK)
    if stop <= begin:
        return
    # the table of the first row that has this chunk: an empty row's table is not read
    table_ptr += (row + tl.min(tl.where(lens > begin, place, BM), 0)).to(tl.int64) * table_stride
    there = lens > begin
    dims, turned = tl.arange(0, BRANK), tl.arange(0, BROT)
    query = (row + place).to(tl.int64) * H + heads
    q_at = q_ptr + ((row + place).to(tl.int64) * q_row_stride + heads.to(tl.int64) * q_head_stride)[:, None]
    q = tl.load(q_at + dims[None, :], mask=there[:, None] & (dims < RANK)[None, :], other=0.0)
    q_turned = tl.load(q_at + RANK + turned[None, :], mask=there[:, None] & (turned < ROTATED)[None, :], other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BRANK, BM], tl.float32)
    for start in range(begin, stop, BN):
        keys = start + tl.arange(0, BN)
        inside = keys < stop  # slots behind the end are not read: they may hold NaN, and 0 x NaN is NaN
        if BLOCK % BN == 0:
            block = tl.load(table_ptr + start // BLOCK).to(tl.int64)
        else:
            block = tl.load(table_ptr + keys // BLOCK, mask=inside, other=0).to(tl.int64)
        at = cache_ptr + (block * block_stride + keys % BLOCK * token_stride)[:, None]
        c = tl.load(at + dims[None, :], mask=inside[:, None] & (dims < RANK)[None, :], other=0.0)
        k = tl.load(at + RANK + turned[None, :], mask=inside[:, None] & (turned < ROTATED)[None, :], other=0.0)
        s = tl.dot(k, q_turned.T, tl.dot(c, q.T, input_precision="ieee"), input_precision="ieee") * factor
        s = tl.where(inside[:, None], s, float("-inf"))  # of rows that share a chunk each has all of it
        new = tl.maximum(m, tl.max(s, 0))
        p, alpha = tl.exp2(s - new[None, :]), tl.exp2(m - new)
        m, l = new, l * alpha + tl.sum(p, 0)
        acc = tl.dot(c.T, p.to(c.dtype), acc * alpha[None, :], input_precision="ieee")
    out = query * C + chunk
    tl.store(m_ptr + out, m, mask=there)
    tl.store(l_ptr + out, l, mask=there)
    tl.store(o_ptr + (out * RANK)[None, :] + dims[:, None], acc, mask=there[None, :] & (dims < RANK)[:, None])


def ahead_of_time() -> list[AheadOfTime]:
    pointers = {"q_ptr": "*bf16:16", "cache_ptr": "*bf16:16", "m_ptr": "*fp32:16", "l_ptr": "*fp32:16", "o_ptr": "*fp32:16"}
    pointers |= dict.fromkeys(SMALL, "*i32")
    numbers = dict.fromkeys(("R", "P", "C", "limit", "table_stride"), "i32")
    numbers |= dict.fromkeys(("q_row_stride", "q_head_stride", "block_stride", "token_stride"), "i32:16")
    cases = []
    for capability, tiles in TILES.items():
        for H, BM, groups in ((128, tiles.BM, False), (16, FEW[capability], False), (16, tiles.BM, True)):
            constants = dict(H=H, RANK=512, ROTATED=64, BLOCK=64, CHUNK=CHUNK, GROUPS=groups, BM=BM, BN=tiles.BN, BRANK=512, BROT=64)
            # stack: on sm_90 a tile of 64 has a few values too many that do not change in the loop, which reads four of them per 64 keys
            cases.append(AheadOfTime(f"mla_decode_split {H} heads{' in groups' * groups} {capability}", mla_decode_split_kernel,
                                     pointers | numbers | {"factor": "fp32"}, constants, tiles.num_warps, tiles.num_stages, registers=255, stack=64,
                                     matrix=True, capabilities=(capability,), contract=False))  # fmt: skip
    return cases
