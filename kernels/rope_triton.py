"""Rotary position embedding in Triton, with the QK norm in front where weights are given; the equations are those of rope.py and rmsnorm.py.

One program per token turns all its heads, queries and keys, so that the angles are loaded once; q and k are read where they lie, by strides.  The
backward without norm is the same kernel with the opposite angle.  With norm: dn = dy turned back, in fp32 and not rounded between, then the gradient
of the norm, with its rstd computed again; dweight in two levels like that of rmsnorm_triton.py, each program walking one run of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .rmsnorm_triton import rstd_of, sum_partials
from .rope import angles

# On an H200 no other tile was faster by more than 1 %.  Pairs turned at a time: 16 heads of 128, one 16-byte load of each half per thread of 4 warps
# in bf16.  The backward holds four times as many values per pair: with 8 heads it takes 96 registers, so that 5 programs run on a processor; with 16
# heads it took 168.
TILE, BWD_TILE = 1024, 512
SLABS = 660  # runs of tokens for dweight, a constant so that every device adds in the same order: 5 programs on each of 132 processors


def rope_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
                eps: float = 1e-6) -> tuple[Tensor, Tensor]:  # fmt: skip
    return RopeFunction.apply(q, k, cos, sin, q_weight, k_weight, eps)


def tiles_of(H: int, HKV: int, d: int, tile: int) -> dict[str, int]:
    """The compile-time numbers of a model: heads, half a head, and tiles of Q_HEADS x BLOCK and K_HEADS x BLOCK pairs."""
    block = triton.next_power_of_2(d // 2)
    most = max(1, tile // block)
    q_heads, k_heads = (min(triton.next_power_of_2(n), most) for n in (H, HKV))
    return dict(H=H, HKV=HKV, HALF=d // 2, Q_HEADS=q_heads, K_HEADS=k_heads, BLOCK=block, num_warps=max(1, min(4, q_heads * block * 4 // tile)))


def in_heads(x: Tensor) -> tuple[Tensor, int, int]:
    """x (T, H, d), copied only where the elements of a head are not neighbours, with the strides of tokens and heads; an axis of size 1 has none."""
    T, H, d = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, x.stride(0) if T > 1 else H * d, x.stride(1) if H > 1 else d


class RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps):
        norm = q_weight is not None
        weights = (q_weight.contiguous(), k_weight.contiguous()) if norm else ()
        ctx.save_for_backward(cos, sin, *((q, k, *weights) if norm else ()))
        ctx.eps = eps
        return rotated(q, k, cos, sin, weights, eps, inverse=False)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin, *saved = ctx.saved_tensors
        if not saved:
            return *rotated(dq, dk, cos, sin, (), ctx.eps, inverse=True), *[None] * 5
        (q, k, q_weight, k_weight), with_dweight = saved, any(ctx.needs_input_grad[4:6])
        (T, H, d), HKV = q.shape, k.shape[1]
        out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
        per_slab = max(1, triton.cdiv(T, SLABS))
        slabs = triton.cdiv(T, per_slab)
        partials = torch.empty(2, slabs if with_dweight else 0, d, dtype=torch.float32, device=q.device)
        dweights = [torch.zeros_like(w) if with_dweight else None for w in (q_weight, k_weight)]
        if q.numel() or k.numel():
            (q, *q_strides), (k, *k_strides), (dq, *dq_strides), (dk, *dk_strides) = (in_heads(x) for x in (q, k, dq, dk))
            (cos, cos_stride), (sin, sin_stride) = angles(cos), angles(sin)
            with on_device_of(q):
                rope_norm_bwd_kernel[(slabs,)](q, k, dq, dk, cos, sin, q_weight, k_weight, *out, partials, T, per_slab, slabs, *q_strides, *k_strides,
                                               *dq_strides, *dk_strides, cos_stride, sin_stride, ctx.eps, WITH_DWEIGHT=with_dweight,
                                               **tiles_of(H, HKV, d, BWD_TILE))  # fmt: skip
                if with_dweight:
                    for rows, dweight in zip(partials, dweights, strict=True):
                        sum_partials(rows, dweight)
        return *out, None, None, *dweights, None


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: tuple, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k turned by the angles, or by their opposites; normed first where there are weights."""
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    if not (q.numel() or k.numel()):
        return tuple(out)
    (q, *q_strides), (k, *k_strides), (cos, cos_stride), (sin, sin_stride) = in_heads(q), in_heads(k), angles(cos), angles(sin)
    q_weight, k_weight = weights or (cos, cos)  # pointers that are never read
    (T, H, d), HKV = q.shape, k.shape[1]
    with on_device_of(q):
        rope_fwd_kernel[(T,)](q, k, cos, sin, q_weight, k_weight, *out, *q_strides, *k_strides, cos_stride, sin_stride, eps,
                              NORM=bool(weights), INVERSE=inverse, **tiles_of(H, HKV, d, TILE))  # fmt: skip
    return tuple(out)


@triton.jit
def rope_fwd_kernel(q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
                    q_stride, q_head_stride, k_stride, k_head_stride, cos_stride, sin_stride, eps,
                    NORM: tl.constexpr, INVERSE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
                    HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = angles_of(cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, INVERSE, HALF, BLOCK)
    rotate_heads(q_ptr + token * q_stride, q_head_stride, q_weight_ptr, q_out_ptr + token * (H * HALF * 2), HALF * 2, cos, sin, eps,
                 NORM, H, HALF, Q_HEADS, BLOCK)  # fmt: skip
    rotate_heads(k_ptr + token * k_stride, k_head_stride, k_weight_ptr, k_out_ptr + token * (HKV * HALF * 2), HALF * 2, cos, sin, eps,
                 NORM, HKV, HALF, K_HEADS, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["T", "per_slab", "slabs"])
def rope_norm_bwd_kernel(q_ptr, k_ptr, dq_ptr, dk_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, dq_out_ptr, dk_out_ptr, partials_ptr,
                         T, per_slab, slabs, q_stride, q_head_stride, k_stride, k_head_stride, dq_stride, dq_head_stride, dk_stride, dk_head_stride,
                         cos_stride, sin_stride, eps, WITH_DWEIGHT: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
                         HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * per_slab
    qa, qb = tl.zeros([Q_HEADS, BLOCK], tl.float32), tl.zeros([Q_HEADS, BLOCK], tl.float32)
    ka, kb = tl.zeros([K_HEADS, BLOCK], tl.float32), tl.zeros([K_HEADS, BLOCK], tl.float32)
    for i in range(0, tl.minimum(T - start, per_slab)):
        token = start + i
        cos, sin = angles_of(cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, True, HALF, BLOCK)
        qa, qb = norm_gradient(q_ptr + token * q_stride, q_head_stride, dq_ptr + token * dq_stride, dq_head_stride, q_weight_ptr,
                               dq_out_ptr + token * (H * HALF * 2), cos, sin, eps, qa, qb, WITH_DWEIGHT, H, HALF, Q_HEADS, BLOCK)  # fmt: skip
        ka, kb = norm_gradient(k_ptr + token * k_stride, k_head_stride, dk_ptr + token * dk_stride, dk_head_stride, k_weight_ptr,
                               dk_out_ptr + token * (HKV * HALF * 2), cos, sin, eps, ka, kb, WITH_DWEIGHT, HKV, HALF, K_HEADS, BLOCK)  # fmt: skip
    if WITH_DWEIGHT:
        lanes = tl.arange(0, BLOCK)
        slab = tl.program_id(0).to(tl.int64)
        q_row, k_row = partials_ptr + slab * (HALF * 2) + lanes, partials_ptr + (slabs + slab) * (HALF * 2) + lanes
        tl.store(q_row, tl.sum(qa, 0), mask=lanes < HALF)
        tl.store(q_row + HALF, tl.sum(qb, 0), mask=lanes < HALF)
        tl.store(k_row, tl.sum(ka, 0), mask=lanes < HALF)
        tl.store(k_row + HALF, tl.sum(kb, 0), mask=lanes < HALF)


@triton.jit
def angles_of(cos_ptr, sin_ptr, INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin (1, BLOCK) of one token in fp32; of the opposite angle if INVERSE."""
    lanes = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def rotate_heads(x_ptr, head_stride, weight_ptr, out_ptr, out_head_stride, cos, sin, eps, NORM: tl.constexpr, H: tl.constexpr,
                 HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Norm and turn the H heads of one token, HEADS at a time."""
    lanes = tl.arange(0, BLOCK)[None, :]
    for first in tl.static_range(0, H, HEADS):
        heads = first + tl.arange(0, HEADS)[:, None]
        mask = (heads < H) & (lanes < HALF)
        at = x_ptr + heads.to(tl.int64) * head_stride + lanes
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            rstd = rstd_of(tl.sum(a * a + b * b, 1), 2 * HALF, eps)[:, None]
            wa = tl.load(weight_ptr + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)
            wb = tl.load(weight_ptr + HALF + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)
            # rounded as rmsnorm rounds its result
            a = (a * rstd * wa).to(out_ptr.dtype.element_ty).to(tl.float32)
            b = (b * rstd * wb).to(out_ptr.dtype.element_ty).to(tl.float32)
        out = out_ptr + heads * out_head_stride + lanes
        tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_gradient(x_ptr, head_stride, dy_ptr, dy_head_stride, weight_ptr, out_ptr, cos, sin, eps, dwa, dwb, WITH_DWEIGHT: tl.constexpr,
                  H: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dx of one token's H heads, stored, and its part of dweight added to dwa, dwb (HEADS, BLOCK)."""
    lanes = tl.arange(0, BLOCK)[None, :]
    wa = tl.load(weight_ptr + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)
    wb = tl.load(weight_ptr + HALF + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)
    for first in tl.static_range(0, H, HEADS):
        heads = first + tl.arange(0, HEADS)[:, None]
        mask = (heads < H) & (lanes < HALF)
        at, dy_at = x_ptr + heads.to(tl.int64) * head_stride + lanes, dy_ptr + heads.to(tl.int64) * dy_head_stride + lanes
        na = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        nb = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
        db = tl.load(dy_at + HALF, mask=mask, other=0.0).to(tl.float32)
        rstd = rstd_of(tl.sum(na * na + nb * nb, 1), 2 * HALF, eps)[:, None]
        na, nb = na * rstd, nb * rstd
        ga, gb = da * cos - db * sin, db * cos + da * sin
        if WITH_DWEIGHT:
            dwa += ga * na
            dwb += gb * nb
        ga, gb = ga * wa, gb * wb
        dot = (tl.sum(ga * na + gb * nb, 1) / (2 * HALF))[:, None]
        out = out_ptr + heads * (HALF * 2) + lanes
        tl.store(out, ((ga - na * dot) * rstd).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, ((gb - nb * dot) * rstd).to(out_ptr.dtype.element_ty), mask=mask)
    return dwa, dwb


def ahead_of_time() -> list[AheadOfTime]:
    cases = []
    for dtype, H, HKV, d in (("bf16", 32, 8, 128), ("fp32", 32, 8, 128), ("bf16", 14, 2, 64)):
        x, tiles, bwd_tiles = f"*{dtype}:16", tiles_of(H, HKV, d, TILE), tiles_of(H, HKV, d, BWD_TILE)
        warps, bwd_warps = tiles.pop("num_warps"), bwd_tiles.pop("num_warps")
        both = {name: x for name in ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr")} | {"eps": "fp32"}
        both |= {f"{name}_stride": "i32:16" for name in ("q", "q_head", "k", "k_head", "cos", "sin")}
        fwd = both | {"q_out_ptr": x, "k_out_ptr": x}
        bwd = both | {name: x for name in ("dq_ptr", "dk_ptr", "dq_out_ptr", "dk_out_ptr")} | {"partials_ptr": "*fp32:16"}
        bwd |= {name: "i32" for name in ("T", "per_slab", "slabs")}
        bwd |= {f"{name}_stride": "i32:16" for name in ("dq", "dq_head", "dk", "dk_head")}
        name = f"{dtype} {H}+{HKV}x{d}"
        cases += [AheadOfTime(f"rope_fwd {name} norm={norm}", rope_fwd_kernel, fwd, tiles | {"NORM": norm, "INVERSE": False}, warps)
                  for norm in (True, False)]  # fmt: skip
        cases.append(AheadOfTime(f"rope_norm_bwd {name}", rope_norm_bwd_kernel, bwd, bwd_tiles | {"WITH_DWEIGHT": True}, bwd_warps, registers=128))
    return cases
