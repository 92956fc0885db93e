"""GRPO loss and its gradient from logits that a trainer already holds, in one call.

z = logits / temperature and logp as in logprob.py, the loss of policy_loss.py on logp, and with coef = d loss / d logp (reference: its docstring)
    d loss / d logits = coef / temperature (onehot(target) - softmax(z)).
In a token-level loss the denominators, the advantage and the old log-prob are known beforehand, so coef is known as soon as the token's logp is: the
row is read, and its gradient written while it is still in cache, in the forward.  A loss whose coefficient needs the new log-probs of the whole
sequence (ratio "sequence" and "sequence_token", or sequence_mask without old_logps) reads the logits once for those and once for the gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._cuda import why_not_cuda
from ._dispatch import Backend, accumulation_dtype, check, late, register
from .group_advantage import check_advantage_options, group_advantage_reference
from .logprob import check_targets, why_not_rows
from .policy_loss import (
    LOG_RATIO_LIMIT,
    LossVariant,
    check_loss_tensors,
    correction_weight,
    kl_value,
    policy_loss_reference,
    surrogate_reference,
)

PIECE = 1 << 19  # logits worked on at once by the reference: 2 MiB in fp32, of which it holds two


def logits_grpo(logits: Tensor, targets: Tensor, old_logps: Tensor | None, advantages: Tensor | None, cu_seqlens: Tensor, *,
                rewards: Tensor | None = None, group_ids: Tensor | None = None, scale: str = "std", baseline: str = "mean", eps: float = 1e-6,
                ref_logps: Tensor | None = None, rollout_logps: Tensor | None = None, mask: Tensor | None = None,
                variant: LossVariant = LossVariant(), temperature: float = 1.0, num_tokens: int | Tensor | None = None,
                num_sequences: int | Tensor | None = None, inplace: bool = False,
                backend: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Compute the loss of `variant` from logits, with the gradient made in the forward.

    logits: (T, V) bf16, fp32 or fp64.  targets: (T,) int64, -100 = as if mask were False there.  Advantages (S,), or rewards (S,) with group_ids (S,)
    and the options of group_advantage.  All else as in policy_loss.  A masked token has gradient 0 and its row is not read.
    Returns the loss, 0-d, and policy_loss's statistics plus entropy_sum (nats, over the unmasked tokens) and, given rewards, num_nan_rewards.
    A NaN in a row makes the loss NaN, and of the gradient that row only.

    inplace=True overwrites logits with the gradient: no second (T, V) tensor.  Without a gradient to compute, logits keep their values.  An
    operation before this one that saved logits for its own backward then raises there (their version counter moves); so does this loss's
    backward if logits are changed in between.  Either way the gradient is handed out once, multiplied by the upstream gradient where it lies: a
    second backward (retain_graph=True) raises RuntimeError.

    Raises ValueError on a shape mismatch, fp16 logits (the gradient is formed before a loss scale is applied and would underflow; use bf16), both
    or neither of advantages and rewards, or inplace with logits that cannot be overwritten: a leaf, a view of one, an inference tensor, rows that
    overlap.
    """
    check(logits.ndim == 2 and logits.is_floating_point(), f"logits_grpo: logits is {tuple(logits.shape)} {logits.dtype}; wanted (T, V) floating")
    check(logits.dtype != torch.float16, "logits_grpo: logits are float16, in which a gradient made before loss scaling underflows; use bfloat16")
    check(logits.shape[1] > 0, "logits_grpo: logits have no columns")
    check_targets("logits_grpo", targets, logits.shape[0], logits.shape[1], temperature)
    check_batch("logits_grpo", targets, old_logps, advantages, rewards, group_ids, scale, baseline, eps, ref_logps, rollout_logps, mask, cu_seqlens,
                variant)  # fmt: skip
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        refuse_overwriting(logits)
    return op(backend, logits=logits, targets=targets, old_logps=old_logps, advantages=advantages, cu_seqlens=cu_seqlens, rewards=rewards,
              group_ids=group_ids, scale=scale, baseline=baseline, eps=float(eps), ref_logps=ref_logps, rollout_logps=rollout_logps, mask=mask,
              variant=variant, temperature=float(temperature), num_tokens=num_tokens, num_sequences=num_sequences, inplace=inplace)  # fmt: skip


def check_batch(where, targets, old_logps, advantages, rewards, group_ids, scale, baseline, eps, ref_logps, rollout_logps, mask, cu_seqlens, variant):
    check_loss_tensors(where, targets, old_logps, ref_logps, rollout_logps, mask, cu_seqlens, variant)
    S = cu_seqlens.numel() - 1
    check((advantages is None) == (rewards is not None and group_ids is not None) and (rewards is None) == (group_ids is None),
          f"{where}: give either advantages, or rewards and group_ids")  # fmt: skip
    if rewards is not None:
        check_advantage_options(where, rewards, group_ids, scale, baseline, eps)
    given = rewards if advantages is None else advantages
    check(given.shape == (S,), f"{where}: {'rewards' if advantages is None else 'advantages'} is {tuple(given.shape)}; wanted ({S},)")


def refuse_overwriting(logits: Tensor) -> None:
    root = logits if logits._base is None else logits._base
    check(not (root.is_leaf and root.requires_grad), "logits_grpo: inplace would overwrite a leaf tensor that requires grad")
    check(not logits.is_inference(), "logits_grpo: inplace needs logits with a version counter; these come from inference mode")
    T, V = logits.shape
    check((V == 1 or logits.stride(1) == 1) and (T <= 1 or logits.stride(0) >= V),
          f"logits_grpo: inplace needs rows that do not overlap; strides are {logits.stride()}")  # fmt: skip


class Tokens(NamedTuple):
    """What the loss knows of each token before its log-prob; (T,) each, fp32 (fp64 for fp64), 0 at masked tokens."""

    targets: Tensor  # int64
    scale: Tensor  # share of the token's loss in the result: mask over all denominators; 0 if and only if masked
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None  # None where the loss has no KL
    rho: Tensor | None  # tis, token_mask: rollout_logps.  sequence_mask: log of the sequence's ratio, to be weighted as it is

    def at(self, rows) -> "Tokens":
        return Tokens(*(None if x is None else x[rows] for x in self))


class Rows(NamedTuple):
    """What one read of the logits gives; (T,) each."""

    logps: Tensor  # 0 where masked
    entropy: Tensor  # 0 where masked
    m: Tensor  # largest raw logit of the row, -inf where all are
    S: Tensor  # sum of exp((logit - m) / temperature)
    coefs: Tensor | None  # d loss / d logp; exactly 0 for a row without gradient


class Steps(NamedTuple):
    """One backend's share; the loops of linear_grpo and logits_grpo are written once."""

    advantage: Callable  # (rewards, group_ids, scale, baseline, eps) -> (S,)
    loss: Callable  # policy_loss
    rows: Callable  # (logits, tokens, variant or None for no coefs, temperature, dlogits to write or None) -> Rows
    dlogits: Callable  # (logits, targets, m, S, coefs, temperature, out, rows=None): gradient of all rows, or of those listed, into out
    scale: Callable  # (x, factor): matrix x *= factor, a 0-d tensor, without touching x where the factor is 1


def token_level(v: LossVariant, old_logps: Tensor | None) -> bool:
    """Is a token's coefficient known once its own log-prob is?"""
    return v.ratio == "token" and not (v.correction == "sequence_mask" and old_logps is None)


def loss_tokens(targets, vocab, old_logps, advantages, cu_seqlens, ref_logps, rollout_logps, mask, variant, num_tokens, num_sequences, dtype):
    """The effective mask and Tokens.  Counts are integers and sums run in order, so equal inputs give equal bits; nothing waits for the device."""
    v, device = variant, targets.device
    keep = (targets >= 0) & (targets < vocab)
    if mask is not None:
        keep = keep & mask
    cu = cu_seqlens.long()
    # the sequence of token t is the first whose end lies beyond t
    sequence = torch.searchsorted(cu[1:].contiguous(), torch.arange(targets.numel(), device=device), right=True)
    before = F.pad(keep.cumsum(0), (1, 0))
    count = before[cu[1:]] - before[cu[:-1]]

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(keep, x.detach().to(dtype), 0.0)

    old, rollout = clean(old_logps), clean(rollout_logps)
    given = (num_tokens, count.sum()) if v.aggregation == "token_mean" else (num_sequences, (count > 0).sum())
    total = torch.as_tensor(given[1] if given[0] is None else given[0], device=device).to(dtype).clamp_min(1)
    scale = keep.to(dtype) / (total * v.max_tokens if v.aggregation == "constant" else total)
    if v.aggregation == "sequence_mean":
        scale = scale / count.clamp_min(1).to(dtype)[sequence]
    rho = None if v.correction == "none" else rollout
    if v.correction == "sequence_mask" and old is not None:
        rho = torch.segment_reduce(old - rollout, "sum", lengths=cu.diff(), unsafe=True)[sequence]
    return keep, Tokens(targets, scale, clean(advantages[sequence]), old, None if v.kl == "none" else clean(ref_logps), rho)


def loss_and_statistics(steps: Steps, logps: Tensor, entropy: Tensor, want_coefs: bool, **call):
    """Loss, statistics and, if wanted, d loss / d logps, from the log-probs of all tokens."""
    logps = logps.detach().requires_grad_(want_coefs)
    with torch.set_grad_enabled(want_coefs):
        loss, stats = steps.loss(logps=logps, **call)
    coefs = None
    if want_coefs:
        coefs = torch.where(logps.isnan(), logps.detach(), torch.autograd.grad(loss, logps)[0])  # clamp's derivative is 0 at NaN
    return loss.detach(), stats | {"entropy_sum": entropy.sum(dtype=torch.float64).float()}, coefs


def logits_loss(steps: Steps, logits, targets, old_logps, advantages, cu_seqlens, rewards, group_ids, scale, baseline, eps, ref_logps, rollout_logps,
                mask, variant, temperature, num_tokens, num_sequences, inplace):  # fmt: skip
    want = torch.is_grad_enabled() and logits.requires_grad
    direct = want and token_level(variant, old_logps)
    x, dtype = logits.detach(), accumulation_dtype(logits.dtype)
    with torch.no_grad():
        if advantages is None:
            advantages = steps.advantage(rewards.detach(), group_ids, scale, baseline, eps)
        advantages = advantages.detach()
        call = dict(old_logps=old_logps, advantages=advantages, cu_seqlens=cu_seqlens, ref_logps=ref_logps, rollout_logps=rollout_logps,
                    variant=variant, num_tokens=num_tokens, num_sequences=num_sequences)  # fmt: skip
        keep, tokens = loss_tokens(targets, x.shape[1], mask=mask, dtype=dtype, **call)
        dlogits = None
        if want:
            dlogits = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows = steps.rows(x, tokens, variant if direct else None, temperature, dlogits if direct else None)
    loss, stats, coefs = loss_and_statistics(steps, rows.logps, rows.entropy, want and not direct, mask=keep, **call)
    if rewards is not None:
        stats |= {"num_nan_rewards": rewards.isnan().sum().float()}
    if not want:
        return loss, stats
    if not direct:
        steps.dlogits(x, targets, rows.m, rows.S, coefs.masked_fill_(rows.m == -torch.inf, 0), temperature, dlogits)
    if inplace:  # a Triton kernel's writes are unknown to autograd
        torch.autograd.graph.increment_version(logits)
    return HandOverFunction.apply("logits_grpo", loss, steps.scale, (dlogits,), logits), stats


class HandOverFunction(torch.autograd.Function):
    """The loss, whose gradients are at hand and are given away once, scaled where they lie: a copy would cost as much as making them."""

    @staticmethod
    def forward(ctx, where, loss, scale, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        ctx.where, ctx.scale, ctx.dtypes, ctx.given_away = where, scale, [x.dtype for x in inputs], False
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        if ctx.given_away:
            raise RuntimeError(f"{ctx.where}: its gradients were handed out by the first backward; call {ctx.where} again")
        gradients = list(ctx.saved_tensors)
        ctx.given_away = True
        for i, (x, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if x is not None and x.dtype == dtype:
                ctx.scale(x, dloss)
            elif x is not None:  # accumulated in a wider dtype: scaled and rounded in one pass
                gradients[i] = torch.mul(x, dloss, out=torch.empty_like(x, dtype=dtype))
        return None, None, None, None, *gradients


def rows_reference(logits: Tensor, tokens: Tokens, variant: LossVariant | None, temperature: float, dlogits: Tensor | None = None) -> Rows:
    T, V = logits.shape
    step = max(1, PIECE // V)
    parts = []
    for i in range(0, max(T, 1), step):
        some = slice(i, i + step)
        rows = _rows_reference(logits[some], tokens.at(some), variant, temperature)
        if dlogits is not None:
            dlogits_reference(logits[some], tokens.targets[some], rows.m, rows.S, rows.coefs, temperature, dlogits[some])
        parts.append(rows)
    return Rows(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


def _rows_reference(logits, tokens, variant, temperature):
    dtype = accumulation_dtype(logits.dtype)
    m = logits.amax(1).to(dtype)
    nothing, skip = m == -torch.inf, tokens.scale == 0
    d = logits - m.masked_fill(nothing, 0.0).unsqueeze(1)
    if temperature != 1:
        d.mul_(1 / temperature)
    d_target = d.gather(1, tokens.targets.masked_fill(skip, 0).unsqueeze(1)).squeeze(1)
    e = d.exp()
    S = e.sum(1).masked_fill(nothing, 1.0)
    U = e.mul_(d.clamp_min_(torch.finfo(dtype).min)).sum(1)  # clamp: a forbidden token has d = -inf, and 0 * -inf is NaN
    logps = (d_target - S.log()).masked_fill(nothing, -torch.inf).masked_fill(skip, 0.0)
    entropy = (S.log() - U / S).masked_fill(nothing | skip, 0.0)
    coefs = None if variant is None else coefficients_reference(logps, tokens, variant).masked_fill(nothing | skip, 0.0)
    return Rows(logps, entropy, m, S, coefs)


def coefficients_reference(logps: Tensor, tokens: Tokens, v: LossVariant) -> Tensor:
    """d loss / d logp of a token-level loss, by differentiating policy_loss.py's terms."""
    A = tokens.advantages
    with torch.enable_grad():
        logps = logps.detach().requires_grad_()
        old = logps.detach() if tokens.old is None else tokens.old
        r = (logps - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        term, _, _ = surrogate_reference(v, logps, r, A)
        if v.correction != "none":
            term = term * correction_weight(v, tokens.rho if v.correction == "sequence_mask" else old - tokens.rho)
        if v.kl != "none":
            term = term + v.beta * kl_value(v, tokens.ref - logps)
        coefs = torch.autograd.grad((tokens.scale * term).sum(), logps)[0]
    return torch.where(logps.isnan(), logps.detach(), coefs)  # clamp's derivative is 0 at NaN, which would hide it


def dlogits_reference(logits, targets, m, S, coefs, temperature, out, rows=None) -> None:
    V = logits.shape[1]
    step = max(1, PIECE // V)
    for i in range(0, out.shape[0], step):
        some = slice(i, i + step) if rows is None else rows[i : i + step]
        part, c = out[i : i + step], coefs[some] / temperature
        d = part if part.dtype == m.dtype else torch.empty(part.shape, dtype=m.dtype, device=part.device)
        torch.sub(logits[some], m[some].unsqueeze(1), out=d)
        if temperature != 1:
            d.mul_(1 / temperature)
        d.exp_().mul_((-c / S[some]).unsqueeze(1))
        here = (targets[some] >= 0) & (targets[some] < V)  # another rank may hold the target's column
        d.scatter_add_(1, targets[some].clamp(0, V - 1).unsqueeze(1), torch.where(here, c, 0.0).unsqueeze(1))
        if (c == 0).any():  # 0 * NaN in a row that has no gradient
            d.masked_fill_((c == 0).unsqueeze(1), 0.0)
        if d is not part:
            part.copy_(d)


def scale_reference(x: Tensor, factor: Tensor) -> None:
    if factor != 1:
        x.mul_(factor)


REFERENCE = Steps(group_advantage_reference, policy_loss_reference, rows_reference, dlogits_reference, scale_reference)


def logits_grpo_reference(**call) -> tuple[Tensor, dict[str, Tensor]]:
    return logits_loss(REFERENCE, **call)


def why_not_rows_cuda(call: dict) -> str | None:
    if reason := why_not_cuda(call) or why_not_rows(call):
        return reason
    from .logits_grpo_cuda import why_not_on_chip

    return why_not_on_chip(call["logits"])


def _triton(**call) -> tuple[Tensor, dict[str, Tensor]]:
    from .logits_grpo_triton import TRITON

    return logits_loss(TRITON, **call)


op = register("logits_grpo", cuda=Backend(late("logits_grpo_cuda.logits_grpo_cuda"), why_not_rows_cuda), triton=Backend(_triton, why_not_rows),
              reference=Backend(logits_grpo_reference))  # fmt: skip
