"""One program per row of logits in Triton: log-prob, entropy, the loss's coefficient and, where the logits are a trainer's own, the gradient.

The first read keeps a running maximum and sums as logprob_triton.py does; then logp and the loss's surrogate, KL and correction functions of
policy_loss_triton.py give coef = d loss / d logp; the second read, last block first, writes coef / temperature (onehot - p) over the logits or
beside them.  A masked row is never read.  Programs of 32 warps, of which all rows in flight fit the L2 cache, so that the second read need not go to
memory, took 3.07 ms on an H200 (T = 8192, V = 151936 in bf16), those of 8 warps 2.26 ms; csrc/cuda/logits_grpo.cu keeps the row on the chip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .group_advantage_triton import group_advantage_triton
from .linear_grpo_triton import block_of, dlogits_triton, write_gradient
from .logits_grpo import Rows, Steps, Tokens
from .logprob_triton import LOWEST, exponentials, finished, rescaled
from .policy_loss import LossVariant, run_time_numbers
from .policy_loss_triton import KLS, SURROGATES, WEIGHTS, policy_loss_triton

# Logits per step and warps: with the gradient written by the same program, and without
BLOCK, WARPS = {True: 8192, False: 4096}, {True: 8, False: 8}
PLAIN = LossVariant()


def rows_triton(logits: Tensor, tokens: Tokens, variant: LossVariant | None, temperature: float, dlogits: Tensor | None = None) -> Rows:
    T, V = logits.shape
    v, gradient = variant or PLAIN, dlogits is not None
    logps, entropy, m, S, coefs = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(5))
    given = [x.contiguous() for x in (tokens.scale, *(tokens.scale if x is None else x for x in tokens[2:]))]  # of those absent none is read
    bounds, weight_bounds = run_time_numbers(v)
    out = dlogits if gradient else logits
    if T:
        with on_device_of(logits):
            logits_grpo_kernel[(T,)](
                logits, out, tokens.targets.contiguous(), *given, logps, entropy, m, S, coefs, V, logits.stride(0), out.stride(0), 1 / temperature,
                *bounds, *weight_bounds, SURROGATE=SURROGATES[v.surrogate], KL=KLS[v.kl], WEIGHT=WEIGHTS[v.correction],
                HAS_OLD=tokens.old is not None, HAS_REF=v.kl != "none", HAS_RHO=v.correction != "none",
                SEQUENCE_WEIGHT=v.correction == "sequence_mask", COEFS=variant is not None, GRADIENT=gradient,
                BLOCK=block_of(V, BLOCK[gradient]), num_warps=WARPS[gradient])  # fmt: skip
    return Rows(logps, entropy, m, S, None if variant is None else coefs)


# the small tensors may be slices that start anywhere: their alignment is not specialised, as it would compile anew
SMALL = ["targets_ptr", "scale_ptr", "advantages_ptr", "old_ptr", "ref_ptr", "rho_ptr", "logps_ptr", "entropy_ptr", "m_ptr", "S_ptr", "coefs_ptr"]


@triton.jit(do_not_specialize_on_alignment=SMALL)
def logits_grpo_kernel(
    logits_ptr, dlogits_ptr, targets_ptr, scale_ptr, advantages_ptr, old_ptr, ref_ptr, rho_ptr, logps_ptr, entropy_ptr, m_ptr, S_ptr, coefs_ptr,
    V, stride, dstride, inv_temperature, lo, hi, cap, tau_positive, tau_negative, beta, weight_low, weight_high,
    SURROGATE: tl.constexpr, KL: tl.constexpr, WEIGHT: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_RHO: tl.constexpr,
    SEQUENCE_WEIGHT: tl.constexpr, COEFS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr, dx_ptr = logits_ptr + row * stride, dlogits_ptr + row * dstride
    scale, target = tl.load(scale_ptr + row), tl.load(targets_ptr + row)
    lanes, one = tl.arange(0, BLOCK), tl.arange(0, 1)
    zero = tl.zeros([1], tl.float32)
    if scale == 0:  # masked
        tl.store(logps_ptr + row + one, zero)
        tl.store(entropy_ptr + row + one, zero)
        tl.store(m_ptr + row + one, zero)
        tl.store(S_ptr + row + one, zero + 1.0)
        if COEFS:
            tl.store(coefs_ptr + row + one, zero)
        if GRADIENT:
            for i in range(0, V, BLOCK):
                tl.store(dx_ptr + i + lanes, tl.zeros([BLOCK], dlogits_ptr.dtype.element_ty), mask=i + lanes < V)
    else:
        m = tl.full([1], LOWEST, tl.float32)
        S, U = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(0, V, BLOCK):
            x = tl.load(x_ptr + i + lanes, mask=i + lanes < V, other=float("-inf")).to(tl.float32)
            new = tl.maximum(m, tl.max(x, 0))
            S, U = rescaled(S, U, m, new, inv_temperature)
            e, de = exponentials(x, new, inv_temperature)
            S, U, m = S + e, U + de, new
        x_target = tl.load(x_ptr + target).to(tl.float32)
        logp, entropy, m, S = finished(x_target, m, tl.sum(S, 0), tl.sum(U, 0), inv_temperature)
        S = S + zero
        tl.store(logps_ptr + row + one, logp)
        tl.store(entropy_ptr + row + one, entropy)
        tl.store(m_ptr + row + one, m)
        tl.store(S_ptr + row + one, S)
        if COEFS:
            old = logp
            if HAS_OLD:
                old = tl.load(old_ptr + row) + zero
            log_ratio = logp - old
            unclamped = tl.where((log_ratio >= -20.0) & (log_ratio <= 20.0), 1.0, 0.0)
            r = tl.exp(tl.minimum(tl.maximum(log_ratio, -20.0), 20.0))
            A = tl.load(advantages_ptr + row) + zero
            _term, coef, _low, _high = SURROGATE(logp, r, A, unclamped, lo, hi, cap, tau_positive, tau_negative)
            if HAS_RHO:
                log_rho = tl.load(rho_ptr + row) + zero
                if not SEQUENCE_WEIGHT:
                    log_rho = old - log_rho
                coef = coef * WEIGHT(log_rho, weight_low, weight_high)
            if HAS_REF:
                _value, slope = KL(tl.load(ref_ptr + row) - logp)
                coef += beta * slope
            # maximum and minimum drop a NaN, so it is put back; a row that forbids every token has no gradient
            coef = tl.where(log_ratio == log_ratio, scale * coef, log_ratio)
            coef = tl.where(m == float("-inf"), 0.0, coef)
            tl.store(coefs_ptr + row + one, coef)
            if GRADIENT:
                write_gradient(x_ptr, dx_ptr, tl.sum(coef, 0) * inv_temperature, target, tl.sum(m, 0), tl.sum(S, 0), V, inv_temperature, BLOCK)


def scale_triton(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place; the device finds out by itself that the factor is 1 and nothing is to be done."""
    rows, columns = x.shape
    if x.numel():
        with on_device_of(x):
            scale_kernel[(min(rows, 1024),)](x, factor.to(torch.float32), rows, columns, x.stride(0), BLOCK=block_of(columns, 4096), num_warps=8)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["factor_ptr"])
def scale_kernel(x_ptr, factor_ptr, rows, columns, stride, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    lanes = tl.arange(0, BLOCK)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if factor != 1.0:
        for k in range(0, tl.cdiv(rows - first, step)):
            row_ptr = x_ptr + (first + k * step) * stride
            for i in range(0, columns, BLOCK):
                x = tl.load(row_ptr + i + lanes, mask=i + lanes < columns, other=0.0)
                tl.store(row_ptr + i + lanes, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=i + lanes < columns)


TRITON = Steps(group_advantage_triton, policy_loss_triton, rows_triton, dlogits_triton, scale_triton)


def ahead_of_time() -> list[AheadOfTime]:
    tokens = dict.fromkeys(SMALL, "*fp32") | {"targets_ptr": "*i64"}
    numbers = dict.fromkeys(("inv_temperature", "lo", "hi", "cap", "tau_positive", "tau_negative", "beta", "weight_low", "weight_high"), "fp32")
    sizes = {"V": "i32:16", "stride": "i32:16", "dstride": "i32:16"}
    cases = []
    for dtype, surrogate, kl, correction, coefs, gradient in (
        ("bf16", "clip", "k3", "tis", True, True), ("fp32", "dual_clip", "k1", "token_mask", True, True),
        ("bf16", "sapo", "k2", "sequence_mask", True, True), ("bf16", "cispo", "none", "none", True, True),
        ("fp32", "clip", "k3", "tis", True, False), ("fp32", "clip", "none", "none", False, False), ("bf16", "clip", "none", "none", False, False),
    ):  # fmt: skip
        flags = dict(SURROGATE=SURROGATES[surrogate], KL=KLS[kl], WEIGHT=WEIGHTS[correction], HAS_OLD=True, HAS_REF=kl != "none",
                     HAS_RHO=correction != "none", SEQUENCE_WEIGHT=correction == "sequence_mask", COEFS=coefs, GRADIENT=gradient,
                     BLOCK=BLOCK[gradient])  # fmt: skip
        cases.append(AheadOfTime(f"logits_grpo {dtype} {surrogate} {kl} {correction} {coefs} {gradient}", logits_grpo_kernel,
                                 tokens | numbers | sizes | {"logits_ptr": f"*{dtype}:16", "dlogits_ptr": f"*{dtype}:16"}, flags, WARPS[gradient],
                                 registers=168 if gradient else 96))  # fmt: skip
    scale = {"x_ptr": "*bf16:16", "factor_ptr": "*fp32", "rows": "i32", "columns": "i32:16", "stride": "i32:16"}
    return [*cases, AheadOfTime("logits_grpo scale", scale_kernel, scale, {"BLOCK": 4096}, 8)]
