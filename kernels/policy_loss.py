"""Clipped policy-gradient losses of the GRPO family on packed log-probabilities, to be minimised.

With d = logp - old (clamped to +-20), r = exp(d) per token or exp(mean d) per sequence, A the sequence's advantage, lo = 1 - clip_low,
hi = 1 + clip_high, sg = stop gradient, the loss of one token is  c * surrogate + beta * KL, where surrogate is

  clip       -min(r A, clip(r, lo, hi) A)                       PPO / GRPO (arXiv 2402.03300, eq. 3); DAPO with hi != 1 + (1 - lo)
  dual_clip  the same, and at most -c A where A < 0              arXiv 1912.09729
  two_sided  -min(min(r, delta) A, clip(r, lo, hi) A)            INTELLECT-2 (arXiv 2505.07291); equals dual_clip with delta = c
  cispo      -sg(clip(r, lo, hi)) A logp                         MiniMax-M1 (arXiv 2506.13585); clip_low >= 1 means no lower bound
  sapo       -(4 / tau) sigmoid(tau (r - 1)) A                   arXiv 2511.20347, tau by the sign of A
  reinforce  -A logp                                             old_logps enter the statistics only

ratio="sequence" is GSPO (arXiv 2507.18071): every token of the sequence bears the loss of r_s, and the gradient goes through the mean.
ratio="sequence_token" has the value r_s with the gradient of the token itself: exp(logp - sg(logp) + sg(log r_s)).
KL with e = ref - logp (clamped to +-20 where it is exponentiated):  k1 = -e,  k2 = e^2 / 2,  k3 = exp(e) - e - 1.
Correction weight c for samples drawn from other numerics, with rho = exp(old - rollout), not differentiated:  tis = min(rho, high);
token_mask = rho if low <= rho <= high else 0;  sequence_mask = R if low <= R <= high else 0, R = exp(sum over the sequence of log rho).
At a clip bound the gradient is kept (r in [lo, hi] counts as inside), as torch.min and torch.clamp give it.

Not here: VESPO, entropy bonus (needs logits), KL multiplied by the ratio.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, late, near_misses, register
from ._triton import why_not_triton

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: a token beyond has gradient 0 instead of an overflow

_CHOICES = {
    "ratio": ("token", "sequence", "sequence_token"),
    "surrogate": ("clip", "dual_clip", "two_sided", "cispo", "sapo", "reinforce"),
    "aggregation": ("token_mean", "sequence_mean", "constant"),
    "kl": ("none", "k1", "k2", "k3"),
    "correction": ("none", "tis", "token_mask", "sequence_mask"),
}


@dataclass(frozen=True)
class LossVariant:
    """One complete loss.  Checked when built: an option that the rest would ignore raises ValueError."""

    ratio: str = "token"
    surrogate: str = "clip"
    clip_low: float = 0.2  # lower bound is 1 - clip_low; >= 1 means none, as r > 0
    clip_high: float = 0.2  # upper bound is 1 + clip_high
    dual_clip: float | None = None  # c of dual_clip, >= 1 + clip_high; None = 3 for that surrogate
    delta: float | None = None  # of two_sided, >= 1 + clip_high
    tau_positive: float = 1.0  # sapo temperature for A > 0
    tau_negative: float = 1.05  # sapo temperature for A <= 0
    aggregation: str = "token_mean"
    max_tokens: int | None = None  # constant: sum / (num_sequences * max_tokens), Dr. GRPO
    kl: str = "none"
    beta: float = 0.0
    correction: str = "none"
    correction_low: float = 0.0  # of token_mask and sequence_mask
    correction_high: float | None = None  # None = 2 for tis and token_mask, 3 for sequence_mask

    def __post_init__(self):
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            check(value in known, f"LossVariant: {name} is {value!r}; {near_misses(value, known)}")
        check(self.clip_low >= 0 and self.clip_high >= 0, f"LossVariant: clip_low {self.clip_low}, clip_high {self.clip_high}; wanted >= 0")
        self._needs("dual_clip", self.surrogate == "dual_clip", "surrogate 'dual_clip'", default=3.0)
        self._needs("delta", self.surrogate == "two_sided", "surrogate 'two_sided'")
        self._needs("max_tokens", self.aggregation == "constant", "aggregation 'constant'")
        self._needs("correction_high", self.correction != "none", "a correction", default=3.0 if self.correction == "sequence_mask" else 2.0)
        for name in ("dual_clip", "delta"):
            value = getattr(self, name)
            check(value is None or value >= 1 + self.clip_high, f"LossVariant: {name} is {value}; wanted >= 1 + clip_high = {1 + self.clip_high}")
        check(self.max_tokens is None or self.max_tokens > 0, f"LossVariant: max_tokens is {self.max_tokens}; wanted > 0")
        check(self.tau_positive > 0 and self.tau_negative > 0, "LossVariant: tau_positive and tau_negative must be > 0")
        check(self.beta >= 0, f"LossVariant: beta is {self.beta}; wanted >= 0")
        check((self.kl == "none") == (self.beta == 0), f"LossVariant: kl {self.kl!r} with beta {self.beta}: give both or neither")
        check(self.correction in ("token_mask", "sequence_mask") or self.correction_low == 0,
              f"LossVariant: correction_low is {self.correction_low}, which correction {self.correction!r} ignores")  # fmt: skip
        check(self.correction_high is None or self.correction_high > self.correction_low >= 0,
              f"LossVariant: correction bounds are {self.correction_low} and {self.correction_high}; wanted 0 <= low < high")  # fmt: skip
        check(self.surrogate not in ("cispo", "reinforce") or self.ratio == "token",
              f"LossVariant: surrogate {self.surrogate!r} weighs each token's own log-prob: ratio {self.ratio!r} has no meaning")  # fmt: skip

    def _needs(self, name: str, wanted: bool, by: str, default=None) -> None:
        value = getattr(self, name)
        check(wanted or value is None, f"LossVariant: {name} is {value}, but only {by} uses it")
        if wanted and value is None:
            check(default is not None, f"LossVariant: {by} needs {name}")
            object.__setattr__(self, name, default)


def policy_loss(logps: Tensor, old_logps: Tensor | None, advantages: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None,
                rollout_logps: Tensor | None = None, mask: Tensor | None = None, variant: LossVariant = LossVariant(),
                num_tokens: int | Tensor | None = None, num_sequences: int | Tensor | None = None,
                backend: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Compute the loss of `variant` over the completion tokens of a packed batch.

    logps, old_logps, ref_logps, rollout_logps: (N,) over completion tokens; only logps is differentiated.  old_logps None = logps, detached.
    advantages: (S,), constant within a sequence.  cu_seqlens: (S+1,) over the N tokens.  mask: (N,) bool, False = as if the token were not there
    (its log-probs may be anything, NaN included).  num_tokens, num_sequences: denominators of the whole optimizer step; None = the unmasked
    tokens and the sequences with any, of this call.  Returns the loss, 0-d, and detached fp32 sums to be added over
    micro-batches and ranks (ratio_max: maximum):
    num_tokens, num_sequences, ratio_sum, ratio_max, clip_low and clip_high (tokens whose gradient that bound cut), old_kl_sum (k3 of new from old),
    ref_kl_sum (k3; 0 without ref_logps), rollout_kl_sum (k3 of old from rollout; 0 without rollout_logps), weight_sum, weight_sq_sum (correction).
    Raises ValueError on a shape mismatch or when `variant` needs a tensor that is not given.
    """
    N = check_loss_tensors("policy_loss", logps, old_logps, ref_logps, rollout_logps, mask, cu_seqlens, variant)
    check(advantages.shape == (cu_seqlens.numel() - 1,),
          f"policy_loss: advantages is {tuple(advantages.shape)}; wanted ({cu_seqlens.numel() - 1},) for {N} tokens")  # fmt: skip
    return op(backend, logps=logps, old_logps=old_logps, advantages=advantages.detach(), cu_seqlens=cu_seqlens, ref_logps=ref_logps,
              rollout_logps=rollout_logps, mask=mask, variant=variant, num_tokens=num_tokens, num_sequences=num_sequences)  # fmt: skip


def check_loss_tensors(where, logps, old_logps, ref_logps, rollout_logps, mask, cu_seqlens, variant) -> int:
    check(isinstance(variant, LossVariant), f"{where}: variant is {type(variant).__name__}; wanted LossVariant (see athanor.losses for presets)")
    check(logps.ndim == 1, f"{where}: logps is {tuple(logps.shape)}; wanted (N,)")
    named = {"old_logps": old_logps, "ref_logps": ref_logps, "rollout_logps": rollout_logps, "mask": mask}
    for name, value in named.items():
        check(
            value is None or value.shape == logps.shape,
            f"{where}: {name} is {None if value is None else tuple(value.shape)}; wanted {tuple(logps.shape)}",
        )
    check(mask is None or mask.dtype == torch.bool, f"{where}: mask is {None if mask is None else mask.dtype}; wanted bool")
    check(cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 1, f"{where}: cu_seqlens is {tuple(cu_seqlens.shape)}; wanted (S+1,)")
    check(variant.kl == "none" or ref_logps is not None, f"{where}: kl {variant.kl!r} needs ref_logps")
    check(variant.correction == "none" or rollout_logps is not None, f"{where}: correction {variant.correction!r} needs rollout_logps")
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        check(first == 0 and last == logps.numel(), f"{where}: cu_seqlens runs from {first} to {last}; wanted 0 to {logps.numel()}")
    return logps.numel()


def policy_loss_reference(logps, old_logps, advantages, cu_seqlens, ref_logps, rollout_logps, mask, variant, num_tokens, num_sequences):
    v = variant
    dtype, N = accumulation_dtype(logps.dtype), logps.numel()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    m = None if mask is None else mask.to(dtype)
    sequence = None
    if mask is not None or v.ratio != "token" or v.aggregation == "sequence_mean" or v.correction == "sequence_mask":
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=logps.device), lengths, output_size=N)

    def clean(x: Tensor) -> Tensor:  # masked tokens become 0 before any arithmetic: inf * 0 would be NaN
        return x.to(dtype) if mask is None else torch.where(mask, x.to(dtype), 0.0)

    def per_sequence(x: Tensor) -> Tensor:
        return x.new_zeros(len(lengths)).index_add(0, sequence, x)

    logps = clean(logps)
    old = logps.detach() if old_logps is None else clean(old_logps.detach())
    A = torch.repeat_interleave(advantages.to(dtype), lengths, output_size=N)
    count = lengths.to(dtype) if mask is None else per_sequence(m)
    num_tokens = count.sum() if num_tokens is None else torch.as_tensor(num_tokens, dtype=dtype, device=logps.device)
    num_sequences = (count > 0).sum() if num_sequences is None else torch.as_tensor(num_sequences, dtype=dtype, device=logps.device)

    log_ratio = logps - old
    if v.ratio != "token":
        mean = (per_sequence(log_ratio) / count.clamp_min(1))[sequence]
        log_ratio = mean if v.ratio == "sequence" else logps - logps.detach() + mean.detach()
    r = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    loss, low, high = surrogate_reference(v, logps, r, A)

    weight = rollout_kl = ref_kl = None
    if rollout_logps is not None:
        log_rho = old - clean(rollout_logps.detach())
        rollout_kl = k3(-log_rho)
    if v.correction != "none":
        weight = correction_weight(v, per_sequence(log_rho)[sequence] if v.correction == "sequence_mask" else log_rho)
        loss = weight * loss
    if ref_logps is not None:
        e = clean(ref_logps.detach()) - logps
        ref_kl = k3(e if v.kl == "k3" else e.detach())
        if v.kl != "none":
            loss = loss + v.beta * (ref_kl if v.kl == "k3" else kl_value(v, e))

    if mask is not None:
        loss = loss * m
    if v.aggregation == "token_mean":
        loss = loss.sum() / num_tokens.clamp_min(1)
    elif v.aggregation == "sequence_mean":
        loss = (per_sequence(loss) / count.clamp_min(1)).sum() / num_sequences.clamp_min(1)
    else:
        loss = loss.sum() / (num_sequences.clamp_min(1) * v.max_tokens)

    with torch.no_grad():
        tokens = count.sum()

        def total(x: Tensor | None, otherwise: Tensor | float = 0.0) -> Tensor:
            if x is None:
                return torch.as_tensor(otherwise, dtype=torch.float32, device=logps.device)
            return (x if mask is None else x * m).sum().float()

        weights = (total(weight, tokens), total(weight if weight is None else weight.square(), tokens))
        stats = {
            "num_tokens": tokens.float(), "ratio_sum": total(r), "clip_low": total(low), "clip_high": total(high), "old_kl_sum": total(k3(log_ratio)),
            "ref_kl_sum": total(ref_kl), "rollout_kl_sum": total(rollout_kl), "weight_sum": weights[0], "weight_sq_sum": weights[1],
            "ratio_max": (r if mask is None else r * m).amax().float() if N else total(None), "num_sequences": (count > 0).sum().float(),
        }  # fmt: skip
    return loss, stats


def run_time_numbers(v: LossVariant) -> tuple[tuple[float, ...], tuple[float, float]]:
    """(lo, hi, cap, tau_positive, tau_negative, beta) and (weight_low, weight_high), the GPU kernels' scalar arguments."""
    # float() because an integer 3 would be compiled as one
    bounds = (1 - v.clip_low, 1 + v.clip_high, v.dual_clip or v.delta or float("inf"), v.tau_positive, v.tau_negative, v.beta)
    return tuple(map(float, bounds)), (float(v.correction_low), float(v.correction_high or 0))


def correction_weight(v: LossVariant, log_rho: Tensor) -> Tensor:
    """The weight of tis, token_mask or sequence_mask; log_rho is a token's, for sequence_mask the sum over its sequence."""
    rho = log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    inside = (rho >= v.correction_low) & (rho <= v.correction_high)
    return rho.clamp_max(v.correction_high) if v.correction == "tis" else torch.where(inside, rho, 0.0)


def kl_value(v: LossVariant, e: Tensor) -> Tensor:
    """k1, k2 or k3 for e = ref - logp."""
    return -e if v.kl == "k1" else e.square() / 2 if v.kl == "k2" else k3(e)


def k3(e: Tensor) -> Tensor:
    """exp(e) - e - 1 >= 0 for e = log p(reference) - log p(sampler)  (Schulman 2020, "Approximating KL divergence")."""
    e = e.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return e.expm1() - e


def surrogate_reference(v: LossVariant, logps: Tensor, r: Tensor, A: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss per token before correction and KL, and where the lower and where the upper bound cut the gradient (bool; None = there is no bound)."""
    lo, hi = 1 - v.clip_low, 1 + v.clip_high
    if v.surrogate == "reinforce":
        return -A * logps, None, None
    if v.surrogate == "sapo":
        tau = torch.full_like(A, v.tau_negative).masked_fill_(A > 0, v.tau_positive)
        return -(4 / tau) * torch.sigmoid(tau * (r - 1)) * A, None, None
    if v.surrogate == "cispo":
        return -r.detach().clamp(lo, hi) * A * logps, r < lo, r > hi
    below, above = (r < lo) & (A < 0), (r > hi) & (A > 0)
    inner = r
    if v.surrogate != "clip":
        ceiling = v.dual_clip if v.surrogate == "dual_clip" else v.delta
        # for A < 0 the surrogate is max(-r A, -clip(r) A), so capping r at c there caps the loss at -c A
        inner = torch.where(A < 0, r.clamp_max(ceiling), r)
        above |= (r > ceiling) & (A < 0)
    return -torch.minimum(inner * A, r.clamp(lo, hi) * A), below, above


op = register("policy_loss", triton=Backend(late("policy_loss_triton.policy_loss_triton"), why_not_triton), reference=Backend(policy_loss_reference))
