"""Optimizer, learning-rate schedule and clipping as one step.

AdamW (arXiv 1711.05101) or Muon for matrices with AdamW for the rest, both PyTorch's own.  Muon's update is scaled to the RMS of an AdamW update
(`match_rms_adamw`), so that one learning rate serves both.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from athanor.config import OptimizerConfig
from athanor.errors import UserError
from athanor.parallel import Ranks
from athanor.sharding import assign_, split_parameters
from athanor.tensor_parallel import Split, splits


def learning_rate(config: OptimizerConfig, step: int, num_steps: int, peak: float | None = None) -> float:
    """Rate of 0-based `step`: linear warm-up, then constant or a cosine that reaches final_lr_ratio x peak on the last step."""
    peak = config.lr if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(num_steps - 1 - config.warmup_steps, 1)
    floor = config.final_lr_ratio
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class ShardedMuon(torch.optim.Muon):
    """Muon of matrices that are split over ranks: the momentum is split, too; gradient and matrix are whole, on every rank, one pair at a time.

    splits: of those that tensor parallelism has split.
    """

    def __init__(self, params, splits: dict[Tensor, Split], **options):
        self.splits = splits
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            momentum, options = group["momentum"], {name: value for name, value in group.items() if name not in ("params", "momentum", "nesterov")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - momentum)
                full = nn.Parameter(self._whole(p, p))
                full.grad = self._whole(p.grad.lerp(buffer, momentum), p)
                torch.optim.Muon([full], momentum=0.0, nesterov=False, **options).step()
                assign_(p, full.detach(), self.splits.get(p))

    def _whole(self, x: Tensor, of: Tensor) -> Tensor:
        full = x.full_tensor() if isinstance(x, DTensor) else x.detach()
        return self.splits[of].whole(full) if of in self.splits else full


def _by_split(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """In groups by the ranks that they are split over: PyTorch's operations on lists take no mixture of them."""
    groups: dict = {}
    for p in parameters:
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return list(groups.values())


class Optimizer:
    """Owns the update of one model's parameters; gradients are summed over ranks before clipping (those of split parameters were in backward).

    Split parameters (`sharding`) are DTensors, and so is their state, which is there from the beginning.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, ranks: Ranks):
        self.config, self.ranks, self.tensor = config, ranks.copies, ranks.tensor
        self.names, self.parameters = zip(*[(name, p) for name, p in split_parameters(model).items() if p.requires_grad], strict=True)
        found = splits(model)
        self.splits = {p: found[name] for name, p in zip(self.names, self.parameters, strict=True) if name in found}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        tables |= {id(p) for n, p in model.named_parameters() if n.startswith(("lm_head", "value_head"))}
        stacks = [n for n, p in model.named_parameters() if p.dim() > 2]  # of experts
        if stacks and config.name == "muon":
            raise UserError(f"optimizer: name is muon, which takes no stacks of matrices such as {stacks[0]}; wanted adamw for a mixture of experts")
        matrices = [p for p in self.parameters if p.dim() >= 2 and id(p) not in tables]
        others = [p for p in self.parameters if all(p is not m for m in matrices)]
        adamw = dict(lr=config.lr, betas=config.betas, eps=config.eps)
        if config.name == "muon":
            parts = {"splits": self.splits} if self.splits or any(isinstance(p, DTensor) for p in matrices) else {}
            muon = ShardedMuon if parts else torch.optim.Muon
            self.parts = [
                muon(matrices, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw", **parts),
                torch.optim.AdamW(others, weight_decay=0.0, fused=True, **adamw),
            ]
        else:
            groups = [{"params": alike, "weight_decay": config.weight_decay} for alike in _by_split(matrices)]
            groups += [{"params": alike, "weight_decay": 0.0} for alike in _by_split(others)]
            self.parts = [torch.optim.AdamW(groups, fused=True, **adamw)]
        self._allocate()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, lr: float) -> float:
        """Reduce, clip and apply; return the gradient norm before clipping.  When it is not finite, nothing is applied."""
        self.ranks.sum_gradients_([p for p in self.parameters if not isinstance(p, DTensor)])
        for p in self.parameters:
            if isinstance(p, DTensor) and p.grad is not None and p.grad.placements != p.placements:  # copies of experts have an addend each
                p.grad = p.grad.redistribute(placements=p.placements)
        norm = self._norm([p for p in self.parameters if p not in self.splits])
        if self.splits:
            squares = self._norm(list(self.splits)).square()
            self.tensor.sum_(squares)
            norm = (norm.square() + squares).sqrt()
        if not math.isfinite(norm):
            return float(norm)
        for group in _by_split(self.parameters):
            torch.nn.utils.clip_grads_with_norm_(group, self.config.grad_clip or math.inf, norm)
        self._apply(lr)
        return float(norm)

    def _norm(self, parameters: list[Tensor]) -> Tensor:
        norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in _by_split(parameters)]
        return reduce(torch.hypot, [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])

    def _apply(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        # Fused AdamW writes past PyTorch's version counters, by which a generator and FP8 copies know of new weights.
        torch.autograd.graph.increment_version(self.parameters)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a saved state must hold, by parameter and kind; writing into the tensors restores it.  Rates and the like are the configuration's."""
        names = {p: name for name, p in zip(self.names, self.parameters, strict=True)}
        states = [(names[p], state) for part in self.parts for p, state in part.state.items()]
        return {f"{name}.{kind}": value for name, state in states for kind, value in state.items()}

    @torch.no_grad()
    def _allocate(self) -> None:
        """Make the state of all parameters, as PyTorch does in a first step: one at rate 0 with gradients of 0, and then forgotten."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self._apply(0.0)
        self.zero_grad()
        for value in self.state_tensors().values():
            value.zero_()
