"""Root-mean-square norm in Triton, with the residual addition in front; the equations are those of rmsnorm.py.

A row of up to ONE_PASS elements stays in registers: read once, written once.  A program takes a tile of ROWS x BLOCK whose shape and number of warps
follow from D alone, so the bits of a row depend neither on the number of rows nor on where it stands.  Longer rows are walked twice.

Backward: dx in one pass.  dweight in two levels without atomics: the rows are cut into at most SLABS runs, a constant and not a property of the
device at hand; one program walks a run and keeps its sum of dy * n in registers, then `sum_partials_kernel` adds the runs in index order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .rmsnorm import in_rows

# On an H200 no other tile or number of runs was faster by more than 1 %.  Sizes from registers per thread (16 elements of a row each) and from the
# bytes in flight that fill the memory bus.
ONE_PASS = 8192  # elements of a row kept in registers
TILE = 2048  # elements per program where rows are shorter than that
LOOP_BLOCK = 4096  # elements per step of a row that is walked
# Runs of rows for dweight, for short and for long rows: 6 and 3 programs on each of 132 processors, as many as their registers let run at once.
SLABS, LONG_SLABS = 792, 396
PARTIAL_ROWS, PARTIAL_COLUMNS = 64, 32  # tile in which the runs are added


def rmsnorm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return RMSNormFunction.apply(x, weight, eps, residual)


def tile_of(D: int) -> tuple[int, int, int]:
    """ROWS, BLOCK and warps for rows of D elements; BLOCK < D where the row is walked."""
    block = min(max(16, triton.next_power_of_2(D)), LOOP_BLOCK if D > ONE_PASS else ONE_PASS)
    rows = max(1, TILE // block)
    return rows, block, 4 if rows * block <= 2048 else 8


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        ctx.set_materialize_grads(False)
        D, weight = x.shape[-1], weight.contiguous()
        y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        s = x if residual is None else torch.empty_like(y)
        ROWS, BLOCK, warps = tile_of(D)
        if x.numel():
            x, *x_rows = in_rows(x)
            other, *other_rows = (x, *x_rows) if residual is None else in_rows(residual)
            N, tensors = rstd.numel(), (x, other, weight, s, y, rstd)
            flags = dict(HAS_RESIDUAL=residual is not None, BLOCK=BLOCK, num_warps=warps)
            with on_device_of(x):
                if BLOCK < D:
                    rmsnorm_long_fwd_kernel[(N,)](*tensors, D, *x_rows, *other_rows, eps, **flags)
                else:
                    rmsnorm_fwd_kernel[(triton.cdiv(N, ROWS),)](*tensors, N, D, *x_rows, *other_rows, eps, ROWS=ROWS, **flags)
        ctx.save_for_backward(s, weight, rstd)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight, rstd = ctx.saved_tensors
        if dy is None:
            return ds, None, None, ds
        D, N = s.shape[-1], rstd.numel()
        dx, with_dweight = torch.empty(s.shape, dtype=s.dtype, device=s.device), ctx.needs_input_grad[1]
        if s.numel() == 0:
            return dx, torch.zeros_like(weight) if with_dweight else None, None, dx if ctx.needs_input_grad[3] else None
        ROWS, BLOCK, warps = tile_of(D)
        s, *s_rows = in_rows(s)
        dy, *dy_rows = in_rows(dy)
        upstream, *ds_rows = (dy, *dy_rows) if ds is None else in_rows(ds)
        tiles = triton.cdiv(N, ROWS)
        per_slab = triton.cdiv(tiles, SLABS if ROWS * BLOCK <= TILE else LONG_SLABS)
        slabs = triton.cdiv(tiles, per_slab)
        partials = torch.empty(slabs if with_dweight else 0, D, dtype=torch.float32, device=s.device)
        dweight = torch.empty_like(weight) if with_dweight else None
        with on_device_of(s):
            if BLOCK < D:
                rmsnorm_long_bwd_kernel[(N,)](s, dy, upstream, weight, rstd, dx, D, *s_rows, *dy_rows, *ds_rows,
                                              HAS_DS=ds is not None, BLOCK=BLOCK, num_warps=warps)  # fmt: skip
                if with_dweight:
                    columns = triton.cdiv(D, BLOCK)
                    rmsnorm_long_dweight_kernel[(slabs * columns,)](s, dy, rstd, partials, N, per_slab, D, *s_rows, *dy_rows,
                                                                    BLOCK=BLOCK, num_warps=warps)  # fmt: skip
            else:
                rmsnorm_bwd_kernel[(slabs,)](s, dy, upstream, weight, rstd, dx, partials, N, per_slab, D, *s_rows, *dy_rows, *ds_rows,
                                             HAS_DS=ds is not None, WITH_DWEIGHT=with_dweight, ROWS=ROWS, BLOCK=BLOCK,
                                             num_warps=bwd_warps(ROWS * BLOCK))  # fmt: skip
            if with_dweight:
                sum_partials(partials, dweight)
        return dx, dweight, None, dx if ctx.needs_input_grad[3] else None


def bwd_warps(elements: int) -> int:
    """Twice the forward's for the longest rows: the running dweight and the weight take registers too."""
    return 4 if elements <= 2048 else 8 if elements <= 4096 else 16


def sum_partials(partials: Tensor, out: Tensor) -> None:
    """out (D,) = sum of the rows of partials (slabs, D) fp32 in index order, one cast at the end.  On the device of the caller's launch context."""
    slabs, D = partials.shape
    sum_partials_kernel[(triton.cdiv(D, PARTIAL_COLUMNS),)](partials, out, slabs, D, ROWS=PARTIAL_ROWS, COLUMNS=PARTIAL_COLUMNS, num_warps=4)


# The number of rows changes from step to step and is not specialised; D, strides and the number of heads belong to the model, and knowing that they
# are multiples of 16 makes the loads 16 bytes wide.
@triton.jit(do_not_specialize=["N"])
def rmsnorm_fwd_kernel(x_ptr, r_ptr, w_ptr, s_ptr, y_ptr, rstd_ptr, N, D, x_inner, x_outer_stride, x_inner_stride,
                       r_inner, r_outer_stride, r_inner_stride, eps,
                       HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    out = (rows * D)[:, None] + columns[None, :]
    x = tl.load(x_ptr + row_starts(rows, x_inner, x_outer_stride, x_inner_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(r_ptr + row_starts(rows, r_inner, r_outer_stride, r_inner_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(x.dtype)
        tl.store(s_ptr + out, x, mask=mask)
    x = x.to(tl.float32)
    rstd = rstd_of(tl.sum(x * x, 1), D, eps)
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, (x * rstd[:, None] * w[None, :]).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit
def rmsnorm_long_fwd_kernel(x_ptr, r_ptr, w_ptr, s_ptr, y_ptr, rstd_ptr, D, x_inner, x_outer_stride, x_inner_stride,
                            r_inner, r_outer_stride, r_inner_stride, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row_starts(row, x_inner, x_outer_stride, x_inner_stride)
    r_ptr += row_starts(row, r_inner, r_outer_stride, r_inner_stride)
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for i in range(0, D, BLOCK):
        x = summed(x_ptr, r_ptr, i + columns, i + columns < D, HAS_RESIDUAL).to(tl.float32)
        squares += x * x
    rstd = rstd_of(tl.sum(squares, 0), D, eps)
    for i in range(0, D, BLOCK):
        mask = i + columns < D
        # added again rather than read back from s: nothing orders a global store before another thread's load
        x = summed(x_ptr, r_ptr, i + columns, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(s_ptr + row * D + i + columns, x, mask=mask)
        w = tl.load(w_ptr + i + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + i + columns, (x.to(tl.float32) * rstd * w).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["N", "per_slab"])
def rmsnorm_bwd_kernel(s_ptr, dy_ptr, ds_ptr, w_ptr, rstd_ptr, dx_ptr, partials_ptr, N, per_slab, D, s_inner, s_outer_stride, s_inner_stride,
                       dy_inner, dy_outer_stride, dy_inner_stride, ds_inner, ds_outer_stride, ds_inner_stride,
                       HAS_DS: tl.constexpr, WITH_DWEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    slab = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, per_slab):
        rows = (slab * per_slab + i) * ROWS + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        s = tl.load(s_ptr + row_starts(rows, s_inner, s_outer_stride, s_inner_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row_starts(rows, dy_inner, dy_outer_stride, dy_inner_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
        normed, dy = s.to(tl.float32) * rstd, dy.to(tl.float32)
        if WITH_DWEIGHT:
            dweight += dy * normed
        g = dy * w[None, :]
        dx = (g - normed * (tl.sum(g * normed, 1) / D)[:, None]) * rstd
        if HAS_DS:
            ds = tl.load(ds_ptr + row_starts(rows, ds_inner, ds_outer_stride, ds_inner_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
            dx += ds.to(tl.float32)
        tl.store(dx_ptr + (rows * D)[:, None] + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WITH_DWEIGHT:
        tl.store(partials_ptr + slab * D + columns, tl.sum(dweight, 0), mask=columns < D)


@triton.jit
def rmsnorm_long_bwd_kernel(s_ptr, dy_ptr, ds_ptr, w_ptr, rstd_ptr, dx_ptr, D, s_inner, s_outer_stride, s_inner_stride,
                            dy_inner, dy_outer_stride, dy_inner_stride, ds_inner, ds_outer_stride, ds_inner_stride,
                            HAS_DS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row_starts(row, s_inner, s_outer_stride, s_inner_stride)
    dy_ptr += row_starts(row, dy_inner, dy_outer_stride, dy_inner_stride)
    ds_ptr += row_starts(row, ds_inner, ds_outer_stride, ds_inner_stride)
    columns = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros([BLOCK], tl.float32)
    for i in range(0, D, BLOCK):
        mask = i + columns < D
        normed = tl.load(s_ptr + i + columns, mask=mask, other=0.0).to(tl.float32) * rstd
        w = tl.load(w_ptr + i + columns, mask=mask, other=0.0).to(tl.float32)
        products += tl.load(dy_ptr + i + columns, mask=mask, other=0.0).to(tl.float32) * w * normed
    dot = tl.sum(products, 0) / D
    for i in range(0, D, BLOCK):
        mask = i + columns < D
        normed = tl.load(s_ptr + i + columns, mask=mask, other=0.0).to(tl.float32) * rstd
        w = tl.load(w_ptr + i + columns, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + i + columns, mask=mask, other=0.0).to(tl.float32) * w
        dx = (g - normed * dot) * rstd
        if HAS_DS:
            dx += tl.load(ds_ptr + i + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + i + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "per_slab"])
def rmsnorm_long_dweight_kernel(s_ptr, dy_ptr, rstd_ptr, partials_ptr, N, per_slab, D, s_inner, s_outer_stride, s_inner_stride,
                                dy_inner, dy_outer_stride, dy_inner_stride, BLOCK: tl.constexpr):  # fmt: skip
    pieces = tl.cdiv(D, BLOCK)
    slab = (tl.program_id(0) // pieces).to(tl.int64)
    columns = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros([BLOCK], tl.float32)
    start = slab * per_slab
    for i in range(0, tl.minimum(N - start, per_slab)):
        row = start + i
        s = tl.load(s_ptr + row_starts(row, s_inner, s_outer_stride, s_inner_stride) + columns, mask=columns < D, other=0.0)
        dy = tl.load(dy_ptr + row_starts(row, dy_inner, dy_outer_stride, dy_inner_stride) + columns, mask=columns < D, other=0.0)
        dweight += dy.to(tl.float32) * (s.to(tl.float32) * tl.load(rstd_ptr + row))
    tl.store(partials_ptr + slab * D + columns, dweight, mask=columns < D)


@triton.jit(do_not_specialize=["slabs"])
def sum_partials_kernel(partials_ptr, out_ptr, slabs, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(0, slabs, ROWS):
        rows = i + tl.arange(0, ROWS)
        mask = (rows < slabs)[:, None] & (columns < D)[None, :]
        total += tl.load(partials_ptr + (rows.to(tl.int64) * D)[:, None] + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def row_starts(rows, inner, outer_stride, inner_stride):
    """Offsets of rows (int64) from the three numbers of `in_rows`."""
    return (rows // inner) * outer_stride + (rows % inner) * inner_stride


@triton.jit
def rstd_of(squares, D, eps):
    # correctly rounded: these are one number per row, and the approximate instructions cost an ulp in every element
    return tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps))


@triton.jit
def summed(x_ptr, r_ptr, at, mask, HAS_RESIDUAL: tl.constexpr):
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
    return x


def ahead_of_time() -> list[AheadOfTime]:
    def layout(name: str, head: bool) -> dict[str, str]:
        """Strides as a launch finds them: of a matrix, where inner is 1 and so a compile-time value, or of a head slice."""
        return {f"{name}_{key}": "i32:16" for key in ("inner", "outer_stride", "inner_stride") if head or key != "inner"}

    cases = []
    for dtype, D, head in (("bf16", 4096, False), ("bf16", 8192, False), ("fp32", 4096, False), ("bf16", 128, True), ("bf16", 16384, False)):
        residual = not head
        ROWS, BLOCK, warps = tile_of(D)
        x = f"*{dtype}:16"
        fixed = {name: {} if head else {f"{name}_inner": 1} for name in ("x", "r", "s", "dy", "ds")}
        strides = {name: layout(name, head) for name in fixed}
        common = {"w_ptr": x, "rstd_ptr": "*fp32:16", "D": "i32:16"}
        fwd = common | {"x_ptr": x, "r_ptr": x, "s_ptr": x, "y_ptr": x, "eps": "fp32"} | strides["x"] | strides["r"]
        bwd = common | {"s_ptr": x, "dy_ptr": x, "ds_ptr": x, "dx_ptr": x} | strides["s"] | strides["dy"] | strides["ds"]
        slab = {"partials_ptr": "*fp32:16", "N": "i32", "per_slab": "i32"}
        row_fixed, grad_fixed = fixed["x"] | fixed["r"], fixed["s"] | fixed["dy"] | fixed["ds"]
        name = f"{dtype} {D}"
        if BLOCK < D:
            dweight = {k: v for k, v in bwd.items() if k not in ("ds_ptr", "w_ptr", "dx_ptr") and not k.startswith("ds_")} | slab
            cases += [
                AheadOfTime(f"rmsnorm_long_fwd {name}", rmsnorm_long_fwd_kernel, fwd, row_fixed | {"HAS_RESIDUAL": residual, "BLOCK": BLOCK}, warps),
                AheadOfTime(f"rmsnorm_long_bwd {name}", rmsnorm_long_bwd_kernel, bwd, grad_fixed | {"HAS_DS": residual, "BLOCK": BLOCK}, warps),
                AheadOfTime(f"rmsnorm_long_dweight {name}", rmsnorm_long_dweight_kernel, dweight,
                            fixed["s"] | fixed["dy"] | {"BLOCK": BLOCK}, warps),
            ]  # fmt: skip
            continue
        tile = {"ROWS": ROWS, "BLOCK": BLOCK}
        cases += [
            AheadOfTime(f"rmsnorm_fwd {name}", rmsnorm_fwd_kernel, fwd | {"N": "i32"}, row_fixed | {"HAS_RESIDUAL": residual} | tile, warps),
            AheadOfTime(f"rmsnorm_bwd {name}", rmsnorm_bwd_kernel, bwd | slab, grad_fixed | {"HAS_DS": residual, "WITH_DWEIGHT": True} | tile,
                        bwd_warps(ROWS * BLOCK), registers=128),
        ]  # fmt: skip
    partials = {"partials_ptr": "*fp32:16", "out_ptr": "*bf16:16", "slabs": "i32", "D": "i32:16"}
    return [*cases, AheadOfTime("sum_partials", sum_partials_kernel, partials, {"ROWS": PARTIAL_ROWS, "COLUMNS": PARTIAL_COLUMNS})]
