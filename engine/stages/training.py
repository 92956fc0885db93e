"""What every stage that trains has in common: one optimizer step over packed micro-batches, and states that a killed run goes on from."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from athanor import preemption, watchdog
from athanor.atomic import write_file
from athanor.batch import PackedBatch, empty_batch, pack
from athanor.checkpoint import BEST_NAME, StateWriter, load_latest_state
from athanor.config import TrainConfig
from athanor.context_parallel import part_of
from athanor.errors import UserError
from athanor.kernels import LogProbs
from athanor.kernels.logprob import IGNORE
from athanor.model.moe import Routes
from athanor.model.transformer import Decoder, PackedAttention, fill_rows, fill_tokens
from athanor.optim import Optimizer
from athanor.parallel import Ranks, pairwise
from athanor.sharding import FullWeights, missing_forwards, parallelize_
from athanor.stages.context import StageContext
from athanor.stages.routing import RouterBalance
from athanor.stages.skipped import record_skip
from athanor.stages.validation import Validation


class TrainingLoop:
    """Model, optimizer and step of one stage.  `steps()` yields what is left to do, records each step and saves when it is time."""

    def __init__(self, context: StageContext, config: TrainConfig, model: Decoder):
        self.context, self.config, self.model = context, config, model
        trains = getattr(config, "mtp_loss", 0) > 0
        for decoder in (module for module in model.modules() if isinstance(module, Decoder) and module.mtp is not None):
            decoder.train_mtp_(trains)
        if trains and model.mtp is None:
            raise UserError(f"stage {context.name}: mtp_loss is {config.mtp_loss}, but the model has no num_nextn_predict_layers; wanted 0")
        parallelize_(model, context.recipe.parallel, context.ranks)
        self.optimizer = Optimizer(model, config.optimizer, context.ranks)
        self.extra: dict = {}
        self.next_step = 0
        self.stopped = False  # set by the stage: this step is the last
        self._save_now = False
        self._saving: int | None = None  # the step of the state that is being written
        self._best_before: dict | None = None
        self.validation: Validation | None = None
        self.states = context.states or StateWriter(context.ranks)
        state = load_latest_state(context.state_dir, model, self.optimizer, context.ranks)
        if state is not None:
            self.extra, self.next_step = state.extra, state.step
        context.metrics.rewind(context.name, self.next_step)
        self.saved_step = self.next_step

    def validate_on(self, weights: FullWeights | None = None) -> None:
        """Look at the validation split in between, where the stage's settings say so.  weights: what the stage samples with, if it does."""
        if self.config.validation is not None:
            weights = weights or FullWeights(self.model, parts=self.context.recipe.parallel.rollout == "split")
            self.validation = Validation(self.context, self.config.validation, weights)

    def save(self) -> None:
        """Save the state after `next_step` finished steps; all ranks call it.  When that fails, stop or go on as the recipe says.

        In the background, it is copied here and written while the run goes on; what becomes of it shows in a later call of `settle`.
        """
        context = self.context
        self.settle()
        if context.ranks.is_main:
            context.metrics.flush()
        self._saving = self.next_step
        with watchdog.phase("checkpoint", f"state after step {self.next_step}"):
            self.states.save(context.state_dir, self.next_step, self.model, self.optimizer, self.extra, keep=self.config.keep_states)
        if not self.states.background:
            self.settle()

    def settle(self) -> None:
        """Wait until the last state is written, and judge how that ended; all ranks call it."""
        if self._saving is None:
            return
        (step, self._saving), context, failure = (self._saving, None), self.context, ""
        with watchdog.phase("checkpoint", f"state after step {step}"):
            try:
                self.states.wait()
                if context.ranks.is_main and context.on_save:
                    context.on_save()
            except (UserError, OSError) as error:
                failure = str(error)
            failure = next(filter(None, context.ranks.concatenate([failure])[0]), "")
        if not failure:
            self.saved_step = step
            return
        if (self.extra.get("best") or {}).get("step") == step:  # what is not there cannot be the best
            self.extra["best"] = self._best_before
        last = f"the last good state is that after step {self.saved_step}" if self.saved_step else "there is no earlier state of the stage"
        if context.recipe.failed_save == "stop":
            raise UserError(f"{failure}; {last}: make room, and the same command goes on from there (or go on without: --failed_save go_on)")
        context.console.note(f"warning: {failure}; {last}; going on")

    def steps(self, total: int, figures: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
        """Yield (0-based step, dict to fill with its metrics) up to `total`; write, show and save after each."""
        with self.context.console.stage(self.context.name, total, first_step=self.next_step) as progress:
            while self.next_step < total and not self.stopped:
                metrics: dict = {}
                start = time.perf_counter()
                watchdog.at(self.context.name, self.next_step + 1)
                yield self.next_step, metrics
                self.next_step += 1
                metrics |= {"step_s": time.perf_counter() - start, "skipped_updates": self.extra.get("skipped_updates", 0)}
                if self.validation is not None and self.validation.due(self.next_step, last=self.next_step == total or self.stopped):
                    metrics |= self._validate()
                self.context.metrics.write(self.context.name, self.next_step, metrics)
                progress.step(self.next_step, {key: metrics[key] for key in figures if key in metrics})
                if self.next_step == total or self.stopped:
                    continue  # the stage's result comes next
                leaving = preemption.asked(self.context.ranks)
                if leaving or self._save_now or self.next_step % self.config.save_every == 0:
                    self.save()
                    self._save_now = False
                if self._saving is not None and (leaving or self.context.ranks.sum_int(int(self.states.failed))):
                    self.settle()
                if leaving:
                    preemption.stop(self.context.ranks, f"after step {self.next_step} of {self.context.name}, saved up to step {self.saved_step}")
        self.settle()

    def _validate(self) -> dict[str, float]:
        start = time.perf_counter()
        self.settle()  # a best state that could not be written is forgotten before the next is compared with it
        measured = self.validation.measure()
        best = self.validation.best(self.next_step, measured, self.extra.get("best"))
        if best is not None:
            self._best_before, self.extra["best"], self._save_now = self.extra.get("best"), best, True
        return measured | {"validation_s": time.perf_counter() - start}

    def export(self) -> dict[str, Path]:
        """Write the stage's result, and the best model beside it where one is kept; return them by name.  The model is the best one afterwards."""
        context, best = self.context, self.extra.get("best")
        outputs = {"checkpoint": context.export(self.model)}
        if best is None:
            return outputs
        where = context.state_dir, self.model, self.optimizer, context.ranks
        if best["step"] != self.next_step and load_latest_state(*where, step=best["step"]) is None:
            context.console.note(f"warning: {context.name}: there is no whole state after step {best['step']}, the best; no {context.best_dir.name}")
            return outputs
        outputs["best"] = context.export(self.model, context.best_dir)
        if context.ranks.is_main:
            write_file(context.best_dir / BEST_NAME, json.dumps(best) + "\n")
        return outputs

    def applied(self, norm: float, loss: float, replay: Callable[[], dict]) -> bool:
        """Whether an update with this gradient norm was applied.  If not, count it and keep what `replay` gives, the origin of its loss."""
        if math.isfinite(norm):
            self.extra.pop("skipped_in_row", None)
            return True
        self._save_now = True
        record_skip(self.context, self.config, self.extra, self.next_step + 1, {"loss": loss, "grad_norm": norm}, replay())
        return False


def packed_batches(
    model: nn.Module, ranks: Ranks, prompts: list[np.ndarray], completions: list[np.ndarray], max_tokens: int, *, share_prompts: bool = False
) -> list[PackedBatch]:
    """This rank's micro-batches of an optimizer step, with empty ones behind them where the ranks of a split model need as many each."""
    batches = pack(prompts, completions, max_tokens, ranks.device, share_prompts=share_prompts)
    return batches + [empty_batch(ranks.device) for _ in range(missing_forwards(model, ranks, len(batches)))]


def completion_logprobs(
    model: Decoder, batch: PackedBatch, temperature: float = 1.0, support: tuple[Tensor, Tensor] | None = None, routes: Routes | None = None
) -> LogProbs:
    """Log-probs and entropies (N,) of the trained tokens of a packed micro-batch, under the truncated distribution where a support (N,) is given.

    routes: for the routers of a mixture of experts.
    """
    return _scored(model, batch, _hidden(model, batch, routes), temperature, support, entropy=True)


def _hidden(model: Decoder, batch: PackedBatch, routes: Routes | None) -> Tensor:
    """The hidden states of the batch's rows, filler included; with context parallelism of this rank's part of them."""
    part = part_of(model, len(batch.input_ids))
    input_ids, positions, cu_seqlens = fill_tokens(batch.input_ids, batch.positions, batch.cu_seqlens, part.step)
    shared = None if batch.shared is None else batch.shared.filled(len(input_ids))
    return model(part.rows(input_ids), part.rows(positions), part.attend(PackedAttention(cu_seqlens, shared)), routes)


def _scored(
    model: Decoder, batch: PackedBatch, hidden: Tensor, temperature: float = 1.0, support: tuple[Tensor, Tensor] | None = None, *, entropy: bool
) -> LogProbs:
    part = part_of(model, len(batch.input_ids))
    own, rows = part.own(batch.loss_rows)
    if support is not None:
        support = fill_rows(support[0][own], -torch.inf), fill_rows(support[1][own])
    targets = fill_rows(batch.targets[own], IGNORE)
    scored = model.logprobs(fill_rows(hidden[rows]), targets, temperature=temperature, support=support, entropy=entropy)
    wanted = scored[: 2 if entropy else 1]
    return LogProbs(*(part.joined(values[: len(rows)], own, batch.num_targets) for values in wanted), *(() if entropy else (None,)))


def mtp_logprobs(model: Decoder, batch: PackedBatch, hidden: Tensor, routes: Routes | None = None) -> Tensor:
    """(M,) log-probs of the trained tokens as `Decoder.look_ahead` predicts them from two tokens before, knowing the one between.

    hidden: the forward's, filler included.  M leaves out tokens whose sequence has nothing two tokens before.
    """
    part = part_of(model, len(batch.input_ids))
    input_ids, positions, cu_seqlens = fill_tokens(batch.input_ids, batch.positions, batch.cu_seqlens, part.step)
    # Row t - 1 predicts what follows row t.  A sequence's last row predicts nothing, but its experts are counted: it must not see its neighbour.
    following = input_ids.roll(-1)
    following[batch.loss_rows] = batch.targets
    attend = part.attend(PackedAttention(cu_seqlens))
    ahead = model.look_ahead(hidden, part.rows(following), part.rows(positions), attend, routes)
    later = batch.positions[batch.loss_rows] > 0
    before, targets = batch.loss_rows[later] - 1, batch.targets[later]
    own, rows = part.own(before)
    logps = model.logprobs(fill_rows(ahead[rows]), fill_rows(targets[own], IGNORE), entropy=False).logps
    return part.joined(logps[: len(rows)], own, len(before))


def optimizer_step(
    optimizer: Optimizer, parts: list[list], loss_of: Callable[..., tuple[Tensor, Tensor | None]], lr: float, num_figures: int = 0
) -> tuple[Tensor, float]:
    """Accumulate the gradients of `loss_of(batch)` over micro-batches, add those of the parts and apply the sum.

    parts: the micro-batches of each of this rank's parts (`Ranks.parts`).  loss_of: gives a loss, divided by denominators of the whole step, so that
    the split into parts and micro-batches does not change the gradient, and (num_figures,) to be summed, too (None = zeros).
    Returns (1 + num_figures,) fp64, the loss and these figures summed over all ranks, and the gradient norm.  When the loss or the gradient is not
    finite, the norm is not either, on all ranks, and nothing is applied.
    """
    ranks, rows = optimizer.ranks.data, []

    def backward(batches: list) -> None:
        row = torch.zeros(1 + num_figures, dtype=torch.float64, device=ranks.device)
        for batch in batches:
            loss, figures = loss_of(batch)
            loss.backward()
            row[0] += loss.detach()
            if figures is not None:
                row[1:] += figures
            del loss  # its graph holds what linear_logprob keeps on a CPU, which the next forward would find beside its own
        rows.append(row)

    def gradients() -> Iterator[list[Tensor]]:
        for batches in parts:
            backward(batches)
            yield optimizer.take_gradients()

    with watchdog.phase("update"):
        optimizer.zero_grad()
        if len(parts) > 1:
            optimizer.set_gradients(pairwise(gradients()))
        else:
            backward(parts[0])
        sums = ranks.sum_parts(torch.stack(rows))
        if optimizer.ranks.sum_int(int(not math.isfinite(sums[0]))):
            return sums, math.nan
        return sums, optimizer.step(lr)


def cross_entropy_step(
    model: Decoder, optimizer: Optimizer, parts: list[list[PackedBatch]], num_targets: int, lr: float, balance: RouterBalance, mtp_loss: float = 0.0
) -> dict[str, float]:
    """One step of mean negative log-likelihood over `num_targets` tokens (all ranks); return its metrics.

    mtp_loss: factor of the same mean of multi-token prediction (DeepSeek-V3, eqs. 24-25), which is `mtp_loss` of the metrics, and is not in `loss`.
    """

    def loss_of(batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        routes, ahead = balance.routes(batch), None
        hidden = _hidden(model, batch, routes)
        loss = -_scored(model, batch, hidden, entropy=False).logps.sum() / num_targets
        if mtp_loss:
            ahead = -mtp_logprobs(model, batch, hidden, routes).sum() / num_targets
            loss = loss + mtp_loss * ahead
        return loss + balance.loss(routes, batch.num_targets / num_targets), None if ahead is None else ahead.detach()

    sums, norm = optimizer_step(optimizer, parts, loss_of, lr, num_figures=1)
    loss, ahead = sums.tolist()
    metrics = {"loss": loss - mtp_loss * ahead, "grad_norm": norm}
    return metrics | {"mtp_loss": ahead} if mtp_loss else metrics
