"""Log-probability and entropy of a token under a softmax, from logits or straight from hidden states and the lm_head.

z = hidden weight^T / temperature,  logp = z[target] - logsumexp(z),  H = logsumexp(z) - sum_v p_v z_v.
d logp / d z = onehot(target) - p.  Statistics are fp32 whatever the input (fp64 for fp64): a bf16 logit near 30 is off by 0.06, a 6 % error
in the importance ratio.  The entropy is a metric, not part of a loss: it carries no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import Backend, accumulation_dtype, check, register

IGNORE = -100
CHUNK_LOGITS = 1 << 22  # logits held at once by the reference: 16 MiB in fp32


class LogProbs(NamedTuple):
    logps: Tensor  # (T,) fp32 (fp64 for fp64 input), differentiable
    entropy: Tensor  # (T,) same dtype, in nats, not differentiable


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, backend: str | None = None) -> LogProbs:
    """Log-probability and entropy of each target under softmax(hidden @ weight.T / temperature), without storing all logits.

    hidden: (T, D).  weight: (V, D).  targets: (T,) int64, -100 = skip (logp 0, no gradient).
    Returns LogProbs; logps is differentiable in hidden and weight.  Raises ValueError on a shape mismatch, a target outside
    [0, V) (checked on CPU; on a GPU such a row counts as skipped, so that no call waits for the device) or a temperature that is not positive.
    """
    check(hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1],
          f"linear_logprob: weight is {tuple(weight.shape)}, hidden is {tuple(hidden.shape)}; wanted (V, D) and (T, D)")  # fmt: skip
    _check_targets("linear_logprob", targets, hidden.shape[0], weight.shape[0], temperature)
    return LogProbs(*linear_op(backend, hidden=hidden, weight=weight, targets=targets, temperature=float(temperature)))


def logprob(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, backend: str | None = None) -> LogProbs:
    """Log-probability and entropy of each target under softmax(logits / temperature).

    logits: (T, V).  targets: (T,) int64, -100 = skip (logp 0, no gradient).  Returns LogProbs, differentiable in logits.
    Raises ValueError as linear_logprob does.
    """
    check(logits.ndim == 2, f"logprob: logits is {tuple(logits.shape)}; wanted (T, V)")
    _check_targets("logprob", targets, logits.shape[0], logits.shape[1], temperature)
    return LogProbs(*op(backend, logits=logits, targets=targets, temperature=float(temperature)))


def _check_targets(where: str, targets: Tensor, rows: int, vocab: int, temperature: float) -> None:
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
    log_p = F.log_softmax(z, dim=-1)
    skip = (targets < 0) | (targets >= logits.shape[1])
    picked = log_p.gather(1, targets.masked_fill(skip, 0).unsqueeze(1)).squeeze(1)
    return picked.masked_fill(skip, 0.0), _entropy(log_p.detach())


def _entropy(log_p: Tensor) -> Tensor:
    # clamp: a forbidden token has log p = -inf, and 0 * -inf is NaN
    return -(log_p.exp().mul_(log_p.clamp_min(torch.finfo(log_p.dtype).min))).sum(-1)


def linear_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if hidden.shape[0] * weight.shape[0] <= CHUNK_LOGITS:
        wide = accumulation_dtype(hidden.dtype)
        return logprob_reference(hidden.to(wide) @ weight.to(wide).T, targets, temperature)
    return LinearLogprobFunction.apply(hidden, weight, targets, temperature)


class LinearLogprobFunction(torch.autograd.Function):
    """Chunks of rows; the backward recomputes each chunk's logits from the saved hidden states and log-sum-exp."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        wide = accumulation_dtype(hidden.dtype)
        w = weight.to(wide)
        step = max(1, CHUNK_LOGITS // weight.shape[0])
        parts = [logprob_reference(x.to(wide) @ w.T, t, temperature) for x, t in zip(hidden.split(step), targets.split(step), strict=True)]
        logps, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.step = temperature, step
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, dlogps, _):
        hidden, weight, targets = ctx.saved_tensors
        wide = accumulation_dtype(hidden.dtype)
        w = weight.to(wide)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(w)
        for i in range(0, hidden.shape[0], ctx.step):
            rows = slice(i, i + ctx.step)
            x, t = hidden[rows].to(wide), targets[rows]
            skip = (t < 0) | (t >= weight.shape[0])
            coef = dlogps[rows].masked_fill(skip, 0.0).unsqueeze(1) / ctx.temperature
            dz = torch.softmax((x @ w.T).div_(ctx.temperature), -1).mul_(-coef)
            dz.scatter_add_(1, t.masked_fill(skip, 0).unsqueeze(1), coef)
            dhidden[rows] = (dz @ w).to(hidden.dtype)
            dweight.addmm_(dz.T, x)
        return dhidden, dweight.to(weight.dtype), None, None


linear_op = register("linear_logprob", reference=Backend(linear_logprob_reference))
op = register("logprob", reference=Backend(logprob_reference))
