"""Log-probs from logits in Triton; the equations are those of logprob.py.

Forward: one program per row reads it once, in blocks, and keeps the running maximum m of the raw logits, S = sum exp((x - m) / temperature) and
U = sum (x - m) exp((x - m) / temperature); a new maximum rescales both.  Then, with x the raw logit,
    logp = (x_target - m) / temperature - log S        H = log S - U / (S temperature)
Everything is relative to m, so neither a large common offset nor a small temperature costs digits.  m and S are saved, not their sum m + log S, which
would round at the size of m.  Backward: one read and one write, dx = dlogp / temperature (onehot - exp((x - m) / temperature) / S); a row whose
upstream gradient is 0 is written without being read.  With a support, a token that was not kept counts as -inf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of

BLOCK, WARPS = 4096, 8  # logits per step, 16 per thread; the fastest of seven on an H200
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: a finite start for the maximum, since -inf minus -inf is NaN


def logprob_triton(logits: Tensor, targets: Tensor, temperature: float, support: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    if support is not None:
        support = support[0].detach().float().contiguous(), support[1].contiguous()
    return LogprobFunction.apply(logits, targets.contiguous(), temperature, support)


def block_of(V: int) -> int:
    return min(BLOCK, max(16, triton.next_power_of_2(V)))


class LogprobFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, support):
        T, V = logits.shape
        logps, entropy, m, S = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(4))
        if T:
            with on_device_of(logits):
                logprob_fwd_kernel[(T,)](logits, targets, *(support or (m, targets)), logps, entropy, m, S, V, logits.stride(0), 1 / temperature,
                                         SUPPORT=support is not None, BLOCK=block_of(V), num_warps=WARPS)  # fmt: skip
        ctx.save_for_backward(logits, targets, m, S, *(support or ()))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, dlogps, _):
        logits, targets, m, S, *support = ctx.saved_tensors
        T, V = logits.shape
        dlogits = torch.empty(T, V, dtype=logits.dtype, device=logits.device)
        if T:
            with on_device_of(logits):
                logprob_bwd_kernel[(T,)](logits, targets, *(support or (m, targets)), dlogps.contiguous(), m, S, dlogits, V,
                                         logits.stride(0), dlogits.stride(0), 1 / ctx.temperature, SUPPORT=bool(support),
                                         BLOCK=block_of(V), num_warps=WARPS)  # fmt: skip
        return dlogits, None, None, None


# V and the strides belong to a model, so specialising on their divisibility by 16 costs one compilation and lets the loads be 16 bytes wide.  The
# small tensors may be slices that start anywhere: their alignment is not specialised, as it would compile anew.
SMALL = ["targets_ptr", "thresholds_ptr", "last_kept_ptr", "logps_ptr", "entropy_ptr", "dlogps_ptr", "m_ptr", "S_ptr"]


@triton.jit(do_not_specialize_on_alignment=SMALL)
def logprob_fwd_kernel(logits_ptr, targets_ptr, thresholds_ptr, last_kept_ptr, logps_ptr, entropy_ptr, m_ptr, S_ptr, V, stride, inv_temperature,
                       SUPPORT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    m = tl.full([1], LOWEST, tl.float32)
    S, U = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)  # per lane, so that a block costs one reduction and not three
    target = tl.load(targets_ptr + row)
    if SUPPORT:
        threshold, last_kept = tl.load(thresholds_ptr + row), tl.load(last_kept_ptr + row)
    for i in range(0, V, BLOCK):
        x = tl.load(x_ptr + i + lanes, mask=i + lanes < V, other=float("-inf")).to(tl.float32)
        if SUPPORT:
            x = kept_logits(x, i + lanes, target, threshold, last_kept)
        new = tl.maximum(m, tl.max(x, 0))
        S, U = rescaled(S, U, m, new, inv_temperature)
        e, de = exponentials(x, new, inv_temperature)
        S, U, m = S + e, U + de, new
    valid = (target >= 0) & (target < V)
    x_target = tl.load(x_ptr + tl.where(valid, target, 0), mask=valid, other=0.0).to(tl.float32)
    logp, entropy, m, S = finished(x_target, m, tl.sum(S, 0), tl.sum(U, 0), inv_temperature)
    one = tl.arange(0, 1)
    tl.store(logps_ptr + row + one, tl.where(valid, logp, 0.0))
    tl.store(entropy_ptr + row + one, entropy)
    tl.store(m_ptr + row + one, m)
    tl.store(S_ptr + row + one, S)


@triton.jit(do_not_specialize_on_alignment=SMALL)
def logprob_bwd_kernel(logits_ptr, targets_ptr, thresholds_ptr, last_kept_ptr, dlogps_ptr, m_ptr, S_ptr, dlogits_ptr, V, stride, dstride,
                       inv_temperature, SUPPORT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr, dx_ptr = logits_ptr + row * stride, dlogits_ptr + row * dstride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    m, S = tl.load(m_ptr + row), tl.load(S_ptr + row)
    if SUPPORT:
        threshold, last_kept = tl.load(thresholds_ptr + row), tl.load(last_kept_ptr + row)
    # m is -inf where the row forbids everything
    coef = tl.where((target >= 0) & (target < V) & (m != float("-inf")), tl.load(dlogps_ptr + row) * inv_temperature, 0.0)
    if coef == 0:
        for i in range(0, V, BLOCK):
            tl.store(dx_ptr + i + lanes, tl.zeros([BLOCK], dlogits_ptr.dtype.element_ty), mask=i + lanes < V)
    else:
        for i in range(0, V, BLOCK):
            x = tl.load(x_ptr + i + lanes, mask=i + lanes < V, other=float("-inf")).to(tl.float32)
            if SUPPORT:
                x = kept_logits(x, i + lanes, target, threshold, last_kept)
            dx = coef * (tl.where(i + lanes == target, 1.0, 0.0) - tl.exp2((x - m) * (inv_temperature * LOG2E)) / S)
            tl.store(dx_ptr + i + lanes, dx.to(dlogits_ptr.dtype.element_ty), mask=i + lanes < V)


@triton.jit
def kept_logits(x, v, target, threshold, last_kept):
    """x with -inf for what the sampler did not keep.  Written so that a NaN counts as kept: it must show in the result."""
    return tl.where(((x < threshold) | ((x == threshold) & (v > last_kept))) & (v != target), float("-inf"), x)


# The running softmax, shared with linear_logprob_triton.py.  x, m, new are raw logits; the shapes broadcast.
@triton.jit
def exponentials(x, m, inv_temperature):
    """e = exp((x - m) / temperature) and (x - m) e, both 0 where x is -inf."""
    d = x - m
    e = tl.exp2(d * (inv_temperature * LOG2E))
    return e, tl.where(e == 0, 0.0, d * e)


@triton.jit
def rescaled(S, U, m, new, inv_temperature):
    """S and U relative to `new` instead of m <= new."""
    shift = tl.maximum(m - new, -1e38)  # the first block's is LOWEST - new, which may overflow, and inf * 0 is NaN
    factor = tl.exp2(shift * (inv_temperature * LOG2E))
    return S * factor, U * factor + (shift * factor) * S


@triton.jit
def finished(x_target, m, S, U, inv_temperature):
    """logp, entropy, and m and S as they are saved: -inf and 1 where the whole row is -inf."""
    nothing = S == 0
    S = tl.where(nothing, 1.0, S)
    log_S = tl.log(S)
    return (x_target - m) * inv_temperature - log_S, log_S - U / S * inv_temperature, tl.where(nothing, float("-inf"), m), S


def ahead_of_time() -> list[AheadOfTime]:
    rows = {"targets_ptr": "*i64", "thresholds_ptr": "*fp32", "last_kept_ptr": "*i64", "m_ptr": "*fp32", "S_ptr": "*fp32", "V": "i32:16",
            "inv_temperature": "fp32"}  # fmt: skip
    cases = []
    for dtype, support in (("bf16", False), ("fp32", False), ("bf16", True)):
        fwd = rows | {"logits_ptr": f"*{dtype}:16", "logps_ptr": "*fp32", "entropy_ptr": "*fp32", "stride": "i32:16"}
        bwd = rows | {"logits_ptr": f"*{dtype}:16", "dlogps_ptr": "*fp32", "dlogits_ptr": f"*{dtype}:16", "stride": "i32:16", "dstride": "i32:16"}
        constants, name = {"BLOCK": BLOCK, "SUPPORT": support}, dtype + " support" * support
        cases += [AheadOfTime(f"logprob_fwd {name}", logprob_fwd_kernel, fwd, constants, WARPS),
                  AheadOfTime(f"logprob_bwd {name}", logprob_bwd_kernel, bwd, constants, WARPS)]  # fmt: skip
    return cases
