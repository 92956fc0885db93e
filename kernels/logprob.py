"""Log-probability and entropy of a token under the softmax of given logits.

z = logits / temperature,  logp = z[target] - logsumexp(z),  H = logsumexp(z) - sum_v p_v z_v,  d logp / d z = onehot(target) - p.
Statistics are fp32 whatever the input (fp64 for fp64): a bf16 logit near 30 is off by 0.06, a 6 % error in the importance ratio.  The entropy is a
metric, not part of a loss: it carries no gradient.

A logit of -inf is a forbidden token: probability 0, no part in the entropy.  A target that is forbidden has logp -inf and a finite gradient.  A row
that forbids everything has logp -inf, entropy 0 and gradient 0.  A NaN or +inf makes its own row NaN and no other.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import Backend, accumulation_dtype, check, register
from ._triton import why_not_triton

IGNORE = -100


class LogProbs(NamedTuple):
    logps: Tensor  # (T,) fp32 (fp64 for fp64 input), differentiable
    entropy: Tensor  # (T,) same dtype, in nats, not differentiable
    argmax: Tensor | None = None  # (T,) int64, the most likely token, ties to the lowest index; None unless asked for


def logprob(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, backend: str | None = None) -> LogProbs:
    """Log-probability and entropy of each target under softmax(logits / temperature).

    logits: (T, V).  targets: (T,) int64, -100 = skip (logp 0, no gradient).
    Returns LogProbs; logps is differentiable in logits.  Raises ValueError on a shape mismatch, a target outside [0, V) (checked on CPU; on a GPU
    such a row counts as skipped, so that no call waits for the device) or a temperature that is not positive.
    """
    check(logits.ndim == 2, f"logprob: logits is {tuple(logits.shape)}; wanted (T, V)")
    check_targets("logprob", targets, logits.shape[0], logits.shape[1], temperature)
    return LogProbs(*op(backend, logits=logits, targets=targets, temperature=float(temperature)))


def check_targets(where: str, targets: Tensor, rows: int, vocab: int, temperature: float) -> None:
    check(targets.shape == (rows,) and targets.dtype == torch.int64,
          f"{where}: targets is {tuple(targets.shape)} {targets.dtype}; wanted ({rows},) int64")  # fmt: skip
    check(temperature > 0, f"{where}: temperature is {temperature}; wanted > 0")
    if rows and targets.device.type == "cpu":
        low, high = torch.aminmax(targets)
        low, high = int(low), int(high)
        check(high < vocab and low >= IGNORE and not (low < 0 and bool(((targets < 0) & (targets != IGNORE)).any())),
              f"{where}: targets run from {low} to {high}; wanted [0, {vocab}) or {IGNORE} = skip")  # fmt: skip


def logprob_reference(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z = logits.to(accumulation_dtype(logits.dtype))
    if temperature != 1.0:
        z = z / temperature
    # log_softmax makes NaN of a row that is -inf throughout; zeros in its place give a uniform row without gradient
    nothing = (z.detach() == -torch.inf).all(-1)
    log_p = F.log_softmax(z.masked_fill(nothing.unsqueeze(1), 0.0), dim=-1)
    skip = (targets < 0) | (targets >= logits.shape[1])
    picked = log_p.gather(1, targets.masked_fill(skip, 0).unsqueeze(1)).squeeze(1).masked_fill(nothing, -torch.inf)
    return picked.masked_fill(skip, 0.0), _entropy(log_p.detach()).masked_fill(nothing, 0.0)


def _entropy(log_p: Tensor) -> Tensor:
    # clamp: a forbidden token has log p = -inf, and 0 * -inf is NaN
    return -(log_p.exp().mul_(log_p.clamp_min(torch.finfo(log_p.dtype).min))).sum(-1)


def _triton(**call) -> tuple[Tensor, Tensor]:
    from .logprob_triton import logprob_triton

    return logprob_triton(**call)


def _why_not(call: dict) -> str | None:
    logits = call["logits"]
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"the logits of a row are not neighbours in memory (strides {logits.stride()})"
    return why_not_triton(call)


op = register("logprob", triton=Backend(_triton, _why_not), reference=Backend(logprob_reference))
