"""Log-probability and entropy of a token under a softmax, from logits or straight from hidden states and the lm_head.

z = hidden weight^T / temperature,  logp = z[target] - logsumexp(z),  H = logsumexp(z) - sum_v p_v z_v.
d logp / d z = onehot(target) - p.  Statistics are fp32 whatever the input (fp64 for fp64): a bf16 logit near 30 is off by 0.06, a 6 % error
in the importance ratio.  The entropy is a metric, not part of a loss: it carries no gradient.
"""

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, register
from .logprob import LogProbs, check_targets, logprob_reference

CHUNK_LOGITS = 1 << 22  # logits held at once by the reference: 16 MiB in fp32


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, backend: str | None = None) -> LogProbs:
    """Log-probability and entropy of each target under softmax(hidden @ weight.T / temperature), without storing all logits.

    hidden: (T, D).  weight: (V, D).  targets: (T,) int64, -100 = skip (logp 0, no gradient).
    Returns LogProbs; logps is differentiable in hidden and weight.  Raises ValueError on a shape mismatch, a target outside
    [0, V) (checked on CPU; on a GPU such a row counts as skipped, so that no call waits for the device) or a temperature that is not positive.
    """
    check(hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1],
          f"linear_logprob: weight is {tuple(weight.shape)}, hidden is {tuple(hidden.shape)}; wanted (V, D) and (T, D)")  # fmt: skip
    check_targets("linear_logprob", targets, hidden.shape[0], weight.shape[0], temperature)
    return LogProbs(*linear_op(backend, hidden=hidden, weight=weight, targets=targets, temperature=float(temperature)))


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
