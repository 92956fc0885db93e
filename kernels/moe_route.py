"""Routing of a mixture of experts: which k of E experts each token goes to, and with which weights.

softmax (Qwen3-MoE, arXiv 2505.09388; Shazeer et al., arXiv 1701.06538):   p = softmax(z),  ids = the k largest z,  w_j = p[ids_j]
sigmoid (DeepSeek-V3, arXiv 2412.19437, eqs. 12-16 and section 2.1.2):     s = sigmoid(z),  ids = the k largest s + bias,  w_j = s[ids_j]

The k largest come in descending order, of equal ones the lowest index first.  Groups: the E experts are n_group runs of neighbours; a group counts as
much as its two largest s + bias together, and only experts of the topk_group best groups are eligible.  The bias only selects (auxiliary-loss-free
balancing, Wang et al., arXiv 2408.15664).  normalize: w_j / (sum_j w_j + 1e-20 for sigmoid); then times `scale`.

Softmax selects by z itself, which has the order of p and is the same number on every machine.

Replay (R3, arXiv 2510.11370): the trainer takes the experts that the sampler chose, and weighs them by its own scores.  A row of -1 was not recorded
and is routed as usual.  A row with a NaN among its scores, where +inf makes one too, gets ids -1, weights NaN, and goes to no expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton
from .swiglu import whole_row_shares

SCORINGS = ("softmax", "sigmoid")
TINY = 1e-20  # DeepSeek-V3 adds it to the sum that it divides by
MOST_EXPERTS = 1024  # a token's scores are one row of registers


class Routing(NamedTuple):
    ids: Tensor  # (T, k) int32, -1 = nowhere
    weights: Tensor  # (T, k) fp32 (fp64 for fp64), differentiable in the logits
    counts: Tensor  # (E,) int32 tokens of each expert
    changed: Tensor  # () int32 replayed ids that the logits would not have chosen


def moe_route(logits: Tensor, k: int, *, scoring: str = "softmax", bias: Tensor | None = None, groups: tuple[int, int] = (1, 1),
              normalize: bool = True, scale: float = 1.0, replay: Tensor | None = None, backend: str | None = None) -> Routing:  # fmt: skip
    """Choose k experts per token.

    logits: (T, E).  bias: (E,), no gradient, and groups: (n_group, topk_group), for sigmoid alone.  replay: (T, k) int32 expert ids to take instead
    of the best, rows of -1 left out.  Returns `Routing`; its weights are differentiable in logits.
    Raises ValueError on a mismatch of shapes, dtypes or options, and, for CPU tensors, on replayed ids outside of [-1, E) or twice in a row.
    """
    check(logits.ndim == 2 and logits.is_floating_point() and 0 < k <= logits.shape[1] <= MOST_EXPERTS,
          lambda: f"moe_route: logits is {tuple(logits.shape)} {logits.dtype}, k is {k}; wanted (T, E) with k <= E <= {MOST_EXPERTS}")  # fmt: skip
    (T, E), (n_group, topk_group) = logits.shape, groups
    check(scoring in SCORINGS, lambda: f"moe_route: scoring is {scoring!r}; wanted one of {SCORINGS}")
    check(scoring == "sigmoid" or (bias is None and n_group == 1), "moe_route: softmax takes neither bias nor groups")
    check(E % n_group == 0 and 1 <= topk_group <= n_group and (n_group == 1 or E // n_group >= 2) and k <= topk_group * (E // n_group),
          lambda: f"moe_route: groups is {groups} and k is {k} for {E} experts; wanted equal groups of at least 2, topk_group of which hold "
                  f"k")  # fmt: skip
    check(bias is None or (bias.shape == (E,) and bias.is_floating_point()),
          lambda: f"moe_route: bias is {tuple(bias.shape)} {bias.dtype}; wanted ({E},)")  # fmt: skip
    check(replay is None or (replay.shape == (T, k) and replay.dtype == torch.int32),
          lambda: f"moe_route: replay is {tuple(replay.shape)} {replay.dtype}; wanted {(T, k)} int32")  # fmt: skip
    if replay is not None and replay.is_cpu and T:
        low, high = (int(x) for x in replay.aminmax())
        check(-1 <= low and high < E, lambda: f"moe_route: replay has ids from {low} to {high}; wanted [-1, {E})")
        whole = replay.sort(1).values
        check(not bool(((whole[:, 1:] == whole[:, :-1]) & (whole[:, 1:] >= 0)).any()) and bool(((replay < 0).all(1) | (replay >= 0).all(1)).all()),
              "moe_route: a row of replay names an expert twice or has only some ids")  # fmt: skip
    bias = None if bias is None else bias.detach()
    return Routing(*op(backend, logits=logits, k=k, scoring=scoring, bias=bias, groups=groups, normalize=normalize, scale=float(scale),
                       replay=replay))  # fmt: skip


def scores_of(logits: Tensor, scoring: str) -> Tensor:
    """(T, E) fp32 (fp64 for fp64): softmax or sigmoid of each row, with bits that do not depend on the other rows."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    if scoring == "softmax":
        return wide.softmax(-1)
    # A row whose neighbour does not touch it is a loop of its own on a CPU, with its last elements always the same ones; see `whole_row_shares`.
    wide = F.pad(wide, (0, 1))[:, :-1]
    return torch.cat([part.sigmoid() for part in wide.split(whole_row_shares(wide))])


def _largest(x: Tensor, k: int) -> Tensor:
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def chosen(logits: Tensor, scores: Tensor, k: int, bias: Tensor | None, groups: tuple[int, int], by_logits: bool) -> Tensor:
    """(T, k) int64: the best experts of each token, best first."""
    n_group, topk_group = groups
    if by_logits:
        return _largest(logits, k)
    keys = scores if bias is None else scores + bias
    if n_group > 1:
        grouped = keys.unflatten(1, (n_group, -1))
        worth = grouped.topk(2, dim=-1).values.sum(-1)
        eligible = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _largest(worth, topk_group), True)
        keys = grouped.masked_fill(~eligible[..., None], -torch.inf).flatten(1)
    return _largest(keys, k)


def moe_route_reference(logits: Tensor, k: int, scoring: str, bias: Tensor | None, groups: tuple[int, int], normalize: bool, scale: float,
                        replay: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    scores = scores_of(logits, scoring)
    with torch.no_grad():
        ids = chosen(logits, scores, k, bias, groups, scoring == "softmax")
        broken = scores.isnan().any(1)
        changed = torch.zeros((), dtype=torch.int32, device=logits.device)
        if replay is not None:
            taken = (replay[:, 0] >= 0) & ~broken
            strange = (replay[:, :, None] != ids[:, None, :]).all(2) & taken[:, None]
            changed = strange.sum(dtype=torch.int32)
            ids = torch.where(taken[:, None], replay.long(), ids)
    weights = scores.gather(1, ids)
    if normalize:
        total = sum(weights.unbind(1)) + (TINY if scoring == "sigmoid" else 0)  # one after the other, whatever the number of rows
        weights = weights / total[:, None]
    weights = weights.mul(scale).masked_fill(broken[:, None], torch.nan)
    ids = ids.masked_fill(broken[:, None], -1).to(torch.int32)
    counts = torch.zeros(logits.shape[1] + 1, dtype=torch.int32, device=logits.device)
    counts.index_add_(0, (ids.flatten() + 1).long(), torch.ones_like(ids).flatten())
    return ids, weights, counts[1:], changed


op = register("moe_route", triton=Backend(late("moe_route_triton.moe_route_triton"), why_not_triton), reference=Backend(moe_route_reference))
