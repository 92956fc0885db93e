"""Draw one token per row by inverse CDF, with the log-probability that the draw really had.

p = softmax(logits / temperature), then top-k (the k most likely), then top-p on what is left, renormalised (the shortest prefix in falling
order whose mass reaches top_p), then min-p (at least min_p times the largest).  Equal logits count as falling with the index: the lowest index
is kept first.  The token is the first whose cumulative probability over the kept ones, in vocabulary order, exceeds one uniform number of
Philox keyed by (seed, position): a sample does not depend on the batch it is in.  Temperature 0 takes the largest logit, lowest index first.

Whatever the filters, what they keep is a prefix of the tokens in falling order, so two numbers per row describe it (`Support` in logprob.py): the
smallest kept logit, and the highest index kept among the logits equal to it.  With them `logprob` rebuilds the same distribution from the same
logits, without a sort.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._philox import philox_uniform
from ._triton import why_not_triton
from .logprob import Support, supported, why_not_rows_cpu

MAX_VOCAB = 1 << 20  # of the Triton kernels: the tiles of a row are held in the registers of one program


class Sampled(NamedTuple):
    tokens: Tensor  # (B,) int64
    logps: Tensor  # (B,) fp32 (fp64 for fp64 logits), under the truncated, renormalised distribution that was drawn from; 0 for a greedy row
    full_logps: Tensor  # (B,) same dtype, under softmax(logits / temperature) without truncation; a greedy row uses temperature 1
    entropy: Tensor  # (B,) same dtype, of that untruncated distribution, in nats
    thresholds: Tensor  # (B,) same dtype, smallest kept logit before temperature; -inf = not truncated; a greedy row's largest; NaN = bad row
    last_kept: Tensor  # (B,) int64, highest index kept among the logits equal to the threshold, V - 1 where all are; a greedy row's token

    @property
    def support(self) -> Support:
        """What `logprob` takes to rebuild the truncated distribution."""
        return Support(self.thresholds, self.last_kept)


def sample(logits: Tensor, *, temperature: float | Tensor = 1.0, top_k: int | Tensor = 0, top_p: float | Tensor = 1.0, min_p: float | Tensor = 0.0,
           seeds: Tensor, positions: Tensor, backend: str | None = None) -> Sampled:  # fmt: skip
    """Sample one token per row of logits.

    logits: (B, V), -inf forbids a token.  temperature, top_k, top_p, min_p: a number or (B,) on the logits' device, top_k integers; temperature 0 =
    greedy; top_k 0 (or >= V), top_p 1 and min_p 0 switch that filter off.  seeds, positions: (B,) int64.  Returns Sampled, without gradient.
    A row with a NaN or +inf, or with nothing allowed, gets NaN log-probs and some token within [0, V).
    Raises ValueError on a shape mismatch or a parameter out of range (values of tensors are looked at on CPU only: no call waits for a GPU).
    """
    check(logits.ndim == 2 and logits.shape[1] > 0, lambda: f"sample: logits is {tuple(logits.shape)}; wanted (B, V) with V > 0")
    check_draw("sample", logits.shape[0], temperature, seeds, positions)
    check_parameter("sample", "top_k", top_k, logits.shape[0], lambda k: k >= 0, "wanted >= 0")
    check(not (isinstance(top_k, Tensor) and top_k.is_floating_point()), "sample: top_k is a tensor of floating-point numbers; wanted integers")
    check_parameter("sample", "top_p", top_p, logits.shape[0], lambda p: (0 < p) & (p <= 1), "wanted in (0, 1]")
    check_parameter("sample", "min_p", min_p, logits.shape[0], lambda p: (0 <= p) & (p <= 1), "wanted in [0, 1]")
    return Sampled(*op(backend, logits=logits.detach(), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds,
                       positions=positions))  # fmt: skip


def check_draw(where: str, rows: int, temperature: float | Tensor, seeds: Tensor, positions: Tensor) -> None:
    for name, value in (("seeds", seeds), ("positions", positions)):
        if value.shape != (rows,) or value.dtype != torch.int64:
            raise ValueError(f"{where}: {name} is {tuple(value.shape)} {value.dtype}; wanted ({rows},) int64")
    check_parameter(where, "temperature", temperature, rows, lambda t: (t >= 0) & (t < math.inf), "wanted >= 0")


def check_parameter(where: str, name: str, value: float | Tensor, rows: int, valid, wanted: str) -> None:
    if not isinstance(value, Tensor):
        check(bool(valid(value)), lambda: f"{where}: {name} is {value}; {wanted}")
        return
    check(value.shape == (rows,), lambda: f"{where}: {name} is {tuple(value.shape)}; wanted a number or ({rows},)")
    # on a GPU the values are not looked at, so that no call waits for the device
    check(value.is_cuda or bool(valid(value).all()), lambda: f"{where}: {name} holds another value; {wanted}")


@torch.no_grad()
def sample_reference(logits, temperature, top_k, top_p, min_p, seeds, positions):
    x = logits.to(accumulation_dtype(logits.dtype))
    V = x.shape[1]
    z, greedy = tempered(x, temperature)
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp_min(torch.finfo(z.dtype).min)).sum(-1)  # clamp: 0 * -inf is NaN
    kept, truncated = p, _truncated(top_k, top_p, min_p, V)
    thresholds, last_kept = x.new_full(x.shape[:1], -torch.inf), seeds.new_full(x.shape[:1], V - 1)
    if truncated is not False:
        keep, thresholds, last_kept = kept_tokens(x, p, top_k, top_p, min_p)
        if truncated is not True:
            thresholds, last_kept = thresholds.masked_fill(~truncated, -torch.inf), last_kept.masked_fill(~truncated, V - 1)
            keep |= ~truncated.unsqueeze(1)
        kept = torch.where(keep, p, 0.0)
    cdf = kept.double().cumsum(1)  # fp64: a tail token of 1e-8 must not drown at V = 150k
    total = cdf[:, -1:]
    # below the total even when the product rounds up to it, so that the draw always lands on a token of positive probability
    threshold = torch.minimum(philox_uniform(seeds, positions).unsqueeze(1) * total, total * (1 - 2.0**-52))
    tokens = torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp_max_(V - 1)
    if greedy is not None:
        tokens = torch.where(greedy, z.argmax(1), tokens)
    full_logps = log_p.gather(1, tokens.unsqueeze(1)).squeeze(1)
    logps = full_logps
    if truncated is not False:
        logps = (full_logps.double() - total.squeeze(1).log()).to(z.dtype).clamp_max_(0.0)
        if truncated is not True:
            logps = torch.where(truncated, logps, full_logps)
    if greedy is not None:
        logps = torch.where(greedy, full_logps - full_logps, logps)  # 0, or NaN in a bad row
        thresholds = torch.where(greedy, x.gather(1, tokens.unsqueeze(1)).squeeze(1), thresholds)
        last_kept = torch.where(greedy, tokens, last_kept)
    bad = full_logps.isnan()
    return tokens, logps, full_logps, entropy, thresholds.masked_fill_(bad, torch.nan), last_kept.masked_fill_(bad, V - 1)


def tempered(x: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """x / temperature, with temperature 1 where it is 0, and which rows those are; None = none."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(x.dtype)
        greedy = temperature == 0
        return x / temperature.masked_fill(greedy, 1.0).unsqueeze(1), greedy
    if temperature == 0:
        return x, torch.ones(len(x), dtype=torch.bool, device=x.device)
    return (x / temperature if temperature != 1 else x), None


def _truncated(top_k, top_p, min_p, V: int) -> bool | Tensor:
    """Whether any filter is on: for the whole batch, or (B,) where a parameter is per row."""
    filters = ((top_k > 0) & (top_k < V), top_p < 1, min_p > 0)
    if all(isinstance(on, bool) for on in filters):
        return any(filters)
    rows = next(on for on in filters if isinstance(on, Tensor))
    return sum(torch.as_tensor(on, device=rows.device) for on in filters) > 0


def kept_tokens(x: Tensor, p: Tensor, top_k, top_p, min_p) -> tuple[Tensor, Tensor, Tensor]:
    """keep (B, V), thresholds and last_kept (B,): what top-k, then top-p, then min-p leave of probabilities p, whose logits are x.

    Sorts values only.  A token of logit -inf is not kept.  Which filters are on may differ by row.
    """
    V, cut, partial = x.shape[1], None, ()
    last_kept = torch.full_like(p[:, 0], V - 1, dtype=torch.int64)
    if isinstance(top_k, Tensor) or 0 < top_k < V or isinstance(top_p, Tensor) or top_p < 1:
        cut, count = _last_probability(p, top_k, top_p)
        partial = (_count(p >= cut) > count).squeeze(1).nonzero().squeeze(1)  # where not all of the equal ones are kept
    if isinstance(min_p, Tensor) or min_p > 0:
        least = (min_p.to(p.dtype).unsqueeze(1) if isinstance(min_p, Tensor) else min_p) * p.amax(1, keepdim=True)
        cut = least if cut is None else torch.maximum(cut, least)
    thresholds = torch.where(p >= cut, x, torch.inf).amin(1)
    if len(partial):
        thresholds[partial], last_kept[partial] = _cut_ties(x[partial], p[partial], cut[partial], count[partial], thresholds[partial])
    forbidden = thresholds == -torch.inf
    if forbidden.any():
        thresholds[forbidden] = torch.where(x[forbidden] > -torch.inf, x[forbidden], torch.inf).amin(1)
        last_kept[forbidden] = V - 1
    keep = x >= thresholds.unsqueeze(1)
    if len(partial):
        keep[partial] &= supported(x[partial], (thresholds[partial], last_kept[partial]))
    return keep, thresholds, last_kept


def _cut_ties(x: Tensor, p: Tensor, cut: Tensor, count: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """thresholds and last_kept of rows where not all of the tokens of probability `cut` are among the `count` first.

    Different logits may round to one probability: then the larger logit goes first, then the lower index.
    """
    tied = p == cut
    room = count - _count(p > cut)
    cumulative = tied.cumsum(1)
    last = (cumulative == room).to(torch.uint8).argmax(1)  # of those that reach `room`, the first
    cutting = (room < cumulative[:, -1:]).squeeze(1)  # unless min-p cuts above them
    equal_left = cutting.clone()  # are there logits equal to the last one that are not kept?
    low, high = torch.where(tied, x, torch.inf).amin(1), torch.where(tied, x, -torch.inf).amax(1)
    for row in ((low < high) & cutting).nonzero().squeeze(1).tolist():
        n, index = int(room[row]), tied[row].nonzero().squeeze(1)
        order = index[x[row, index].argsort(descending=True, stable=True)]
        last[row], equal_left[row] = order[n - 1], x[row, order[n - 1]] == x[row, order[n]]
    thresholds = torch.where(cutting, x.gather(1, last.unsqueeze(1)).squeeze(1), thresholds)
    return thresholds, torch.where(equal_left, last, x.shape[1] - 1)


def _last_probability(p: Tensor, top_k, top_p) -> tuple[Tensor, Tensor]:
    """The smallest probability that top-k, then top-p keep, and how many tokens they keep, (B, 1) each."""
    V = p.shape[1]
    if isinstance(top_k, Tensor):
        k = top_k.long().unsqueeze(1)
        k = torch.where((k > 0) & (k < V), k, V)
        falling = _sort_falling(p)
    else:
        falling = torch.topk(p, top_k, dim=1).values if 0 < top_k < V else _sort_falling(p)
        k = torch.full_like(p[:, :1], falling.shape[1], dtype=torch.int64)
    count = k
    if isinstance(top_p, Tensor) or top_p < 1:
        mass = falling.double().cumsum(1)
        # a token stays while the mass in front of it has not reached top_p, so the first always stays
        if isinstance(top_p, Tensor):
            top_p = top_p.double().unsqueeze(1)
        count = torch.minimum(k, 1 + _count(mass[:, :-1] < top_p * mass.gather(1, k - 1)))
        if isinstance(top_p, Tensor):  # the last of a full prefix may carry too little mass to show in the sum
            count = torch.where(top_p < 1, count, k)
    return falling.gather(1, count - 1), count


def _count(mask: Tensor) -> Tensor:
    """(B, 1) int64, how many are true."""
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().sum(1, keepdims=True))  # a tenth of torch's time
    return mask.sum(1, keepdim=True)


def _sort_falling(p: Tensor) -> Tensor:
    if p.device.type == "cpu":
        import numpy as np

        return torch.from_numpy(np.sort(-p.numpy(), axis=1)).neg_()  # values without indices, vectorised
    return p.sort(dim=1, descending=True).values


def _why_not_cpu(call: dict) -> str | None:
    # parameters per row are small and converted
    return why_not_rows_cpu({"logits": call["logits"], "seeds": call["seeds"], "positions": call["positions"]})


def _why_not(call: dict) -> str | None:
    logits = call["logits"]
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"the logits of a row are not neighbours in memory (strides {logits.stride()})"
    if logits.shape[1] > MAX_VOCAB:
        return f"V is {logits.shape[1]}; at most {MAX_VOCAB}"
    return why_not_triton({"logits": logits, "seeds": call["seeds"], "positions": call["positions"]})


op = register("sample", triton=Backend(late("sample_triton.sample_triton"), _why_not),
              cpu=Backend(late("sample_cpu.sample_cpu"), _why_not_cpu), reference=Backend(sample_reference))  # fmt: skip
