"""Absorbed decode of multi-head latent attention in Triton; the equation and the layout of the cache are in mla_decode.py.

Two launches, as in paged_attention_triton.py, whose second one, `paged_attention_merge_kernel`, serves here too. `mla_decode_split_kernel` runs a
program per chunk, row and tile of BM heads. A tile of the latent is read once and is both operands: keys for the scores, together with the rotated
part, and values for the sum.  Left out: sharing the prefix of a group among its rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, entry_for, on_device_of
from .paged_attention_triton import Tiles, paged_attention_merge_kernel

# Tokens, from token 0.  Longer than paged_attention's 256: a partial is rank x H floats, 262 KB at 128 heads, and 256 rows of the cache are 295 KB
CHUNK = 2048
# On an H200 128 rows of 8,192 tokens take 1.37 ms with 128 heads (products: 0.37) and 0.40 with 16 (bytes: 0.29).  The sum of values is BM x rank
# in fp32: 64 x 512 are 128 registers of each of 256 threads.
TILES = {80: Tiles(16, 32, 4, 2), 90: Tiles(64, 64, 8, 2), 100: Tiles(64, 32, 8, 2)}
TILES_FEW = Tiles(16, 32, 4, 2)  # 16 heads and fewer
TILES_FP32 = Tiles(16, 16, 4, 1)  # exact fp32 products, no tensor cores
TILES_INTERPRETER = Tiles(16, 64, 4, 1)


def tiles_of(q: Tensor) -> Tiles:
    if not q.is_cuda:
        return TILES_INTERPRETER
    if q.dtype == torch.float32:
        return TILES_FP32
    if q.shape[1] <= 16:
        return TILES_FEW
    return entry_for(TILES, q.device)


def mla_decode_triton(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, rank: int, scale: float,
                      limit: int) -> Tensor:  # fmt: skip
    (R, H, d), device, C = q.shape, q.device, triton.cdiv(limit, CHUNK)
    q = q if q.stride(2) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    out, lse = torch.empty(R, H, rank, dtype=q.dtype, device=device), torch.empty(R, H, dtype=torch.float32, device=device)
    if R == 0:
        return out
    m, l = torch.empty(2, R, H, C, dtype=torch.float32, device=device)
    o = torch.empty(R, H, C, rank, dtype=torch.float32, device=device)
    seq_lens, tiles = seq_lens.contiguous(), tiles_of(q)
    with on_device_of(q):
        if C:
            mla_decode_split_kernel[(C * R * triton.cdiv(H, tiles.BM),)](
                q, key_cache, block_table, seq_lens, m, l, o, R, C, limit, block_table.stride(0), q.stride(0), q.stride(1), key_cache.stride(0),
                key_cache.stride(2), scale * 1.4426950408889634, H=H, RANK=rank, ROTATED=d - rank, BLOCK=key_cache.shape[2], CHUNK=CHUNK,
                BM=tiles.BM, BN=tiles.BN, BRANK=max(16, triton.next_power_of_2(rank)), BROT=max(16, triton.next_power_of_2(max(1, d - rank))),
                num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False)  # fmt: skip
        paged_attention_merge_kernel[(R * H,)](m, l, o, seq_lens, out, lse, C, limit, H=H, D=rank, CHUNK=CHUNK,
                                               BD=max(16, triton.next_power_of_2(rank)), num_warps=1, enable_fp_fusion=False)  # fmt: skip
    return out


SMALL = ["table_ptr", "lens_ptr"]


@triton.jit(do_not_specialize=["R", "C", "limit", "table_stride"], do_not_specialize_on_alignment=SMALL)
def mla_decode_split_kernel(q_ptr, cache_ptr, table_ptr, lens_ptr, m_ptr, l_ptr, o_ptr, R, C, limit, table_stride, q_row_stride, q_head_stride,
                            block_stride, token_stride, factor, H: tl.constexpr, RANK: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr,
                            CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BRANK: tl.constexpr, BROT: tl.constexpr):  # fmt: skip
    TILES: tl.constexpr = (H + BM - 1) // BM
    pid = tl.program_id(0)
    row, chunk = (pid // TILES % R).to(tl.int64), pid // TILES // R
    heads = pid % TILES * BM + tl.arange(0, BM)
    begin = chunk * CHUNK
    stop = tl.minimum(tl.minimum(tl.load(lens_ptr + row), limit), begin + CHUNK)
    if stop <= begin:
        return
    dims, turned = tl.arange(0, BRANK), tl.arange(0, BROT)
    q_at = q_ptr + row * q_row_stride + heads[:, None].to(tl.int64) * q_head_stride
    q = tl.load(q_at + dims[None, :], mask=(heads < H)[:, None] & (dims < RANK)[None, :], other=0.0)
    q_turned = tl.load(q_at + RANK + turned[None, :], mask=(heads < H)[:, None] & (turned < ROTATED)[None, :], other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BRANK], tl.float32)
    for start in range(begin, stop, BN):
        keys = start + tl.arange(0, BN)
        inside = keys < stop  # slots behind the end are not read: they may hold NaN, and 0 x NaN is NaN
        block = tl.load(table_ptr + row * table_stride + keys // BLOCK, mask=inside, other=0).to(tl.int64)
        at = cache_ptr + (block * block_stride + keys % BLOCK * token_stride)[:, None]
        c = tl.load(at + dims[None, :], mask=inside[:, None] & (dims < RANK)[None, :], other=0.0)
        k = tl.load(at + RANK + turned[None, :], mask=inside[:, None] & (turned < ROTATED)[None, :], other=0.0)
        s = tl.dot(q_turned, k.T, tl.dot(q, c.T, input_precision="ieee"), input_precision="ieee") * factor
        s = tl.where(inside[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p, alpha = tl.exp2(s - new[:, None]), tl.exp2(m - new)
        m, l = new, l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision="ieee")
    out = (row * H + heads) * C + chunk
    tl.store(m_ptr + out, m, mask=heads < H)
    tl.store(l_ptr + out, l, mask=heads < H)
    tl.store(o_ptr + (out * RANK)[:, None] + dims[None, :], acc, mask=(heads < H)[:, None] & (dims < RANK)[None, :])


def ahead_of_time() -> list[AheadOfTime]:
    pointers = {"q_ptr": "*bf16:16", "cache_ptr": "*bf16:16", "table_ptr": "*i32", "lens_ptr": "*i32", "m_ptr": "*fp32:16", "l_ptr": "*fp32:16",
                "o_ptr": "*fp32:16"}  # fmt: skip
    numbers = dict.fromkeys(("R", "C", "limit", "table_stride"), "i32") | dict.fromkeys(("q_row_stride", "q_head_stride", "block_stride",
                                                                                        "token_stride"), "i32:16")  # fmt: skip
    cases = []
    for H, capability, tiles in [*((128, c, t) for c, t in TILES.items()), *((16, c, TILES_FEW) for c in TILES)]:
        constants = dict(H=H, RANK=512, ROTATED=64, BLOCK=64, CHUNK=CHUNK, BM=tiles.BM, BN=tiles.BN, BRANK=512, BROT=64)
        cases.append(AheadOfTime(f"mla_decode_split {H} {capability}", mla_decode_split_kernel, pointers | numbers | {"factor": "fp32"}, constants,
                                 tiles.num_warps, tiles.num_stages, registers=255, capabilities=(capability,), contract=False))  # fmt: skip
    return cases
