"""Draw one token per row by inverse CDF, with the log-probability that the draw really had.

p = softmax(logits / temperature), then top-k (the k most likely), then top-p on what is left, renormalised (the shortest prefix in falling
order whose mass reaches top_p), then min-p (at least min_p times the largest).  Equal logits count as falling with the index: the lowest index
is kept first.  The token is the first whose cumulative probability over the kept ones, in vocabulary order, exceeds one uniform number of
Philox keyed by (seed, position): a sample does not depend on the batch it is in.  Temperature 0 takes the largest logit, lowest index first.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, register
from ._philox import philox_uniform


class Sampled(NamedTuple):
    tokens: Tensor  # (B,) int64
    logps: Tensor  # (B,) fp32, under the truncated and renormalised distribution that was drawn from; 0 for a greedy row
    full_logps: Tensor  # (B,) fp32, under softmax(logits / temperature) without truncation; a greedy row uses temperature 1
    entropy: Tensor  # (B,) fp32, of that untruncated distribution, in nats


def sample(logits: Tensor, *, temperature: float | Tensor = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
           seeds: Tensor, positions: Tensor, backend: str | None = None) -> Sampled:  # fmt: skip
    """Sample one token per row of logits.

    logits: (B, V), -inf forbids a token.  temperature: a number or (B,), 0 = greedy.  top_k 0, top_p 1 and min_p 0 switch that filter off.
    seeds, positions: (B,) int64.  Returns Sampled, without gradient.  A row with a NaN, or with nothing allowed, gets NaN log-probs
    and some token within [0, V).  Raises ValueError on a shape mismatch or a parameter out of range.
    """
    check(logits.ndim == 2 and logits.shape[1] > 0, f"sample: logits is {tuple(logits.shape)}; wanted (B, V) with V > 0")
    for name, value in (("seeds", seeds), ("positions", positions)):
        check(value.shape == logits.shape[:1] and value.dtype == torch.int64,
              f"sample: {name} is {tuple(value.shape)} {value.dtype}; wanted ({logits.shape[0]},) int64")  # fmt: skip
    if isinstance(temperature, Tensor):
        check(temperature.shape == logits.shape[:1], f"sample: temperature is {tuple(temperature.shape)}; wanted a number or ({logits.shape[0]},)")
        # on a GPU the values are not looked at, so that no call waits for the device
        check(temperature.is_cuda or bool((temperature >= 0).all()), "sample: temperature holds a value below 0 or NaN; wanted >= 0")
    else:
        check(temperature >= 0 and math.isfinite(temperature), f"sample: temperature is {temperature}; wanted >= 0")
    check(top_k >= 0, f"sample: top_k is {top_k}; wanted >= 0")
    check(0 < top_p <= 1, f"sample: top_p is {top_p}; wanted in (0, 1]")
    check(0 <= min_p <= 1, f"sample: min_p is {min_p}; wanted in [0, 1]")
    return Sampled(*op(backend, logits=logits.detach(), temperature=temperature, top_k=int(top_k), top_p=float(top_p), min_p=float(min_p),
                       seeds=seeds, positions=positions))  # fmt: skip


@torch.no_grad()
def sample_reference(logits, temperature, top_k, top_p, min_p, seeds, positions):
    z = logits.to(accumulation_dtype(logits.dtype))
    greedy = None
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype)
        greedy = temperature == 0
        z = z / temperature.masked_fill(greedy, 1.0).unsqueeze(1)
    elif temperature == 0:
        greedy = torch.ones(len(z), dtype=torch.bool, device=z.device)
    elif temperature != 1:
        z = z / temperature
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp_min(torch.finfo(z.dtype).min)).sum(-1)  # clamp: 0 * -inf is NaN
    kept = p
    if top_k and top_k < z.shape[1] or top_p < 1 or min_p > 0:
        kept = torch.where(kept_tokens(z, p, top_k, top_p, min_p), p, 0.0)
    cdf = kept.double().cumsum(1)  # fp64: a tail token of 1e-8 must not drown at V = 150k
    total = cdf[:, -1:]
    # below the total even when the product rounds up to it, so that the draw always lands on a token of positive probability
    threshold = torch.minimum(philox_uniform(seeds, positions).unsqueeze(1) * total, total * (1 - 2.0**-52))
    tokens = torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp_max_(z.shape[1] - 1)
    if greedy is not None:
        tokens = torch.where(greedy, z.argmax(1), tokens)
    full_logps = log_p.gather(1, tokens.unsqueeze(1)).squeeze(1)
    logps = full_logps
    if kept is not p:
        logps = (full_logps.double() - total.squeeze(1).log()).to(z.dtype).clamp_max_(0.0)
    if greedy is not None:
        logps = torch.where(greedy, torch.zeros_like(logps), logps)
    return tokens, logps, full_logps, entropy


def kept_tokens(z: Tensor, p: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(B, V) bool: what top-k, then top-p, then min-p leave.  Sorts values only; ties at the last kept value go to the lowest index."""
    keep = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < z.shape[1] or top_p < 1:
        if 0 < top_k < z.shape[1]:
            falling = torch.topk(p, top_k, dim=1).values
        else:
            falling = _sort_falling(p)
        count = torch.full_like(p[:, :1], falling.shape[1], dtype=torch.int64)
        if top_p < 1:
            mass = falling.double().cumsum(1)
            # a token stays while the mass in front of it has not reached top_p, so the first always stays
            count = 1 + (mass[:, :-1] < top_p * mass[:, -1:]).sum(1, keepdim=True)
        last = falling.gather(1, count - 1)
        keep = p > last
        tied = p == last
        room = count - keep.sum(1, keepdim=True)
        keep |= tied & (tied.cumsum(1) <= room)
    if min_p > 0:
        keep &= p >= min_p * p.amax(1, keepdim=True)
    return keep


def _sort_falling(p: Tensor) -> Tensor:
    if p.device.type == "cpu":
        import numpy as np

        return torch.from_numpy(np.sort(-p.numpy(), axis=1)).neg_()  # values without indices, vectorised
    return p.sort(dim=1, descending=True).values


op = register("sample", reference=Backend(sample_reference))
