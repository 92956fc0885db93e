"""linear_logprob with the vocabulary split over ranks (Megatron-LM, arXiv 1909.08053, section 3): no rank forms another's logits.

Rank r has rows V_r of the weight.  Of each token's z = hidden weight_r^T / temperature it computes m_r = max, S_r = sum exp(z - m_r) and, where V_r
holds the target, its z.  Ranks exchange these three fp32 numbers, 12 bytes per token (16 with U_r = sum (z - m_r) exp(z - m_r) for the entropy), and
combine them in the order of the ranks, so that all have the same bits:
    m = max m_r,   S = sum S_r exp(m_r - m),   logp = z[target] - m - log S,   H = log S - U / S.
Backward: each rank's logits again, or those that are kept where one chunk has them all; dz = dlogp (onehot - exp(z - m) / S) on the rank's own
columns; dweight = dz^T hidden stays with the rank, dhidden = sum_r dz weight_r is summed over the ranks.

A chunk of rows at a time, as in linear_grpo.py, whose row kernels these are.  Left out: return_argmax.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, register
from ._triton import why_not_triton
from .linear_grpo import chunk_length
from .logits_grpo import REFERENCE, Steps, Tokens
from .logprob import LogProbs, check_support, check_targets, supported


def linear_logprob_parallel(hidden: Tensor, weight: Tensor, targets: Tensor, *, first: int, vocab_size: int, group: dist.ProcessGroup | None = None,
                            temperature: float = 1.0, support: tuple[Tensor, Tensor] | None = None, entropy: bool = True,
                            backend: str | None = None) -> LogProbs:  # fmt: skip
    """Log-probability and entropy of each target under softmax(hidden @ W.T / temperature), W (V, D) lying in pieces on the ranks of a group.

    hidden (T, D), targets (T,) int64, -100 = skip, support as in `linear_logprob`: the same on every rank.  weight: this rank's rows first,
    first + 1, ... of W; the ranks' pieces follow each other in the order of the group, a piece may be empty, all together are vocab_size = V rows.
    entropy: False exchanges 12 instead of 16 bytes per token, and `entropy` of the result is None.  group: None = all ranks.
    A collective: every rank calls it, and its backward, with the same gradient of logps.  Returns on every rank the same LogProbs, fp32 (fp64 for
    fp64); logps is differentiable in hidden, whose gradient is whole on every rank, and weight, of its own rows.  Raises ValueError on a shape
    mismatch, rows outside of the vocabulary, a target outside [0, V) (checked on CPU) or a temperature that is not positive.
    """
    check(hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1],
          lambda: f"linear_logprob_parallel: weight is {tuple(weight.shape)}, hidden is {tuple(hidden.shape)}; wanted (V_r, D), (T, D)")  # fmt: skip
    check(hidden.dtype == weight.dtype, lambda: f"linear_logprob_parallel: hidden is {hidden.dtype}, weight is {weight.dtype}; wanted one dtype")
    check(0 <= first and first + weight.shape[0] <= vocab_size,
          lambda: f"linear_logprob_parallel: rows {first} to {first + weight.shape[0]} of weight; wanted them in [0, {vocab_size}]")  # fmt: skip
    check_targets("linear_logprob_parallel", targets, hidden.shape[0], vocab_size, temperature)
    if support is not None:
        check_support("linear_logprob_parallel", support, hidden.shape[0])
    return LogProbs(*op(backend, hidden=hidden, weight=weight, targets=targets, first=first, vocab_size=vocab_size, group=group,
                        temperature=float(temperature), support=support, entropy=entropy))  # fmt: skip


class Walk:
    """One rank's logits, a chunk of rows at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, support: tuple[Tensor, Tensor] | None):
        self.wide = accumulation_dtype(hidden.dtype)
        # tensor cores take bf16; elsewhere the products are formed in the accumulation dtype
        self.dtype = hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else self.wide
        self.hidden, self.weight, self.first, self.support = hidden, weight.to(self.dtype), first, support
        # of a target elsewhere: no column
        self.columns = torch.where((targets >= first) & (targets < first + weight.shape[0]), targets - first, -1)
        self.rows = max(1, min(chunk_length(max(weight.shape[0], 1), hidden.device), len(hidden)))
        self.chunks = [slice(i, min(i + self.rows, len(hidden))) for i in range(0, len(hidden), self.rows)]

    def buffer(self, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(self.rows, self.weight.shape[0], dtype=dtype)

    def logits(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """hidden of some rows as it is multiplied, and their logits, those that the sampler did not keep at -inf."""
        x, z = self.hidden[rows].to(self.dtype), buffer[: rows.stop - rows.start]
        options = {} if z.dtype == x.dtype else {"out_dtype": z.dtype}
        torch.mm(x, self.weight.T, **options, out=z)
        if self.support is not None:
            here = torch.arange(z.shape[1], device=z.device) == self.columns[rows].unsqueeze(1)
            kept = supported(z, (self.support[0][rows], self.support[1][rows] - self.first)) | here
            z.masked_fill_(~kept, -torch.inf)
        return x, z


class LinearLogprobParallelFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, first, vocab_size, group, temperature, support, entropy, steps):
        walk = Walk(hidden.detach(), weight.detach(), targets, first, support)
        T, empty = len(hidden), not weight.shape[0]
        m, S, U, z_target = (hidden.new_zeros(T, dtype=walk.wide) for _ in range(4))
        m.fill_(-torch.inf)
        buffer = walk.buffer(walk.wide)
        for rows in () if empty else walk.chunks:
            _, z = walk.logits(rows, buffer)
            column = walk.columns[rows]
            # A scale of 1: of every row the maximum and the sum are wanted, whatever its target.
            some = steps.rows(z, Tokens(column.clamp_min(0), torch.ones_like(m[rows]), *[torch.zeros_like(m[rows])] * 4), None, temperature, None)
            m[rows], S[rows] = some.m, some.S.masked_fill(some.m == -torch.inf, 0.0)
            U[rows] = (some.S.log() - some.entropy) * S[rows]
            z_target[rows] = torch.where(column >= 0, z.gather(1, column.clamp_min(0).unsqueeze(1)).squeeze(1), 0.0)
        ours = torch.stack((m, S, z_target, U) if entropy else (m, S, z_target))
        everyone = ours.new_empty(dist.get_world_size(group), *ours.shape)
        dist.all_gather(list(everyone.unbind()), ours, group=group)
        m_r, S_r = everyone[:, 0], everyone[:, 1]
        m = m_r.amax(0)
        nothing = m == -torch.inf
        shift = ((m_r - m.masked_fill(nothing, 0.0)) / temperature).clamp_min(torch.finfo(m.dtype).min)
        weights = shift.exp()
        S = (S_r * weights).sum(0).masked_fill(nothing, 1.0)
        skip = (targets < 0) | (targets >= vocab_size)
        logps = (everyone[:, 2].sum(0) - m.masked_fill(nothing, 0.0)) / temperature - S.log()
        logps = logps.masked_fill(nothing, -torch.inf).masked_fill(skip, 0.0)
        entropies = None
        if entropy:
            entropies = (S.log() - (weights * (everyone[:, 3] + shift * S_r)).sum(0) / S).masked_fill(nothing, 0.0)
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(hidden, weight, targets, m, S, skip | nothing, *(support or ()))
        ctx.call = first, group, temperature, steps
        ctx.kept = buffer if len(walk.chunks) == 1 and not empty and any(ctx.needs_input_grad[:2]) else None
        return logps, entropies

    @staticmethod
    def backward(ctx, dlogps, _entropies):
        hidden, weight, targets, m, S, skip, *support = ctx.saved_tensors
        first, group, temperature, steps = ctx.call
        walk = Walk(hidden, weight, targets, first, tuple(support) or None)
        coefs = dlogps.masked_fill(skip, 0.0).to(m.dtype)
        dhidden = torch.zeros_like(hidden, dtype=walk.dtype)
        dweight = torch.zeros_like(weight, dtype=walk.wide) if ctx.needs_input_grad[1] else None
        buffer, dz_buffer = ctx.kept if ctx.kept is not None else walk.buffer(walk.wide), walk.buffer(walk.dtype)
        for rows in walk.chunks if weight.shape[0] else ():
            if ctx.kept is None:
                x, z = walk.logits(rows, buffer)
            else:
                x, z = hidden[rows].to(walk.dtype), buffer
            dz = dz_buffer[: len(z)]
            steps.dlogits(z, walk.columns[rows], m[rows], S[rows], coefs[rows], temperature, dz)
            if ctx.needs_input_grad[0]:
                torch.mm(dz, walk.weight, out=dhidden[rows])
            if dweight is not None:
                options = {} if walk.dtype == walk.wide else {"out_dtype": walk.wide}
                torch.addmm(dweight, dz.T, x, **options, out=dweight)
        if ctx.needs_input_grad[0]:
            dist.all_reduce(dhidden, group=group)
        dhidden = dhidden.to(hidden.dtype) if ctx.needs_input_grad[0] else None
        return dhidden, None if dweight is None else dweight.to(weight.dtype), *[None] * 8


def _run(steps: Steps, hidden, weight, targets, first, vocab_size, group, temperature, support, entropy) -> tuple[Tensor, Tensor | None]:
    return LinearLogprobParallelFunction.apply(hidden, weight, targets, first, vocab_size, group, temperature, support, entropy, steps)


def linear_logprob_parallel_reference(**call) -> tuple[Tensor, Tensor | None]:
    return _run(REFERENCE, **call)


def _triton(**call) -> tuple[Tensor, Tensor | None]:
    from .logits_grpo_triton import TRITON

    return _run(TRITON, **call)


op = register("linear_logprob_parallel", triton=Backend(_triton, why_not_triton), reference=Backend(linear_logprob_parallel_reference))
