"""Log-probability and entropy from given logits for CPU tensors: csrc/cpu/logprob.inl; the equations are those of logprob.py.

The forward keeps the largest logit and the inverse sum of exponentials of each row; the backward computes the probabilities again, in one pass.
Sums of 1024 exponentials are fp32, their sum is fp64.  `sample` on the cpu backend takes its log-probs from the same C++ function.
"""

import torch
from torch import Tensor

from ._cpu import address, dense, dense_rows, native, run


def logprob_cpu(logits: Tensor, targets: Tensor, temperature: float, support: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    return run(LogprobCpuFunction, logits, targets, temperature, *(support or (None, None)))


def described(logits: Tensor, targets: Tensor, temperature: float, thresholds: Tensor | None, last_kept: Tensor | None) -> tuple:
    """How the C++ side is told of rows of logits; everything but the logits is contiguous."""
    T, V = logits.shape
    return logits.data_ptr(), logits.stride(0), T, V, targets.data_ptr(), address(thresholds), address(last_kept), 1 / temperature


class LogprobCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, thresholds, last_kept):
        logits, small = dense_rows(logits), [x if x is None else dense(x) for x in (targets, thresholds, last_kept)]
        logps, entropy, largest, inverse_sum = (logits.new_empty(logits.shape[0]) for _ in range(4))
        native().logprob_fwd(*described(logits, small[0], temperature, *small[1:]), *map(address, (logps, entropy, largest, inverse_sum, None)),
                             torch.get_num_threads())  # fmt: skip
        ctx.save_for_backward(logits, *small, largest, inverse_sum)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, dlogps, _entropy):
        logits, targets, thresholds, last_kept, largest, inverse_sum = ctx.saved_tensors
        dlogps, dlogits = dense(dlogps), torch.empty_like(logits, memory_format=torch.contiguous_format)
        native().logprob_bwd(*described(logits, targets, ctx.temperature, thresholds, last_kept),
                             *map(address, (dlogps, largest, inverse_sum, dlogits)), dlogits.stride(0), torch.get_num_threads())  # fmt: skip
        return dlogits, None, None, None, None
