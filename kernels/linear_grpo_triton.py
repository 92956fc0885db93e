"""From logits and coefficients to the gradient of the logits, in Triton: the last step before the gradient GEMMs of linear_grpo.py.

Program j writes row j of the output from row `rows[j]` of the logits: rows without gradient are left out by not being listed, and the gradient
GEMMs then run on a dense matrix.  The output may be the logits themselves when no row moves.  Log-probs and coefficients come from
logits_grpo_triton.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of

BLOCK, WARPS = 4096, 8  # logits per step, 16 per thread.  Not measured on a GPU yet
LOG2E = tl.constexpr(1.4426950408889634)


def block_of(V: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(V)))


def dlogits_triton(logits: Tensor, targets: Tensor, m: Tensor, S: Tensor, coefs: Tensor, temperature: float, out: Tensor, rows=None) -> None:
    V = logits.shape[1]
    if out.shape[0] == 0:
        return
    with on_device_of(logits):
        dlogits_kernel[(out.shape[0],)](
            logits, targets.contiguous(), m.contiguous(), S.contiguous(), coefs.contiguous(), targets if rows is None else rows, out, V,
            logits.stride(0), out.stride(0), 1 / temperature, LISTED=rows is not None, BLOCK=block_of(V, BLOCK), num_warps=WARPS)  # fmt: skip


# V and the strides belong to a model, so specialising on their divisibility by 16 costs one compilation and lets the loads be 16 bytes wide
@triton.jit(do_not_specialize_on_alignment=["targets_ptr", "m_ptr", "S_ptr", "coefs_ptr", "rows_ptr"])
def dlogits_kernel(logits_ptr, targets_ptr, m_ptr, S_ptr, coefs_ptr, rows_ptr, out_ptr, V, stride, out_stride, inv_temperature,
                   LISTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    row = j
    if LISTED:
        row = tl.load(rows_ptr + j)
    coef = tl.load(coefs_ptr + row) * inv_temperature
    write_gradient(logits_ptr + row * stride, out_ptr + j * out_stride, coef, tl.load(targets_ptr + row), tl.load(m_ptr + row), tl.load(S_ptr + row),
                   V, inv_temperature, BLOCK)  # fmt: skip


@triton.jit
def write_gradient(x_ptr, out_ptr, coef, target, m, S, V, inv_temperature, BLOCK: tl.constexpr):
    """out = coef (onehot - exp((x - m) / temperature) / S) for one row; zeros, without reading x, where coef is 0.  out may be x."""
    lanes = tl.arange(0, BLOCK)
    if coef == 0:
        for i in range(0, V, BLOCK):
            tl.store(out_ptr + i + lanes, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=i + lanes < V)
    else:
        blocks = tl.cdiv(V, BLOCK)
        for k in range(0, blocks):  # from the end, where a row that was just read is still in cache
            i = (blocks - 1 - k) * BLOCK
            x = tl.load(x_ptr + i + lanes, mask=i + lanes < V, other=float("-inf")).to(tl.float32)
            dx = coef * (tl.where(i + lanes == target, 1.0, 0.0) - tl.exp2((x - m) * (inv_temperature * LOG2E)) / S)
            tl.store(out_ptr + i + lanes, dx.to(out_ptr.dtype.element_ty), mask=i + lanes < V)


def ahead_of_time() -> list[AheadOfTime]:
    rows = {"targets_ptr": "*i64", "m_ptr": "*fp32", "S_ptr": "*fp32", "coefs_ptr": "*fp32", "rows_ptr": "*i64", "inv_temperature": "fp32"}
    sizes = {"V": "i32:16", "stride": "i32:16", "out_stride": "i32:16"}
    return [AheadOfTime(f"linear_grpo dlogits {source} to {to} {listed}", dlogits_kernel,
                        rows | sizes | {"logits_ptr": f"*{source}:16", "out_ptr": f"*{to}:16"}, {"LISTED": listed, "BLOCK": BLOCK}, WARPS)
            for source, to, listed in (("fp32", "bf16", True), ("fp32", "fp32", False), ("bf16", "bf16", False))]  # fmt: skip
