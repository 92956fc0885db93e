"""Append to a paged KV cache in Triton, with norm and rotation in front or without; the rules are those of kv_append.py.

One program per row writes all its heads.  The norm and the rotation are `rotate_heads` of rope_triton.py in the same tiles, its output the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .rope_triton import TILE, angles, angles_of, in_heads, rotate_heads, tiles_of


def kv_append_triton(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, positions: Tensor) -> None:
    R, HKV, d = k.shape
    if R == 0 or d == 0:
        return
    (k, *k_strides), (v, *v_strides) = in_heads(k), in_heads(v)
    tiles = tiles_of(HKV, HKV, max(2, d), TILE)
    with on_device_of(k):
        kv_append_kernel[(R,)](k, v, key_cache, value_cache, block_table, positions.contiguous(), block_table.shape[1], *block_table.stride(),
                               *k_strides, *v_strides, *key_cache.stride()[:3], *value_cache.stride()[:3], BLOCK_SIZE=key_cache.shape[2], HKV=HKV,
                               D=d, K_HEADS=tiles["K_HEADS"], BD=triton.next_power_of_2(d), num_warps=tiles["num_warps"])  # fmt: skip


def qkv_append_triton(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor,
                      positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> Tensor:  # fmt: skip
    (R, H, d), HKV = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if R == 0 or d == 0:
        return out
    (q, *q_strides), (k, *k_strides), (v, *v_strides), (cos, cos_stride), (sin, sin_stride) = *map(in_heads, (q, k, v)), *map(angles, (cos, sin))
    norm = q_weight is not None
    weights = (q_weight.contiguous(), k_weight.contiguous()) if norm else (cos, cos)  # pointers that are never read
    with on_device_of(q):
        qkv_append_kernel[(R,)](q, k, v, cos, sin, *weights, out, key_cache, value_cache, block_table, positions.contiguous(), block_table.shape[1],
                                *block_table.stride(), *q_strides, *k_strides, *v_strides, cos_stride, sin_stride, *key_cache.stride()[:3],
                                *value_cache.stride()[:3], eps, NORM=norm, BLOCK_SIZE=key_cache.shape[2], D=d, BD=triton.next_power_of_2(d),
                                **tiles_of(H, HKV, d, TILE))  # fmt: skip
    return out


@triton.jit
def slot_of(table_ptr, positions_ptr, row, max_blocks, table_stride, table_column_stride, BLOCK_SIZE: tl.constexpr):
    """Block (int64) and slot of the row's new token, and whether there is one."""
    position = tl.load(positions_ptr + row)
    there = (position >= 0) & (position // BLOCK_SIZE < max_blocks)
    at = table_ptr + row * table_stride + (position // BLOCK_SIZE).to(tl.int64) * table_column_stride
    return tl.load(at, mask=there, other=0).to(tl.int64), position % BLOCK_SIZE, there


@triton.jit
def copy_heads(x_ptr, head_stride, out_ptr, out_head_stride, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BD: tl.constexpr):
    lanes = tl.arange(0, BD)[None, :]
    for first in tl.static_range(0, H, HEADS):
        heads = first + tl.arange(0, HEADS)[:, None]
        mask = (heads < H) & (lanes < D)
        x = tl.load(x_ptr + heads.to(tl.int64) * head_stride + lanes, mask=mask, other=0.0)
        tl.store(out_ptr + heads.to(tl.int64) * out_head_stride + lanes, x, mask=mask)


STEP = ["max_blocks", "table_stride", "table_column_stride"]  # the table may grow: nothing of it is specialised
SMALL = ["table_ptr", "positions_ptr"]


@triton.jit(do_not_specialize=STEP, do_not_specialize_on_alignment=SMALL)
def kv_append_kernel(k_ptr, v_ptr, key_cache_ptr, value_cache_ptr, table_ptr, positions_ptr, max_blocks, table_stride, table_column_stride,
                     k_stride, k_head_stride, v_stride, v_head_stride, kc_block_stride, kc_head_stride, kc_token_stride,
                     vc_block_stride, vc_head_stride, vc_token_stride, BLOCK_SIZE: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                     K_HEADS: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block, slot, there = slot_of(table_ptr, positions_ptr, row, max_blocks, table_stride, table_column_stride, BLOCK_SIZE)
    if there:
        copy_heads(k_ptr + row * k_stride, k_head_stride, key_cache_ptr + block * kc_block_stride + slot * kc_token_stride, kc_head_stride,
                   HKV, D, K_HEADS, BD)  # fmt: skip
        copy_heads(v_ptr + row * v_stride, v_head_stride, value_cache_ptr + block * vc_block_stride + slot * vc_token_stride, vc_head_stride,
                   HKV, D, K_HEADS, BD)  # fmt: skip


@triton.jit(do_not_specialize=STEP, do_not_specialize_on_alignment=SMALL)
def qkv_append_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, key_cache_ptr, value_cache_ptr, table_ptr,
                      positions_ptr, max_blocks, table_stride, table_column_stride, q_stride, q_head_stride, k_stride, k_head_stride, v_stride,
                      v_head_stride, cos_stride, sin_stride, kc_block_stride, kc_head_stride, kc_token_stride, vc_block_stride, vc_head_stride,
                      vc_token_stride, eps, NORM: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
                      HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cos, sin = angles_of(cos_ptr + row * cos_stride, sin_ptr + row * sin_stride, False, HALF, BLOCK)
    rotate_heads(q_ptr + row * q_stride, q_head_stride, q_weight_ptr, q_out_ptr + row * (H * D), D, cos, sin, eps, NORM, H, HALF, Q_HEADS, BLOCK)
    block, slot, there = slot_of(table_ptr, positions_ptr, row, max_blocks, table_stride, table_column_stride, BLOCK_SIZE)
    if there:
        rotate_heads(k_ptr + row * k_stride, k_head_stride, k_weight_ptr, key_cache_ptr + block * kc_block_stride + slot * kc_token_stride,
                     kc_head_stride, cos, sin, eps, NORM, HKV, HALF, K_HEADS, BLOCK)  # fmt: skip
        copy_heads(v_ptr + row * v_stride, v_head_stride, value_cache_ptr + block * vc_block_stride + slot * vc_token_stride, vc_head_stride,
                   HKV, D, K_HEADS, BD)  # fmt: skip


def ahead_of_time() -> list[AheadOfTime]:
    cases = []
    for dtype, H, HKV, d, norm in (("bf16", 32, 8, 128, True), ("bf16", 14, 2, 64, False), ("fp32", 32, 8, 128, True)):
        x, tiles = f"*{dtype}:16", tiles_of(H, HKV, d, TILE)
        warps = tiles.pop("num_warps")
        caches = {f"{name}_{axis}_stride": "i32:16" for name in ("kc", "vc") for axis in ("block", "head", "token")}
        common = dict.fromkeys(("k_ptr", "v_ptr", "key_cache_ptr", "value_cache_ptr"), x) | dict.fromkeys(SMALL, "*i32") | dict.fromkeys(STEP, "i32")
        common |= caches | {f"{name}_stride": "i32:16" for name in ("k", "k_head", "v", "v_head")}
        fused = common | dict.fromkeys(("q_ptr", "cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr", "q_out_ptr"), x) | {"eps": "fp32"}
        fused |= {f"{name}_stride": "i32:16" for name in ("q", "q_head", "cos", "sin")}
        fixed = dict(BLOCK_SIZE=16, D=d, BD=d)
        cases += [
            AheadOfTime(f"kv_append {dtype} {HKV}x{d}", kv_append_kernel, common, fixed | {k: tiles[k] for k in ("HKV", "K_HEADS")}, warps),
            AheadOfTime(f"qkv_append {dtype} {H}+{HKV}x{d} norm={norm}", qkv_append_kernel, fused, fixed | tiles | {"NORM": norm}, warps),
        ]
    return cases
