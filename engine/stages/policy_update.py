"""The optimizer steps of one rollout: whole groups, packed micro-batches, denominators counted over the optimizer step and all ranks.

The samples of a group share the forward and backward of their prompt where they lie in one micro-batch.  A mixture of experts computes it for each:
its routers count what they choose for each sequence.

Samples whose advantage is zero add nothing to the gradient when the loss has no KL term, so they get no forward at all; they stay in the
denominators.

The old log-probs are the sampler's own.  A loss with an off-policy correction takes the trainer's instead, scored before the first of the updates,
and weighs their distance from the sampler's.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from athanor import watchdog
from athanor.batch import PackedBatch
from athanor.config import GRPOConfig
from athanor.context_parallel import part_of
from athanor.errors import UserError
from athanor.kernels import LogProbs, LossVariant, is_strict, policy_loss
from athanor.model.moe import Routes, routers
from athanor.model.transformer import Decoder
from athanor.optim import learning_rate
from athanor.samples import Sample
from athanor.stages.context import StageContext
from athanor.stages.distribution import Share, shares
from athanor.stages.routing import RouterBalance
from athanor.stages.training import TrainingLoop, completion_logprobs, optimizer_step, packed_batches

ROUNDING_GAP, EXACT_LIMIT = 1e-5, 1e-3  # nats; fp32 rounding in another order is about the first
NUM_GAP_SUMS = 3  # |trainer - sampler|, the k3 estimate of their KL divergence, tokens
SUMS = ("num_tokens", "ratio_sum", "clip_low", "clip_high", "old_kl_sum", "ref_kl_sum", "entropy_sum", "weight_sum", "rollout_kl_sum")


def update_policy(
    context: StageContext,
    config: GRPOConfig,
    variant: LossVariant,
    loop: TrainingLoop,
    reference: Decoder | None,
    groups: list[list[Sample]],
    places: list[int],
    advantages: Tensor,
    step: int,
) -> dict:
    """Take `updates_per_rollout` optimizer steps on the groups of all ranks; return means over the trained tokens and the on-policy log-prob gap.

    groups, advantages: this rank's; (S,) fp32, one per sample in their order.  places: of its groups among those of all ranks.  Raises UserError when
    the gap is above max_logp_gap.
    """
    ranks = context.ranks.data
    sums, gap_sums = torch.zeros(len(SUMS), dtype=torch.float64, device=ranks.device), None
    norms, ratio_max = [], torch.zeros((), dtype=torch.float64, device=ranks.device)
    options = {"hidden_size": loop.model.config.hidden_size, "all_live": reference is not None, "shared_prompts": shares_prompts(loop.model)}
    spread = shares(groups, places, advantages, config.updates_per_rollout, context.ranks, **options)
    with watchdog.phase("update", "scores before the first"):
        updates = [_Update(context, config, variant, loop.model, reference, share, moved=i > 0) for i, share in enumerate(spread)]
    balanced: dict = {}  # of the last update, which is the farthest from the sampler
    sampled: dict = {}
    for update in updates:
        rate = learning_rate(config.optimizer, step, config.steps)
        found, norm = optimizer_step(loop.optimizer, update.parts, update.loss, rate, num_figures=len(SUMS) + NUM_GAP_SUMS)
        norms.append(norm)
        balanced = update.balance.finish(loop.applied(norm, float(found[0]), update.replay))
        sums += found[1 : 1 + len(SUMS)]
        if update is updates[0]:  # later ones are scored by other weights than those that sampled them
            gap_sums = found[1 + len(SUMS) :]
            if config.routing_replay == "rollout":  # the same weights: what is left is the difference between sampler and trainer
                sampled = {"rollout_route_disagreement": balanced.get("route_disagreement", 0.0)}
        ratio_max = torch.maximum(ratio_max, update.ratio_max)
    gap = updates[0].gap
    ranks.max_(gap)
    ranks.max_(ratio_max)
    # Of a split layer's products each rank has a part, summed in another order than the sampler's.
    exact = (ranks.device.type == "cpu" or is_strict()) and context.ranks.tensor.world == 1
    limit = config.max_logp_gap or (EXACT_LIMIT if exact else None)
    # NaN must not pass, except with an update that was skipped for it
    if limit is not None and not float(gap) <= limit and np.isfinite(norms[0]):
        raise UserError(
            f"stage {context.name}, step {step + 1}: sampled log-probs differ from the trainer's by {float(gap):.2e}, "
            f"more than max_logp_gap = {limit}"
        )
    if exact and float(gap) > ROUNDING_GAP:
        context.console.warn(
            f"{context.name}: sampled log-probs differ from the trainer's by more than {ROUNDING_GAP:g} nats here (logp_gap_max in metrics.jsonl)"
        )
    values = dict(zip(SUMS, sums.tolist(), strict=True))
    tokens = max(values["num_tokens"], 1.0)
    gap_mean, gap_k3 = (gap_sums[:2] / gap_sums[2].clamp_min(1)).tolist()
    correction = {}
    if variant.correction != "none":
        correction = {"correction_weight": values["weight_sum"] / tokens, "kl_rollout": values["rollout_kl_sum"] / tokens}
    return correction | balanced | sampled | {
        "logp_gap_max": float(gap),
        "logp_gap_mean": gap_mean,
        "logp_gap_k3": gap_k3,
        "grad_norm": float(np.mean(norms)),
        "entropy": values["entropy_sum"] / tokens,
        "clip_fraction": (values["clip_low"] + values["clip_high"]) / tokens,
        "kl_old": values["old_kl_sum"] / tokens,
        "kl_ref": values["ref_kl_sum"] / tokens,
        "ratio_mean": values["ratio_sum"] / tokens,
        "ratio_max": float(ratio_max),
    }


def shares_prompts(model: Decoder) -> bool:
    return not routers(model)


def check_experts(name: str, config: GRPOConfig, model: Decoder) -> None:
    """Refuse routing_replay for a model without routers."""
    if config.routing_replay != "off" and not routers(model):
        raise UserError(f"stage {name}: routing_replay is {config.routing_replay}, but the model has no experts; wanted off")


class _Update:
    """The samples of one optimizer step on this rank, and the loss of each of their micro-batches."""

    def __init__(self, context, config: GRPOConfig, variant: LossVariant, model: Decoder, reference, share: Share, *, moved: bool):
        """moved: an update of the same rollout goes before this one."""
        self.variant, self.model, self.reference, self.temperature = variant, model, reference, config.sampling.temperature
        self.num_tokens, self.num_sequences = share.num_tokens, share.num_sequences
        self.balance = RouterBalance(model, config, context.ranks.data)
        self.samples, self.advantages = share.samples, share.advantages.to(context.ranks.device)
        self.parts, first = [], 0  # micro-batches of each part
        for size in share.sizes:
            own = self.samples[first : first + size]
            prompts, completions = [s.prompt_ids for s in own], [s.token_ids for s in own]
            batches = packed_batches(model, context.ranks, prompts, completions, config.micro_batch_tokens, share_prompts=shares_prompts(model))
            self.parts.append([replace(batch, sequences=batch.sequences + first) for batch in batches])
            first += size
        self.batches = sum(self.parts, [])
        # On the device, so that no micro-batch waits for it
        self.gap, self.ratio_max = torch.zeros(2, dtype=torch.float64, device=context.ranks.device)
        self.old: dict[int, Tensor] = {}  # the trainer's log-probs before the first update, by batch
        # the experts of the sampler or of before the first update, by batch
        self.recorded = {id(batch): self._sampled_routes(batch) for batch in self.batches} if config.routing_replay == "rollout" else {}
        self.corrected = variant.correction != "none"
        replays = config.routing_replay == "trainer" and moved  # before the first update the routers choose what they would record
        if self.corrected or replays:
            with torch.no_grad():
                for batch in self.batches:
                    routes = self.balance.routes(batch, self.recorded.get(id(batch)))
                    logps = self._score(model, batch, routes).logps
                    if self.corrected:
                        self.old[id(batch)] = logps
                    if replays:
                        self.recorded[id(batch)] = routes.recorded

    def _score(self, model: Decoder, batch: PackedBatch, routes: Routes | None = None) -> LogProbs:
        return completion_logprobs(model, batch, self.temperature, self._column(batch, "support"), routes)

    def _column(self, batch: PackedBatch, name: str):
        """A column of the batch's samples end to end on its device: `logps`, or the pair of `support` (None without truncation or samples)."""
        values = [getattr(self.samples[i], name) for i in batch.sequences]
        if not values or values[0] is None:
            return None
        joined = [np.concatenate(v) for v in (zip(*values, strict=True) if name == "support" else [values])]
        tensors = [torch.from_numpy(x).to(batch.input_ids.device) for x in joined]
        return tuple(tensors) if name == "support" else tensors[0]

    def _sampled_routes(self, batch: PackedBatch) -> Tensor:
        """(L, T, k) int32, the experts that the sampler chose for this rank's inputs of the batch: all of a sequence but its last token."""
        parts = [part for i in batch.sequences for prompt, own in [self.samples[i].routes] for part in (prompt, own[1:])]
        routes = part_of(self.model, len(batch.input_ids)).rows(np.concatenate(parts))
        return torch.from_numpy(routes).to(batch.input_ids.device, torch.int32).transpose(0, 1).contiguous()

    def replay(self) -> dict:
        """What the loss is computed from, besides the weights; `batches[i].sequences` index the samples' columns."""
        columns = {name: [getattr(s, name) for s in self.samples] for name in ("prompt_ids", "token_ids", "logps", "support", "text", "finish")}
        return {"batches": self.batches, "advantages": self.advantages, "num_tokens": self.num_tokens, "num_sequences": self.num_sequences, **columns}

    def loss(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Loss of one micro-batch, already divided by the denominators of the whole optimizer step, and its SUMS and sums of the gap."""
        rollout = self._column(batch, "logps")
        routes = self.balance.routes(batch, self.recorded.get(id(batch)))
        scored = self._score(self.model, batch, routes)
        ref_logps = None
        if self.reference is not None:
            with torch.no_grad():
                ref_logps = self._score(self.reference, batch).logps
        if not batch.num_targets:  # nothing but the calls that other ranks wait for
            return scored.logps.sum() + self.balance.loss(routes, 0.0), None
        advantages = self.advantages[torch.from_numpy(batch.sequences).to(rollout.device)]
        loss, stats = policy_loss(
            scored.logps, self.old[id(batch)] if self.corrected else rollout, advantages, batch.loss_cu_seqlens, ref_logps=ref_logps,
            rollout_logps=rollout if self.corrected else None, variant=self.variant, num_tokens=self.num_tokens, num_sequences=self.num_sequences,
        )  # fmt: skip
        stats = {**stats, "entropy_sum": scored.entropy.sum()}
        self.ratio_max = torch.maximum(self.ratio_max, stats["ratio_max"].double())
        difference = (scored.logps.detach() - rollout).double()
        self.gap = torch.maximum(self.gap, difference.abs().max())
        gap_sums = difference.abs().sum(), (difference.expm1() - difference).sum(), difference.new_full((), len(rollout))
        figures = torch.stack([*(stats[name].detach().double() for name in SUMS), *gap_sums])
        return loss + self.balance.loss(routes, batch.num_targets / max(self.num_tokens, 1)), figures
