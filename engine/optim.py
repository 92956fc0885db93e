"""Optimizer, learning-rate schedule and clipping as one step.

AdamW (arXiv 1711.05101) or Muon for matrices with AdamW for the rest, both PyTorch's own.  Muon's update is scaled to the RMS of an AdamW update
(`match_rms_adamw`), so that one learning rate serves both.
"""

import math

import torch
from torch import nn

from athanor.config import OptimizerConfig
from athanor.errors import UserError
from athanor.parallel import Ranks


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


class Optimizer:
    """Owns the update of one model's parameters; gradients are summed over ranks before clipping."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        tables |= {id(p) for n, p in model.named_parameters() if n.startswith(("lm_head", "value_head"))}
        stacks = [n for n, p in model.named_parameters() if p.dim() > 2]  # of experts
        if stacks and config.name == "muon":
            raise UserError(f"optimizer: name is muon, which takes no stacks of matrices such as {stacks[0]}; wanted adamw for a mixture of experts")
        matrices = [p for p in self.parameters if p.dim() >= 2 and id(p) not in tables]
        others = [p for p in self.parameters if all(p is not m for m in matrices)]
        adamw = dict(lr=config.lr, betas=config.betas, eps=config.eps)
        if config.name == "muon":
            self.parts = [
                torch.optim.Muon(matrices, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(others, weight_decay=0.0, fused=True, **adamw),
            ]
        else:
            groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
            self.parts = [torch.optim.AdamW(groups, fused=True, **adamw)]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, lr: float) -> float:
        """Reduce, clip and apply; return the gradient norm before clipping.  A non-finite norm raises FloatingPointError and applies nothing."""
        self.ranks.sum_gradients_(self.parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm}")
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        # Fused updates do not count as in-place writes (torch 2.13), by which the sampler and FP8 copies know that weights have changed.
        torch.autograd.graph.increment_version(self.parameters)
        return norm

    def state_dict(self) -> dict:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])
