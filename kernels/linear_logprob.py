"""Log-probability and entropy of a token under the softmax of its logits, straight from hidden states and the lm_head.

The equations are those of logprob.py with logits = hidden weight^T, which are computed in fp32 (fp64 for fp64) and never stored as a whole.
"""

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton
from .logprob import LogProbs, check_support, check_targets, logprob_reference, supported

# The reference's constants, for a CPU.
PLAIN_LOGITS = 1 << 22  # so few are left to autograd, which keeps them all (16 MiB in fp32) and a few copies
TILE = (1024, 1024)  # tokens x vocabulary, beyond that: 4 MiB in fp32.  The fastest of 8 shapes, by a few percent
KEPT_LOGITS = 1 << 24  # of which so many (64 MiB), and at most an eighth, are kept for the backward, which need not compute them again


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, support: tuple[Tensor, Tensor] | None = None,
                   return_argmax: bool = False, backend: str | None = None) -> LogProbs:  # fmt: skip
    """Log-probability and entropy of each target under softmax(hidden @ weight.T / temperature), without storing all logits.

    hidden: (T, D).  weight: (V, D).  targets: (T,) int64, -100 = skip (logp 0, no gradient).  support: `Sampled.support` of the draws, thresholds
    (T,) and last_kept (T,) int64, as in `logprob`: softmax and entropy are over the target and the tokens that the sampler kept.  Those are found
    from the logits as they are computed here: where the sampler's were rounded in another way, a token at the threshold may be left out (a skipped
    row may keep nothing: its entropy is some number).  return_argmax: also the most likely token of each row, of the whole vocabulary whatever the
    support, ties to the lowest index (a greedy check costs `out.argmax == targets`); of a row with a NaN it is some token.
    Returns LogProbs; logps is differentiable in hidden and weight.  Raises ValueError on a shape mismatch, a target outside
    [0, V) (checked on CPU; on a GPU such a row counts as skipped, so that no call waits for the device) or a temperature that is not positive.
    """
    check(hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1],
          lambda: f"linear_logprob: weight is {tuple(weight.shape)}, hidden is {tuple(hidden.shape)}; wanted (V, D) and (T, D)")  # fmt: skip
    check_targets("linear_logprob", targets, hidden.shape[0], weight.shape[0], temperature)
    if support is not None:
        check_support("linear_logprob", support, hidden.shape[0])
    return LogProbs(*linear_op(backend, hidden=hidden, weight=weight, targets=targets, temperature=float(temperature), return_argmax=return_argmax,
                               support=support))  # fmt: skip


def linear_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_argmax: bool,
                             support: tuple[Tensor, Tensor] | None = None) -> tuple:  # fmt: skip
    if hidden.shape[0] * weight.shape[0] <= PLAIN_LOGITS:
        wide = accumulation_dtype(hidden.dtype)
        logits = hidden.to(wide) @ weight.to(wide).T
        return *logprob_reference(logits, targets, temperature, support), logits.argmax(-1) if return_argmax else None
    backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = min(KEPT_LOGITS, hidden.shape[0] * weight.shape[0] // 8) if backward else 0
    return LinearLogprobFunction.apply(hidden, weight, targets, temperature, return_argmax, keep, support)


class LinearLogprobFunction(torch.autograd.Function):
    """One TILE of logits at a time, in a buffer that stays in the cache; the first tiles, `keep` logits in all, are kept for the backward.

    Forward: m = largest logit so far, S = sum exp((x - m) / temperature), U = sum (x - m) exp((x - m) / temperature), rescaled at a new maximum.
    Backward: with lse = m + temperature log S and each tile's logits again, q = onehot - exp((x - lse) / temperature); the row factor
    c = dlogp / temperature goes to the small operands:  d_hidden = c (q W),  d_weight = q^T (c hidden).
    With a support, a token that was not kept counts as -inf in both, but not for the argmax.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, return_argmax, keep, support):
        T, V = hidden.shape[0], weight.shape[0]
        x = hidden.detach().to(accumulation_dtype(hidden.dtype))
        lowest = torch.finfo(x.dtype).min
        m, S, U, x_target = x.new_full((T,), lowest), x.new_zeros(T), x.new_zeros(T), x.new_zeros(T)
        argmax, highest = (targets.new_zeros(T), torch.full_like(m, lowest)) if return_argmax else (None, None)
        buffers, ctx.kept = x.new_empty(3, TILE[0] * TILE[1]), []
        for rows, cols in _tiles(T, V):
            z, d, e = (buffer[: (rows.stop - rows.start) * (cols.stop - cols.start)].view(rows.stop - rows.start, -1) for buffer in buffers)
            if z.numel() <= keep:
                z, keep = torch.empty_like(z), keep - z.numel()
                ctx.kept.append(z)
            else:
                d, keep = z, 0
            torch.mm(x[rows], weight[cols].detach().to(x.dtype).T, out=z)
            y = targets[rows] - cols.start
            here = (y >= 0) & (y < z.shape[1])
            x_target[rows] += torch.where(here, z.gather(1, y.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1), 0.0)
            largest = z.amax(1)
            if return_argmax:
                argmax[rows] = torch.where(largest > highest[rows], z.argmax(1) + cols.start, argmax[rows])
                highest[rows] = torch.maximum(highest[rows], largest)
            if support is not None:
                largest = _restrict_(z, support, rows, cols, y).amax(1)
            new = torch.maximum(m[rows], largest)
            shift = (m[rows] - new).clamp_min(lowest)
            factor = (shift / temperature).exp()
            torch.sub(z, new.unsqueeze(1), out=d)
            (torch.exp(d, out=e) if temperature == 1.0 else torch.div(d, temperature, out=e).exp_())
            if support is not None:  # -inf is the rule then
                d.clamp_min_(lowest)
            de = torch.bmm(d.unsqueeze(1), e.unsqueeze(2)).flatten()
            if de.isnan().any():  # a logit of -inf, and -inf * 0 is NaN
                de = torch.linalg.vecdot(d.clamp_min_(lowest), e)
            U[rows] = U[rows] * factor + shift * factor * S[rows] + de
            S[rows] = S[rows] * factor + e.sum(1)
            m[rows] = new
        nothing = S == 0
        log_S = S.masked_fill(nothing, 1.0).log()
        skip = (targets < 0) | (targets >= V)
        logps = ((x_target - m) / temperature - log_S).masked_fill(nothing, -torch.inf).masked_fill(skip, 0.0)
        entropy = (log_S - U / S / temperature).masked_fill(nothing, 0.0)
        ctx.save_for_backward(hidden, weight, targets, m + temperature * log_S, skip | nothing, *(support or ()))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy, *([argmax] if return_argmax else []))
        return logps, entropy, argmax

    @staticmethod
    def backward(ctx, dlogps, _entropy, _argmax):
        hidden, weight, targets, lse, skip, *support = ctx.saved_tensors
        (T, V), wide = (hidden.shape[0], weight.shape[0]), lse.dtype
        x = hidden.detach().to(wide)
        c = (dlogps.masked_fill(skip, 0.0) / ctx.temperature).unsqueeze(1)
        lse = torch.where(c == 0, torch.inf, lse.unsqueeze(1))  # q = 0 where nothing flows back, whatever the logits
        targets = targets.masked_fill(c.squeeze(1) == 0, -1)
        cx = c * x
        dhidden = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        buffer = x.new_empty(TILE[0] * TILE[1])
        for i, (rows, cols) in enumerate(_tiles(T, V)):
            w, q = weight[cols].detach().to(wide), buffer[: (rows.stop - rows.start) * (cols.stop - cols.start)].view(rows.stop - rows.start, -1)
            y = targets[rows] - cols.start
            z = ctx.kept[i] if i < len(ctx.kept) else torch.mm(x[rows], w.T, out=q)
            if support and i >= len(ctx.kept):
                _restrict_(z, support, rows, cols, y)
            torch.sub(z, lse[rows], out=q)
            (q if ctx.temperature == 1.0 else q.div_(ctx.temperature)).exp_()
            here = (y >= 0) & (y < q.shape[1])
            q.scatter_add_(1, y.clamp(0, q.shape[1] - 1).unsqueeze(1), -here.to(wide).unsqueeze(1))
            if dhidden is not None:
                dhidden[rows].addmm_(q, w, alpha=-1)
            if dweight is not None:
                dweight[cols].addmm_(q.T, cx[rows], alpha=-1)
        dhidden = None if dhidden is None else dhidden.mul_(c).to(hidden.dtype)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None, None


def _restrict_(z: Tensor, support: tuple[Tensor, Tensor], rows: slice, cols: slice, y: Tensor) -> Tensor:
    """A tile of logits with -inf for what the sampler did not keep; y is the target's column in the tile, if it is there."""
    keep = supported(z, (support[0][rows], support[1][rows] - cols.start)) | (torch.arange(z.shape[1], device=z.device) == y.unsqueeze(1))
    return z.masked_fill_(~keep, -torch.inf)


def _tiles(T: int, V: int):
    """Rows and columns of one tile after the other."""
    for col in range(0, V, TILE[1]):
        for row in range(0, T, TILE[0]):
            yield slice(row, min(row + TILE[0], T)), slice(col, min(col + TILE[1], V))


def why_not_product(call: dict) -> str | None:
    """The reasons that hold for every Triton kernel on hidden weight^T."""
    hidden, weight = call["hidden"], call["weight"]
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"hidden is {hidden.dtype}, weight is {weight.dtype}; the kernels take both in fp32, fp16 or bf16 (fp64 is the reference's)"
    if weight.stride(1) != 1:
        return f"the numbers of a row of weight are not neighbours in memory (strides {weight.stride()})"
    return why_not_triton(call)


linear_op = register("linear_logprob", triton=Backend(late("linear_logprob_triton.linear_logprob_triton"), why_not_product),
                     cpu=Backend(late("linear_logprob_cpu.linear_logprob_cpu"), why_not_cpu),
                     reference=Backend(linear_logprob_reference))  # fmt: skip
