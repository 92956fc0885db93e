"""The policy losses in Triton: loss, statistics and d loss / d logp in one pass over the tokens; the equations are those of policy_loss.py.

Three launches.  `sequence_fwd_kernel`: one program per sequence sums what a token needs to know of its sequence (unmasked tokens, mean log-ratio,
log of the sequence's correction weight, sum of the token weights).  `policy_loss_fwd_kernel`: blocks of packed tokens write the coefficient
d loss / d logp and one row of partial sums per block; a token finds its sequence by binary search in cu_seqlens.  `finish_kernel`: one program adds
the rows in index order.  No atomics, so equal inputs give equal bits.  The backward is one multiplication of the stored coefficients.

Surrogate, KL and correction are small functions handed to the kernel as compile-time values; bounds, beta and lengths are run-time numbers,
so no new length, temperature or clip range compiles anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .policy_loss import run_time_numbers

BLOCK = 512  # tokens per program, 4 warps
ROWS = 512  # of partial sums that one step of the last kernel adds
COLUMNS = 16  # of the partial sums, the last is ratio_max
SUMS = ("loss", "num_tokens", "ratio_sum", "clip_low", "clip_high", "old_kl_sum", "ref_kl_sum", "rollout_kl_sum", "weight_sum", "weight_sq_sum")


def policy_loss_triton(logps, old_logps, advantages, cu_seqlens, ref_logps, rollout_logps, mask, variant, num_tokens, num_sequences):
    detached = [None if x is None else x.detach().contiguous() for x in (old_logps, ref_logps, rollout_logps, mask)]
    loss, sums, count = PolicyLossFunction.apply(
        logps, advantages.contiguous(), cu_seqlens.contiguous(), *detached, variant, num_tokens, num_sequences
    )
    stats = dict(zip(SUMS[1:], sums[1:].unbind(), strict=False)) | {"ratio_max": sums[COLUMNS - 1], "num_sequences": (count > 0).sum().float()}
    return loss, stats


class PolicyLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, advantages, cu_seqlens, old_logps, ref_logps, rollout_logps, mask, variant, num_tokens, num_sequences):
        v, device = variant, logps.device
        N, S = logps.numel(), cu_seqlens.numel() - 1
        logps = logps.contiguous()
        old = logps if old_logps is None else old_logps
        ref = logps if ref_logps is None else ref_logps  # a pointer that is never read
        rollout = logps if rollout_logps is None else rollout_logps
        keep = torch.empty(1, dtype=torch.uint8, device=device) if mask is None else mask.view(torch.uint8)
        bounds, weight_bounds = run_time_numbers(v)
        flags = dict(WEIGHT=WEIGHTS[v.correction], SEQUENCE_WEIGHT=v.correction == "sequence_mask",
                     HAS_MASK=mask is not None, HAS_ROLLOUT=rollout_logps is not None)  # fmt: skip
        sequence = torch.zeros(4, S, dtype=torch.float32, device=device)  # rows: count, mean log-ratio, sum of log rho, sum of weights
        dlogps = torch.empty(N, dtype=torch.float32, device=device)
        blocks = max(1, triton.cdiv(N, BLOCK))
        partials = torch.empty(blocks, COLUMNS, dtype=torch.float32, device=device)
        sums = torch.empty(COLUMNS, dtype=torch.float32, device=device)
        with on_device_of(logps):
            if S:
                sequence_fwd_kernel[(S,)](logps, old, rollout, keep, cu_seqlens, sequence, S, *weight_bounds, **flags, BLOCK=BLOCK, num_warps=4)
            per_token = 1 / _denominator(v, sequence[0], num_tokens, num_sequences)
            policy_loss_fwd_kernel[(blocks,)](
                logps, old, ref, rollout, keep, advantages, cu_seqlens, sequence, per_token, dlogps, partials, N, S, S.bit_length() + 1,
                *bounds, *weight_bounds,
                SURROGATE=SURROGATES[v.surrogate], KL=KLS[v.kl], **flags, HAS_REF=ref_logps is not None, RATIO=v.ratio,
                SEQUENCE_MEAN=v.aggregation == "sequence_mean", COLUMNS=COLUMNS, BLOCK=BLOCK, num_warps=4)  # fmt: skip
            finish_kernel[(1,)](partials, sums, blocks, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=8)
        ctx.save_for_backward(dlogps)
        ctx.dtype = logps.dtype
        count = sequence[0]
        ctx.mark_non_differentiable(sums, count)
        return sums[0].clone(), sums, count

    @staticmethod
    def backward(ctx, dloss, _sums, _count):
        (dlogps,) = ctx.saved_tensors
        return (dlogps * dloss).to(ctx.dtype), *[None] * 9


def _denominator(v, count: Tensor, num_tokens, num_sequences) -> Tensor:
    """What every token's loss is divided by, apart from its sequence's length under sequence_mean; 0-d on the device, never read back."""
    if v.aggregation == "token_mean":
        given = count.sum() if num_tokens is None else torch.as_tensor(num_tokens, dtype=torch.float32, device=count.device)
        return given.clamp_min(1)
    given = (count > 0).sum() if num_sequences is None else torch.as_tensor(num_sequences, dtype=torch.float32, device=count.device)
    return given.clamp_min(1).float() * (v.max_tokens if v.aggregation == "constant" else 1)


# Integers are not specialised: a count that happens to be 1 or a multiple of 16 must not compile anything.  Nor is the alignment of what a caller may
# have cut out of a larger tensor, as every micro-batch is.
CUT = ["logps_ptr", "old_ptr", "ref_ptr", "rollout_ptr", "keep_ptr", "advantages_ptr", "cu_ptr"]


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=CUT)
def sequence_fwd_kernel(logps_ptr, old_ptr, rollout_ptr, keep_ptr, cu_ptr, sequence_ptr, S, weight_low, weight_high,
                        WEIGHT: tl.constexpr, SEQUENCE_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ROLLOUT: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_ptr + s).to(tl.int64), tl.load(cu_ptr + s + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    count, log_ratio = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    log_rho, weight = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(start, end, BLOCK):
        t = i + lanes
        keep = t < end
        if HAS_MASK:
            keep = keep & (tl.load(keep_ptr + t, mask=keep, other=0) != 0)
        old = tl.load(old_ptr + t, mask=keep, other=0.0).to(tl.float32)
        count += tl.where(keep, 1.0, 0.0)
        log_ratio += tl.load(logps_ptr + t, mask=keep, other=0.0).to(tl.float32) - old
        if HAS_ROLLOUT:
            rho = old - tl.load(rollout_ptr + t, mask=keep, other=0.0).to(tl.float32)
            log_rho += rho
            weight += tl.where(keep, WEIGHT(rho, weight_low, weight_high), 0.0)
    n = tl.sum(count, 0)
    total_rho = tl.sum(log_rho, 0)
    total_weight = n
    if HAS_ROLLOUT:
        total_weight = n * WEIGHT(total_rho, weight_low, weight_high) if SEQUENCE_WEIGHT else tl.sum(weight, 0)
    tl.store(sequence_ptr + s, n)
    tl.store(sequence_ptr + S + s, tl.sum(log_ratio, 0) / tl.maximum(n, 1.0))
    tl.store(sequence_ptr + 2 * S + s, total_rho)
    tl.store(sequence_ptr + 3 * S + s, total_weight)


@triton.jit(do_not_specialize=["N", "S", "steps"], do_not_specialize_on_alignment=CUT)
def policy_loss_fwd_kernel(
    logps_ptr, old_ptr, ref_ptr, rollout_ptr, keep_ptr, advantages_ptr, cu_ptr, sequence_ptr, per_token_ptr, dlogps_ptr, partials_ptr, N, S, steps,
    lo, hi, cap, tau_positive, tau_negative, beta, weight_low, weight_high,
    SURROGATE: tl.constexpr, KL: tl.constexpr, WEIGHT: tl.constexpr, SEQUENCE_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ROLLOUT: tl.constexpr,
    HAS_REF: tl.constexpr, RATIO: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK + tl.arange(0, BLOCK)
    inside = t < N
    # the sequence of a token is the first whose end lies beyond it: a search for the block's first token, then a walk over the ends inside the block
    begin, stop = block * BLOCK, tl.minimum(block * BLOCK + BLOCK, N)
    first, last = begin * 0, begin * 0 + S
    for _ in range(steps):
        middle = (first + last) // 2
        after = tl.load(cu_ptr + middle + 1, mask=middle < S, other=2147483647) <= begin
        first, last = tl.where(after, middle + 1, first), tl.where(after, last, middle)
    s = tl.zeros([BLOCK], tl.int64) + first
    end = tl.load(cu_ptr + first + 1, mask=first < S, other=2147483647)
    while end < stop:
        s += (t >= end).to(tl.int64)
        first += 1
        end = tl.load(cu_ptr + first + 1, mask=first < S, other=2147483647)
    keep = inside
    if HAS_MASK:
        keep = keep & (tl.load(keep_ptr + t, mask=inside, other=0) != 0)
    m = tl.where(keep, 1.0, 0.0)
    A = tl.load(advantages_ptr + s, mask=keep, other=0.0).to(tl.float32)
    n = tl.maximum(tl.load(sequence_ptr + s, mask=keep, other=1.0), 1.0)
    logp = tl.load(logps_ptr + t, mask=keep, other=0.0).to(tl.float32)
    old = tl.load(old_ptr + t, mask=keep, other=0.0).to(tl.float32)
    w = tl.load(per_token_ptr) * m
    if SEQUENCE_MEAN:
        w = w / n
    log_ratio = logp - old
    if RATIO != "token":
        log_ratio = tl.load(sequence_ptr + S + s, mask=keep, other=0.0)
    unclamped = (log_ratio >= -20.0) & (log_ratio <= 20.0)
    r = tl.exp(tl.minimum(tl.maximum(log_ratio, -20.0), 20.0))
    term, coef, low, high = SURROGATE(logp, r, A, tl.where(unclamped, 1.0, 0.0), lo, hi, cap, tau_positive, tau_negative)

    c = tl.full([BLOCK], 1.0, tl.float32)
    rollout_kl = tl.zeros([BLOCK], tl.float32)
    if HAS_ROLLOUT:
        log_rho = old - tl.load(rollout_ptr + t, mask=keep, other=0.0).to(tl.float32)
        rollout_kl, _slope = _kl_k3(-log_rho)
        if SEQUENCE_WEIGHT:
            log_rho = tl.load(sequence_ptr + 2 * S + s, mask=keep, other=0.0)
        c = WEIGHT(log_rho, weight_low, weight_high)
    # maximum and minimum drop a NaN, which would hide a broken log-prob from loss and gradient
    term, coef = tl.where(log_ratio == log_ratio, term, log_ratio), tl.where(log_ratio == log_ratio, coef, log_ratio)
    loss = w * c * term
    if RATIO == "sequence":  # through the mean: every token of the sequence receives the sum of the weights over it, divided by n
        dlogp = w * coef * tl.load(sequence_ptr + 3 * S + s, mask=keep, other=0.0) / n
    else:
        dlogp = w * c * coef
    ref_kl = tl.zeros([BLOCK], tl.float32)
    if HAS_REF:
        e = tl.load(ref_ptr + t, mask=keep, other=0.0).to(tl.float32) - logp
        ref_kl, _slope = _kl_k3(e)
        value, slope = KL(e)
        loss += w * beta * value
        dlogp += w * beta * slope
    tl.store(dlogps_ptr + t, dlogp, mask=inside)

    old_kl, _slope = _kl_k3(log_ratio)
    row = partials_ptr + block * COLUMNS
    tl.store(row, tl.sum(loss, 0))
    tl.store(row + 1, tl.sum(m, 0))
    tl.store(row + 2, tl.sum(r * m, 0))
    tl.store(row + 3, tl.sum(low * m, 0))
    tl.store(row + 4, tl.sum(high * m, 0))
    tl.store(row + 5, tl.sum(old_kl * m, 0))
    tl.store(row + 6, tl.sum(ref_kl * m, 0))
    tl.store(row + 7, tl.sum(rollout_kl * m, 0))
    tl.store(row + 8, tl.sum(c * m, 0))
    tl.store(row + 9, tl.sum(c * c * m, 0))
    for column in tl.static_range(10, COLUMNS - 1):
        tl.store(row + column, 0.0)
    tl.store(row + COLUMNS - 1, tl.max(r * m, 0))


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(partials_ptr, sums_ptr, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Add the rows of partial sums in index order; the last column is a maximum of values >= 0."""
    columns = tl.arange(0, COLUMNS)
    total, largest = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for i in range(0, rows, ROWS):
        row = (i + tl.arange(0, ROWS)).to(tl.int64)
        x = tl.load(partials_ptr + row[:, None] * COLUMNS + columns[None, :], mask=(row < rows)[:, None], other=0.0)
        total += tl.sum(x, 0)
        largest = tl.maximum(largest, tl.max(x, 0))
    tl.store(sums_ptr + columns, tl.where(columns == COLUMNS - 1, largest, total))


# Surrogates: (logp, r, A, 1 where r is not clamped, bounds) -> loss, d loss / d logp, lower bound cut the gradient, upper bound did.
@triton.jit
def _surrogate_clip(logp, r, A, unclamped, lo, hi, cap, tau_positive, tau_negative):
    below, above = (A < 0) & (r < lo), (A > 0) & (r > hi)
    cut = tl.where(below | above, 0.0, 1.0)
    bounded = tl.minimum(tl.maximum(r, lo), hi)
    return -tl.minimum(r * A, bounded * A), -r * A * cut * unclamped, tl.where(below, 1.0, 0.0), tl.where(above, 1.0, 0.0)


@triton.jit
def _surrogate_capped(logp, r, A, unclamped, lo, hi, cap, tau_positive, tau_negative):
    below, above = (A < 0) & (r < lo), ((A > 0) & (r > hi)) | ((A < 0) & (r > cap))
    cut = tl.where(below | above, 0.0, 1.0)
    bounded = tl.minimum(tl.maximum(r, lo), hi)
    inner = tl.where(A < 0, tl.minimum(r, cap), r)
    return -tl.minimum(inner * A, bounded * A), -r * A * cut * unclamped, tl.where(below, 1.0, 0.0), tl.where(above, 1.0, 0.0)


@triton.jit
def _surrogate_cispo(logp, r, A, unclamped, lo, hi, cap, tau_positive, tau_negative):
    weight = tl.minimum(tl.maximum(r, lo), hi)
    return -weight * A * logp, -weight * A, tl.where(r < lo, 1.0, 0.0), tl.where(r > hi, 1.0, 0.0)


@triton.jit
def _surrogate_sapo(logp, r, A, unclamped, lo, hi, cap, tau_positive, tau_negative):
    tau = tl.where(A > 0, tau_positive, tau_negative)
    gate = 1.0 / (1.0 + tl.exp(-tau * (r - 1.0)))
    closed = 1.0 / (1.0 + tl.exp(tau * (r - 1.0)))  # 1 - gate loses everything once gate rounds to 1
    return -4.0 / tau * gate * A, -4.0 * gate * closed * r * A * unclamped, r * 0.0, r * 0.0


@triton.jit
def _surrogate_reinforce(logp, r, A, unclamped, lo, hi, cap, tau_positive, tau_negative):
    return -A * logp, -A, r * 0.0, r * 0.0


# KL: e = ref - logp -> value, d value / d logp.
@triton.jit
def _kl_none(e):
    return e * 0.0, e * 0.0


@triton.jit
def _kl_k1(e):
    return -e, e * 0.0 + 1.0


@triton.jit
def _kl_k2(e):
    return e * e * 0.5, -e


@triton.jit
def _kl_k3(e):
    bounded = tl.minimum(tl.maximum(e, -20.0), 20.0)
    # exp(e) - 1 - e cancels near 0, where the first steps of a run are: a series there, good to 1e-8 of the value at 0.25
    series = 1.0 / 720.0 + bounded * (1.0 / 5040.0 + bounded * (1.0 / 40320.0))
    series = bounded * bounded * (0.5 + bounded * (1.0 / 6.0 + bounded * (1.0 / 24.0 + bounded * (1.0 / 120.0 + bounded * series))))
    value = tl.where(tl.abs(bounded) < 0.25, series, tl.exp(bounded) - 1.0 - bounded)
    return value, tl.where(bounded == e, -(value + bounded), 0.0)


# Correction: log rho -> weight.
@triton.jit
def _weight_none(log_rho, low, high):
    return log_rho * 0.0 + 1.0


@triton.jit
def _weight_truncated(log_rho, low, high):
    return tl.minimum(tl.exp(tl.minimum(tl.maximum(log_rho, -20.0), 20.0)), high)


@triton.jit
def _weight_masked(log_rho, low, high):
    rho = tl.exp(tl.minimum(tl.maximum(log_rho, -20.0), 20.0))
    return tl.where((rho >= low) & (rho <= high), rho, 0.0)


SURROGATES = {"clip": _surrogate_clip, "dual_clip": _surrogate_capped, "two_sided": _surrogate_capped, "cispo": _surrogate_cispo,
              "sapo": _surrogate_sapo, "reinforce": _surrogate_reinforce}  # fmt: skip
KLS = {"none": _kl_none, "k1": _kl_k1, "k2": _kl_k2, "k3": _kl_k3}
WEIGHTS = {"none": _weight_none, "tis": _weight_truncated, "token_mask": _weight_masked, "sequence_mask": _weight_masked}


def ahead_of_time() -> list[AheadOfTime]:
    token = dict.fromkeys(("logps_ptr", "old_ptr", "ref_ptr", "rollout_ptr"), "*fp32") | {
        "keep_ptr": "*u8",
        "cu_ptr": "*i32",
        "sequence_ptr": "*fp32",
    }
    numbers = dict.fromkeys(("lo", "hi", "cap", "tau_positive", "tau_negative", "beta", "weight_low", "weight_high"), "fp32")
    outputs = dict.fromkeys(("advantages_ptr", "per_token_ptr", "dlogps_ptr", "partials_ptr"), "*fp32") | dict.fromkeys(("N", "S", "steps"), "i32")
    full = dict(HAS_MASK=True, HAS_ROLLOUT=True, BLOCK=BLOCK)
    settings = [("clip", "k3", _weight_truncated, False, "token"), ("dual_clip", "k1", _weight_masked, False, "sequence"),
                ("cispo", "k2", _weight_masked, True, "token"), ("sapo", "none", _weight_none, False, "sequence_token"),
                ("reinforce", "k3", _weight_truncated, False, "token")]  # fmt: skip
    cases = [
        AheadOfTime(
            f"policy_loss {surrogate} {kl} {ratio}",
            policy_loss_fwd_kernel,
            token | numbers | outputs,
            full
            | dict(
                SURROGATE=SURROGATES[surrogate],
                KL=KLS[kl],
                WEIGHT=weight,
                SEQUENCE_WEIGHT=by_sequence,
                HAS_REF=True,
                RATIO=ratio,
                SEQUENCE_MEAN=True,
                COLUMNS=COLUMNS,
            ),
        )  # fmt: skip
        for surrogate, kl, weight, by_sequence, ratio in settings
    ]
    for weight, by_sequence in ((_weight_truncated, False), (_weight_masked, True)):
        signature = {k: v for k, v in (token | numbers).items() if k in sequence_fwd_kernel.arg_names} | {"S": "i32"}
        cases.append(AheadOfTime("sequence_fwd", sequence_fwd_kernel, signature, full | dict(WEIGHT=weight, SEQUENCE_WEIGHT=by_sequence)))
    finish = {"partials_ptr": "*fp32", "sums_ptr": "*fp32", "rows": "i32"}
    return [*cases, AheadOfTime("finish", finish_kernel, finish, {"COLUMNS": COLUMNS, "ROWS": 64})]
