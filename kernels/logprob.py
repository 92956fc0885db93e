"""Log-probability and entropy of a token under the softmax of given logits.

z = logits / temperature,  logp = z[target] - logsumexp(z),  H = logsumexp(z) - sum_v p_v z_v,  d logp / d z = onehot(target) - p.
Statistics are fp32 whatever the input (fp64 for fp64): a bf16 logit near 30 is off by 0.06, a 6 % error in the importance ratio.  The entropy is a
metric, not part of a loss: it carries no gradient.

A logit of -inf is a forbidden token: probability 0, no part in the entropy.  A target that is forbidden has logp -inf and a finite gradient.  A row
that forbids everything has logp -inf, entropy 0 and gradient 0.  A NaN or +inf makes its own row NaN and no other.

With a support K (what top-k, top-p or min-p left of the row when its token was drawn), z is restricted to K + {target}:
    logp = log p[target] - log sum_{v in K} p_v,   d logp / d z = onehot(target) - p restricted to K and renormalised.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._cpu import why_not_cpu
from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton

IGNORE = -100


class Support(NamedTuple):
    """The tokens that top-k, top-p or min-p kept: logit > threshold, or logit == threshold and index <= last_kept.  Logits before temperature."""

    thresholds: Tensor  # (T,) floating point, -inf = not truncated
    last_kept: Tensor  # (T,) int64


class LogProbs(NamedTuple):
    logps: Tensor  # (T,) fp32 (fp64 for fp64 input), differentiable
    entropy: Tensor  # (T,) same dtype, in nats, not differentiable
    argmax: Tensor | None = None  # (T,) int64, the most likely token, ties to the lowest index; None unless asked for


def logprob(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, support: tuple[Tensor, Tensor] | None = None,
            backend: str | None = None) -> LogProbs:  # fmt: skip
    """Log-probability and entropy of each target under softmax(logits / temperature).

    logits: (T, V).  targets: (T,) int64, -100 = skip (logp 0, no gradient).  support: `Sampled.support` of the draws, thresholds (T,) and last_kept
    (T,) int64: the softmax is over the tokens that the sampler kept.  It is rebuilt from these logits: the same ones give the same tokens; after an
    optimizer step it is whatever now lies above the old threshold.  The target always counts as kept, so that its logp stays finite.
    Returns LogProbs; logps is differentiable in logits.  Raises ValueError on a shape mismatch, a target outside [0, V) (checked on CPU; on a GPU
    such a row counts as skipped, so that no call waits for the device) or a temperature that is not positive.
    """
    check(logits.ndim == 2, lambda: f"logprob: logits is {tuple(logits.shape)}; wanted (T, V)")
    check_targets("logprob", targets, logits.shape[0], logits.shape[1], temperature)
    if support is not None:
        check_support("logprob", support, logits.shape[0])
    return LogProbs(*op(backend, logits=logits, targets=targets, temperature=float(temperature), support=support))


def check_support(where: str, support: tuple[Tensor, Tensor], rows: int) -> None:
    thresholds, last_kept = support
    check(thresholds.shape == (rows,) and thresholds.is_floating_point() and last_kept.shape == (rows,) and last_kept.dtype == torch.int64,
          lambda: f"{where}: support is {tuple(thresholds.shape)} {thresholds.dtype} and {tuple(last_kept.shape)} {last_kept.dtype}; wanted "
                  f"({rows},) "
          f"floating-point thresholds and ({rows},) int64 last_kept")  # fmt: skip


def supported(x: Tensor, support: tuple[Tensor, Tensor]) -> Tensor:
    """(T, V) bool.  Written so that a NaN counts as kept: it must show in the result."""
    thresholds, last_kept = (t.unsqueeze(1) for t in support)
    return ~((x < thresholds) | ((x == thresholds) & (torch.arange(x.shape[1], device=x.device) > last_kept)))


def check_targets(where: str, targets: Tensor, rows: int, vocab: int, temperature: float) -> None:
    check(targets.shape == (rows,) and targets.dtype == torch.int64,
          lambda: f"{where}: targets is {tuple(targets.shape)} {targets.dtype}; wanted ({rows},) int64")  # fmt: skip
    check(temperature > 0, lambda: f"{where}: temperature is {temperature}; wanted > 0")
    if rows and targets.device.type == "cpu":
        low, high = torch.aminmax(targets)
        low, high = int(low), int(high)
        check(high < vocab and low >= IGNORE and not (low < 0 and bool(((targets < 0) & (targets != IGNORE)).any())),
              lambda: f"{where}: targets run from {low} to {high}; wanted [0, {vocab}) or {IGNORE} = skip")  # fmt: skip


def logprob_reference(logits: Tensor, targets: Tensor, temperature: float, support: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    z = logits.to(accumulation_dtype(logits.dtype))
    if temperature != 1.0:
        z = z / temperature
    # log_softmax makes NaN of a row that is -inf throughout; zeros in its place give a uniform row without gradient
    nothing = (z.detach() == -torch.inf).all(-1)
    z = z.masked_fill(nothing.unsqueeze(1), 0.0)
    skip = (targets < 0) | (targets >= logits.shape[1])
    index = targets.masked_fill(skip, 0).unsqueeze(1)
    if support is not None:
        keep = supported(logits.detach().to(z.dtype), support) | (torch.arange(z.shape[1], device=z.device) == targets.unsqueeze(1))
        keep |= ~keep.any(1, keepdim=True)  # a skipped row of which nothing is left
        exact = _drawn_logps(z.detach(), index, keep, support[0])
        z = z.masked_fill(~keep, -torch.inf)
    log_p = F.log_softmax(z, dim=-1)
    picked = log_p.gather(1, index).squeeze(1)
    if support is not None:
        picked = WithValue.apply(picked, exact)
    picked = picked.masked_fill(nothing, -torch.inf)
    return picked.masked_fill(skip, 0.0), _entropy(log_p.detach()).masked_fill(nothing, 0.0)


def _drawn_logps(z: Tensor, index: Tensor, keep: Tensor, thresholds: Tensor) -> Tensor:
    """The log-probs as the sampler rounds them: log p less the log of the kept mass, an fp64 sum from left to right (Tensor.sum adds pairwise)."""
    log_p = F.log_softmax(z, dim=-1)
    full = log_p.gather(1, index).squeeze(1)
    total = torch.where(keep, log_p.exp(), 0.0).double().cumsum(1)[:, -1]
    return torch.where(thresholds == -torch.inf, full, (full.double() - total.log()).to(z.dtype).clamp_max_(0.0))


class WithValue(torch.autograd.Function):
    """The gradient of one expression with the bits of another that is equal but for rounding."""

    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def _entropy(log_p: Tensor) -> Tensor:
    # clamp: a forbidden token has log p = -inf, and 0 * -inf is NaN
    return -(log_p.exp().mul_(log_p.clamp_min(torch.finfo(log_p.dtype).min))).sum(-1)


def why_not_rows_cpu(call: dict) -> str | None:
    """The reasons that hold for the C++ kernels on given logits."""
    V, (thresholds, last_kept) = call["logits"].shape[1], call.get("support") or (None, None)
    if V >= 1 << 31:
        return f"V is {V}; the C++ kernels count tokens in 32 bits"
    return why_not_cpu(call | {"thresholds": thresholds, "last_kept": last_kept})


def why_not_rows(call: dict) -> str | None:
    logits = call["logits"]
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"the logits of a row are not neighbours in memory (strides {logits.stride()})"
    return why_not_triton(call)


op = register("logprob", triton=Backend(late("logprob_triton.logprob_triton"), why_not_rows),
              cpu=Backend(late("logprob_cpu.logprob_cpu"), why_not_rows_cpu), reference=Backend(logprob_reference))  # fmt: skip
