"""Optimizer, learning-rate schedule and clipping as one step.

AdamW (arXiv 1711.05101) or Muon for matrices with AdamW for the rest, both PyTorch's own.  Muon's update is scaled to the RMS of an AdamW update
(`match_rms_adamw`), so that one learning rate serves both.  Each expert of a mixture is a matrix of its own (arXiv 2502.16982 trains one so).
"""

import math
from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from athanor.config import OptimizerConfig
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


class SplitMuon(torch.optim.Optimizer):
    """Muon where PyTorch's own does not reach: matrices that are split over ranks, and stacks of experts, whose matrices are updated one by one.

    The momentum is split as the parameter is.  Gradient and matrix are whole, on every rank, one pair at a time; of a DTensor's stack each rank has
    whole matrices already, and updates its own.
    splits: of those that tensor parallelism has split.
    """

    def __init__(self, params, splits: dict[Tensor, Split], *, momentum: float, **options):
        self.splits = splits
        super().__init__(params, dict(momentum=momentum, **options))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            momentum, options = group["momentum"], {name: value for name, value in group.items() if name not in ("params", "momentum")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(buffer, momentum)
                if p.dim() == 3 and isinstance(p, DTensor) and p not in self.splits:
                    assert all(placement == Replicate() or placement == Shard(0) for placement in p.placements)
                    _muon_step_(p.to_local(), update.to_local(), **options)
                    continue
                full = self._whole(p, p)
                _muon_step_(full, self._whole(update, p), **options)
                assign_(p, full, self.splits.get(p))

    def _whole(self, x: Tensor, of: Tensor) -> Tensor:
        full = x.full_tensor() if isinstance(x, DTensor) else x.detach()
        return self.splits[of].whole(full) if of in self.splits else full


def _muon_step_(x: Tensor, update: Tensor, lr: float, weight_decay: float, adjust_lr_fn: str) -> None:
    """What PyTorch's Muon does to a matrix after the momentum, in place on a matrix or on each of a stack."""
    if x.dim() == 2:
        matrix = nn.Parameter(x)
        matrix.grad = update
        torch.optim.Muon([matrix], lr=lr, weight_decay=weight_decay, adjust_lr_fn=adjust_lr_fn, momentum=0.0, nesterov=False).step()
    elif len(x):  # a rank may have no expert
        assert adjust_lr_fn == "match_rms_adamw"
        x.mul_(1 - lr * weight_decay).add_(orthogonalised(update), alpha=-lr * 0.2 * math.sqrt(max(x.shape[1:])))


def orthogonalised(stack: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T of a stack (E, N, K), roughly, in bf16: five Newton-Schulz iterations with PyTorch's coefficients.

    PyTorch's own takes one matrix at a time, three times as slow for eight small experts on a CPU.
    """
    x = stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


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
        matrices = [p for p in self.parameters if p.dim() >= 2 and id(p) not in tables]
        others = [p for p in self.parameters if all(p is not m for m in matrices)]
        adamw = dict(lr=config.lr, betas=config.betas, eps=config.eps)
        if config.name == "muon":
            split = self.splits or any(isinstance(p, DTensor) or p.dim() > 2 for p in matrices)
            muon = partial(SplitMuon, splits=self.splits) if split else torch.optim.Muon
            self.parts = [
                muon(matrices, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
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

    def take_gradients(self) -> list[Tensor]:
        """The gradients, zeros where there is none, which are the caller's from now on."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        self.zero_grad()
        return gradients

    def set_gradients(self, gradients: list[Tensor]) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient

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
