"""Balance of a mixture of experts over one optimizer step: selection biases (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) and the sequence balance
loss: the mean over the step's sequences weighted by their trained tokens, which does not depend on how they are packed.  For a dense model all of
it is nothing."""

import torch
from torch import Tensor

from athanor.batch import PackedBatch
from athanor.config import TrainConfig
from athanor.context_parallel import part_of
from athanor.model.moe import Routes, imbalance, rebalance_, routers
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks


class RouterBalance:
    """Made for one step: `routes` goes into each training forward, `loss` is added to what it trains, `finish` follows the optimizer's step."""

    def __init__(self, model: Decoder, config: TrainConfig, ranks: Ranks):
        """ranks: with micro-batches of their own, `Ranks.data`."""
        self.model, self.ranks, self.rate, self.alpha = model, ranks, config.router_bias_rate, config.balance_loss
        self.routers = routers(model)
        self.counts: Tensor | None = None  # (layers, E) fp64
        # replayed choices that the routers would not have made, and all that were replayed
        self.changed = torch.zeros(2, dtype=torch.float64, device=ranks.device)

    def routes(self, batch: PackedBatch, replay: Tensor | None = None) -> Routes | None:
        """For a forward over this rank's part of the batch, filler rows behind it or not.  replay: `Routes.recorded` of an earlier one over it."""
        return self.routes_over(len(batch.input_ids), batch.cu_seqlens, batch.loss_cu_seqlens, replay)

    def routes_over(self, num_tokens: int, cu_seqlens: Tensor, loss_cu_seqlens: Tensor, replay: Tensor | None = None) -> Routes | None:
        """The same for packed sequences that are no PackedBatch.  loss_cu_seqlens: (S+1,) of what is trained of each."""
        if not self.routers:
            return None
        part = part_of(self.model, num_tokens)
        if not self.alpha:
            return Routes(replay, num_tokens=part.num_tokens)
        weights = loss_cu_seqlens.diff() / loss_cu_seqlens[-1].clamp_min(1)
        others = {"begin": part.begin, "across": part.sum} if part.ranks else {}
        return Routes(replay, num_tokens=part.num_tokens, cu_seqlens=cu_seqlens, weights=weights, **others)

    def loss(self, routes: Routes | None, share: float) -> Tensor | float:
        """alpha times the mean over layers, times the batch's share of the step; counts what the forward chose."""
        if routes is None:
            return 0.0
        counts = torch.stack(routes.counts).double()
        self.counts = counts if self.counts is None else self.counts + counts
        if routes.replay is not None:
            self.changed += torch.stack((torch.stack(routes.changed).sum(), (routes.replay >= 0).sum())).double()
        return self.alpha * share * torch.stack(routes.balance).mean() if routes.balance else 0.0

    def finish(self, applied: bool = True) -> dict:
        """Move the biases by the counts of all ranks, with a step that was applied; return the step's metrics."""
        if not self.routers:
            return {}
        experts = len(self.routers[0].weight)
        counts = self.counts if self.counts is not None else self.changed.new_zeros(len(self.routers), experts)
        for ranks in filter(None, (self.ranks, part_of(self.model, 0).ranks)):  # of those with other micro-batches, and with other rows of these
            ranks.sum_(counts, self.changed)
        metrics = {"route_disagreement": float(self.changed[0] / self.changed[1])} if self.changed[1] else {}
        if not counts.any():
            return metrics | {"router_imbalance": 0.0}
        if applied and self.rate and all(router.bias is not None for router in self.routers):
            rebalance_(self.model, counts, self.rate)
        return metrics | {"router_imbalance": imbalance(list(counts))}
